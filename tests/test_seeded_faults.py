"""The faults that `scripts/mutate.py` seeds are in the code as it is."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_seeded_fault_changes_one_place() -> None:
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    mutate = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["mutate"] = mutate  # a dataclass looks its module up
    spec.loader.exec_module(mutate)  # type: ignore[union-attr]
    stale = {
        number: fault.file
        for number, fault in enumerate(mutate.FAULTS, 1)
        if (ROOT / "src" / "inbatch" / fault.file).read_text().count(fault.old) != 1 or fault.new == fault.old
    }
    assert not stale, "update `old` and `new` of these faults"
    assert len(mutate.FAULTS) >= 25
