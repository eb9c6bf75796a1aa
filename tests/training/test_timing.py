"""Estimates before a run starts: its duration, and whether it fits in memory."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import inbatch
from inbatch.api import dry_run
from inbatch.data import open_data
from inbatch.errors import ConfigError
from inbatch.training import auto_context, evaluation_plan, memory_bench, timing
from inbatch.training.build import build
from inbatch.training.holdout import EvaluationSplit
from inbatch.training.resolve import resolve_recipe
from inbatch.training.timing import expectation, growth, smaller_choices, step_seconds

IMAGES = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def test_timing_a_step_does_not_change_the_run() -> None:
    for method, more in (("simclr", {}), ("byol", {}), ("simclr", {"context": 8, "fuse.name": "conv"}),
                         ("simclr", {"negatives.name": "drop-similar", "curate.name": "redraw"})):  # fmt: skip
        recipe, source = resolve_recipe(
            IMAGES, {"method.name": method, "encoder.name": "tiny", "batch_size": 32, "epochs": 2} | more
        )
        built = build(recipe, source, device=CPU)
        before = copy.deepcopy({name: part.state_dict() for name, part in built.parts().items()})
        random = torch.get_rng_state()
        assert step_seconds(built) > 0
        assert torch.equal(torch.get_rng_state(), random)
        for name, part in built.parts().items():
            state, then = part.state_dict(), before[name]
            assert state.keys() == then.keys()
            assert all(torch.equal(x, then[key]) for key, x in state.items() if isinstance(x, torch.Tensor))
        assert all(p.grad is None for p in built.network.parameters())


def test_additional_forward_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near duplicates take one view of each sample more, curation all views, and as many as it redraws."""
    monkeypatch.setattr("time.perf_counter", iter(range(10**6)).__next__)  # every measured pass takes one second
    seconds = {}
    for name, more in {"plain": {}, "similar": {"negatives.name": "drop-similar"},
                       "curated": {"curate.name": "redraw", "curate.budget": 0.5}}.items():  # fmt: skip
        recipe, source = resolve_recipe(IMAGES, {"encoder.name": "tiny", "batch_size": 32, "epochs": 2} | more)
        built = build(recipe, source, device=CPU)
        seconds[name] = step_seconds(built)
        assert timing.plain_share(built) == pytest.approx(seconds["plain"] / seconds[name] if name == "curated" else 1)
    assert seconds == {"plain": 2.0, "similar": 4.0, "curated": 2.0 + 2 * 2 * 1.5}  # 16 of 32 samples are timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let time be the number of multiplications and additions so far: other work does not change it."""
    with FlopCounterMode(display=False) as operations:
        monkeypatch.setattr("time.perf_counter", lambda: float(operations.get_total_flops()))
        yield


@pytest.mark.slow
def test_small_images_cost_less(clock: None) -> None:
    settings = {"preset": "fast", "encoder.width": 16, "steps": 5, "image_size": 64, "batch_size": 16}
    recipe, source = resolve_recipe(torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8), settings)
    ((until, cost),) = growth(build(recipe, source, device=CPU), samples=2)
    assert until == recipe.grow_until and cost < 0.9


def test_expectation_names_the_budget_if_the_run_takes_days() -> None:
    recipe, source = resolve_recipe(IMAGES, {"encoder.name": "tiny", "batch_size": 32, "epochs": 100})
    built = build(recipe, source, device=CPU)
    assert built.total == 200
    assert "about 17 min for 200 steps" in expectation(built, 5.0)
    assert "--budget" not in expectation(built, 5.0)
    assert "11 days" in expectation(built, 4752.0) and "--budget 1h" in expectation(built, 4752.0)


@pytest.mark.slow
def test_smaller_choices_take_less_time(clock: None) -> None:
    recipe, source = resolve_recipe(IMAGES, {"encoder.name": "resnet18", "batch_size": 4, "epochs": 1})
    choices = smaller_choices(build(recipe, source, device=CPU))
    assert choices and all(how.startswith("--encoder ") for how, _ in choices)


def test_dry_run_states_the_expected_duration() -> None:
    report = dry_run(IMAGES, encoder="tiny", epochs=3, batch_size=32)
    assert report["seconds_estimate"]["training"] > 0 and "Expected: about" in report["description"]


@pytest.mark.slow
def test_a_run_that_does_not_fit_gets_a_smaller_context_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, source = resolve_recipe(IMAGES, {"encoder.name": "tiny", "batch_size": 64, "epochs": 1, "image_size": 32})
    assert auto_context.within_memory(recipe, source, CPU) == (recipe, "")
    needed = memory_bench.MemoryBench(recipe, source, CPU, None).trial(64, dry=False).needed
    monkeypatch.setattr(auto_context, "free_device_bytes", lambda device: int(needed * 0.9))
    smaller, note = auto_context.within_memory(recipe, source, CPU)
    assert isinstance(smaller.context, int) and smaller.context < 64
    assert "context is" in note and "are free" in note
    asked, _ = resolve_recipe(
        IMAGES, {"encoder.name": "tiny", "batch_size": 64, "epochs": 1, "image_size": 32, "context": 64}
    )
    with pytest.raises(ConfigError, match="of memory are free"):
        auto_context.within_memory(asked, source, CPU)
    with pytest.raises(ConfigError, match="of memory are free"):
        inbatch.pretrain(IMAGES, encoder="tiny", batch_size=64, epochs=1, context=64, image_size=32, quiet=True)


def test_the_time_of_an_evaluation_is_scaled_from_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond an image, and two seconds for what the first call loads, which are not scaled."""
    source, clock, sizes = open_data("digits-canvas"), [100.0], []

    def evaluate(encoder: Any, bank: Any, queries: Any, **options: Any) -> None:
        clock[0] += 0.001 * (len(bank) + len(queries)) + 2 * (not sizes)
        sizes.append((len(bank), len(queries)))

    monkeypatch.setattr(evaluation_plan, "evaluate", evaluate)
    monkeypatch.setattr(evaluation_plan, "fit_readout", lambda *_, **__: None)
    monkeypatch.setattr(evaluation_plan, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    built: Any = SimpleNamespace(encoder=None, recipe=SimpleNamespace(knn_k=5, seed=0))
    seconds = evaluation_plan.evaluation_seconds(built, EvaluationSplit(source, source, "all"))
    assert sizes == [(256, 128)] * 2
    assert seconds == pytest.approx(2 + 0.384 + 2 * 0.001 * 2 * len(source))
