"""`context: auto`: the largest group that fits, without side effects, the same on every rank and after a resume."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import one_object, run
from rank_pool import on_ranks
from small_runs import assert_same_state, saved, tiny

from inbatch import api
from inbatch.data import Source, open_data
from inbatch.errors import ConfigError
from inbatch.runtime import memory
from inbatch.training import auto_context, memory_bench
from inbatch.training.auto_context import candidates
from inbatch.training.build import build
from inbatch.training.memory_bench import MemoryProbe, predict
from inbatch.training.recipe import Recipe, make
from inbatch.training.resolve import resolve_recipe

CPU, MB = torch.device("cpu"), 1_000_000
SMALL = {"subset": 200, "batch_size": 128, "context": "auto"}


def planned(**settings: Any) -> tuple[Recipe, Source]:
    return resolve_recipe("digits-canvas", SMALL | {k.replace("__", "."): v for k, v in settings.items()})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the free memory in MB."""
    return lambda size: monkeypatch.setattr(memory_bench, "free_bytes", lambda *_: int(size * MB))


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Set the cost of a group in bytes and seconds; return the list of the groups with dry steps."""

    def set_costs(needed: Callable[[int], float], seconds: float = 0.0) -> list[int]:
        tried: list[int] = []

        def trial(self: Any, context: int, dry: bool = True) -> MemoryProbe:
            if dry:
                tried.append(context)
            kept = round((needed(context) - needed(0)) / 2)
            return MemoryProbe(round(needed(context)), kept, seconds * context if dry else None)

        monkeypatch.setattr(memory_bench.MemoryBench, "trial", trial)
        return tried

    return set_costs


# Search


@pytest.mark.slow
@pytest.mark.parametrize("share", [2, 6, 64, 250, 251, 4096])
@pytest.mark.parametrize("curve", [lambda g: 100 + 10 * g, lambda g: 100 + 10 * g + g * g / 20], ids=["line", "square"])
def test_the_largest_divisor_that_fits_is_found(
    share: int, curve: Callable[[int], float], free: Callable[[float], None], costs: Callable[..., list[int]]
) -> None:
    """For any limit; no dry step far above it is run, even for plug-ins whose cost is quadratic."""
    straight = curve(3) - curve(2) == curve(2) - curve(1)
    recipe, source = planned(batch_size=share, **({} if straight else {"attend__name": "batchformer"}))
    sizes, chosen = candidates(recipe, 1), []
    assert sizes == [c for c in range(2, share + 1) if share % c == 0]
    for size in (200, 1000, 5000, 1e5, 1e7):
        tried = costs(curve)
        free(size / MB)
        fitting = [c for c in sizes if curve(c) <= 0.8 * size]
        if not fitting:
            with pytest.raises(ConfigError, match="even a group of"):
                auto_context.fit(recipe, source, CPU)
            continue
        fit = auto_context.fit(recipe, source, CPU)
        chosen.append(fit.context)
        assert fit.context == max(fitting) and fit.needed == round(curve(max(fitting)))
        assert fit.how == "found by a dry step" and fit.context in tried
        assert (fit.larger is None) == (fit.context == share)
        assert all(curve(c) <= 2 * size for c in tried if c > 32)
    assert chosen == sorted(chosen) and chosen


def test_a_line_through_the_last_two_points() -> None:
    one = {8: MemoryProbe(1000, 80)}
    assert predict(one, 8) == 1000 and predict(one, 16) == 1000 + 8 * 15  # as counted, with a margin
    two = one | {16: MemoryProbe(2000, 160)}
    assert predict(two, 32) == 2000 + 16 * 125 and predict(two | {16: MemoryProbe(1001, 160)}, 32) == 1001 + 160
    assert predict(two | {64: MemoryProbe(memory_bench.FULL, 0)}, 128) == memory_bench.FULL


def test_a_group_that_would_take_too_long_is_predicted(
    free: Callable[[float], None], costs: Callable[..., list[int]]
) -> None:
    recipe, source = planned(batch_size=1024)
    tried = costs(lambda g: 100 + 10 * g, seconds=auto_context.PATIENCE / 300)
    free(1)
    fit = auto_context.fit(recipe, source, CPU)
    assert fit.context == 1024 and max(tried) == 256 and "predicted by dry steps" in fit.sentence()


def test_candidates_are_divisors_of_the_batch() -> None:
    recipe, _ = planned(batch_size=24)
    assert candidates(recipe, 2) == [2, 3, 4, 6, 12]
    assert candidates(planned(batch_size=24, sync_norm=True)[0], 2) == [4, 6, 8, 12, 24]  # at least two on every rank
    assert candidates(planned(batch_size=24, shuffle_groups=True)[0], 1) == [2, 3, 4, 6, 8, 12]
    assert candidates(planned(batch_size=24, fuse__name="conv")[0], 1) == [4, 6, 8, 12, 24]  # its bottleneck is 4
    assert candidates(planned(batch_size=24, mix__name="mixco")[0], 1) == [4, 6, 8, 12, 24]  # has halves of two
    with pytest.raises(ConfigError, match="cannot be shared by 5"):
        candidates(recipe, 5)
    with pytest.raises(ConfigError, match="use another batch"):
        candidates(planned(batch_size=7, shuffle_groups=True)[0], 1)


# Real dry steps


def test_a_group_that_is_halved_has_dry_steps() -> None:
    """Half of two samples has no norm statistics."""
    recipe, source = planned(batch_size=14, mix__name="mixco", encoder__name="tiny", image_size=12)
    fit = auto_context.fit(recipe, source, CPU)
    assert fit.context == 14 and fit.mixes_samples


@pytest.mark.slow
def test_real_steps_follow_the_limit(free: Callable[[float], None]) -> None:
    recipe, source = planned()
    fits = []
    for size in (25, 60, 1000):
        free(size)
        fits.append(auto_context.fit(recipe, source, CPU))
        assert fits[-1].needed <= 0.8 * size * MB
        assert fits[-1].larger is None or fits[-1].larger[1] > 0.8 * size * MB
    contexts = [one.context for one in fits]
    assert contexts == sorted(contexts) and contexts[0] < contexts[-1] == 128
    assert fits[0].noisy and "noisy" in fits[0].sentence() and not fits[-1].noisy
    assert "One more forward pass" in fits[0].sentence() and "forward pass" not in fits[-1].sentence()


def dry_and_real() -> tuple[int, int, int]:
    """Return the context, the memory predicted for it, and the memory of a step of the run."""
    memory_bench.free_bytes = lambda *_: 140 * MB  # this process ends with the test
    recipe, fit = auto_context.resolve(*planned(subset=600, batch_size=512), CPU)
    assert fit is not None
    built = build(recipe, open_data("digits-canvas", subset=600), device=CPU)
    batch = next(iter(built.loader.epoch(0)))
    steps = []
    for step in range(3):  # libraries and allocator may add memory in one of them that is not a step's
        memory_bench.release_memory(CPU)
        before = memory_bench.used_bytes(CPU)
        built.step(batch, step)
        steps.append(memory_bench.peak(CPU) - before)
    return fit.context, fit.needed, min(steps)


@pytest.mark.slow
def test_the_dry_step_is_like_a_real_one() -> None:
    """The prediction is at least the memory of a step, and not much more.

    The test runs in a new process, because a process that has run for long reuses memory that it already holds.
    """
    if memory_bench.used_bytes(CPU) is None:
        pytest.skip("this system does not tell the peak of a process")
    ((context, needed, taken),) = on_ranks(1, dry_and_real)
    assert context < 512
    assert taken < 1.15 * needed + 5 * MB and needed < 1.6 * taken + 20 * MB


@pytest.mark.slow
def test_plug_ins_are_on_in_the_dry_steps(free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With their group's size; a plug-in whose weights depend on the group is measured, too."""
    seen, real = [], memory_bench.dry_step

    def step(built: Any, samples: int, side: int, plain: bool = False) -> None:
        real(built, samples, side, plain)
        if not plain:
            assert (
                built.network.fuse is not None and built.encoder.attend is not None and built.step.curator is not None
            )
            assert built.network.fuse.layers[0].steps[0].in_channels == samples == built.context
            seen.append(samples)

    monkeypatch.setattr(memory_bench, "dry_step", step)
    monkeypatch.setattr(auto_context, "PATIENCE", 0.0)
    free(1000)
    recipe, source = planned(fuse__name="conv", attend__name="batchformer", curate__name="redraw", method__name="byol")
    fit = auto_context.fit(recipe, source, CPU)
    assert seen == [8, 32] and fit.context == 128 and "predicted" in fit.how


