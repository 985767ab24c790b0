"""Forms from curl: what its options make of a text, and the lines that the documentation shows."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from reward_service.protocol import MalformedBodyError, ScoreRequest
from reward_service.requests.forms import decode_form
from reward_service.web.openapi import description

ROOT = Path(__file__).parents[3]
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


class FormServer(HTTPServer):
    """Server that decodes forms: `outcome` is the last request, or the reason that it was refused."""

    outcome: ScoreRequest | str


class _Handler(BaseHTTPRequestHandler):
    server: FormServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self.server.outcome = decode_form(body, self.headers["Content-Type"])
        except MalformedBodyError as error:
            self.server.outcome = str(error)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[FormServer]:
    with FormServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curl")
    (folder / "one.png").write_bytes(b"\x89PNG; bytes")
    (folder / "prompt.txt").write_text("a prompt in a file")
    (folder / "prompt.csv").write_text("a prompt in a file")
    return folder


def sent_by_curl(server: FormServer, folder: Path, *options: str) -> ScoreRequest | str:
    """Return the request that curl sends, or the reason that it is refused."""
    url = f"http://127.0.0.1:{server.server_port}/"
    command = ["curl", "-sS", "-q", "--noproxy", "*", "-F", "image=@one.png", *options, url]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return server.outcome


TEXTS = [
    "a red circle; oil on canvas",
    "a; type=text/html",
    "a;filename=b",
    '"quoted"',
    'say "a; b" twice',
    "@prompt.txt",
    "<prompt.txt",
    "(a",
    "a\\; b",
    "it's ünïcode\nin two lines",
    "=",
    ";",
]


@needs_curl
@pytest.mark.parametrize("text", TEXTS)
def test_form_string_sends_any_text(server: FormServer, folder: Path, text: str) -> None:
    """`--form-string`, which the documentation uses, sends the text as it is."""
    request = sent_by_curl(server, folder, "--form-string", f"prompt={text}")
    assert isinstance(request, ScoreRequest)
    assert [item.prompt for item in request.items] == [text]


@needs_curl
@pytest.mark.parametrize(
    "text",
    [
        "a; type=text/html",
        "a; type=text/plain",
        "a;TYPE=text/x; oil on canvas",
        "a; filename=b",
        'a; headers="X-Style: oil"',
        "a; encoder=base64",
        "@prompt.txt",
        "@prompt.txt;type=text/html",
        "<prompt.csv;type=text/csv",
        "(a",
        "; oil on canvas",
    ],
)
def test_changed_prompt_is_refused(server: FormServer, folder: Path, text: str) -> None:
    """A prompt that `-F` has visibly changed is refused, with the option to use instead."""
    refusal = sent_by_curl(server, folder, "-F", f"prompt={text}")
    assert isinstance(refusal, str)
    assert "encoder" in text or "--form-string prompt=" in refusal


@needs_curl
@pytest.mark.parametrize(
    "value", ["evaluators=clip", 'weights={"clip": 1}', "normalization=z", "deterministic=true"]
)
def test_changed_option_is_refused(server: FormServer, folder: Path, value: str) -> None:
    """The other fields hold text too."""
    prompt = ("--form-string", "prompt=a")
    assert isinstance(sent_by_curl(server, folder, *prompt, "--form-string", value), ScoreRequest)
    for more in ("; type=text/html", "; filename=x", "; headers=X: y"):
        refusal = sent_by_curl(server, folder, *prompt, "-F", value + more)
        assert f"--form-string {value.partition('=')[0]}=" in str(refusal)


@needs_curl
def test_image_encoded_by_curl_is_refused(server: FormServer, folder: Path) -> None:
    """The bytes of an image are never decoded from base64, so they must not be sent so."""
    refusal = sent_by_curl(server, folder, "-F", "prompt=a", "-F", "image=@one.png;encoder=base64")
    assert isinstance(refusal, str)
    assert "field image has a Content-Transfer-Encoding" in refusal
    assert isinstance(
        sent_by_curl(server, folder, "-F", "prompt=a", "-F", "image=@one.png;type=x/y"), ScoreRequest
    )


def test_documented_lines_send_text_unchanged() -> None:
    """Curl lines in documentation, docstrings, messages and the page's code send text by `--form-string`."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    for suffix in ("py", "js", "html"):
        files += (ROOT / "reward_service").rglob(f"*.{suffix}")
    sources = {str(file): file.read_text() for file in files} | {"/docs": description()}
    fields = re.compile(r"(?:-F|--form)[ =]+[\"'`]?(?!image=|\$\{quoted\(`image=)[\w$]+=.*")
    found = [f"{name}: {match}" for name, text in sources.items() for match in fields.findall(text)]
    assert not found
    assert sum("--form-string prompt=" in text for text in sources.values()) >= 5
