"""Adapters: called as each trainer calls its reward functions, with a fake service."""

from __future__ import annotations

import base64
import inspect
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from reward_service.adapters import ddpo_reward, flow_grpo_reward, openrlhf_reward, trl_reward
from reward_service.client import InputError, RejectedError, RewardClient
from reward_service.images import decode
from reward_service.protocol import (
    MSGPACK,
    EvaluatorIdentity,
    EvaluatorScore,
    ItemResult,
    ScoreRequest,
    ScoreResponse,
    decode_request,
)
from tests.support.service.fake_service import (
    PIXELS,
    Handler,
    encoded_response,
    make_client,
    problem_response,
    score_response,
)
from tests.support.service.serving import png

TENSOR = torch.stack([torch.zeros(3, 4, 5), torch.ones(3, 4, 5)])
PROMPTS = ("a red circle", "a blue square")


class FakeScoringService:
    """A service of two evaluators: mean brightness and prompt length; the reward is the sum of units."""

    def __init__(self) -> None:
        self.requests: list[ScoreRequest] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(decode_request(request.content, MSGPACK))
        results = []
        for index, item in enumerate(self.requests[-1].items):
            pixels = decode(item.image.data, item.image.format, item.image.shape).rgb
            light, length = float(pixels.mean()) / 255, len(item.prompt) / 100
            scores = {"light": EvaluatorScore(1, 2, light), "length": EvaluatorScore(3, 4, length)}
            results.append(ItemResult(index, light + length, scores, False, False))
        identity = dict.fromkeys(("light", "length"), EvaluatorIdentity("f", "c"))
        return encoded_response(ScoreResponse("id", results, identity, {}))


def refuse_request(_: httpx.Request) -> httpx.Response:
    return problem_response(500, "scoring_failed", retryable=False)


def test_flow_grpo_reward() -> None:
    """Called as its trainers do: in a thread pool, with a tensor, tuples, metadata and only_strict."""
    reward_fn = flow_grpo_reward(make_client(FakeScoringService()))
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(reward_fn, TENSOR, PROMPTS, [{}, {}], only_strict=True)
        rewards, metadata = future.result()
    assert metadata == {}
    for key, expected in {"light": [0, 1], "length": [0.12, 0.13], "avg": [0.12, 1.13]}.items():
        gathered = torch.as_tensor(rewards[key], device="cpu").float()
        torch.testing.assert_close(gathered, torch.tensor(expected, dtype=torch.float32))
    array = np.stack([PIXELS, PIXELS])
    assert reward_fn(array, PROMPTS, {}, None)[0]["avg"].shape == (2,)


def test_flow_grpo_reward_with_another_normalization() -> None:
    """The scores have the same normalization as the reward."""
    service = FakeScoringService()
    rewards, _ = flow_grpo_reward(make_client(service), normalization="z", evaluators=["light", "length"])(
        TENSOR, PROMPTS, {}
    )
    assert rewards["length"].tolist() == [4, 4]
    assert (service.requests[0].normalization, service.requests[0].evaluators) == ("z", ["light", "length"])


def test_ddpo_reward() -> None:
    """One tensor of rewards and a dict, as TRL's DDPO trainer and ddpo-pytorch unpack them."""
    reward, metadata = ddpo_reward(make_client(FakeScoringService()))(TENSOR.half(), PROMPTS, ({}, {}))
    assert isinstance(reward, torch.Tensor)
    torch.testing.assert_close(torch.as_tensor(reward, device="cpu"), torch.tensor([0.12, 1.13]))
    assert metadata["light"].tolist() == [0, 1]


def test_trl_reward() -> None:
    """Called by name, with every column and the trainer's own extras; it returns a list of floats."""
    logged: dict[str, float] = {}
    reward = trl_reward(make_client(FakeScoringService()), name="scorer")
    assert (reward.__name__, inspect.iscoroutinefunction(reward)) == ("scorer", False)
    rewards = reward(
        prompts=list(PROMPTS),
        completions=[PIXELS * 0, Image.new("RGB", (4, 4), "white")],
        completion_ids=[[1], [2]],
        trainer_state=object(),
        log_extra=lambda *_: None,
        log_metric=logged.__setitem__,
        category=["a", "b"],
    )
    assert rewards == pytest.approx([0.12, 1.13])
    assert all(type(value) is float for value in rewards)
    assert logged == pytest.approx({"scorer/light": 0.5, "scorer/length": 0.125})


