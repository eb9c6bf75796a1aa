"""The command check-method: the module that is typed is imported, and a failed test is exit code 4."""

import json
from pathlib import Path

import pytest
from command_line import run

from inbatch.testing import check

MODULE = """
import torch
from inbatch.methods import SimCLR

class Fine(SimCLR):
    pass

class Learns(SimCLR):
    def __init__(self, start: float = 0.0) -> None:
        super().__init__(out_dim=8)
        self.factor = torch.nn.Parameter(torch.tensor(start))
"""


def test_a_typed_class_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_ALONE", ())
    monkeypatch.setattr(check, "_STEPS", ())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typed_methods.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    result = run("check-method typed_methods:Fine --set out_dim=8 --json")
    assert result.exit_code == 0 and json.loads(result.stdout)["options"] == {"out_dim": 8}
    result = run("check-method typed_methods:Learns --set method.start=1.0")
    assert result.exit_code == 4 and "FAILED  parameters" in result.stdout and "Learns fails 1 of" in result.stderr
    for words, message in (
        ("typed_methods:Absent", "typed_methods has no 'Absent'"),
        ("no_such_module:X", "there is no module 'no_such_module'"),
        ("simcrl", "give MODULE:CLASS, or one of simclr"),
        ("typed_methods:torch", "takes a subclass of inbatch.methods.base.Method"),
        ("simclr --set batch_size=8", "is an option of the check"),
        ("simclr --set temprature=8", "no option 'temprature'"),
        ("moco --set queue=64", "'method.queue' is now 'method.queue_size': rename it"),
    ):
        result = run(f"check-method {words}")
        assert result.exit_code == 2 and message in result.stderr, (words, result.stderr)
