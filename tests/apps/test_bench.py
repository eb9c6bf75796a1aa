"""Benchmarks measure what they state: equal work, alternating order, complete tables. No time is asserted."""

import importlib.util
import itertools
import json
import math
import multiprocessing
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from inbatch.apps.bench import benchmark, inbatch_workloads, reference_workloads, report, runner, synthetic_data, worker
from inbatch.apps.bench.options import SECTIONS, Options
from inbatch.apps.bench.suites import MAKERS, Field
from inbatch.apps.cli import app
from inbatch.errors import ConfigError, DataError
from inbatch.losses import nt_xent

ROOT = Path(__file__).resolve().parents[2]
JOB: dict[str, Any] = {"device": "cpu", "threads": 1, "compile": False, "method": "simclr", "encoder": "tiny"}


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{file.stem}_script", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Command-line options


def test_sections_are_chosen_in_their_order() -> None:
    assert Options(("step", "network")).chosen == ("network", "step")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sections": ("tower",)}, "'tower'"),
        ({"size": 64}, "--size"),
        ({"batch": 1}, "--batch"),
        ({"threads": 0}, "--threads"),
        ({"rounds": 0}, "--rounds"),
        ({"peers_python": "/nowhere/python"}, "/nowhere/python"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"data": "/", "sections": ("loss",)}, "--data"),
        ({"out": Path("/nowhere/bench.json")}, "/nowhere"),
    ],
)
def test_invalid_options_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**asked).check()


def test_the_command_repeats_the_run_and_names_no_place() -> None:
    options = Options(("views",), 224, data="/secret/photos", peers=True, peers_python="/secret/python", rounds=3)
    assert options.command() == "inbatch bench views --size 224 --rounds 3 --data photos --peers-python python --peers"


@pytest.mark.grid(5)
@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_has_inbatch_first_and_existing_workloads(section: str, size: int, tmp_path: Path) -> None:
    options = Options((section,), size, quick=True, encoder="resnet18", compile=True)
    for comparison in MAKERS[section](Field(options, section, "cpu", tmp_path)):
        assert comparison.implementations[0].who == runner.OURS
        names = [one.who for one in comparison.implementations]
        assert len(set(names)) == len(names)
        for one in comparison.implementations:
            name = one.job["module"].rpartition(".")[2]
            assert callable(getattr(importlib.import_module(f"inbatch.apps.bench.{name}"), one.job["make"]))
            json.dumps(dict(one.job))


# Equal work


def test_images_are_as_long_as_photographs_when_encoded(tmp_path: Path) -> None:
    for size, low, high in ((32, 500, 1500), (224, 50_000, 150_000)):
        images = synthetic_data.draw_images(3, size)
        assert images.shape == (3, *synthetic_data.SIDES[size], 3) and not (images[0] == images[1]).all()
        assert low < np.mean([len(file) for file in synthetic_data.jpegs(images, size)]) < high


def test_all_read_the_same_files(tmp_path: Path) -> None:
    files = synthetic_data.jpegs(synthetic_data.draw_images(5, 32), 32)
    synthetic_data.pack(files, tmp_path)
    assert reference_workloads.files({"folder": str(tmp_path)}) == files
    folder = synthetic_data.write_folder(files, tmp_path / "jpegs")
    assert sorted(synthetic_data.encoded(str(folder), 9)) == sorted(files)
    with pytest.raises(DataError, match="no JPEG"):
        (tmp_path / "empty").mkdir()
        synthetic_data.encoded(str(tmp_path / "empty"), 9)


def test_literal_loss_equals_that_of_inbatch() -> None:
    z = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert reference_workloads.literal_nt_xent(z).item() == pytest.approx(nt_xent(z, 0.1).item(), rel=1e-6)


@pytest.mark.parametrize("make", ["neighbours", "probe", "clusters"])
def test_evaluations_of_the_same_features_agree(make: str, tmp_path: Path) -> None:
    for name, array in synthetic_data.features(500, 16, 4).items():
        np.save(tmp_path / f"{name}.npy", array)
    job = JOB | {"folder": str(tmp_path), "queries": 100, "classes": 4, "k": 20}
    scores = []
    for module in (inbatch_workloads, reference_workloads):
        call, details = getattr(module, make)(job)
        assert call() == 1
        scores.append(details["nmi" if make == "clusters" else "top1"])
    assert scores[0] == pytest.approx(scores[1], abs=0.1 if make == "clusters" else 0.02) and scores[0] > 0.05


