"""Load the models of a run and check that its settings fit them."""

import hashlib
from collections.abc import Sequence

import diffusers
import torch
import transformers

from trainer.config import ConfigError, TrainerConfig, flat
from trainer.rl.karlo import keep_few_activations, load_karlo
from trainer.rl.policy import DecoderPolicy
from trainer.rl.rewards import Scorer
from trainer.rl.sampler import ImageSampler
from trainer.runtime.distributed import Processes


def check_share(config: TrainerConfig, prompts: Sequence[str], processes: Processes) -> None:
    """Raises ConfigError where an iteration has fewer prompts than there are processes to draw them."""
    groups = min(config.rollout.prompts_per_iteration, len(prompts))
    if groups < processes.world:
        raise ConfigError(
            f"trainer.rollout.prompts_per_iteration: {groups} prompts cannot be shared among "
            f"{processes.world} processes, whole groups each; raise it or start fewer processes"
        )


def check_alike(config: TrainerConfig, scorer: Scorer, policy: DecoderPolicy, processes: Processes) -> None:
    """Raises JobError where one process has another configuration, scorer or adapter than the main one."""
    start_alike = "start all processes with the same command and files"
    processes.check_alike("configuration", flat(config.model_dump(mode="json")), start_alike)
    processes.check_alike("scorer", scorer.identity, "point all processes at the same service")
    processes.check_alike("adapter", {"LoRA": checksum(policy)}, start_alike)


def check_evaluators(config: TrainerConfig, scorer: Scorer) -> None:
    """Raises ConfigError where a weight names an evaluator that the service does not have."""
    wanted = {*config.objective.weights, *config.reward_evaluators, config.guard.evaluator} - {None}
    unknown = sorted(map(str, wanted - set(scorer.evaluators)))
    if unknown:
        raise ConfigError(
            f"trainer.objective.weights: the service has no evaluator {', '.join(unknown)} (named there, in "
            f"evaluation.weights or as guard.evaluator); it has {', '.join(scorer.evaluators)}"
        )


def checksum(policy: DecoderPolicy) -> str:
    """Hash of the adapter, the same for equal bits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(policy.lora.items()):
        digest.update(name.encode() + weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_sampler(config: TrainerConfig, device: str | None = None) -> ImageSampler:
    """Load Karlo on the device, or the configured one; the policy has no adapter yet. Raises ConfigError."""
    device = device or config.device
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _check_device(device)
    quiet_libraries()
    karlo = load_karlo(
        config.karlo, device, getattr(torch, config.precision), getattr(torch, config.policy_precision)
    )
    if config.update.gradient_checkpointing:
        keep_few_activations(karlo.decoder)
    if config.compile:
        karlo.decoder.compile()
    policy = DecoderPolicy(
        karlo.decoder,
        karlo.decoder_scheduler,
        steps=config.sampling.decoder_steps,
        guidance=config.sampling.decoder_guidance,
    )
    return ImageSampler(karlo, policy, config.sampling, offload=config.memory.offload)


def _check_device(name: str) -> None:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.device: {name}, but torch finds no GPU here; set trainer.device=cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"trainer.device: {name!r} is no device here; set cpu or cuda") from error


def quiet_libraries() -> None:
    """Errors only from diffusers and transformers: their notes on loading are no news to our users."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
