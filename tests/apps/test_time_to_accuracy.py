"""benchmarks/time_to_accuracy.py: a killed curve resumes unchanged, its file is whole, the target is detected."""

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from inbatch.apps.bench.accuracy import entries, markdown, plot_curves, reached, together
from inbatch.apps.bench.report import texts
from inbatch.errors import ConfigError, DataError

pyarrow = pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("time_to_accuracy", ROOT / "benchmarks" / "time_to_accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 40 training and 20 test images of two classes in the format of CIFAR-10's Parquet files."""
    from pyarrow import Table
    from pyarrow.parquet import write_table

    from inbatch.apps.bench.synthetic_data import draw_images as images
    from inbatch.apps.bench.synthetic_data import jpegs

    folder = tmp_path_factory.mktemp("cifar")
    for seed, (split, count) in enumerate((("train", 40), ("test", 20))):
        labels = np.arange(count) % 2
        pixels = (images(count, 32, seed) // 2 + 100 * labels[:, None, None, None]).astype(np.uint8)
        files = [{"bytes": file, "path": f"{i}.jpg"} for i, file in enumerate(jpegs(pixels, 32))]
        write_table(Table.from_pydict({"image": files, "label": labels.tolist()}), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one layer and plain views instead of lightly's, 2 epochs of 5 steps, and leave threads unchanged."""

    def network(job: dict[str, Any]) -> nn.Sequential:
        pool = nn.AvgPool2d(8)
        return nn.Sequential(pool, nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 16), nn.Linear(16, 4))

    def transform(image: Any) -> list[torch.Tensor]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return [pixels + 0.1 * torch.randn(3, 32, 32) + 0.1 * np.random.rand() for _ in range(2)]

    monkeypatch.setattr(SCRIPT.peer_workloads, "network", network)
    monkeypatch.setattr(SCRIPT.peer_workloads, "criterion", lambda *_: lambda a, b: (a - b).square().mean() - a.std())
    monkeypatch.setitem(SCRIPT.peer_workloads.TRANSFORMS, "lightly", lambda size: transform)
    monkeypatch.setattr(SCRIPT, "RECIPE", SCRIPT.RECIPE | {"batch": 8, "epochs": 2})
    monkeypatch.setattr(SCRIPT, "version", lambda name: "1.6")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def run(data: Path, out: Path, *words: str) -> dict[str, Any]:
    report: dict[str, Any] = SCRIPT.main(["--data", str(data), "--who", "lightly", "--out", str(out), *words])
    assert json.loads(out.read_text()) == report
    return report


def learned(curve: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the entries of the curve that do not depend on the clock."""
    return [tuple(entry[key] for key in ("images", "epoch", "knn", "bank", "queries", "loss")) for entry in curve]


EVERY = ("--every-seconds", "0", "--target", "2")  # evaluate after every step, never reach the target


@pytest.mark.slow
def test_curve_of_a_killed_benchmark_is_continued(
    data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(data, tmp_path / "whole.json", *EVERY)
    assert [entry["images"] for entry in whole["curve"]] == list(range(8, 88, 8)) and whole["reached"] is None
    judge = SCRIPT.look

    def killed(*words: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) in (1, 3, 8):  # before the first step, in the first epoch and in the second
            raise KeyboardInterrupt
        return judge(*words)

    calls: list[int] = []
    monkeypatch.setattr(SCRIPT, "look", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "cut.json", *EVERY)
    cut = run(data, tmp_path / "cut.json", *EVERY)
    assert learned(cut["curve"]) == learned(whole["curve"])
    for key in ("seconds", "cpu_seconds"):
        times = [entry[key] for entry in cut["curve"]]
        assert times == sorted(times) and times[0] > 0 and cut[key] == times[-1]


@pytest.mark.slow
def test_benchmark_at_its_time_limit_saves_and_can_be_continued(data: Path, tmp_path: Path, small: None) -> None:
    whole = run(data, tmp_path / "whole.json", *EVERY)
    report = run(data, tmp_path / "cut.json", *EVERY, "--hours", "0")
    assert report["step"] == 0 and not report["curve"]
    assert learned(run(data, tmp_path / "cut.json", *EVERY)["curve"]) == learned(whole["curve"])


def test_changed_recipe_is_refused(data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run(data, tmp_path / "curve.json", *EVERY, "--hours", "0")
    with pytest.raises(ConfigError, match="holds another run"):
        run(data, tmp_path / "curve.json", *EVERY, "--threads", "7")


@pytest.mark.slow
def test_benchmark_ends_at_the_target(data: Path, tmp_path: Path, small: None) -> None:
    report = run(data, tmp_path / "curve.json", "--every-seconds", "0", "--target", "0")
    assert report["step"] == 1 and report["reached"]["cpu_seconds"] == report["cpu_seconds"]
    report = run(data, tmp_path / "curve.json", "--every-seconds", "0", "--target", "0", "--past-target")
    assert report["step"] == 10 and report["reached"]["images"] == 8


def test_whole_bank_is_used_only_near_the_target(data: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCRIPT, "FIRST", 10)
    train, test = (SCRIPT.labelled(data / f"{split}.parquet") for split in ("train", "test"))
    encoder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    look = SCRIPT.look(encoder, train, test, target=2.0, every=0.0)
    assert look["bank"] == 10 and look["knn"] == 1  # brightness separates these classes
    assert SCRIPT.look(encoder, train, test, target=2.0, every=1e9)["bank"] == 40
    assert SCRIPT.look(encoder, train, test, target=1.0, every=0.0)["bank"] == 40


def entry(cpu: float, knn: float, bank: int) -> dict[str, Any]:
    costs = {"cpu_seconds": cpu, "seconds": 2 * cpu, "images": int(cpu)}
    return costs | {"knn": knn, "bank": bank, "queries": 20}


def test_the_first_look_that_finds_it_reaches_a_target() -> None:
    curve = [entry(0, 0.1, 10), entry(20, 0.4, 100), entry(30, 0.5, 100), entry(40, 0.7, 10), entry(50, 0.6, 100)]
    expected = {"target": 0.5, "seconds": 60, "cpu_seconds": 30, "images": 30, "cpu_seconds_before": 20}
    assert reached(curve, 0.5) == expected | {"bank": 100, "queries": 20}
    assert reached(curve, 0.8) is None and reached([], 0.5) is None


def test_the_recipe_is_lightlys() -> None:
    """The learning rate, the views and the network are built from lightly's parts."""
    pytest.importorskip("lightly")
    transform = SCRIPT.peer_workloads.TRANSFORMS["lightly"](32)
    text = str(transform.transforms[0].transform)
    assert "brightness=(0.6" in text and "hue=(-0.1, 0.1)" in text, "the jitter of small images is halved"
    model = SCRIPT.peer_workloads.network({"library": "lightly"})
    assert model[:-1](torch.zeros(2, 3, 32, 32)).shape == (2, 512) and model(torch.zeros(2, 3, 32, 32)).shape == (
        2,
        128,
    )
    assert SCRIPT.peer_workloads.criterion("lightly", SCRIPT.RECIPE["temperature"]).temperature == 0.5


@pytest.mark.slow
def test_inbatchs_curve_is_that_of_its_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    words = ["--data", str(data), "--who", "inbatch", "--out", str(tmp_path / "ours.json"), "--threads", "1"]
    command = "simclr --encoder tiny --epochs 2 --batch 8 --set subset=32 --set evaluate_every=1 --quiet"
    report = SCRIPT.main([*words, "--target", "0.0", "--command", command])
    result = json.loads((tmp_path / "ours" / "result.json").read_text())
    curve = report["curve"]
    assert [(e["images"], e["epoch"], e["bank"], e["queries"]) for e in curve] == [
        (32 * i, i, 32, 20) for i in range(3)
    ]
    assert [e["knn"] for e in curve] == [e["knn"] for e in result["curve"]]
    assert curve[0]["loss"] is None and curve[-1]["loss"] == pytest.approx(result["curve"][-1]["loss"], rel=0.5)
    assert curve[-1]["seconds"] == result["training_seconds"] > 0
    assert curve[-1]["cpu_seconds"] == result["training_cpu_seconds"] > curve[1]["cpu_seconds"] > 0
    assert report["reached"]["cpu_seconds"] == 0 and report["recipe"]["epochs"] == 2
    again = SCRIPT.main([*words, "--target", "0.0", "--command", command])
    assert again["curve"] == curve, "a finished run was trained again"


def test_a_log_without_costs_is_refused(tmp_path: Path) -> None:
    assert entries(tmp_path, 10) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "knn": 0.5}\n{"step": 1, "knn": 0.5}\n')
    with pytest.raises(DataError, match="is from an older version of inbatch"):
        entries(tmp_path, 10)


def test_evaluation_of_all_images_replaces_that_of_a_part(tmp_path: Path) -> None:
    cost = {"training_seconds": 5, "cpu_seconds": 9, "images": 20}
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 4.0}, {"step": 2, "bank": 10, "queries": 5} | cost]
    lines.append({"step": 2, "knn": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    for bank, knn in ((10, 0.5), (40, 0.6)):
        judged = {"train": {"labelled": bank}, "test": {"labelled": 5}, "knn": {"top1": 0.6}}
        (tmp_path / "result.json").write_text(json.dumps({"evaluation": judged}))
        (point,) = entries(tmp_path, 10)
        assert (point["bank"], point["knn"], point["cpu_seconds"], point["epoch"]) == (bank, knn, 9, 2.0)
        assert point["loss"] == 3.0


def test_curves_are_drawn_together(tmp_path: Path) -> None:
    env = {"threads": 1, "processor": "AMD EPYC", "flags": ["avx2"], "versions": {"torch": "2.14"}}
    files = []
    for who, speed in (("lightly", 1), ("inbatch", 4)):
        curve = [entry(0, 0.1, 100), entry(1000 / speed, 0.4, 10), entry(2000 / speed, 0.5, 100)]
        report = {"who": who, "command": f"train {who}", "target": 0.5, "images": 100, "environment": env}
        files.append(tmp_path / f"{who}.json")
        files[-1].write_text(json.dumps(report | {"curve": curve}))
    comparison = SCRIPT.main(
        ["--draw", *map(str, files), "--out", str(tmp_path / "all.json"), "--figure", str(tmp_path / "all.png")]
    )
    assert comparison == together(files) and (tmp_path / "all.png").stat().st_size > 1000
    text = markdown(comparison)
    assert texts("time-to-accuracy", comparison) == {"time-to-accuracy": text}
    assert "| lightly | 1 | 2,000 (not yet at 1,000) | 1.00 |" in text
    assert "| inbatch | 1 | 500 (not yet at 250) | 4.00 |" in text
    late = comparison | {"target": 0.9}
    assert "not in 2,000" in markdown(late)
    only_ours = copy.deepcopy(comparison)
    for look in only_ours["runs"][0]["curve"]:
        look["knn"] = 0.1
    assert "| inbatch | 1 | 500 (not yet at 250) | over 4 |" in markdown(only_ours)
    plot_curves(late, tmp_path / "late.png")
    files[0].write_text(files[0].read_text().replace('"target": 0.5', '"target": 0.6'))
    with pytest.raises(DataError, match="differ in target"):
        together(files)
