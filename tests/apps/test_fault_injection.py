"""The part of the fault injection suite that takes seconds; run all of it with `python -m tests.fault_injection`."""

import re
from pathlib import Path

import pytest
from fault_injection.__main__ import differs, escaped
from fault_injection.faults import DRILLS

QUICK = [drill for drill in DRILLS if drill.quick]


def test_every_fault_has_a_drill() -> None:
    assert {drill.number for drill in DRILLS} == set(range(1, 25))


def test_the_page_of_promises_names_tests_of_every_fault() -> None:
    """The page names existing tests for every fault."""
    here = Path(__file__).parents[1]
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", (here.parent / "docs" / "faults.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 27
    for number, tests in rows:
        named = re.findall(r"`([\w.]+)`", tests)
        assert named and named[0].endswith(".py"), number
        for name in named:
            if name.endswith(".py"):
                text = next(here.rglob(name)).read_text()
            else:
                assert re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE), f"fault {number}: no {name}"


@pytest.mark.slow
@pytest.mark.parametrize("drill", QUICK, ids=[f"{drill.number}: {drill.fault}" for drill in QUICK])
def test_drill(drill, tmp_path: Path) -> None:
    assert differs(drill.expected, drill.act(tmp_path)) == drill.expected


def test_what_was_not_seen_differs() -> None:
    expected = {"exit": 3, "says": ("one", "two")}
    assert differs(expected, {"exit": 3, "says": "one,\n two and three", "more": 1}) == expected
    assert differs(expected, {"exit": 3, "says": "one"}) != expected
    assert differs(expected, {"says": "one two"}) != expected


def test_names_are_escaped_in_the_page() -> None:
    assert escaped("<script>|`a`&") == "&lt;script&gt;\\|\\`a\\`&amp;"
