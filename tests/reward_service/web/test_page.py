"""Pages at / and /docs: in a real browser against a real service."""

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
from fastapi import FastAPI
from PIL import Image

from reward_service.config import Auth, ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.images import Pixels
from reward_service.protocol import PROBLEM_CODES
from reward_service.scoring.auth import new_key
from reward_service.scoring.service import ScoringService
from reward_service.web.app import STATIC_FILES
from tests.support.service.browser import CHROMIUM, Tab, browser
from tests.support.service.serving import listening_server, png, running_server

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
HOSTILE = (
    "</textarea><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\n"
    'it\'s $(touch owned) `touch owned` \\ @file;type=text/html "q" <b>ünïcode ﬁsh</b>'
)
CONTROL = 2
PROXY_PATH = "below/a/path"


@pytest.fixture(scope="module")
def port(config: ServiceConfig, engine: RewardEngine) -> Iterator[int]:
    with running_server(config, engine) as (_, port):
        yield port


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest.fixture
def page(tab: Tab, port: int) -> Iterator[Tab]:
    """The page with a ready service; afterwards, check that it sent no request to another host."""
    visit(tab, port)
    tab.wait("document.querySelectorAll('#list article').length === 4")
    yield tab
    assert f"{home(port)}page/page.js" in tab.requests
    assert foreign_requests(tab, port) == []


@pytest.fixture
def files(tmp_path: Path, images: list[Pixels]) -> list[Path]:
    paths = [tmp_path / name for name in ('it\'s "one".png', "two, too.jpg", "three.webp")]
    for path, pixels in zip(paths, images[1:], strict=False):
        Image.fromarray(pixels).save(path)
    return paths


def home(port: int) -> str:
    return f"http://127.0.0.1:{port}/"


def visit(tab: Tab, port: int, path: str = "") -> None:
    tab.size(1280)
    tab.requests.clear()
    tab.console.clear()
    tab.open(home(port) + path)


def foreign_requests(tab: Tab, port: int) -> list[str]:
    """Requests of the tab to anything but the service."""
    own = (home(port), f"blob:{home(port)}", "data:")
    return [url for url in tab.requests if not url.startswith(own)]


def add_images(tab: Tab, files: list[Path], *prompts: str) -> None:
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
    """Return the exact numbers of each card, and the fraction that its bars fill."""
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