@pytest.mark.slow
def test_operations_of_a_network_are_those_of_its_layers(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", synthetic_data.draw_images(4, 32))
    run = inbatch_workloads.built(JOB | {"folder": str(tmp_path), "size": 32, "batch": 4}, cache_on_device=True)
    layers = [(3, 32, 32), (32, 64, 16), (64, 96, 16)]  # channels in and out, side of the output
    forward = [2 * 9 * a * b * side**2 for a, b, side in layers]
    convolutions = 3 * sum(forward) - forward[0]  # the gradient of the image is not computed
    head = 3 * 2 * (96 * 96 + 96 * 96 + 96 * 128)
    assert inbatch_workloads.work_of(run, next(run.loader.epoch(0))) == 2 * 4 * (convolutions + head)


@pytest.mark.parametrize("make", ["views", "network", "step"])
def test_workloads_of_inbatch_count_their_operations(make: str, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", synthetic_data.draw_images(8, 32))
    job = JOB | {"folder": str(tmp_path), "size": 32, "batch": 4, "unit": "views"}
    call, details = getattr(inbatch_workloads, make)(job)
    assert call() == (4 if make == "step" else 8)
    assert details["of"] in report.CEILINGS and details["needs"] > 0


# Order of measurements

FAKE = """
import json, sys
job = json.loads(sys.argv[1])
log = open(job["log"], "a")
print("warming up", file=sys.stderr)
if "failed" in job:
    print(json.dumps({"failed": job["failed"], "kind": job.get("kind")}), flush=True)
elif "dies" in job:
    sys.exit("gone")
else:
    print(json.dumps({"of": "copy", "needs": 2, "first_seconds": 1}), flush=True)
    for line in sys.stdin:
        print(job["name"], end="", file=log, flush=True)
        print(json.dumps({"seconds": job["seconds"].pop(0), "units": 10}), flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes implementations which record when they run."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(runner, "SCRIPT", tmp_path / "fake.py")

    def make(who: str, peer: bool = False, **job: Any) -> runner.Implementation:
        return runner.Implementation(who, {"threads": 1, "log": str(tmp_path / "log"), "name": who[0]} | job, peer=peer)

    return make


def test_implementations_alternate_and_report_their_median(fake: Any, tmp_path: Path) -> None:
    both = [fake("inbatch", seconds=[1, 2, 5]), fake("other", seconds=[10, 5, 20])]
    result = runner.BenchmarkRounds("work", "images/s", both).run(3, {"copy": 100}, show_missing=False)
    assert (tmp_path / "log").read_text() == "iooiio"
    row = result["implementations"]["inbatch"]
    assert (row["low"], row["rate"], row["high"]) == (2, 5, 10) and row["share"] == pytest.approx(5 * 2 / 100)
    rows = list(report.table_rows(result))
    assert rows[0][:4] == ("inbatch", "5", "2", "10") and rows[0][5] == "10% of bandwidth"
    assert rows[1][:5] == ("other", "1", "0.5", "2", "5.00")


def test_implementations_that_fail_state_the_reason(fake: Any) -> None:
    others = [
        fake("lost", True, failed="not installed"),
        fake("mute", True, dies=1),
        fake("full", failed="out of memory"),
        fake("wrong", True, failed="a setting", kind="ConfigError"),
    ]
    comparison = runner.BenchmarkRounds("work", "ms", [fake("inbatch", seconds=[1]), *others])
    shown = comparison.run(1, {}, show_missing=True)
    failed = {who: row["failed"] for who, row in shown["implementations"].items() if "failed" in row}
    assert failed == {"lost": "not installed", "mute": "gone", "full": "out of memory", "wrong": "a setting"}
    assert [row[-1] for row in report.table_rows(shown)][1] == "not installed"


def test_missing_libraries_are_left_out_unless_requested(fake: Any) -> None:
    comparison = runner.BenchmarkRounds(
        "work", "ms", [fake("inbatch", seconds=[1]), fake("lost", True, failed="not installed")]
    )
    assert set(comparison.run(1, {}, show_missing=False)["implementations"]) == {"inbatch"}


@pytest.mark.parametrize(("kind", "error"), [("ConfigError", ConfigError), ("DataError", DataError)])
def test_our_own_refusal_is_the_user_s_error(fake: Any, kind: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="no such encoder"):
        runner.BenchmarkRounds("work", "ms", [fake("inbatch", failed="no such encoder", kind=kind)]).run(
            1, {}, show_missing=True
        )


def test_less_time_is_better_if_the_unit_is_ms() -> None:
    row = {"rate": 100.0, "low": 50.0, "high": 200.0}
    comparison = {
        "unit": "ms",
        "title": "",
        "threads": [1],
        "implementations": {"inbatch": row, "other": row | {"rate": 50.0}},
    }
    rows = list(report.table_rows(comparison))
    assert rows[0][1:4] == ("10", "5", "20") and rows[1][4] == "2.00"


@pytest.mark.skipif(sys.platform != "linux", reason="the state of a process is read from /proc")
def test_workers_are_stopped_between_rounds() -> None:
    child = multiprocessing.get_context("fork").Process(target=_busy, daemon=True)
    child.start()

    def state() -> str:
        return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def becomes(wanted: bool) -> bool:
        return any((state() == "T") == wanted for _ in range(100_000))

    try:
        worker.signal_workers("SIGSTOP")
        assert becomes(True)
        worker.signal_workers("SIGCONT")
        assert becomes(False)
    finally:
        child.kill()
        child.join()


def _busy() -> None:
    for _ in itertools.count():
        pass


# Commands


@pytest.mark.slow
def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    line = ["bench", "loss", "--quick", "--no-peers", "--threads", "1", "--json", "--out", str(tmp_path / "found.json")]
    done = CliRunner().invoke(app, line, catch_exceptions=False)
    result = json.loads(done.stdout)
    assert done.exit_code == 0 and json.loads((tmp_path / "found.json").read_text()) == result
    (comparison,) = result["sections"]["loss"]
    assert set(comparison["implementations"]) == {"inbatch", "literal"} and comparison["threads"] == [1]
    ceiling = result["ceilings"]["1"]
    assert ceiling["copy"] > 0 and ceiling["float32"] >= ceiling["float32_plain"] > 0
    assert ceiling["bf16"] is None or ceiling["bf16"] > 0
    for row in comparison["implementations"].values():
        assert row["low"] <= row["rate"] <= row["high"] and len(row["rounds"]) == 2
        assert row["share"] == pytest.approx(row["rate"] * 4 * 256**2 * 128 / ceiling["float32"])
    assert CliRunner().invoke(app, ["bench", "los"]).exit_code == 2
    texts = report.texts("bench-32px", result)
    assert "| literal |" in texts["bench-32px loss"] and "inbatch bench loss" in texts["bench-32px machine"]


@pytest.mark.slow
def test_guards_run() -> None:
    assert load(ROOT / "benchmarks" / "guards.py").main(["--quick"]) == 0


def test_guard_below_its_floor_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    guards = load(ROOT / "benchmarks" / "guards.py")
    monkeypatch.setattr(guards, "ratio", lambda guard, seconds, rounds: (guard.floor - 0.01, 1.0, 1.0))
    monkeypatch.setattr(guards, "lay_out", lambda folder, quick: None)
    assert guards.main(["--only", "NT-Xent", "JPEG"]) == 1
    output = capsys.readouterr().out
    assert output.count("SLOW") == 3 and "views" not in output
    with pytest.raises(SystemExit):
        guards.main(["--only", "nothing"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--curves", "--wait"])
def test_training_is_measured(kind: str, tmp_path: Path) -> None:
    training, out = load(ROOT / "benchmarks" / "training.py"), tmp_path / "found.json"
    result = training.main(["--quick", kind, "--threads", "1", "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    if kind == "--curves":
        assert all(len(run["loss"]) == 2 and math.isfinite(sum(run["loss"])) for run in result["runs"].values())
        assert result["apart"]["bf16"] < result["apart"]["float32, seed 1"] and out.with_suffix(".png").is_file()
        assert "| bf16 |" in report.texts("bf16", result)["bf16"]
    else:
        row = result["encoders"]["tiny"]
        assert row["waiting"] == pytest.approx(sum(row["waited"]) / sum(row["waited"] + row["worked"]))
        assert len(row["waited"]) == 2 and "| tiny |" in report.texts("waiting", result)["waiting"]


def test_the_folder_of_a_killed_benchmark_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "inbatch-bench-dead").mkdir()
    with benchmark.scratch_folder() as first:
        (first / "images.npy").touch()
        with benchmark.scratch_folder() as second:
            assert sorted(tmp_path.iterdir()) == sorted([first, second]) and (first / "images.npy").exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), benchmark.scratch_folder() as folder:
        (folder / "images.npy").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_page_is_what_the_files_make() -> None:
    page = ROOT / "docs" / "speed.md"
    assert page.read_text() == load(ROOT / "scripts" / "render_results.py").benchmark_page(page), (
        "python scripts/render_results.py"
    )