def test_trl_reward_reads_conversations() -> None:
    """The last message's text, and the image in the last message of the completion."""
    service = FakeScoringService()
    prompts = [
        [{"role": "system", "content": "generate an image"}, {"role": "user", "content": "a red circle"}]
    ]
    parts = [{"type": "text", "text": "here"}, {"type": "image", "image": PIXELS}]
    trl_reward(make_client(service))(prompts=prompts, completions=[[{"role": "assistant", "content": parts}]])
    assert service.requests[0].items[0].prompt == "a red circle"
    assert service.requests[0].items[0].image.data == PIXELS.tobytes()


def test_trl_reward_scores_captions_of_given_images() -> None:
    """A captioner's completions against its images; both columns are named."""
    service = FakeScoringService()
    reward = trl_reward(make_client(service), texts="completions", pictures="images")
    completions = [[{"role": "assistant", "content": [{"type": "text", "text": "a fish"}]}]]
    reward(prompts=["describe"], completions=completions, images=[[PIXELS]])
    assert service.requests[0].items[0].prompt == "a fish"
    with pytest.raises(InputError, match="no column 'images', only completions, prompts"):
        reward(prompts=["describe"], completions=completions)
    with pytest.raises(InputError, match="one image, not 2"):
        reward(prompts=["describe"], completions=completions, images=[[PIXELS, PIXELS]])


def test_openrlhf_reward(tmp_path: Any) -> None:
    """Called by position with one pair from a thread; rewards, scores and logs are tensors of length 1."""
    path = tmp_path / "white.png"
    Image.new("RGB", (4, 4), "white").save(path)
    reward_func = openrlhf_reward(make_client(FakeScoringService()), normalization="z")
    with ThreadPoolExecutor(1) as executor:
        result = executor.submit(reward_func, [str(path)], ["a red circle"], [None]).result()
    assert set(result) == {"rewards", "scores", "extra_logs"}
    torch.testing.assert_close(result["rewards"], torch.tensor([1.12]))
    torch.testing.assert_close(result["scores"], torch.tensor([(1 + 0.12) / 2]))
    torch.testing.assert_close(result["extra_logs"]["light"], torch.tensor([2.0]))
    assert result.get("scores") or result.get("rewards")  # as OpenRLHF selects them


def test_openrlhf_reward_scores_responses() -> None:
    """A text policy: the query without the prompt, against an image in the label."""
    service, file = FakeScoringService(), io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    label = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    reward_func = openrlhf_reward(make_client(service), texts="responses", pictures="labels")
    reward_func(["describe: a fish"], ["describe: "], [label], extra=1)
    assert service.requests[0].items[0].prompt == "a fish"
    assert service.requests[0].items[0].image.data == file.getvalue()
    for broken in ("data:image/png,xxx", "data:image/png;base64,###"):
        with pytest.raises(InputError, match="base64"):
            reward_func(["q"], ["p"], [broken])


IMAGE = "data:image/png;base64," + base64.b64encode(png(PIXELS)).decode()
CHAT = "<|im_start|>user\nDescribe the image.<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>user<|end_header_id|>\n\nDescribe.<|eot_id|>"
LLAMA_TURN = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def openrlhf_prompt(texts: str, query: str, prompt: str) -> str:
    """Return the prompt that the adapter sends to the service."""
    sent: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        body = decode_request(request.content, MSGPACK)
        sent.append(body.items[0].prompt)
        return encoded_response(score_response(body))

    reward_func = openrlhf_reward(make_client(handler), texts=texts, pictures="labels")
    reward_func([query], [prompt], [f"<s>{IMAGE}</s>"])
    return sent[0]


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        ("Describe: a fish<|im_end|>", "Describe: "),
        ("Describe: a fish<|im_end|>\n<|endoftext|><|endoftext|>", "Describe: "),
        ("<s>Describe: a fish</s>", "Describe: "),
        ("<s> Describe: a fish </s>", "Describe: "),
        ("<pad><pad><bos>Describe: a fish<eos><pad>", "Describe: "),
        (f"{CHAT}a fish<|im_end|>", CHAT),
        (f"<s>{CHAT}a fish<|im_end|>", CHAT),
        (f"<|begin_of_text|>{LLAMA}{LLAMA_TURN}a fish<|eot_id|>", f"{LLAMA}{LLAMA_TURN}"),
        (f"<|begin_of_text|>{LLAMA}{LLAMA_TURN}a fish<|eot_id|>", LLAMA),
        ("<s> [INST] Describe. [/INST] a fish</s>", "[INST] Describe. [/INST]"),
        ("<start_of_turn>model\na fish<end_of_turn>\n", ""),
        (
            "<｜begin▁of▁sentence｜><｜User｜>Describe.<｜Assistant｜>a fish<｜end▁of▁sentence｜>",
            "<｜User｜>Describe.",
        ),
    ],
)
def test_openrlhf_responses_lose_special_tokens(query: str, prompt: str) -> None:
    """Tokens around query and response, which OpenRLHF decodes too, do not reach the service."""
    assert openrlhf_prompt("responses", query, prompt) == "a fish"


