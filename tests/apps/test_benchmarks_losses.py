"""Benchmark of losses: all implementations compute the same values, and its files and tables are complete."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK, RENDER = load(ROOT / "benchmarks" / "losses.py"), load(ROOT / "scripts" / "render_results.py")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")


@pytest.mark.parametrize("loss", BENCHMARK.LOSSES)
def test_losses_of_inbatch_equal_the_literal_version(loss: str) -> None:
    """Check values and gradients, in tiles, with the whole matrix and by default; bf16 products to their rounding."""

    def compute(who: str) -> dict[str, Any]:
        measured = BENCHMARK.Measured(loss, who, rows=64, queue=96, dim=16)
        measured.call()
        gradients = [leaf.grad for leaf in measured.leaves if leaf.grad is not None]
        (gradient,) = gradients if len(measured.leaves) == 1 else [torch.stack(gradients)]
        return measured.figures() | {"rows": gradient.flatten(0, -2)}

    expected = compute("literal")
    assert expected["value"] > 0.1 and expected["gradient"] > 1e-3
    for who in BENCHMARK.OURS:
        off = 1e-2 if "bf16" in who else 1e-4
        result = compute(who)
        assert result["value"] == pytest.approx(expected["value"], rel=off)
        assert result["gradient"] == pytest.approx(expected["gradient"], rel=off)
        rows = expected["rows"][-len(result["rows"]) :].view_as(result["rows"])
        torch.testing.assert_close(result["rows"], rows, rtol=off, atol=off * float(rows.abs().max()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a measurement with 64 rows, each implementation in its own process."""
    folder = tmp_path_factory.mktemp("losses")
    words = "--threads 1 --rows 64 --losses nt_xent --dim 16 --repeat 1 --who inbatch literal lightly --out"
    results = BENCHMARK.main([*words.split(), str(folder / "losses.json")])
    assert BENCHMARK.disagreeing(results) == []
    assert json.loads((folder / "losses-1thread.json").read_text()) == json.loads(json.dumps(results[1]))
    return folder


@pytest.fixture
def measured(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "losses-1thread.json").read_text())


@pytest.mark.slow
def test_the_file_is_whole(measured: dict[str, Any], folder: Path) -> None:
    assert measured["environment"]["threads"] == 1
    assert measured["commands"][0].startswith("python benchmarks/losses.py --threads 1 --rows 64")
    assert str(folder) not in measured["commands"][0]
    ceilings = measured["ceilings"]
    assert len(ceilings) == 2 and all(one["gflops"] >= one["plain"] > 1 for one in ceilings)
    block = measured["losses"]["nt_xent"]["64"]
    assert set(block) == {"inbatch", "literal", "lightly"}
    for who, by in block.items():
        assert set(by) == {"ships", "kept"}
        for row in by.values():
            if who == "lightly" and "failed" in row:
                assert row == {"failed": "not installed"}
            elif "failed" in row:
                assert row == {"failed": "no glibc"} and sys.platform != "linux"
            else:
                assert row["agrees"] and row["off"] <= 1e-4
                assert 0 < row["best"] <= row["seconds"] and len(row["rounds"]) == 1 and row["calls"] > 1
                work = 4 * 64**2 * 16
                best = max(one["gflops"] for one in ceilings)
                assert row["share"] == pytest.approx(work / row["seconds"] / 1e9 / best)
                assert (row["memory_bytes"] is None) == (sys.platform != "linux")
    assert "torch" in measured["versions"]["inbatch"]


@pytest.mark.slow
def test_tables_and_plot_of_a_file(measured: dict[str, Any], tmp_path: Path) -> None:
    tables = RENDER.loss_tables(measured)
    rows = [line for line in tables["nt_xent"].splitlines() if line.startswith("| 64 |")]
    assert [row.split(" | ")[1] for row in rows] == list(measured["losses"]["nt_xent"]["64"])
    assert all(line.count("|") == tables["nt_xent"].splitlines()[0].count("|") for line in rows)
    (short,) = [line for line in tables["all"].splitlines() if line.startswith("| nt_xent |")]
    own, literal = (measured["losses"]["nt_xent"]["64"][who]["ships"]["seconds"] for who in ("inbatch", "literal"))
    assert short.split(" | ")[3] == f"{literal / own:.1f}"
    assert "GFLOP/s" in tables["where"]
    BENCHMARK.plot(measured, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_the_page_is_what_the_files_make() -> None:
    page = ROOT / "docs" / "large-batches.md"
    assert page.read_text() == RENDER.loss_page(page), "python scripts/render_results.py writes it again"
    for threads in ("1thread", "2threads"):
        assert all(f"<!-- losses-{threads} {name} -->" in page.read_text() for name in ("where", "nt_xent", "all"))


def test_differing_libraries_are_named() -> None:
    row = {"seconds": 1.0, "value": 2.0, "gradient": 0.5}
    block = {"literal": {"ships": dict(row)}, "inbatch": {"ships": row | {"value": 2.001}},
             "lightly": {"ships": row | {"gradient": 0.50001}, "kept": {"failed": "out of memory"}}}  # fmt: skip
    BENCHMARK.judge(block)
    assert BENCHMARK.disagreeing({1: {"losses": {"nt_xent": {"64": block}}}}) == ["nt_xent, N 64, inbatch"]
    (cells,) = [cells for cells in BENCHMARK.details(64, block) if cells[1] == "inbatch"]
    assert cells[-1] == "DISAGREES by 5e-04"


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("limit, memory, failed", [(60, 10**9, "out of memory"), (1, 10**10, "over 1 s")])
def test_excessive_memory_or_time_is_reported(limit: int, memory: int, failed: str) -> None:
    job = {"loss": "nt_xent", "who": "literal", "rows": 16384, "queue": 1, "dim": 16, "threads": 1, "memory": memory}
    implementation = BENCHMARK.Implementation(job | {"limit": limit, "allocator": "ships"}, sys.executable).start()
    implementation.warm_up()
    row = implementation.end()
    assert row["failed"] == failed
    if memory == 10**9:
        assert row["asked_bytes"] == 4 * 16384**2


def test_invalid_options_are_reported(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for words, message in (
        (["--rows", "63"], "even numbers"),
        (["--repeat", "0"], "positive"),
        (["--out", str(tmp_path / "nowhere" / "x.json")], "no folder"),
    ):
        with pytest.raises(SystemExit):
            BENCHMARK.main(words)
        assert message in capsys.readouterr().err