def numbers(response: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the numbers of a response in the format of `shown`."""
    return [
        {
            "reward": result["reward"],
            "scores": {
                name: [score["unit"], score["z"], score["raw"]] for name, score in result["scores"].items()
            },
        }
        for result in response["results"]
    ]


def score(port: int, files: list[Path], prompts: list[str], **headers: str) -> dict[str, Any]:
    """Return the response of the API."""
    parts: list[tuple[str, Any]] = [("prompt", (None, prompt.encode())) for prompt in prompts]
    parts += [("image", ("x", path.read_bytes())) for path in files]
    response = httpx.post(f"{home(port)}v1/score", files=parts, headers=headers, timeout=30)
    assert response.status_code == 200, response.text
    return dict(response.json())


def run_curl(line: str, folder: Path, **environment: str) -> dict[str, Any]:
    """Run the copied command in a shell; return the response."""
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        check=True,
        timeout=30,
    )
    return dict(json.loads(done.stdout))


def assert_same_scores(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Compare numbers within the tolerance between one batch and another."""
    assert len(mine) == len(other)
    for one, two in zip(mine, other, strict=True):
        assert one["reward"] == pytest.approx(two["reward"], abs=1e-4)
        assert one["scores"].keys() == two["scores"].keys()
        for name in one["scores"]:
            assert one["scores"][name] == pytest.approx(two["scores"][name], abs=1e-3)


def test_static_files_are_small_and_strict(port: int) -> None:
    """Media types, a policy without foreign hosts or inline code, revalidation; below 40 KB in all."""
    sizes = 0
    for path in sorted(STATIC_FILES.iterdir()):
        route = "" if path.name == "index.html" else f"page/{path.name}"
        response = httpx.get(home(port) + route)
        assert response.content == path.read_bytes()
        kind = response.headers["content-type"].partition(";")[0]
        assert (
            kind
            in {
                ".html": ["text/html"],
                ".css": ["text/css"],
                ".js": ["text/javascript", "application/javascript"],
                ".svg": ["image/svg+xml"],
            }[path.suffix]
        )
        assert_strict(response.headers["content-security-policy"])
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-cache"
        again = httpx.get(home(port) + route, headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert set(re.findall(r"https?://[^\s\"'`]+", path.read_text())) <= {"http://www.w3.org/2000/svg"}
        sizes += path.stat().st_size
    assert sizes < 40_000
    for name in ("index.html", "docs.html"):
        markup = (STATIC_FILES / name).read_text()
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", markup)
    assert httpx.get(f"{home(port)}page/../app.py").status_code == 404
    assert httpx.get(f"{home(port)}page/%2e%2e/app.py").status_code == 404


def assert_strict(policy: str) -> None:
    """Check that a Content-Security-Policy allows neither foreign hosts nor inline code."""
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def strip_prefix(app: FastAPI) -> Any:
    """Return an application below PROXY_PATH, without telling the inner one: as behind a plain proxy."""

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(f"/{PROXY_PATH}")
            scope = dict(scope, path=path if path != scope["path"] else "/outside", raw_path=path.encode())
        await app(scope, receive, send)

    return proxy


class TestDocs:
    """Swagger UI at /docs."""

    pytestmark = in_a_browser

    def test_docs_show_every_operation(self, tab: Tab, port: int) -> None:
        """Swagger UI lists the operations, loaded from this host only; the policy blocks nothing."""
        assert_strict(httpx.get(f"{home(port)}docs").headers["content-security-policy"])
        visit(tab, port, "docs")
        tab.wait("document.querySelectorAll('.opblock').length === 7")
        assert tab.run("document.querySelector('.info .title').innerText").startswith("Reward service")
        codes = tab.run("[...document.querySelectorAll('.info td:first-child')].map(cell => cell.innerText)")
        assert codes == list(PROBLEM_CODES)
        tab.run("document.querySelector('#operations-default-score_v1 button').click()")
        tab.wait("document.querySelector('#operations-default-score_v1 .responses-table')")
        assert foreign_requests(tab, port) == []
        assert tab.console == []

    @pytest.mark.parametrize("path", ["", PROXY_PATH])
    def test_docs_can_send_requests(
        self, tab: Tab, config: ServiceConfig, engine: RewardEngine, path: str
    ) -> None:
        """`Try it out` reaches the service, also below a path of a proxy."""
        service = ScoringService(config, build=lambda _: engine)
        with listening_server(config, service, strip_prefix if path else lambda app: app) as (_, port):
            visit(tab, port, f"{path}/docs" if path else "docs")
            block = "document.querySelector('#operations-default-live_health_live_get')"
            tab.wait(block)
            tab.run(f"{block}.querySelector('button').click()")
            tab.wait(f"{block}.querySelector('.try-out button')")
            tab.run(f"{block}.querySelector('.try-out button').click()")
            tab.wait(f"{block}.querySelector('button.execute')")
            tab.run(f"{block}.querySelector('button.execute').click()")
            tab.wait(f"{block}.querySelector('.live-responses-table .response-col_status')")
            assert "live" in tab.run(f"{block}.querySelector('.live-responses-table').innerText")
            assert f"{home(port)}{path + '/' if path else ''}health/live" in tab.requests
            assert foreign_requests(tab, port) == []
            assert tab.console == []
            tab.open("about:blank")


class TestPage:
    """The page at /."""

    pytestmark = in_a_browser

    def test_scores_equal_the_apis(self, page: Tab, port: int, files: list[Path]) -> None:
        """Numbers and bars are the API's, the curl command gives them too, and the console is empty."""
        prompts = ["a red square", "two circles", "and " * 60]
        add_images(page, files, *prompts)
        press_score(page, 3)
        found = shown(page)
        assert_same_scores(found, numbers(score(port, files, prompts)))
        for card in found:
            for name, (unit, _, _) in card["scores"].items():
                assert card["bars"][name] == pytest.approx(unit, abs=0.05)
        notes = [text(page, f".card:nth-child({number})") for number in (1, 2, 3)]
        assert ["Lossy file" in note for note in notes] == [False, True, True]
        assert ["prompt was too long" in note for note in notes] == [False, False, True]
        assert "3 images scored" in text(page, "#said")
        assert page.console == []
        page.run("document.getElementById('copy').click()")
        page.wait("document.getElementById('copied').innerText === 'Copied.'")
        if shutil.which("curl"):
            assert_same_scores(
                found,
                numbers(
                    run_curl(str(page.run("document.getElementById('line').textContent")), files[0].parent)
                ),
            )

    def test_two_images_are_compared(self, page: Tab, port: int, files: list[Path]) -> None:
        """For each evaluator the page names the image with the higher score; the selection can be swapped."""
        add_images(page, files[:2], "a red square")
        page.type(".card:nth-child(2) textarea", "a red square")
        press_score(page, 2)
        one, two = (result["scores"] for result in score(port, files[:2], ["a red square"])["results"])
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

    def test_hostile_text_is_not_executed(self, page: Tab, port: int, files: list[Path]) -> None:
        """Markup and shell code in a prompt or file name run neither in the page nor in the curl command."""
        named = files[0].with_name("<img src=x onerror=alert(1)>$(touch owned).png")
        named.write_bytes(files[0].read_bytes())
        add_images(page, [named], HOSTILE)
        press_score(page, 1)
        assert_same_scores(shown(page), numbers(score(port, [named], [HOSTILE])))
        assert page.run("document.title") == "Reward service"
        assert page.run("document.querySelectorAll('.card script, .card img').length") == 1
        if shutil.which("curl"):
            line = str(page.run("document.getElementById('line').textContent"))
            assert_same_scores(shown(page), numbers(run_curl(line, named.parent)))
        assert not (named.parent / "owned").exists()
        assert page.console == []

    def test_images_can_be_pasted_and_dropped(
        self, page: Tab, port: int, images: list[Pixels], tmp_path: Path
    ) -> None:
        """Bitmaps from the clipboard and dropped files are sent unchanged, each under a unique name."""
        path = tmp_path / "given.png"
        path.write_bytes(png(images[2]))
        page.run(f"""(() => {{
          const bytes = new Uint8Array({list(path.read_bytes())});
          let made = 0; // a time each: files of the same name, size and time count as one
          const file = () => new File([bytes], "image.png", {{type: "image/png", lastModified: ++made}});
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
        assert_same_scores(shown(page), numbers(score(port, [path] * 3, ["a circle"])))

    def test_problems_are_described(self, page: Tab, files: list[Path]) -> None:
        """The invalid image is named and marked, with code and request ID; the rest is scored without it."""
        bad = files[0].with_name("bad.png")
        bad.write_bytes(b"this is no image")
        add_images(page, [files[0], bad], "a", "b")
        page.run("document.getElementById('score').click()")
        page.wait("document.querySelector('#problem strong')")
        shown_text = text(page, "#problem")
        assert "Image 2, bad.png: " in shown_text
        assert "not_an_image · 422 · request " in shown_text
        assert "PNG, JPEG or WebP" in text(page, ".card:nth-child(2)")
        page.run("document.querySelectorAll('.card button')[1].click()")
        assert text(page, "#problem") == ""
        assert page.run("document.activeElement.getAttribute('aria-label')").startswith("Remove image 1")
        press_score(page, 1)

    def test_evaluator_out_of_service_is_marked(self, page: Tab, files: list[Path]) -> None:
        """If an evaluator is down, its row and the missing reward say so, and the other scores are shown."""
        add_images(page, files[:1], "a")
        page.run("""(() => {
          const scores = {clip: {raw: 0.25, z: -0.5, unit: 0.3085}};
          const result = {index: 0, reward: null, scores, truncated_prompt: false, lossy_input: false};
          const failed = {hpsv2: "evaluator_down"};
          const response = {id: "x", results: [result], evaluators: {}, timing_ms: {total: 1}, failed};
          window.fetch = async () => new Response(JSON.stringify(response));
        })()""")
        press_score(page, 1)
        shown_text = text(page, ".card")
        assert "−0.50" in shown_text
        assert re.search(r"hpsv2\s+out of service", shown_text)
        assert "no reward: hpsv2 out of service" in shown_text

    def test_page_works_with_the_keyboard(self, page: Tab, files: list[Path]) -> None:
        """Tab reaches the file field, then the prompt; Control and Enter score; all controls have names."""
        add_images(page, files[:1])
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
    def test_page_fits_the_screen(self, page: Tab, files: list[Path], width: int) -> None:
        """Nothing overflows, with scores, comparison, long words and a problem on the page."""
        page.size(width)
        odd = files[0].with_name("a_very_long_name_" * 6 + ".png")
        odd.write_bytes(files[0].read_bytes())
        add_images(page, [odd, *files[1:]], "word" * 60, "b", "c")
        press_score(page, 3)
        bad = files[0].with_name("b" * 90 + ".png")
        bad.write_bytes(b"no")
        add_images(page, [bad])
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

    def test_page_works_with_an_api_key(
        self, tab: Tab, config: ServiceConfig, engine: RewardEngine, files: list[Path], tmp_path: Path
    ) -> None:
        """The key is requested, rejected if wrong, stored in the tab only and absent from the curl line."""
        key, _ = new_key(tmp_path / "keys.yaml", "someone")
        locked = config.model_copy(update={"auth": Auth(keys=tmp_path / "keys.yaml")})
        with running_server(locked, engine) as (_, port):
            visit(tab, port)
            tab.wait("document.querySelector('#problem strong')")
            assert "API key required" in text(tab, "#key-box")
            assert tab.run("document.activeElement.id") == "key"
            add_images(tab, files[:1], "a red square")
            for wrong, words in (("rk_wrong", "unknown API key"), ("clé", "Invalid API key")):
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
                assert_same_scores(shown(tab), numbers(run_curl(line, files[0].parent, REWARD_KEY=key)))
            kept = tab.run("[document.cookie, localStorage.length, Object.values(sessionStorage)]")
            assert kept == ["", 0, [key]]
            tab.call("Page.reload")
            tab.wait("document.querySelectorAll('#list article').length === 4")
            tab.open("about:blank")

    def test_page_waits_while_models_load(
        self, tab: Tab, config: ServiceConfig, engine: RewardEngine, files: list[Path]
    ) -> None:
        """The page shows that the service is loading, and without a reload that it is ready."""
        loaded = threading.Event()

        def build(_: ServiceConfig) -> RewardEngine:
            assert loaded.wait(60)
            return engine

        try:
            with listening_server(config, ScoringService(config, build=build)) as (_, port):
                visit(tab, port)
                tab.wait("document.getElementById('state').innerText.startsWith('loading: ')")
                add_images(tab, files[:1], "a red square")
                tab.run("document.getElementById('score').click()")
                tab.wait("document.querySelector('#problem strong')")
                assert text(tab, "#problem").startswith("Not ready\n")
                assert "Retry in 2 s." in text(tab, "#problem")
                loaded.set()
                tab.wait("document.getElementById('state').innerText.startsWith('ready: 4 evaluators')")
                press_score(tab, 1)
                tab.open("about:blank")
        finally:
            loaded.set()