@pytest.mark.parametrize(
    ("sent", "scored"),
    [
        ("a fish", "a fish"),
        (" a fish ", " a fish "),
        ("a <b>bold</b> fish", "a <b>bold</b> fish"),
        ("a model<|im_end|>", "a model"),
        ("<|im_start|>model car on a table<|im_end|>", "model car on a table"),
        ("<|im_start|>user\na fish<|im_end|>\n<|im_start|>assistant\n", "a fish"),
        ("<bos><start_of_turn>user\na fish<end_of_turn>\n<start_of_turn>model\n", "a fish"),
        (f"<|begin_of_text|>{LLAMA}{LLAMA_TURN}", "Describe."),
    ],
)
def test_prompts_lose_special_tokens_at_their_ends(sent: str, scored: str) -> None:
    """OpenRLHF and TRL: tokens and roles at the ends are removed, and nothing else changes."""
    assert openrlhf_prompt("prompts", "", sent) == openrlhf_prompt("queries", sent, "") == scored
    service = FakeScoringService()
    trl_reward(make_client(service))(prompts=[sent], completions=[PIXELS])
    trl_reward(make_client(service), texts="completions", pictures="images")(
        prompts=["x"], completions=[[{"role": "assistant", "content": sent}]], images=[PIXELS]
    )
    assert [request.items[0].prompt for request in service.requests] == [scored, scored]


def test_ambiguous_texts_are_refused() -> None:
    """A query without its prompt, and a prompt of several messages, raise; what a policy writes does not."""
    with pytest.raises(InputError, match="query 0 does not begin with its prompt"):
        openrlhf_prompt("responses", "<s>a fish", "Describe: ")
    chat = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na fish<|im_end|>"
    with pytest.raises(InputError, match=r"prompt 0 has the token <\|im_end\|> between its words"):
        openrlhf_prompt("prompts", "", chat)
    assert (
        openrlhf_prompt("responses", "Describe: a <|fim|> fish<|im_end|>", "Describe: ") == "a <|fim|> fish"
    )
    assert openrlhf_prompt("responses", "Describe: <|im_end|>", "Describe: ") == " "


@pytest.mark.parametrize("handler", [refuse_request, FakeScoringService()])
def test_failure_raises_instead_of_a_reward(handler: Handler) -> None:
    """The service's refusal, and an image that cannot be sent, reach the trainer as exceptions."""
    images: Any = TENSOR if handler is refuse_request else [torch.full((3, 4, 4), 2.0)] * 2
    service = make_client(handler)
    for call in (
        lambda: flow_grpo_reward(service)(images, PROMPTS, {}),
        lambda: ddpo_reward(service)(images, PROMPTS, {}),
        lambda: trl_reward(service)(prompts=PROMPTS, completions=list(images)),
        lambda: openrlhf_reward(service)(list(images), PROMPTS, [None, None]),
    ):
        with pytest.raises(RejectedError if handler is refuse_request else InputError):
            call()


def test_partial_responses_are_refused() -> None:
    """A null reward would become NaN in an array; the option is refused."""
    reward_fn: Any = flow_grpo_reward(make_client(FakeScoringService()), allow_partial=True)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="needs every score"):
        reward_fn(TENSOR, PROMPTS, {})


def test_adapters_do_not_import_torch() -> None:
    """Without torch in the process the arrays are numpy's."""
    code = (
        "import sys, reward_service.adapters.common as a; import reward_service.adapters;"
        "print('torch' in sys.modules, type(a.as_tensor([1.0])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "ndarray"]


def test_one_client_serves_several_adapters() -> None:
    """Adapters hold no state of their own."""
    with RewardClient(
        "http://service.invalid", transport=httpx.MockTransport(FakeScoringService())
    ) as service:
        assert flow_grpo_reward(service)(TENSOR, PROMPTS)[0]["avg"].shape == (2,)
        assert len(trl_reward(service)(prompts=PROMPTS, completions=list(TENSOR))) == 2
