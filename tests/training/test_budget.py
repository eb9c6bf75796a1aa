"""Time budgets: syntax, the plan of a run within a budget, and the adaptation of its length to the measured speed."""

import json
import math
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import assert_same_state, leave_out_evaluation, saved, stop_after
from typer.testing import CliRunner

import inbatch
from inbatch.apps.cli import app
from inbatch.errors import ConfigError, Preempted
from inbatch.models import create_encoder, save_encoder
from inbatch.training import budget, calibration, evaluation_plan, requested_settings
from inbatch.training.budget import Pace, RunClock, Timeline, duration, parse_budget
from inbatch.training.budget_plan import Choice, plan_budget
from inbatch.training.build import build
from inbatch.training.extra_passes import ExtraPasses, combined, fitting_steps, run_seconds, survey_seconds
from inbatch.training.monitors.online_evaluation import limited
from inbatch.training.recipe import make
from inbatch.training.resolve import resolve_recipe


def test_parse_budget_reads_minutes_hours_and_days() -> None:
    written = {"45m": 2700, "1h30m": 5400, "2d": 172800, "90s": 90, "0.5h": 1800, " 1H ": 3600, 60: 60, 61.5: 61.5}
    written |= {"1h 30m": 5400, "5 min": 300, "2 days": 172800, "1.5 hours": 5400, timedelta(minutes=5): 300}
    for text, seconds in written.items():
        assert parse_budget(text) == seconds


def test_bad_budgets_are_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    for text in ("0", "-5m", "soon", "1s", "45", "5 m m", "infd", "nan", "m", "1m2", "9" * 400 + "d", "1001d"):
        with pytest.raises(ConfigError, match="budget = "):
            parse_budget(text)
        done = CliRunner().invoke(app, ["pretrain", "--data", "digits-canvas", "--out", str(tmp_path / "run"),
                                        f"--budget={text}"])  # fmt: skip
        assert done.exit_code == 2 and done.output.count("\n") == 1 and "budget" in done.output, done.output
    for value, error in ((True, "not a time"), (math.nan, "not a time"), (math.inf, "too long"), (10**400, "too long")):
        with pytest.raises(ConfigError, match=error):
            parse_budget(value)
    for more in ([], ["--set", "steps=3"], ["--set", "steps=3", "--encoder", "fast"]):
        words = ["pretrain", "--data", "nowhere", "--budget", "45m", "--epochs", "3", *more]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and "both set the length" in done.output
    assert not (tmp_path / "run").exists()


def test_duration_is_short_and_has_units() -> None:
    for seconds, text in ((12.3, "12 s"), (1800, "30 min"), (12000, "3 h 20 min"), (11 * 86400, "11 days")):
        assert duration(seconds) == text
    assert duration(10**9).endswith("years")


def test_timeline_without_a_change_is_the_step_itself() -> None:
    timeline = Timeline(100)
    assert timeline.total == 100
    assert all(timeline.place(step) is step for step in (0, 1, 57, 100))


def test_timeline_stretches_the_rest_of_the_plan_to_the_steps_left() -> None:
    timeline = Timeline(100)
    timeline.change(40, 30)  # the last 60 of the plan in 30 steps
    assert timeline.total == 70
    assert [timeline.place(step) for step in (0, 39, 40, 41, 55, 70)] == [0, 39, 40, 42, 70, 100]
    timeline.change(55, 60)  # the last 30 in 60
    assert timeline.total == 115
    assert [timeline.place(step) for step in (40, 55, 57, 115)] == [40, 70, 71, 100]
    places = [timeline.place(step) for step in range(116)]
    assert all(a < b for a, b in zip(places, places[1:], strict=False)) and timeline.progress(115) == 1
    timeline.change(60, 0)
    assert timeline.total == 60 and timeline.progress(60) == 1


def test_pace_keeps_a_plan_that_fits_and_changes_one_that_does_not() -> None:
    timeline, pace = Timeline(100), Pace(100.0, reserve=10.0)
    assert pace.revised(10, timeline, used=10.0, per_step=0.85) is None
    slower = pace.revised(10, timeline, used=10.0, per_step=1.7)
    assert slower is not None and 40 < slower < 50 and slower * 1.7 + 10 + 10 <= 100
    faster = pace.revised(10, timeline, used=10.0, per_step=0.4)
    assert faster is not None and faster > 190
    assert pace.revised(95, timeline, used=50.0, per_step=0.4) is None  # too late for another schedule
    assert pace.revised(50, timeline, used=99.0, per_step=1.0) == 0


