"""`inbatch choose`: recorded measures, measures on images, bad input, and the study behind its sentence."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from command_line import one_object, run

import inbatch
from inbatch.apps.reports import choose, choose_study
from inbatch.apps.reports.choose_interval import resampled, undecided, with_intervals
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import rankme
from inbatch.evaluation.embeddings import Embeddings
from inbatch.models import create_encoder, save_encoder
from inbatch.rng import permutation
from inbatch.runtime.files import write_json
from inbatch.training import checkpoint
from inbatch.training.monitors import label_free
from inbatch.training.recipe import make

ROOT = Path(__file__).resolve().parents[2]


def entry(**values: Any) -> dict[str, Any]:
    usual = {"step": 9, "epoch": 3, "loss": 2.0, "rankme": 10.0, "lidar": 5.0, "alpha": 1.5, "feature_std": 0.5}
    return usual | values


def recorded_run(folder: Path, last: dict[str, Any], method: str = "simclr", **settings: Any) -> Path:
    """Write the recipe and the result of a run that never was."""
    recipe = make({"data": "digits-canvas", "method.name": method, "encoder.name": "tiny"} | settings)
    write_json(folder / "recipe.json", recipe.nested())
    write_json(folder / "result.json", {"curve": [entry(rankme=99.0, lidar=99.0), last], "steps": 9})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Return three runs; each measure but std and loss prefers another one."""
    lasts = {
        "a": entry(rankme=30.0, knn=0.2), "b": entry(lidar=50.0, loss=1.0, knn=0.9),
        "c": entry(alpha=0.9, feature_std=0.9, knn=0.5),
    }  # fmt: skip
    for name in lasts:
        (tmp_path / name).mkdir()
    return [recorded_run(tmp_path / name, last) for name, last in lasts.items()]


def test_runs_are_ranked_by_their_last_evaluation(runs: list[Path]) -> None:
    for by, expected in {"rankme": "a", "lidar": "b", "alpha": "c", "std": "c", "loss": "b"}.items():
        result = inbatch.choose_run(runs, by=by)
        assert Path(result["recommended"]).name == expected and [one["rank"] for one in result["runs"]] == [1, 2, 2]
        scores = [one["score"] for one in result["runs"]]
        assert scores == sorted(scores, reverse=True) and result["notes"][:1] == study_note(by)
        assert choose_study.NAMES[by] in result["reliability"]
    assert result["kendall_tau"]["loss"] == pytest.approx(2 / 6**0.5) and result["kendall_tau"]["rankme"] < 0
    assert inbatch.choose_run(runs)["by"] == "loss" and not choose_study.reliability("rankme").supported


def study_note(by: str) -> list[str]:
    if choose_study.reliability(by).supported:
        return []
    return [f"the study does not support choosing by this measure: its interval is not above 0; see {choose.PAGE}"]


def test_runs_of_equal_value_are_not_ordered(runs: list[Path]) -> None:
    result = inbatch.choose_run(runs[::-1], by="rankme")  # "b" and "c" recorded 10
    assert [one["rank"] for one in result["runs"]] == [1, 2, 2] and not any("same value" in n for n in result["notes"])
    result = inbatch.choose_run(runs[1:], by="rankme")
    assert [one["rank"] for one in result["runs"]] == [1, 1]
    assert any(f"{runs[1]}, {runs[2]} have the same value of rankme" in n for n in result["notes"])


def test_the_command_prints_table_reliability_and_json(runs: list[Path], tmp_path: Path) -> None:
    words = " ".join(map(str, runs))
    shown = run(f"choose {words} --by lidar").stdout
    assert f"Recommended: {runs[1]}, by lidar" in shown and "Reliability: LiDAR" in shown
    assert "k-NN" in shown and "90.0%" in shown and "Kendall's tau with k-NN here" in shown
    result = one_object(run(f"choose {words} --json -o {tmp_path / 'choice.json'}").stdout)
    assert json.loads((tmp_path / "choice.json").read_text()) == result
    assert {one["run"] for one in result["runs"]} == set(map(str, runs))


