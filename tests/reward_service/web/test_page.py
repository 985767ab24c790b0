"""The page at /: in a real browser, against a real service, by its numbers, its words and its manners."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from reward_service.config import Auth, ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.images import Pixels
from reward_service.scoring.auth import new_key
from reward_service.scoring.service import ScoringService
from reward_service.web.app import PAGE
from tests.support.service.browser import CHROMIUM, Tab, browser
from tests.support.service.serving import listening, png, serving

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to look at the page with"),
]
HOSTILE = (
    "</textarea><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\n"
    'it\'s $(touch owned) `touch owned` \\ @file;type=text/html "q" <b>ünïcode ﬁsh</b>'
)
CONTROL = 2


@pytest.fixture(scope="module")
def port(config: ServiceConfig, engine: RewardEngine) -> Iterator[int]:
    with serving(config, engine) as (_, port):
        yield port


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest.fixture
def page(tab: Tab, port: int) -> Iterator[Tab]:
    """The page, ready; afterwards it has asked nobody else for anything."""
    visit(tab, port)
    tab.wait("document.querySelectorAll('#list article').length === 4")
    yield tab
    assert f"{home(port)}page/page.js" in tab.requests
    assert [it for it in tab.requests if not it.removeprefix("blob:").startswith(home(port))] == []


@pytest.fixture
def files(tmp_path: Path, images: list[Pixels]) -> list[Path]:
    paths = [tmp_path / name for name in ('it\'s "one".png', "two, too.jpg", "three.webp")]
    for path, pixels in zip(paths, images[1:], strict=False):
        Image.fromarray(pixels).save(path)
    return paths


def home(port: int) -> str:
    return f"http://127.0.0.1:{port}/"


def visit(tab: Tab, port: int) -> None:
    tab.size(1280)
    tab.requests.clear()
    tab.complaints.clear()
    tab.open(home(port))


def give(tab: Tab, files: list[Path], *prompts: str) -> None:
    """Choose images and type their prompts."""
    tab.choose("#files", *files)
    tab.wait(f"document.querySelectorAll('.card').length >= {len(files)}")
    for number, prompt in enumerate(prompts, 1):
        tab.type(f".card:nth-child({number}) textarea", prompt)


def press_score(tab: Tab, images: int) -> None:
    tab.run("document.getElementById('score').click()")
    tab.wait(f"document.querySelectorAll('.scores').length === {images}")


def text(tab: Tab, selector: str) -> str:
    return str(tab.run(f"document.querySelector({json.dumps(selector)}).innerText"))


def shown(tab: Tab) -> list[dict[str, Any]]:
    """The numbers of each card, whole, and how far its bars reach."""
    script = """[...document.querySelectorAll(".card")].map(card => ({
      reward: Number(card.querySelector(".reward data").value),
      scores: Object.fromEntries([...card.querySelectorAll("[data-evaluator]")].map(row => [
        row.dataset.evaluator, [...row.querySelectorAll("data")].map(it => Number(it.value)),
      ])),
      bars: Object.fromEntries([...card.querySelectorAll("[data-evaluator]")].map(row => {
        const bar = row.querySelector(".bar");
        return [row.dataset.evaluator, parseFloat(getComputedStyle(bar.firstChild).width) / bar.clientWidth];
      })),
    }))"""
    tab.wait("document.getAnimations().length === 0")
    return list(tab.run(script))


def numbers(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """An answer's numbers as `shown` has the page's."""
    return [
        {
            "reward": result["reward"],
            "scores": {
                name: [score["unit"], score["z"], score["raw"]] for name, score in result["scores"].items()
            },
        }
        for result in answer["results"]
    ]


def ask(port: int, files: list[Path], prompts: list[str], **headers: str) -> dict[str, Any]:
    """The API's own answer."""
    parts: list[tuple[str, Any]] = [("prompt", (None, prompt.encode())) for prompt in prompts]
    parts += [("image", ("x", path.read_bytes())) for path in files]
    answer = httpx.post(f"{home(port)}v1/score", files=parts, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def curled(line: str, folder: Path, **environment: str) -> dict[str, Any]:
    """What the copied command gives in a shell."""
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        check=True,
        timeout=30,
    )
    return dict(json.loads(done.stdout))