def test_pace_counts_cheaper_steps_of_a_run_whose_images_grow() -> None:
    pace = Pace(100.0, growth=[(0.5, 0.25)])
    steps = pace.fitting(0.0, per_step=0.25, progress=0.0)  # half at 0.25 s, half at 1 s
    assert math.isclose(steps * (0.25 + 1.0) / 2, 100, rel_tol=0.05)
    assert math.isclose(pace.fitting(0.0, per_step=1.0, progress=0.75), 100, rel_tol=0.05)


def test_run_clock_ends_a_run_in_time_for_any_duration_of_steps() -> None:
    for slow_from, factor in ((10**9, 1.0), (50, 2.0), (20, 0.5), (80, 5.0)):
        now = 0.0
        timeline = Timeline(100)
        clock = RunClock(Pace(110.0, reserve=5.0), lambda: now)  # noqa: B023
        clock.start(0, 100)
        step = 0
        while step < timeline.total:
            now += 1.0 * (factor if step >= slow_from else 1.0)
            step += 1
            if clock.due():
                left, _ = clock.check(step, timeline, 0)
                if left is not None:
                    timeline.change(step, left)
        assert 110 * 0.85 <= now + 5 <= 110 * 1.05, (slow_from, factor, now)
        assert timeline.progress(step) == 1


def test_surveys_and_curated_steps_are_counted_in_the_plan() -> None:
    """The longest run whose steps and surveys fit; curation begins in the second of 10 epochs here."""

    class Curated:
        def first_epoch(self, epochs: int) -> int:
            return max(1, math.ceil(0.1 * epochs))

    def run(curator: Any, surveys: range) -> Any:
        method, sampler = SimpleNamespace(surveys=lambda epoch: epoch in surveys), None
        loader = SimpleNamespace(steps=10, sampler=sampler)
        return SimpleNamespace(loader=loader, method=method, step=SimpleNamespace(curator=curator))

    nothing, surveyed = run(None, range(0)), run(None, range(2, 10**6))
    assert fitting_steps(nothing, 100.5, 1.0, ExtraPasses()) == 100
    assert run_seconds(surveyed, 100, 1.0, ExtraPasses(survey=5.0)) == 100 + 8 * 5
    assert fitting_steps(surveyed, 140.0, 1.0, ExtraPasses(survey=5.0)) == 100
    assert fitting_steps(surveyed, 139.9, 1.0, ExtraPasses(survey=5.0)) == 99
    assert fitting_steps(surveyed, 20.0, 1.0, ExtraPasses(survey=5.0)) == 20, "too short for a survey"
    curated = run(Curated(), range(0))
    assert run_seconds(curated, 100, 1.0, ExtraPasses(plain=0.5)) == 95
    steps = fitting_steps(curated, 95.0, 1.0, ExtraPasses(plain=0.5))  # from 101 steps on, two epochs are not curated
    assert steps >= 100 and run_seconds(curated, steps, 1.0, ExtraPasses(plain=0.5)) <= 95
    assert combined([(0.5, 0.4)], [(0.1, 0.5)]) == [(0.1, 0.2), (0.5, 0.4)] and combined([], []) == []


