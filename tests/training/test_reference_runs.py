"""Reference runs: bands, their messages, and that a comparison does not change the run."""

import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import assert_same_state, evaluate_on_few_images, saved, stop_after, tiny
from typer.testing import CliRunner, Result

from inbatch import api
from inbatch.api import load_run
from inbatch.apps.cli import app
from inbatch.errors import ConfigError, Preempted
from inbatch.training.metric_logger import Log
from inbatch.training.monitors import shipped_references
from inbatch.training.monitors.comparison import Comparison
from inbatch.training.monitors.curve_plot import plot_curves
from inbatch.training.monitors.online_evaluation import evaluation_epochs
from inbatch.training.monitors.reference import FLOORS, Reference, read_reference
from inbatch.training.monitors.reference_files import MEASURES
from inbatch.training.train_state import TrainState

EVERY = {"evaluate_every": 1}


@pytest.fixture(scope="module", autouse=True)
def unjudged() -> Iterator[None]:
    """Replace the final evaluation and the final picture, which no test here needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inbatch.training.run_result.evaluation", lambda *_: {})
        nothing = {"comparison_seconds": 0.0, "initial": "untrained encoder", "untrained": {}, "unlabelled": {}}
        patch.setattr("inbatch.training.run_result.compare_with_initial", lambda *_: nothing)
        patch.setattr("inbatch.training.run_result.plot_curves", lambda *_: None)
        evaluate_on_few_images(patch)
        yield


def curve(*knn: float, every: int = 1, **others: float) -> list[dict[str, float]]:
    return [{"epoch": i * every, "knn": x} | others for i, x in enumerate(knn)]


def run(line: str) -> Result:
    words = "pretrain --data digits-canvas --set subset=200 --batch 40 --context 20 --set method.out_dim=8 "
    return CliRunner().invoke(app, shlex.split(words + line), catch_exceptions=False, env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of two epochs, evaluated after each."""
    return tiny("simclr", tmp_path_factory.mktemp("runs") / "run", **EVERY).directory


