"""Leak monitor: groups are recognised if their rows carry a signature, and not otherwise."""

import json
from pathlib import Path

import pytest
import torch
from rank_pool import on_ranks
from small_runs import tiny

from inbatch import api
from inbatch.models.network import running_statistics
from inbatch.training.monitors.context_leak import SURE, group_leak, leak, mixes_samples, sign


def rows(strength: float, scale: float = 0.0) -> torch.Tensor:
    """Draw two views of 8 groups of 64 samples; each group is shifted (or scaled) by this much in the second view."""
    g = torch.Generator().manual_seed(0)
    views = torch.randn(2, 8, 64, 16, generator=g)
    views[1] += strength * torch.randn(8, 1, 16, generator=g)
    return views


def test_chance_is_called_chance() -> None:
    figures = group_leak(rows(0.0))
    assert figures["leak_chance"] == 1 / 8
    assert figures["leak"] < figures["leak_chance"] + SURE * figures["leak_error"] and sign(figures, False) is None


def test_a_signature_is_found() -> None:
    figures = group_leak(rows(1.0))
    assert figures["leak"] > 0.5
    assert "--shuffle-groups" in str(sign(figures, False)) and "shuffled" in str(sign(figures, True))


def test_centred_group_is_not_a_leak() -> None:
    """Batch normalisation removes the group's mean: its halves lie on opposite sides, which gives less than chance."""
    centred = rows(1.0)
    centred -= centred.mean(2, keepdim=True)
    figures = group_leak(centred)
    assert sign(figures, False) is None


@pytest.mark.parametrize(("fuse", "attend", "expected"), [
    (None, None, False), ("set", None, True), (None, "ba2m", True), (None, "batchformer", True), (None, "se", False),
])  # fmt: skip
def test_leak_is_measured_if_samples_interact(fuse: str | None, attend: str | None, expected: bool) -> None:
    plugins = {key: value for key, value in (("fuse", fuse), ("attend", attend)) if value}
    assert mixes_samples(api.prepare("digits-canvas", subset=80, batch_size=16, **plugins)) is expected


@pytest.mark.grid(1)
@pytest.mark.parametrize("method", ["simclr", "moco", "swav"])
def test_looking_changes_nothing(method: str) -> None:
    built = api.prepare("digits-canvas", method, subset=80, batch_size=16, context=8, fuse="set", attend="batchformer")
    before = [s.clone() for s in running_statistics(built.network)]
    state = torch.get_rng_state()
    figures = leak(built, 0)
    assert set(figures) == {"leak", "leak_chance", "leak_error"} and figures["leak_chance"] == 1 / 10
    assert figures == leak(built, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, running_statistics(built.network), strict=True))
    assert torch.equal(state, torch.get_rng_state()) and built.network.training


@pytest.mark.slow
def test_a_run_logs_it(tmp_path: Path) -> None:
    result = tiny("simclr", tmp_path, fuse="conv").result
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in log if "leak" in record][-1]
    assert last["step"] == 10 and result["leak"] == {k: v for k, v in last.items() if k != "step"}


def ranks_leak(out: str) -> dict[str, float]:
    return tiny("simclr", Path(out), fuse="set", batch_size=80, epochs=1, context=20).result["leak"]


@pytest.mark.slow
def test_every_rank_takes_part(tmp_path: Path) -> None:
    alone = ranks_leak(str(tmp_path / "one"))
    first, second = on_ranks(2, ranks_leak, str(tmp_path / "two"))
    assert first == second and first["leak_chance"] == alone["leak_chance"]
    assert first["leak"] == pytest.approx(alone["leak"], abs=0.05)