def test_limits_of_a_comparison_are_stated(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    other = recorded_run(tmp_path / "d", entry(), "vicreg", subset=50)
    result = inbatch.choose_run([*runs, other])
    notes = " ".join(result["notes"])
    assert result["by"] == "rankme" and "different methods (simclr, vicreg)" in notes and "different images" in notes
    assert result["kendall_tau"] is None  # one run has no k-NN
    same = recorded_run(tmp_path / "d", entry(), **{"method.temperature": 0.9})
    assert "scale of the loss" in " ".join(inbatch.choose_run([runs[0], same], by="loss")["notes"])
    assert "scale of the loss" not in " ".join(inbatch.choose_run(runs, by="loss")["notes"])


def test_a_stopped_run_is_read_from_its_checkpoint(runs: list[Path]) -> None:
    (runs[0] / "result.json").unlink()
    with pytest.raises(ConfigError, match="No checkpoint"):
        inbatch.choose_run(runs)
    checkpoint.save(runs[0] / "checkpoints", {"progress": {"curve": [entry(rankme=77.0, step=4)]}}, step=5)
    first = inbatch.choose_run(runs, by="rankme")["runs"][0]
    assert (first["run"], first["rankme"], first["step"]) == (str(runs[0]), 77.0, 4)
    assert "has not finished" in first["note"]
    checkpoint.save(runs[0] / "checkpoints", {"progress": {"curve": []}}, step=1)
    with pytest.raises(ConfigError, match="before its first evaluation"):
        inbatch.choose_run(runs)


def test_bad_input_is_one_sentence(runs: list[Path], tmp_path: Path) -> None:
    for name in ("empty", "old", "broken"):
        (tmp_path / name).mkdir()
    old = recorded_run(tmp_path / "old", {"step": 9, "rankme": 3.0, "feature_std": 0.1})
    broken = recorded_run(tmp_path / "broken", entry(rankme="high"))
    wrong = {
        f"{runs[0]}": (2, "at least two runs, not 1"),
        f"{runs[0]} {runs[0]}": (2, "only 1 differ"),
        f"{runs[0]} {runs[1]} --by knn": (2, "unknown measure 'knn'"),
        f"{runs[0]} {tmp_path / 'nowhere'}": (2, "is not the folder of a run"),
        f"{runs[0]} {tmp_path / 'empty'}": (2, "it has no recipe.json"),
        f"{runs[0]} {old} --by lidar": (2, "an older version made it; pass --data"),
        f"{runs[0]} {broken}": (3, "rankme is not a number"),
        f"{runs[0]} {runs[1]} --by loss --data x": (2, "training data only"),
        f"{runs[0]} {runs[1]} --by same_image": (2, "the same views for all runs: pass --data"),
        f"{runs[0]} {runs[1]} -o {tmp_path}": (1, "Name another file"),
        "": (2, "Missing argument"),
    }
    for words, (code, sentence) in wrong.items():
        result = run(f"choose {words}")
        assert result.exit_code == code and sentence in result.stderr, (words, result.stderr)
        assert "Traceback" not in result.output
    with pytest.raises(ConfigError, match="seed must be a whole number"):
        inbatch.choose_run(runs, seed=1.5)  # type: ignore[arg-type]
    write_json(runs[0] / "result.json", {"curve": [entry()], "evaluation": "none"})
    assert inbatch.choose_run(runs[:2])["by"] == "loss"
    (runs[0] / "result.json").write_text("{")
    assert run(f"choose {runs[0]} {runs[1]}").exit_code == 3


def test_encoders_of_different_sizes_are_measured_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 255, (30, 3, 24, 24), dtype=torch.uint8)
    for name, size in {"small": 20, "large": 32}.items():
        save_encoder(create_encoder("tiny", size=size).eval(), tmp_path / name)
    with pytest.raises(ConfigError, match="encoder's folder, which has no record of a run: pass --data"):
        inbatch.choose_run([tmp_path / "small", tmp_path / "large"])
    data, labels = (images, [i % 2 for i in range(30)]), []
    monkeypatch.setattr(choose, "IMAGES", 25)
    result = inbatch.choose_run([tmp_path / "small", tmp_path / "large"], data=data)
    assert result["by"] == "same_image" and all(0 <= one["score"] == one["same_image"] <= 1 for one in result["runs"])
    for one in result["runs"]:
        encoder = inbatch.load(one["run"])
        chosen = label_free.Chosen(choose.images_for(None, encoder, data)["train"], None, 0, 25)
        expected = rankme(torch.from_numpy(encoder.embed([chosen.source.image(int(i)) for i in chosen.indices])))
        assert one["rankme"] == pytest.approx(float(expected), rel=1e-3) and one["images"] == 25
        assert 0 <= one["knn"] <= 1 and one["loss"] is None and one["lidar"] > 1
        labels.append(one["encoder"])
    assert result["kendall_tau"]["loss"] is None and labels == ["tiny", "tiny"]
    best, other = result["runs"]
    number = min(25, label_free.LIDAR_IMAGES)
    assert best["low"] <= best["score"] <= best["high"] and best["measured"] == number and "difference" not in best
    assert other["difference"]["low"] <= other["difference"]["value"] <= other["difference"]["high"]
    unclear = any(f"cannot be told apart by same_image of {number} images" in note for note in result["notes"])
    assert unclear == (other["difference"]["low"] <= 0)
    with pytest.raises(DataError):
        inbatch.choose_run([tmp_path / "small", tmp_path / "large"], data=tmp_path / "nowhere")