def agree(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """The same numbers, as far as one batch and another give the same."""
    assert len(mine) == len(other)
    for one, two in zip(mine, other, strict=True):
        assert one["reward"] == pytest.approx(two["reward"], abs=1e-4)
        assert one["scores"].keys() == two["scores"].keys()
        for name in one["scores"]:
            assert one["scores"][name] == pytest.approx(two["scores"][name], abs=1e-3)


def test_the_page_is_small_strict_and_whole(port: int) -> None:
    """Right types, a policy without foreign hosts or inline code, asked about each time; below 40 KB."""
    sizes = 0
    for path in sorted(PAGE.iterdir()):
        route = "" if path.name == "index.html" else f"page/{path.name}"
        answer = httpx.get(home(port) + route)
        assert answer.content == path.read_bytes()
        kind = answer.headers["content-type"].partition(";")[0]
        assert (
            kind
            in {
                ".html": ["text/html"],
                ".css": ["text/css"],
                ".js": ["text/javascript", "application/javascript"],
                ".svg": ["image/svg+xml"],
            }[path.suffix]
        )
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
        again = httpx.get(home(port) + route, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert set(re.findall(r"https?://[^\s\"'`]+", path.read_text())) <= {"http://www.w3.org/2000/svg"}
        sizes += path.stat().st_size
    assert sizes < 40_000
    markup = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", markup)
    assert httpx.get(f"{home(port)}page/../app.py").status_code == 404
    assert httpx.get(f"{home(port)}page/%2e%2e/app.py").status_code == 404


class TestInABrowser:
    """What people see and do."""

    pytestmark = in_a_browser

    def test_scores_are_the_apis_own(self, page: Tab, port: int, files: list[Path]) -> None:
        """Numbers and bars are the API's, the curl line gives them again, and nothing complains."""
        prompts = ["a red square", "two circles", "and " * 60]
        give(page, files, *prompts)
        press_score(page, 3)
        found = shown(page)
        agree(found, numbers(ask(port, files, prompts)))
        for card in found:
            for name, (unit, _, _) in card["scores"].items():
                assert card["bars"][name] == pytest.approx(unit, abs=0.05)
        notes = [text(page, f".card:nth-child({number})") for number in (1, 2, 3)]
        assert ["Lossy file" in note for note in notes] == [False, True, True]
        assert ["prompt was too long" in note for note in notes] == [False, False, True]
        assert "3 images scored" in text(page, "#said")
        assert page.complaints == []
        page.run("document.getElementById('copy').click()")
        page.wait("document.getElementById('copied').innerText === 'Copied.'")
        if shutil.which("curl"):
            agree(
                found,
                numbers(
                    curled(str(page.run("document.getElementById('line').textContent")), files[0].parent)
                ),
            )

    def test_two_images_are_compared(self, page: Tab, port: int, files: list[Path]) -> None:
        """For each evaluator the page names the image with the higher score; the choice can be swapped."""
        give(page, files[:2], "a red square")
        page.type(".card:nth-child(2) textarea", "a red square")
        press_score(page, 2)
        one, two = (result["scores"] for result in ask(port, files[:2], ["a red square"])["results"])
        expected = {name: "A" if one[name]["raw"] > two[name]["raw"] else "B" for name in one}
        script = """Object.fromEntries([...document.querySelectorAll(".versus tbody tr")].map(
          row => [row.dataset.evaluator, row.querySelector(".better").innerText]))"""
        better = page.run(script)
        better.pop("reward")
        assert {name: words.split()[0] for name, words in better.items()} == expected
        for name, words in better.items():
            assert float(words.split()[2]) == pytest.approx(abs(one[name]["z"] - two[name]["z"]), abs=0.011)
        assert "The prompts differ" not in text(page, "#verdict")
        page.run("""(() => { const left = document.getElementById("left"); left.value = "1";
          left.dispatchEvent(new Event("change")); })()""")
        swapped = page.run(script)
        swapped.pop("reward")
        flip = {"A": "B", "B": "A"}
        assert {name: words.split()[0] for name, words in swapped.items()} == {
            n: flip[s] for n, s in expected.items()
        }

    def test_hostile_words_stay_words(self, page: Tab, port: int, files: list[Path]) -> None:
        """Markup and shell code in a prompt or a file's name run neither here nor in the curl line."""
        named = files[0].with_name("<img src=x onerror=alert(1)>$(touch owned).png")
        named.write_bytes(files[0].read_bytes())
        give(page, [named], HOSTILE)
        press_score(page, 1)
        agree(shown(page), numbers(ask(port, [named], [HOSTILE])))
        assert page.run("document.title") == "Reward service"
        assert page.run("document.querySelectorAll('.card script, .card img').length") == 1
        if shutil.which("curl"):
            line = str(page.run("document.getElementById('line').textContent"))
            agree(shown(page), numbers(curled(line, named.parent)))
        assert not (named.parent / "owned").exists()
        assert page.complaints == []

    def test_images_may_be_pasted_and_dropped(
        self, page: Tab, port: int, images: list[Pixels], tmp_path: Path
    ) -> None:
        """Bitmaps from the clipboard and dropped files are sent byte by byte, under names of their own."""
        path = tmp_path / "given.png"
        path.write_bytes(png(images[2]))
        page.run(f"""(() => {{
          const bytes = new Uint8Array({list(path.read_bytes())});
          const file = () => new File([bytes], "image.png", {{type: "image/png"}});
          for (const kind of ["paste", "paste", "drop"]) {{
            const carried = new DataTransfer();
            carried.items.add(file());
            const held = {{clipboardData: carried, dataTransfer: carried}};
            const options = {{bubbles: true, cancelable: true, ...held}};
            document.body.dispatchEvent(
              kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options));
          }}
        }})()""")
        page.wait("document.querySelectorAll('.card').length === 3")
        names = [text(page, f".card:nth-child({number}) h2") for number in (1, 2, 3)]
        assert names == ["1 · pasted.png", "2 · pasted-2.png", "3 · image.png"]
        saved = page.run(
            "[...document.querySelectorAll('.facts a')].map(it => [it.download, it.href.slice(0, 5)])"
        )
        assert saved == [["pasted.png", "blob:"], ["pasted-2.png", "blob:"]]
        page.type(".card:nth-child(1) textarea", "a circle")
        page.run("document.getElementById('same').click()")
        press_score(page, 3)
        agree(shown(page), numbers(ask(port, [path] * 3, ["a circle"])))

    def test_problems_are_told_in_words(self, page: Tab, files: list[Path]) -> None:
        """The image at fault is named and marked, with code and request; without it the rest is scored."""
        bad = files[0].with_name("bad.png")
        bad.write_bytes(b"this is no image")
        give(page, [files[0], bad], "a", "b")
        page.run("document.getElementById('score').click()")
        page.wait("document.querySelector('#problem strong')")
        told = text(page, "#problem")
        assert "Picture 2, bad.png: " in told
        assert "not_an_image · 422 · request " in told
        assert "PNG, JPEG or WebP" in text(page, ".card:nth-child(2)")
        page.run("document.querySelectorAll('.card button')[1].click()")
        assert text(page, "#problem") == ""
        assert page.run("document.activeElement.getAttribute('aria-label')").startswith("Remove image 1")
        press_score(page, 1)

    def test_what_is_out_of_service_is_marked(self, page: Tab, files: list[Path]) -> None:
        """Where an evaluator is down, its row and the missing reward say so, and the others' scores stand."""
        give(page, files[:1], "a")
        page.run("""(() => {
          const scores = {clip: {raw: 0.25, z: -0.5, unit: 0.3085}};
          const result = {index: 0, reward: null, scores, truncated_prompt: false, lossy_input: false};
          const failed = {hpsv2: "evaluator_down"};
          const answer = {id: "x", results: [result], evaluators: {}, timing_ms: {total: 1}, failed};
          window.fetch = async () => new Response(JSON.stringify(answer));
        })()""")
        press_score(page, 1)
        told = text(page, ".card")
        assert "−0.50" in told
        assert re.search(r"hpsv2\s+out of service", told)
        assert "no reward: hpsv2 out of service" in told

    def test_the_keyboard_is_enough(self, page: Tab, files: list[Path]) -> None:
        """Tab reaches the file field first, then the prompt; Control and Enter score; all have names."""
        give(page, files[:1])
        page.run("document.querySelector('summary').focus()")
        reached = []
        for _ in range(7):
            page.press("Tab", 9)
            reached.append(page.run("document.activeElement.id || document.activeElement.innerText"))
        assert [it for it in reached if it in ("files", "Remove", "prompt-1", "score")] == [
            "files",
            "Remove",
            "prompt-1",
            "score",
        ]
        page.type("#prompt-1", "a")
        page.press("Enter", 13, CONTROL)
        page.wait("document.querySelectorAll('.scores').length === 1")
        unnamed = page.run("""[...document.querySelectorAll("input, textarea, select, button")].filter(
          it => !it.labels?.length && !it.getAttribute("aria-label") && !it.innerText.trim()
        ).filter(it => it.checkVisibility()).map(it => it.outerHTML)""")
        assert unnamed == []

    @pytest.mark.parametrize("width", [320, 390, 1280])
    def test_it_fits_the_screen(self, page: Tab, files: list[Path], width: int) -> None:
        """Nothing reaches over the side, with scores, comparison, long words and a problem on it."""
        page.size(width)
        odd = files[0].with_name("a_very_long_name_" * 6 + ".png")
        odd.write_bytes(files[0].read_bytes())
        give(page, [odd, *files[1:]], "word" * 60, "b", "c")
        press_score(page, 3)
        bad = files[0].with_name("b" * 90 + ".png")
        bad.write_bytes(b"no")
        give(page, [bad])
        page.wait("document.querySelectorAll('.card').length === 4")
        page.run("document.getElementById('key-box').open = true")
        page.run("document.getElementById('score').click()")
        page.wait("document.querySelector('#problem strong')")
        assert page.run("document.documentElement.scrollWidth") <= width
        over = page.run("""[...document.querySelectorAll(
          "td, th, h2, h3, p, li, dd, label, button"
        )].filter(it => it.scrollWidth > it.clientWidth + 1 && it.clientWidth
        ).map(it => it.outerHTML.slice(0, 200))""")
        assert over == []

    def test_it_works_with_a_key(
        self, tab: Tab, config: ServiceConfig, engine: RewardEngine, files: list[Path], tmp_path: Path
    ) -> None:
        """Asked for, refused in words if wrong, kept in the tab alone, and no part of the curl line."""
        key, _ = new_key(tmp_path / "keys.yaml", "someone")
        locked = config.model_copy(update={"auth": Auth(keys=tmp_path / "keys.yaml")})
        with serving(locked, engine) as (_, port):
            visit(tab, port)
            tab.wait("document.querySelector('#problem strong')")
            assert "A key is needed" in text(tab, "#key-box")
            assert tab.run("document.activeElement.id") == "key"
            give(tab, files[:1], "a red square")
            for wrong, words in (("rk_wrong", "none of the service's keys"), ("clé", "cannot be a key")):
                tab.type("#key", wrong)
                tab.press("Enter", 13)
                tab.wait(f"document.getElementById('problem').innerText.includes({json.dumps(words)})")
            tab.type("#key", key)
            tab.press("Enter", 13)
            tab.wait("document.querySelectorAll('#list article').length === 4")
            assert text(tab, "#problem") == ""
            press_score(tab, 1)
            line = str(tab.run("document.getElementById('line').textContent"))
            assert key not in line
            if shutil.which("curl"):
                agree(shown(tab), numbers(curled(line, files[0].parent, REWARD_KEY=key)))
            kept = tab.run("[document.cookie, localStorage.length, Object.values(sessionStorage)]")
            assert kept == ["", 0, [key]]
            tab.call("Page.reload")
            tab.wait("document.querySelectorAll('#list article').length === 4")
            tab.open("about:blank")

    def test_it_waits_while_the_models_load(
        self, tab: Tab, config: ServiceConfig, engine: RewardEngine, files: list[Path]
    ) -> None:
        """It says that the service is loading, and by itself that it is ready."""
        loaded = threading.Event()

        def build(_: ServiceConfig) -> RewardEngine:
            assert loaded.wait(60)
            return engine

        try:
            with listening(config, ScoringService(config, build=build)) as (_, port):
                visit(tab, port)
                tab.wait("document.getElementById('state').innerText.startsWith('loading: ')")
                give(tab, files[:1], "a red square")
                tab.run("document.getElementById('score').click()")
                tab.wait("document.querySelector('#problem strong')")
                assert text(tab, "#problem").startswith("Not ready\n")
                assert "Try again in 2 s." in text(tab, "#problem")
                loaded.set()
                tab.wait("document.getElementById('state').innerText.startsWith('ready: 4 evaluators')")
                press_score(tab, 1)
                tab.open("about:blank")
        finally:
            loaded.set()
