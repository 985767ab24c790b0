"""Agreement of docs/faults.md with the fault tests."""

from __future__ import annotations

import re
from pathlib import Path

from reward_service.protocol import PROBLEM_CODES

HERE = Path(__file__).parent
ROW = re.compile(r"^\| [^|]+ \| ?(?P<status>\d*) ?\| ?(?:`(?P<code>\w+)`)? ?\| (?P<tests>`.+) \|$")


def rows() -> list[re.Match[str]]:
    lines = (HERE.parents[1] / "docs" / "faults.md").read_text().splitlines()
    return [found for line in lines if (found := ROW.match(line))]


def test_each_fault_has_a_documented_status_and_a_test() -> None:
    """Each row has the code's own status and an existing test, and no fault test is missing."""
    sources = "\n".join(path.read_text() for path in HERE.parent.rglob("test_*.py"))
    named = set()
    for row in rows():
        if row["code"]:
            assert (int(row["status"]), row["code"]) == (PROBLEM_CODES[row["code"]][0], row["code"])
        else:
            assert row["status"] in ("200", "")
        named |= set(re.findall(r"`(test_\w+)`", row["tests"]))
    assert all(f"def {name}(" in sources for name in named)
    files = ("device", "bodies", "images", "sockets", "processes")
    defined = re.findall(
        r"def (test_\w+)", "\n".join((HERE / f"test_{name}.py").read_text() for name in files)
    )
    assert set(defined) - named == {"test_invalid_images_of_many"}
    assert len(rows()) >= 20