def changed(run: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change a run's result."""
    result = json.loads((run / "result.json").read_text())
    change(result)
    to.write_text(json.dumps(result))
    return to


def falsify(result: dict[str, Any]) -> None:
    for entry in result["curve"]:
        entry["knn"] += 0.5 * (entry["epoch"] == 1)
        entry["rankme"] *= 9


# Band


def test_band_equals_the_literal_version() -> None:
    """Against a literal version: three seeds, evaluated after different epochs; at an evaluation and between two."""
    seeds = [curve(0.1, 0.4, 0.6), curve(0.2, 0.45, 0.5), curve(0.3, 0.9, every=2)]
    reference = Reference("r", seeds)
    at = {0: [0.1, 0.2, 0.3], 1: [0.4, 0.45, 0.6], 1.5: [0.5, 0.475, 0.75], 2: [0.6, 0.5, 0.9]}
    means = {epoch: sum(x) / 3 for epoch, x in at.items()}
    variances = {epoch: sum((x - means[epoch]) ** 2 for x in xs) / 2 for epoch, xs in at.items()}
    usual = (variances[1] + variances[2]) / 2  # of the evaluations, without the untrained encoder's
    for epoch, mean in means.items():
        half = 3 * math.sqrt(max(variances[epoch], usual) * (1 + 1 / 3))
        assert reference.band("knn", epoch) == pytest.approx((mean - half, mean, mean + half))
    assert usual > variances[1] and variances[2] > usual, "both are tried"
    assert reference.band("knn", 2.1) is None and reference.band("loss", 1) is None
    assert reference.epochs == [0, 1, 2]


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_band_has_a_floor(seeds: int) -> None:
    entry = {"epoch": 4, "knn": 0.5, "loss": -2.0, "feature_std": 0.6, "rankme": 40.0}
    reference = Reference("r", [[entry]] * seeds)
    bands = {measure: reference.band(measure, 4) for measure in MEASURES}
    halves = {"knn": 0.03, "loss": 0.1, "feature_std": 0.1, "rankme": 10.0}
    assert FLOORS.keys() == halves.keys()
    for measure, half in halves.items():
        assert bands[measure] == pytest.approx((entry[measure] - half, entry[measure], entry[measure] + half))


def test_seed_that_ends_early_is_left_out_after_its_end() -> None:
    reference = Reference("r", [curve(0.2, 0.4), curve(0.4, 0.6, 0.8)])
    half = 3 * math.sqrt(0.02 * 2)  # the deviation at the evaluation before, of one seed
    assert reference.band("knn", 2) == pytest.approx((0.8 - half, 0.8, 0.8 + half))


def test_losses_are_compared_over_the_same_steps() -> None:
    """A run evaluated every other epoch is compared with the mean of both; one evaluated more often is not compared."""
    every = [{"epoch": e, "knn": 0.1 * e} | ({"loss": 9.0 / e} if e else {}) for e in range(5)]
    reference = Reference("r", [every])
    for looks, losses in {(0, 2, 4): {2: 6.75, 4: 2.625}, (0, 3): {3: 5.5}, (0, 1, 2, 3, 4): {1: 9, 4: 2.25}}.items():
        for epoch, loss in losses.items():
            assert reference.average_losses(looks).band("loss", epoch)[1] == pytest.approx(loss)
    sparse = reference.average_losses((0, 4))
    # the last epoch alone is not known
    assert sparse.average_losses((0, 1, 2, 3, 4)).band("loss", 4) == sparse.band("loss", 4)
    assert Reference("r", [[every[0], every[4]]]).average_losses(range(5)).band("loss", 4) is None
    assert sparse.band("knn", 1)[1] == pytest.approx(0.1), "only losses are means"


def test_sentences_say_what_is_outside_and_where() -> None:
    reference = Reference("r", [curve(0.35, 0.35, loss=2.0, feature_std=0.5, rankme=20.0)])
    inside = {"epoch": 1, "knn": 0.35, "loss": 2.0, "feature_std": 0.5, "rankme": 20.0}
    assert reference.outside(inside) == [] == reference.outside({"epoch": 2, "knn": 0.9})
    assert reference.outside(inside | {"knn": 0.312, "rankme": 30.5}) == [
        "k-NN 31.2 % is below the band of the reference (32.0 to 38.0 %) at epoch 1",
        "RankMe 30.5 is above the band of the reference (15 to 25) at epoch 1",
    ]
    for loss, words in {math.nan: "loss nan is not a number", math.inf: "loss inf is above"}.items():
        (sentence,) = reference.outside(inside | {"loss": loss})
        assert sentence.startswith(words), "what is not a number is not masked"


def test_leaving_and_entering_the_band_are_reported_once() -> None:
    reference, mine, messages = Reference("r", [curve(*[0.5] * 8)]), [], []
    compared = Comparison(reference, mine, range(8), 5)
    for entry in curve(0.5, 0.4, 0.3, 0.9, math.nan, math.nan, 0.5, 0.5, 0.9):  # the last one beyond the reference
        mine.append(entry)
        messages.append(" ".join(compared.new_sentences()))
    for message, words in zip(
        messages, ["", "is below", "", "is above", "is not a number", "", "is back inside", "", ""], strict=True
    ):
        assert words in message and bool(words) == bool(message)
    assert compared.json() == {"reference": "r", "seeds": 1, "looks": 8, "outside": {"knn": [1, 2, 3, 4, 5]}}
    assert "inside the band at 3 of 8 evaluations (k-NN)" in compared.summary()


@pytest.mark.slow
def test_looks_are_those_of_the_run(finished: Path) -> None:
    recipe = load_run(finished).recipe
    for epochs, every, looks in [(2, 1, [0, 1, 2]), (7, 3, [0, 3, 6, 7]), (3, 9, [0, 3])]:
        assert evaluation_epochs(replace(recipe, epochs=epochs, evaluate_every=every)) == looks


# Whole runs


@pytest.mark.slow
def test_a_run_is_inside_its_own_band_and_comparing_changes_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture is drawn after every evaluation; a loss is the mean over steps; a run may replace its reference."""
    losses: list[float] = []
    drawn: list[str] = []
    real = Log.step

    def log(self: Log, step: int, epoch: int, values: Any, images: int) -> None:
        losses.append(float(values["loss"]))
        real(self, step, epoch, values, images)

    monkeypatch.setattr(Log, "step", log)
    monkeypatch.setattr(
        "inbatch.training.monitors.online_evaluation.plot_curves", lambda log, png, compared: drawn.append(png.name)
    )
    own = shutil.copytree(finished, tmp_path / "run")
    again = tiny("simclr", own, compare=own, overwrite=True, **EVERY)
    assert_same_state(saved(own), saved(finished))
    outside: dict[str, list[int]] = {measure: [] for measure in MEASURES}
    assert again.result["compared"] == {"reference": str(own), "seeds": 1, "looks": 3, "outside": outside}
    plain = json.loads((finished / "result.json").read_text())
    assert plain["compared"] is None and plain["curve"] == again.result["curve"]
    assert drawn == ["curves.png"] * 3 and len(losses) == 10
    assert [entry.keys() & MEASURES for entry in plain["curve"]] == [MEASURES.keys() - {"loss"}, *[MEASURES.keys()] * 2]
    for i in (1, 2):
        assert plain["curve"][i]["loss"] == pytest.approx(sum(losses[5 * i - 5 : 5 * i]) / 5, rel=1e-12)


def test_a_mean_masks_no_nan() -> None:
    progress = TrainState(step=2, curve=[{"step": 0}])
    progress.loss = progress.loss + torch.tensor(torch.nan)
    progress.loss = progress.loss + torch.tensor(1.0)
    assert math.isnan(progress.mean_loss()["loss"])
    progress.curve.append({"step": 2})
    assert progress.mean_loss() == {} and float(progress.loss) == 0


@pytest.mark.slow
def test_run_outside_the_band_is_reported_and_exits_with_0(finished: Path, tmp_path: Path) -> None:
    wrong = changed(finished, tmp_path / "wrong.json", falsify)
    done = run(f"--epochs 2 --set evaluate_every=1 --compare {wrong} --out {tmp_path / 'run'}")
    assert done.exit_code == 0
    for words in (
        "1 seed, 2 epochs",
        "k-NN",
        "is below the band",
        "is back inside",
        "RankMe",
        "2 of 3 evaluations (k-NN)",
    ):
        assert words in done.stderr, words
    assert "Not the reference's" not in done.stderr, "the recipes are the same"
    comparison = json.loads((tmp_path / "run" / "result.json").read_text())["compared"]
    assert comparison["outside"] == {"knn": [1], "loss": [], "feature_std": [], "rankme": [0, 1, 2]}
    assert_same_state(saved(tmp_path / "run"), saved(finished))
    assert not list((tmp_path / "run").rglob(".*.tmp"))


@pytest.mark.slow
def test_a_resumed_run_has_the_same_curve_and_verdict(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in an epoch: its loss is the mean of the steps before and after; evaluations before the cut count, too."""
    monkeypatch.setattr("inbatch.training.monitors.online_evaluation.plot_curves", lambda *_: None)
    wrong = changed(finished, tmp_path / "wrong.json", falsify)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 8)
        tiny("simclr", tmp_path / "cut", **EVERY)
    result = tiny("simclr", tmp_path / "cut", resume=True, compare=wrong, **EVERY).result
    assert_same_state(saved(tmp_path / "cut"), saved(finished))
    assert result["curve"] == json.loads((finished / "result.json").read_text())["curve"]
    assert result["compared"]["outside"]["knn"] == [1] and result["compared"]["looks"] == 3


