"""Reports in a real browser: nothing is fetched, nothing complains, a phone shows them whole."""

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from tests.support.trainer.report_samples import HOSTILE, make_experiment, make_run, prompts_of
from trainer.report.compare import write_comparison
from trainer.report.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to look at the pages with")

# Each page in a frame as wide as a screen; what is found there is left in the document that is dumped.
WATCH = """
<pre id="found"></pre>
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const inner = frame.contentDocument, root = inner.documentElement;
    return {
      page: frame.name, width: root.clientWidth, needs: root.scrollWidth, title: inner.title,
      fetched: frame.contentWindow.performance.getEntriesByType("resource").map(it => it.name)
        .filter(it => !it.startsWith("data:")),
      broken: [...inner.images].filter(it => !it.complete || !it.naturalWidth).length,
      images: inner.images.length, sections: inner.querySelectorAll("section").length,
      small: [...inner.querySelectorAll("figure svg text")]
        .filter(it => it.getBoundingClientRect().height < 7).length,
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


def browse(
    pages: dict[str, Path], widths: tuple[int, ...], folder: Path
) -> tuple[list[dict[str, object]], str]:
    """Findings of Chromium in each page at each width, and the lines of its console."""
    frames = [
        f'<iframe name="{name}" style="border:0;width:{width}px;height:2000px" '
        f'srcdoc="{escape(path.read_text(encoding="utf-8"))}"></iframe>'
        for name, path in pages.items()
        for width in widths
    ]
    watch = folder / "watch.html"
    watch.write_text(f'<!doctype html><meta charset="utf-8">{"".join(frames)}{WATCH}', encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        watch.as_uri(),
    ]
    done = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(found[1]), console


@pytest.mark.slow
def test_pages_fit_a_phone_and_fetch_nothing(tmp_path: Path) -> None:
    """Report, hostile report, experiment and comparison: whole at 390 and 1280 px, silent, from one file."""
    run = make_run(tmp_path / "run")
    hostile = make_run(tmp_path / "hostile", prompts=prompts_of(9, HOSTILE))
    study = make_experiment(tmp_path / "study")
    half = make_run(
        tmp_path / "a-run-with-quite-a-long-name-that-wraps-nowhere-at-all", finished=False, done=5
    )
    pages = {path.name: write_report(path) for path in (run, hostile, study)}
    pages["comparison"] = write_comparison([run, half, study], tmp_path / "compare.html")
    found, console = browse(pages, (390, 1280), tmp_path)
    assert len(found) == 8
    for page in found:
        assert page["needs"] == page["width"], page
        assert page["fetched"] == [], page
        assert page["broken"] == 0, page
        assert page["small"] == 0, page
        assert page["sections"], page
        assert page["title"] != "owned", page
    assert console == ""
