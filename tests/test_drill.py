"""The part of the drill that takes seconds; the whole of it is `python -m tests.drill`."""

from pathlib import Path

import pytest
from drill.__main__ import differs, escaped
from drill.faults import DRILLS

QUICK = [drill for drill in DRILLS if drill.quick]


def test_every_fault_has_a_drill() -> None:
    assert {drill.number for drill in DRILLS} == set(range(1, 25))


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