@pytest.mark.slow
def test_full_gpu_means_that_the_context_does_not_fit(
    free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = memory_bench.dry_step

    def step(built: Any, samples: int, *rest: Any, **more: Any) -> None:
        if samples > 16:
            raise torch.OutOfMemoryError("Tried to allocate 20 GiB")
        real(built, samples, *rest, **more)

    monkeypatch.setattr(memory_bench, "dry_step", step)
    free(1000)
    fit = auto_context.fit(*planned(), CPU)
    assert fit.context == 16 and fit.larger == (32, None)
    assert "32 would run out of memory" in fit.sentence()
    monkeypatch.setattr(memory_bench, "dry_step", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        auto_context.fit(*planned(), CPU)


@pytest.mark.slow
def test_bytes_are_counted_if_the_system_reports_no_memory(
    free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_bench, "used_bytes", lambda device: None)
    monkeypatch.setattr(memory_bench, "dry_step", lambda *_, **__: pytest.fail("a dry step that nothing measures"))
    free(20)
    fit = auto_context.fit(*planned(), CPU)
    assert 2 <= fit.context < 128 and "counted with a margin of 50 %" in fit.sentence()


def test_error_if_no_context_fits(free: Callable[[float], None]) -> None:
    free(3)
    with pytest.raises(ConfigError, match=r"even a group of 2 takes \d+ MB .* of the 3 MB free .* smaller encoder"):
        auto_context.fit(*planned(), CPU)


@pytest.mark.slow
def test_waiting_batches_and_rows_count(free: Callable[[float], None]) -> None:
    """They depend on the batch, not on the group."""
    free(1000)
    sizes = {}
    for name, settings in {
        "small": {"batch_size": 32},
        "large": {"batch_size": 128},
        "streamed": {"cache_on_device": False},
    }.items():
        recipe, source = planned(**settings)
        bench = memory_bench.MemoryBench(recipe, source, CPU, workers=3)
        bench.trial(8, dry=False)
        sizes[name] = bench.batch
    per = 128 * 2 * 20 * 20  # the crops of a batch, one channel
    assert sizes["streamed"] == 7 * per + 128 * 8 * 2 * 128 * 4  # one in use, two in each of three workers; rows
    assert sizes["small"] < sizes["large"]


@pytest.mark.slow
def test_state_of_the_caller_is_unchanged(free: Callable[[float], None], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    free(40)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.is_grad_enabled()
    built = api.prepare("digits-canvas", **SMALL)
    assert torch.equal(before[0], torch.get_rng_state()) and torch.is_grad_enabled() == before[2]
    assert np.random.get_state()[1].tolist() == before[1]
    assert not list(tmp_path.iterdir()) and 2 <= built.context < 128 == built.recipe.batch_size
    plain = api.prepare("digits-canvas", **SMALL | {"context": built.context})
    assert built.recipe == plain.recipe
    assert_same_state(built.network.state_dict(), plain.network.state_dict())


# Runs


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_run_keeps_the_number(
    free: Callable[[float], None], costs: Callable[..., list[int]], tmp_path: Path, monkeypatch: Any
) -> None:
    """recipe.json and the command contain it; a resume requires it and does not search."""
    free(11)
    costs(lambda context: context * MB)
    done = tiny("simclr", tmp_path / "auto", context="auto", epochs=1)
    context = done.recipe.context
    assert context == 8 == done.result["context"], "of 16, in 80 % of 11 MB"
    recipe = json.loads((tmp_path / "auto" / "recipe.json").read_text())
    metadata = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert recipe["context"] == context == metadata["context"] and f"--set context={context}" in metadata["command"]

    tiny("simclr", tmp_path / "given", context=context, epochs=1)
    assert_same_state(saved(tmp_path / "auto"), saved(tmp_path / "given"))

    monkeypatch.setattr(auto_context, "fit", lambda *_: pytest.fail("searched again"))
    again = tiny("simclr", tmp_path / "auto", context="auto", epochs=1, resume=True)
    assert again.recipe.context == context
    with pytest.raises(ConfigError, match="keeps its recipe: context = 15"):
        tiny("simclr", tmp_path / "auto", context=15, epochs=1, resume=True)


@pytest.mark.slow
def test_run_started_without_a_context_resumes_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("simclr", tmp_path, context=None, epochs=1)
    monkeypatch.setattr(auto_context, "fit", lambda *_: pytest.fail("searched"))
    assert tiny("simclr", tmp_path, context="auto", epochs=1, resume=True).recipe.context is None


def test_build_needs_a_resolved_context() -> None:
    with pytest.raises(ConfigError, match="resolve"):
        build(*planned(), device=CPU)


# Command line


LINE = "pretrain --data digits-canvas --set subset=200 --batch 40 --dry-run"


@pytest.mark.slow
def test_dry_run_prints_the_context_found(free: Callable[[float], None], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    free(27)
    result = run(f"{LINE} --context auto")
    assert result.exit_code == 0 and not list(tmp_path.iterdir())
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("# context: ")]
    context = yaml.safe_load(result.stdout)["context"]
    assert f"# context: {context} of 40, found" in line and f"set context={context}" in line and "limit 80 %" in line
    free(1000)
    report = one_object(run(f"{LINE} --set context=auto --json").stdout)
    assert report["context"] == report["recipe"]["context"] == report["context_found"]["context"] == 40
    Path("auto.yaml").write_text("context: auto\n")
    assert one_object(run(f"{LINE} --config auto.yaml --json").stdout)["context_found"]["larger"] is None
    free(3)
    refused = run(f"{LINE} --context auto")
    assert refused.exit_code == 2 and "even a group of 2" in refused.stderr and not refused.stdout


@pytest.mark.parametrize("value", ["nonsense", "0", "1", "-8", "2.5", "true", "[8]"])
def test_invalid_contexts_are_refused(value: str) -> None:
    ways = [f"--set context={value}"] + ([f"--context={value}"] if value != "[8]" else [])
    for words in ways:
        refused = run(f"{LINE} {words}")
        assert refused.exit_code == 2 and "whole number of at least 2, auto, or null" in refused.stderr, refused.stderr


def test_valid_contexts() -> None:
    for value, wanted in ((None, None), ("auto", "auto"), (8, 8), ("8", 8)):
        recipe = make({"data": "photos", "context": value})
        assert recipe.context == wanted and make(recipe.flat()) == recipe


# Figures


def test_the_table_of_cards_is_what_the_file_makes() -> None:
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("render", root / "scripts" / "render_results.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    page = root / "docs" / "large-batches.md"
    assert page.read_text() == render.scaling_page(page), "python scripts/render_results.py writes it again"
    assert page.read_text().count("| resnet50, 224 px, ") == 4
    spec = importlib.util.spec_from_file_location("context_memory", root / "benchmarks" / "context_memory.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    record = json.loads((root / "results" / "context-memory.json").read_text())
    assert list(record["entries"]) == list(benchmark.ENTRIES)
    for row in record["entries"].values():
        for card, context in row["contexts"].items():
            taken = row["fixed"] + row["rows"] + np.array([1, 2]) * context * row["per_sample"]
            assert (
                taken[0] <= auto_context.LIMIT * float(card) * 1e9 < taken[1]
                and benchmark.context(row, float(card)) == context
            )


# Memory limits of containers and jobs


def test_a_limit_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limited_bytes", lambda: [12_000, 8_000])
    assert memory.free_bytes(CPU, 4) == 2_000


# Ranks


def found_on_a_rank() -> list[dict[str, Any]]:
    """Return the contexts found on ranks with unequal memory, plain, with synchronised norm, and sharded."""
    from inbatch.runtime import distributed

    memory_bench.free_bytes = lambda *_: (
        (1000 if distributed.rank() == 0 else 40) * MB
    )  # this process ends with the test
    return [
        auto_context.fit(*resolve_recipe("digits-canvas", SMALL | more), CPU).json()
        for more in ({}, {"sync_norm": True}, {"shard": True})
    ]


@pytest.mark.slow
def test_ranks_agree() -> None:
    one, other = on_ranks(2, found_on_a_rank)
    assert one == other and [fit["share"] for fit in one] == [64, 128, 64]
    for fit in one:
        assert fit["free_bytes"] == 40 * MB and fit["share"] % fit["context"] == 0 and fit["context"] >= 4