def test_images_whose_classes_cannot_be_compared_order_runs_without_k_nn() -> None:
    """All images are of one class, or the only ones of a rare class are among the queries."""
    encoder = create_encoder("tiny", size=16)
    labels = torch.zeros(30, dtype=torch.long)
    rare = labels.clone()
    rare[permutation(0, 1, 30)[0]] = 1
    several = labels.clone()
    several[::2] = 1
    for own, known in ((labels, False), (rare, False), (several, True)):
        clean = Embeddings(torch.randn(30, 8), own, tuple(map(str, range(30))), "images", "features")
        assert (choose._knn(encoder, clean, 0) is not None) == known


def measured(run: str, hits: list[int]) -> dict[str, Any]:
    """Return a run of which the second views of these images were found."""
    matches = torch.tensor(hits).double()
    values = resampled(lambda at: float(matches[at].mean()), len(hits), 0)
    return {"run": run, "score": float(matches.mean()), "resampled": values, "measured": len(hits)}


def test_few_images_do_not_order_runs_and_many_do() -> None:
    """The interval of 20 of 100 hits is that of a binomial share; differences are of the same images."""
    few = with_intervals([measured("a", [1, 1, 1, 0, 0, 0, 1, 0]), measured("b", [0, 1, 0, 1, 1, 0, 0, 0])])
    assert few[1]["difference"]["value"] == 0.125 and few[1]["difference"]["low"] < 0 and "resampled" not in few[0]
    [note] = undecided(few, "same_image")
    assert note.startswith("a and b cannot be told apart by same_image of 8 images: the difference is 0.125, 95 %")
    many = with_intervals([measured("a", 60 * [1] + 40 * [0]), measured("b", 20 * [1] + 80 * [0])])
    assert undecided(many, "same_image") == [] and many[1]["difference"]["low"] > 0.2
    assert many[1]["high"] - many[1]["score"] == pytest.approx(1.96 * (0.2 * 0.8 / 100) ** 0.5, rel=0.2)
    unknown = with_intervals([measured("a", [1, 0]), measured("b", [1, 0, 0])])
    assert (
        unknown[1]["difference"]["low"] is None and "no interval of std is known for b" in undecided(unknown, "std")[0]
    )


def test_the_width_of_a_run_without_labels_is_known(runs: list[Path]) -> None:
    for path, width in zip(runs, (96, 48, 96), strict=True):
        result = json.loads((path / "result.json").read_text())
        write_json(path / "result.json", result | {"evaluation": None, "width": width})
    choice = inbatch.choose_run(runs)
    assert {one["width"] for one in choice["runs"]} == {48, 96}
    assert any("different widths (48, 96)" in note for note in choice["notes"])


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("choose_tables", ROOT / "scripts" / "choose_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["choose_tables"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_page_and_quoted_figures_are_what_the_records_give(study: ModuleType) -> None:
    runs = study.read_runs()
    again = "python scripts/choose_tables.py writes them again"
    assert study.PAGE.read_text() == study.page(runs), again
    assert study.QUOTING.read_text() == study.source(runs), again


def test_runs_with_equal_measures_have_an_undefined_order() -> None:
    from inbatch.apps.cli.choosing import _taus

    assert _taus({"loss": 0.5, "rankme": None}) == "Kendall's tau with k-NN here: loss +0.50"
    assert "cannot be computed" in _taus({"loss": float("nan"), "rankme": None})
