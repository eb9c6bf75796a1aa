"""docs/settings.md is current and describes every setting."""

import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parents[1]
with patch.object(sys, "path", [str(ROOT / "scripts"), *sys.path]):
    script = runpy.run_path(str(ROOT / "scripts" / "settings.py"))


def test_page_is_current_and_complete() -> None:
    text = script["page"]()
    assert (ROOT / "docs" / "settings.md").read_text() == text, "run: python scripts/settings.py"
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row.endswith("|  |")], "a setting has no meaning: explain it in its docstring"
    assert "`--image-size` (`image_size`)" in " ".join(text.split()) and "`--lr` (`optimizer.lr`)" in text


@pytest.mark.parametrize(
    "doc",
    [
        "Sum.\n\nalpha: first. beta, gamma: both,\n    on two lines.\nNot an entry.\ndelta: last.",
        "Sum.\n\nArgs:\n    alpha (float): first.\n    beta, gamma: both,\n        on two lines.\n    delta: last.\n\n"
        "Returns:\n    alpha: beta",
        "Sum.\n\nalpha: first. beta, gamma: both, on\ntwo lines.\nNot an entry.\ndelta: last.",
        "Sum. alpha: first; beta, gamma: both, on two lines; delta: last.",
    ],
    ids=["own", "google", "no indent", "one line"],
)
def test_meanings_are_read_from_docstrings(doc: str) -> None:
    meanings = script["read_meanings"](doc.split("\n\nReturns")[0], ["alpha", "beta", "gamma", "delta"])
    both = "both, on two lines"
    assert meanings == {"alpha": "first", "beta": both, "gamma": both, "delta": "last"}