def test_differences_from_the_reference_are_printed_at_the_start(finished: Path) -> None:
    reference = read_reference(finished)
    recipe = load_run(finished).recipe.nested()

    def opening(looks: list[int], **other: Any) -> str:
        return " ".join(Comparison(reference.average_losses(looks), [], looks, 5).opening(recipe | other))

    assert opening([0, 1, 2], seed=7, epochs=2) == opening([0, 1, 2])
    assert "1 seed, 2 epochs" in opening([0, 1, 2]) and "Not " not in opening([0, 1, 2])
    assert "The reference has 2 epochs, this run 3" in opening([0, 1, 2, 3])
    assert "Not the reference's: batch_size (40 there, 8 here)" in opening([0, 1, 2], batch_size=8)
    assert "Not the reference's: data ('digits-canvas' there, 'b' here)" in opening([0, 1, 2], data="a/b")
    assert "the reference has no values at these evaluations: loss" in opening([0])


# Picture


@pytest.mark.slow
def test_the_band_is_in_the_picture_and_cheap(finished: Path, tmp_path: Path) -> None:
    reference = read_reference(finished)
    log, mine = finished / "metrics.jsonl", [{"step": 5} | entry for entry in reference.curves[0]]
    plot_curves(log, tmp_path / "plain.png")
    hostile = replace(reference, name="a\udcff$b\x1b[31m\n_c^")  # a valid path name
    began = time.process_time()
    plot_curves(log, tmp_path / "band.png", Comparison(hostile, mine, [0, 1, 2], 5))
    assert time.process_time() - began < 2  # 0.3 s on a busy core
    grey = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("plain", "band")]
    shares = [(image == (224, 224, 224)).all(-1).mean() for image in grey]
    assert shares[0] < 0.001 < 0.02 < shares[1], shares


