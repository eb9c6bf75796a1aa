"""The part of the fault injection suite that takes seconds; run all of it with `python -m tests.fault_injection`."""

import re
from pathlib import Path

import pytest
from fault_injection.__main__ import differs, escaped
from fault_injection.faults import INJECTIONS

QUICK = [injection for injection in INJECTIONS if injection.quick]


def test_every_fault_is_injected() -> None:
    assert {injection.number for injection in INJECTIONS} == set(range(1, 25))


def test_page_names_tests_of_every_fault() -> None:
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
@pytest.mark.parametrize("injection", QUICK, ids=[f"{injection.number}: {injection.fault}" for injection in QUICK])
def test_injected_fault_has_the_expected_result(injection, tmp_path: Path) -> None:
    assert differs(injection.expected, injection.act(tmp_path)) == injection.expected


def test_missing_observation_is_a_difference() -> None:
    expected = {"exit": 3, "says": ("one", "two")}
    assert differs(expected, {"exit": 3, "says": "one,\n two and three", "more": 1}) == expected
    assert differs(expected, {"exit": 3, "says": "one"}) != expected
    assert differs(expected, {"says": "one two"}) != expected


def test_names_are_escaped_in_the_page() -> None:
    assert escaped("<script>|`a`&") == "&lt;script&gt;\\|\\`a\\`&amp;"
