"""Size of the container images and the light client: `python -m benchmarks.images`.

Needs a container engine and the images of `docker compose build`. The light client is installed into a
plain Python image, from the lock.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import docker
import typer
from docker.models.containers import Container

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6

#: Install the light client, and nothing else, into an environment of its own.
INSTALL = (
    "python3 -m venv --without-pip /tmp/light && "
    "pip --python /tmp/light/bin/python install -q --no-compile --no-deps --require-hashes "
    "-r /src/requirements/light.lock && "
    "pip --python /tmp/light/bin/python install -q --no-compile --no-deps /src"
)
_IMPORT = """
import json, subprocess, sys, time
def spent(code):
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started
code = "import reward_service.client"
spent(code)
took = min(spent(code) - spent("pass") for _ in range(7))
import reward_service.client
heavy = {"torch", "transformers", "fastapi", "uvicorn"} & set(sys.modules)
print(json.dumps({"import_ms": round(1000 * took), "heavy": sorted(heavy)}))
"""


def light_container(engine: docker.DockerClient, image: str, network: str | None = None) -> Container:
    """Start a container of a plain Python image; its /tmp/light/bin/python has the light client only.

    Raises:
        RuntimeError: the installation failed
    """
    container = engine.containers.run(
        image,
        ["sleep", "infinity"],
        init=True,
        detach=True,
        network=network,
        volumes={str(ROOT): {"bind": "/src", "mode": "ro"}},
    )
    try:
        _run(container, ["sh", "-c", INSTALL])
    except RuntimeError:
        container.remove(force=True)
        raise
    return container


def measure_light(container: Container) -> dict[str, object]:
    """Return the client's size with its dependencies in MB, its import time in ms, and its heavy imports."""
    size = _run(container, ["du", "-sb", "/tmp/light/lib"]).split()[0]
    measured = _run(container, ["/tmp/light/bin/python", "-c", _IMPORT]).splitlines()[-1]
    return {"size_mb": round(int(size) / MB), **json.loads(measured)}


def _run(container: Container, command: list[str]) -> str:
    code, output = container.exec_run(command)
    assert isinstance(output, bytes)  # an iterator only with stream=True
    text = output.decode()
    if code:
        raise RuntimeError(text[-2000:])
    return text


def layers(engine: docker.DockerClient, image: str) -> dict[str, float]:
    """Return the megabytes of an image: base, torch and its dependencies, packages, code with models."""
    found = {"base": 0.0, "torch": 0.0, "packages": 0.0, "code": 0.0}
    for layer in engine.images.get(image).history():
        command = layer["CreatedBy"]
        if "torch.lock" in command and "pip install" in command:
            kind = "torch"
        elif ".lock" in command and "pip install" in command:
            kind = "packages"
        else:
            kind = "code" if "/app" in command or "COPY" in command else "base"
        found[kind] += layer["Size"] / MB
    return {kind: round(size, 1) for kind, size in found.items()}


def main(
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md too.")] = None,
    base: Annotated[str, typer.Option(help="Plain Python image for the light client.")] = "python:3.11-slim",
) -> None:
    """Print the sizes of the images, and size and import time of the light client."""
    engine = docker.from_env()
    container = light_container(engine, base)
    try:
        light = measure_light(container)
    finally:
        container.remove(force=True)
    images = {name: layers(engine, f"karlo-reward-lab/{name}") for name in ("reward", "trainer")}
    page = _page(images, light)
    print(page)
    if out:
        out.with_suffix(".json").write_text(json.dumps({"images": images, "light": light}, indent=1) + "\n")
        out.with_suffix(".md").write_text(page)


def _page(images: dict[str, dict[str, float]], light: dict[str, object]) -> str:
    rows = [
        "# Images and the light client",
        "",
        "`python -m benchmarks.images`. Megabytes, unpacked. Both images share the layer `torch`.",
        "",
        "| image | base | torch | packages | code and miniature | total | without torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sizes in images.items():
        total = sum(sizes.values())
        cells = [f"{sizes[kind]:,.0f}" for kind in ("base", "torch", "packages", "code")]
        rows.append(f"| {name} | {' | '.join(cells)} | {total:,.0f} | {total - sizes['torch']:,.0f} |")
    rows += [
        "",
        f"Light client with its dependencies: {light['size_mb']} MB, imported in {light['import_ms']} ms.",
        "",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    typer.run(main)