@pytest.mark.parametrize("known", [0.0, 8.0])
def test_run_clock_leaves_time_for_surveys(known: float) -> None:
    """Before each epoch of 10 steps, from the fourth on; if the calibration knows their duration, the plan holds."""
    now, timeline, step = 0.0, Timeline(100), 0
    clock = RunClock(Pace(163.0), lambda: now)
    clock.survey_seconds = known
    clock.start(0, 100)

    def surveys(more: int) -> int:
        return len([epoch for epoch in range(-(-step // 10), -(-(step + more) // 10)) if epoch >= 3])

    while step < timeline.total:
        if step % 10 == 0 and step >= 30:
            now += 8.0
            clock.paused(8.0)
            clock.survey_seconds = 8.0
        now, step = now + 1.0, step + 1
        if clock.due():
            left, _ = clock.check(step, timeline, 0, 0, surveys)
            if left is not None:
                timeline.change(step, left)
    assert 163 * 0.9 <= now <= 163 and (timeline.total == 100 or not known)


@pytest.mark.parametrize(("method", "more"), [
    ("simclr", {"sampler.name": "neighbours"}), ("pcl", {"method.num_clusters": (4, 8), "method.queue_size": 32}),
    ("simclr", {"curate.name": "redraw"})])  # fmt: skip
def test_extra_passes_are_measured(method: str, more: dict[str, Any]) -> None:
    """Surveys on small problems, curation by steps that curate, although the first epoch does not."""
    settings = {"method.name": method, "encoder.name": "tiny", "batch_size": 16, "steps": 100, "epochs": 25} | more
    built = build(*resolve_recipe(IMAGES, settings), device=torch.device("cpu"))
    assert (survey_seconds(built) > 0) == ("curate.name" not in more)
    if "curate.name" in more:
        seen = []
        embed = built.step.curator._embed
        built.step.curator._embed = lambda model, batch: seen.append(batch.epoch) or embed(model, batch)
        plain = calibration._costs(built, 0.01)[2]
        assert set(seen) == {built.step.curator.starts} and 0 < plain <= 1


IMAGES = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _pretrain(out: Path, **fields: Any) -> inbatch.Run:
    settings = {"encoder": "tiny", "batch_size": 16, "quiet": True, "preset": "none", "views": "plain"}
    settings |= {"views": "simclr_cifar", "steps": 13, "seed": 3, "checkpoint_every": 1}
    return inbatch.pretrain(IMAGES, "simclr", out=out, **settings | fields)


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_steps_end_a_run_within_an_epoch(tmp_path: Path) -> None:
    run = _pretrain(tmp_path / "run", evaluate_every=2)
    assert run.result["steps"] == 13 and json.loads((tmp_path / "run/run.json").read_text())["last_step"] == 13
    assert [entry["epoch"] for entry in run.result["curve"]] == [0, 2, 3.25]


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_run_whose_length_changed_resumes_and_repeats_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"steps": 20, "replans": [[6, 7]]}
    whole = _pretrain(tmp_path / "whole", **changes)
    assert whole.result["steps"] == 13
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Preempted):
            _pretrain(tmp_path / "run", **changes)
    inbatch.pretrain(IMAGES, resume=tmp_path / "run", quiet=True)
    inbatch.pretrain(IMAGES, config=tmp_path / "run/recipe.json", out=tmp_path / "again", quiet=True)
    for name in ("run", "again"):
        assert_same_state(saved(tmp_path / "whole"), saved(tmp_path / name))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow budgets of seconds, and try one encoder."""
    monkeypatch.setattr(budget, "LEAST", 1.0)
    monkeypatch.setattr(calibration, "WIDTHS", (8,))


def test_a_budget_is_planned_kept_and_repeated_without_calibrating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "FEWEST", -(10**9))  # beside other work, calibration may take the whole budget
    run = inbatch.pretrain(IMAGES, out=tmp_path / "run", budget="5s", batch_size=16)
    output = capsys.readouterr().err
    assert -1 < output.find("timing real steps, for about 10 s") < output.find("Expected: about")
    assert run.result["wall_seconds"] < 60  # on a busy machine a step, an import or a picture may take long
    recipe = json.loads((tmp_path / "run/recipe.json").read_text())
    assert recipe["budget"] == 5.0 and recipe["preset"] == "fast" and recipe["steps"] >= 1
    assert run.result["calibration"]["tried"]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(calibration, "_costs", refuse)
    leave_out_evaluation(monkeypatch)
    inbatch.pretrain(
        IMAGES, config=tmp_path / "run/recipe.json", out=tmp_path / "again", quiet=True, settings={"budget": None}
    )
    assert_same_state(saved(tmp_path / "run")["network"], saved(tmp_path / "again")["network"])

    before = (tmp_path / "run/result.json").read_bytes()
    again = inbatch.pretrain(IMAGES, resume=tmp_path / "run")
    assert "is finished" in capsys.readouterr().err and again.result["steps"] == run.result["steps"]
    assert (tmp_path / "run/result.json").read_bytes() == before


def _plan(**settings: Any) -> Choice:
    settings = {key.replace("__", "."): value for key, value in settings.items()} | {"batch_size": 16}
    options: dict[str, Any] = {"device": torch.device("cpu"), "workers": None, "download": False}
    return plan_budget(IMAGES, settings, time.perf_counter(), **options)[0]


def test_given_settings_are_kept_and_the_context_is_searched_first(
    monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    monkeypatch.setattr(calibration, "step_seconds", lambda built, samples: 0.01)
    monkeypatch.setattr(calibration, "_timed", lambda built, step, seconds: 0.01 if step else 0.0143)
    choice = _plan(budget="15s", encoder__width=12, context="auto")
    assert choice.recipe.encoder.options["width"] == 12 and choice.recipe.preset == "fast"
    assert choice.recipe.context == 16 and any(note.startswith("context: 16") for note in choice.notes)
    assert choice.chosen.small == 1.0  # small images cannot cost more: the measurement was noise
    assert _plan(budget="15s", encoder__name="fast").recipe.optimizer.name == "adamw"
    for more in ({"epochs": 2}, {"steps": 3}, {"steps": 3, "encoder__name": "fast"}):
        asked = {key.replace("__", "."): value for key, value in ({"budget": "15s"} | more).items()}
        assert requested_settings.needs_plan(asked)
        with pytest.raises(ConfigError, match="both set the length"):
            _plan(**asked)


def test_whole_steps_are_not_made_if_they_would_take_the_budget(
    monkeypatch: pytest.MonkeyPatch, short: None, tmp_path: Path
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a whole step was made")

    monkeypatch.setattr(calibration, "_timed", refuse)
    monkeypatch.setattr(calibration, "step_seconds", lambda built, samples: 4.0)
    choice = _plan(budget="60s", encoder__name="tiny")  # 60 s allow 12 steps of 4 s, fewer on a busy machine
    assert 5 <= choice.chosen.steps <= 12 and any("steps only" in note for note in choice.notes)
    monkeypatch.setattr(calibration, "step_seconds", lambda built, samples: 100.0)
    with pytest.raises(ConfigError, match=r"too short for tiny, 16 pixels .* about 100\.0 s\. Leave out encoder and"):
        _plan(budget="15s", encoder__name="tiny")
    with pytest.raises(ConfigError, match=r"too short for fast, .* about 100\.0 s\. Set a smaller batch, or give"):
        _plan(budget="15s")
    save_encoder(create_encoder("tiny", size=16, channels=IMAGES.shape[1]), tmp_path)
    with pytest.raises(ConfigError, match=r"The encoder is that of --init: set a smaller batch, or give"):
        _plan(budget="15s", encoder__name="tiny", encoder__init=str(tmp_path))


def test_command_line_replaces_length_and_parts_of_a_file() -> None:
    planned = {"budget": 60.0, "steps": 5, "epochs": 2, "replans": [[1, 2]], "evaluate_every": 3, "knn_k": 7}
    planned |= {"encoder.name": "fast", "encoder.width": 24, "schedule.warmup_epochs": 0.1}
    assert requested_settings._merged(planned, {"seed": 1}) == planned | {"seed": 1}
    kept = {"knn_k": 7, "encoder.name": "fast", "encoder.width": 24}
    for asked in ({"budget": "5m"}, {"epochs": 50}, {"steps": 500}):
        assert requested_settings._merged(planned, asked) == kept | asked
    with pytest.raises(ConfigError, match="replans end the run before its first step"):
        make({"data": "photos", "replans": [[0, 0]]})
    by_hand = {"epochs": 9, "evaluate_every": 3}
    assert requested_settings._merged(by_hand, {"budget": "5m"}) == {"evaluate_every": 3, "budget": "5m"}
    assert requested_settings._merged(planned, {"encoder.name": "tiny"})["encoder.name"] == "tiny"
    assert "encoder.width" not in requested_settings._merged(planned, {"encoder.name": "tiny"})


@pytest.mark.slow
def test_resumed_run_is_evaluated_on_as_many_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    labels = torch.arange(64) % 4
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        patch.setattr(evaluation_plan, "affordable", lambda built, held, seconds: limited(held, 30, 4))
        with pytest.raises(Preempted):
            inbatch.pretrain((IMAGES, labels), out=tmp_path / "run", budget="15s", batch_size=16, quiet=True)
    run = inbatch.pretrain((IMAGES, labels), resume=tmp_path / "run", quiet=True)
    judged = run.result["evaluation"]
    assert (judged["train"]["images"], judged["test"]["images"]) == (30, 4)
    assert run.result["calibration"]["tried"]


def test_one_hour_is_the_default_budget_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    default = requested_settings.with_default_budget({}, "photos", cpu, configured=False)
    assert default["budget"] == "1h" and requested_settings.needs_plan(default)
    for settings in ({"epochs": 3}, {"preset": "cifar"}, {"encoder.name": "tiny"}, {"budget": "2h"}, {"steps": 5}):
        assert requested_settings.with_default_budget(settings, "photos", cpu, configured=False) == settings
    assert requested_settings.with_default_budget({}, "photos", cpu, configured=True) == {}
    assert requested_settings.with_default_budget({}, "digits-canvas", cpu, configured=False) == {}
    assert requested_settings.with_default_budget({}, "photos", torch.device("cuda"), configured=False) == {}