# Invalid references

WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no curve": (lambda r: r.pop("curve"), "pass the result.json of a finished run"),
    "no recipe": (lambda r: r.pop("recipe"), "pass the result.json of a finished run"),
    "null": (lambda r: r["curve"][1].update(loss=None), "loss is not a number"),
    "nan": (lambda r: r["curve"][1].update(rankme=math.nan), "rankme is not a number"),
    "no epoch": (lambda r: r["curve"][1].pop("epoch"), "epoch is not a number"),
    "no entries": (lambda r: r.update(curve=[1, 2]), "epoch is not a number"),
    "falling": (lambda r: r["curve"].reverse(), "do not increase"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_result_that_is_none_is_refused(wrong: str, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=WRONG[wrong][1]):
        read_reference(changed(finished, tmp_path / "r.json", WRONG[wrong][0]))


@pytest.mark.slow
def test_bad_references_end_with_2_and_leave_nothing(finished: Path, tmp_path: Path) -> None:
    damaged, unfinished, empty = tmp_path / "damaged.json", tmp_path / "unfinished", tmp_path / "empty"
    damaged.write_bytes((finished / "result.json").read_bytes()[:300])
    unfinished.mkdir()
    empty.mkdir()
    shutil.copy(finished / "recipe.json", unfinished)
    for path, words in [
        (tmp_path / "nowhere", "is not a reference: pass"), ("x" * 5000, "is not a reference: pass"),
        (empty, "is not a reference: pass"), (unfinished, "has not finished"), (damaged, "cannot be read"),
    ]:  # fmt: skip
        done = run(f"--epochs 1 --compare {path} --out {tmp_path / 'run'}")
        assert done.exit_code == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "run").exists()
    assert run(f"--epochs 1 --compare {finished} --dry-run").exit_code == 2


def test_a_folder_of_seeds_is_one_recipe(finished: Path, tmp_path: Path) -> None:
    def seed(number: int) -> Callable[[dict[str, Any]], Any]:
        return lambda result: result["recipe"].update(seed=number)

    for number in (0, 1, 2):
        changed(finished, tmp_path / f"{number}.json", seed(number))
    assert len(read_reference(tmp_path).curves) == 3
    changed(finished, tmp_path / "3.json", seed(1))
    with pytest.raises(ConfigError, match=r"1\.json and 3\.json have the same seed"):
        read_reference(tmp_path)
    changed(finished, tmp_path / "3.json", lambda result: result["recipe"]["optimizer"].update(lr=7))
    with pytest.raises(ConfigError, match=r"0\.json and 3\.json differ in optimizer\.lr"):
        read_reference(tmp_path)


def test_auto_finds_the_runs_of_the_same_recipe(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped_references, "folder", lambda: tmp_path)
    recipe = json.loads((finished / "recipe.json").read_text())
    with pytest.raises(ConfigError, match="this installation contains no reference runs"):
        shipped_references.find_reference(recipe)
    free = {"seed": 5, "data": "/elsewhere/digits-canvas", "knn_k": 3, "precision": "float32", "evaluate_every": 2}
    changed(finished, tmp_path / "same-5.json", lambda r: (r.update(schema=1), r["recipe"].update(free)))
    changed(finished, tmp_path / "same-0.json", lambda r: r.update(schema=1))
    changed(finished, tmp_path / "later.json", lambda r: r.update(schema=2))
    other = {"data": "/elsewhere/other", "epochs": 9}
    changed(finished, tmp_path / "other.json", lambda r: (r.update(schema=1), r["recipe"].update(other)))
    reference = shipped_references.find_reference(recipe)
    assert len(reference.curves) == 2 and "same-0, same-5" in reference.name
    assert api._reference("auto", load_run(finished).recipe) == reference
    with pytest.raises(ConfigError, match=r"The closest, same-0, differs in epochs \(2 there, 3 here\)"):
        shipped_references.find_reference(recipe | {"epochs": 3})
