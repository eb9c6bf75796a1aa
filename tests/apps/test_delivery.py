"""Results are printed before they are written, and are safe to print and to write whatever a record contains."""

import errno
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from test_papers import TABLE, record
from typer.testing import CliRunner

from inbatch import api
from inbatch.apps.bench import benchmark
from inbatch.apps.cli import app
from inbatch.apps.papers import command, render
from inbatch.apps.papers.command import TableReport
from inbatch.apps.papers.filled_table import fill
from inbatch.apps.papers.results import Record, read_record
from inbatch.apps.papers.spec import cells
from inbatch.apps.reports import batch_context, crop_statistics, dataset
from inbatch.data import open_data, write_folder
from inbatch.errors import DataError, Unwritten
from inbatch.runtime import files
from inbatch.runtime.text import one_line, printable
from inbatch.training import run_result

EVALUATION: dict[str, Any] = {"knn": {"top1": 0.515}, "initial": "untrained encoder", "untrained": None, "note": None}
EVALUATION |= {"held_out": "a tenth", "test": {"labelled": 7, "per_class": {}}}


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file be opened and written, and fail to reach the disk: it is full."""

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)


def test_evaluate_shows_what_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that cannot be written is reported first, the figures are shown, and the exit code is that of the file."""
    calls = []
    monkeypatch.setattr(api, "evaluate_run", lambda *_, **__: calls.append(1) or dict(EVALUATION))
    (tmp_path / "evaluation.json").mkdir()
    shown = run("evaluate", str(tmp_path))
    assert shown.exit_code == 1 and "51.5%" in shown.stdout and "Written to" not in shown.stdout
    warning, error = shown.stderr.splitlines()[0], shown.stderr.splitlines()[-1]
    assert warning.startswith("warning: Cannot write") and "evaluation.json" in error and error.startswith("error:")
    asked = run("evaluate", str(tmp_path), "-o", str(tmp_path / "evaluation.json"))
    assert asked.exit_code == 1 and len(calls) == 1 and not asked.stdout, "a requested file is checked before any work"
    json_result = run("evaluate", str(tmp_path), "--json")
    object_ = json.loads(json_result.stdout)
    assert json_result.exit_code == object_["exit_code"] == 1 and object_["knn"] == EVALUATION["knn"]
    assert "evaluation.json" in object_["error"]


def test_evaluate_prints_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: None) -> None:
    monkeypatch.setattr(api, "evaluate_run", lambda *_, **__: dict(EVALUATION))
    shown = run("evaluate", str(tmp_path))
    assert shown.exit_code == 1 and "51.5%" in shown.stdout and "No space left" in shown.stderr
    assert not list(tmp_path.iterdir())


def test_other_commands_print_results_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: None
) -> None:
    images = write_folder(open_data("digits-canvas", subset=12), tmp_path / "images")
    out = tmp_path / "out"

    def failing(result: dict[str, Any]) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise Unwritten(f"Cannot write {out}", result)

        return fail

    measured = {"epoch": 0, "step": 3, "note": None, "pictures": [], "leak": None, "data": "digits"}
    monkeypatch.setattr(batch_context, "inspect_run", failing(measured))
    monkeypatch.setattr(command, "shipped", lambda: tmp_path)
    monkeypatch.setattr(crop_statistics, "plot", lambda tallies, sides, pairs, png: files.write_json(png, {}))
    monkeypatch.setattr(benchmark, "bench", failing({"known": "figure"}))
    monkeypatch.setattr("inbatch.apps.bench.report.print_machine", lambda machine: print(machine["known"]))
    for words, figure in (
        (["data", str(images), "-o", str(out / "x.png")], "12 in train"),
        (["crops", "--pairs", "500", "-o", str(out / "x.png")], "500 pairs"),
        (["table", "curation-figure-3", "-o", str(out / "x.md")], "runs, seeds"),
        (["inspect", str(tmp_path), "-o", str(out)], "step 3"),
        (["bench"], "figure"),
    ):
        shown = run(*words)
        assert shown.exit_code == 1 and figure in shown.stdout and f"Cannot write {out}" in shown.stderr, words
        json_result = run(*words, "--json")
        assert json_result.exit_code == 1 and f"Cannot write {out}" in json.loads(json_result.stdout)["error"], words
    assert not list(out.iterdir())


def test_an_output_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(dataset, "resolve_recipe", worked)
    monkeypatch.setattr(crop_statistics, "count_configurations", worked)
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "x.png")
    for words in (
        ["data", "digits-canvas", "-o", place],
        ["crops", "-o", place],
        ["views", "digits-canvas", "-o", place],
    ):
        shown = run(*words)
        assert shown.exit_code == 1 and place in shown.stderr, words
    assert run("data", "digits-canvas", "-o", str(tmp_path / "x.psd")).exit_code == 2


UNSEEN = "a\rb\x1b[31mc\u202ed\u2066e\u200bf\ufeffg\u2028h\x9bi\x00j\u3164k\u00adl\U000e0041m"
HOSTILE = f"{UNSEEN}\n# n | <script>`o` ` <b> $p$ & ~"


def _clean(text: str) -> bool:
    return all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp", "Co", "Cn") for c in text)


def test_text_is_escaped_once_and_by_one_function() -> None:
    assert printable("a\r\n\x1b[1m\u202e\u200b\u3164\u2800ü漢±") == "a\\r\n\\x1b[1m\\u202e\\u200b\\u3164\\u2800ü漢±"
    assert one_line("a\nb") == "a\\nb" and one_line(one_line(HOSTILE)) == one_line(HOSTILE)
    assert _clean(printable(HOSTILE)) and "\u3164" not in printable(HOSTILE)


def test_no_format_of_a_table_passes_on_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records come from elsewhere: their text changes neither the terminal, nor the direction, nor the structure."""
    first, *others = cells(TABLE, "smoke")
    failure = {"exit_code": 4, "sentence": HOSTILE}
    where = {"device": "cpu", "processor": HOSTILE, "threads": 1, "versions": {"torch": HOSTILE}}
    failed = record(first, 0.5, status="failed", failure=failure, evaluation=None, command=HOSTILE, source=HOSTILE)
    records = {one.run_key: one for one in (failed, record(others[0], 0.5, environment=where))}
    sheet = fill(TABLE, "smoke", records)
    report = TableReport(sheet)
    monkeypatch.setattr(render, "curves", lambda sheet: None)
    texts = {ending: write(sheet) for ending, write in render.FORMATS.items()}
    texts["terminal"] = "\n".join(report.text_lines())
    for ending in render.FORMATS:
        report.write(tmp_path / f"x{ending}")
        assert (tmp_path / f"x{ending}").read_bytes() == texts[ending].encode()
    for ending, text in texts.items():
        assert _clean(text) and "\u3164" not in text, ending
        assert "\n# n" not in text, f"{ending}: a line end of a record begins a line"
        assert ending == "terminal" or "<script>" not in text, ending


def test_records_of_another_shape_are_refused(tmp_path: Path) -> None:
    """Every case is an error that names the file; none of them reaches the code that fills a table."""
    cell = next(cells(TABLE, "smoke"))
    good = record(cell, 0.5).file()
    path = tmp_path / f"{cell.stem}.json"

    def refused(text: str) -> str:
        path.write_text(text)
        with pytest.raises(DataError, match="is not the result of a run") as caught:
            read_record(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    deep = ("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000)
    for text in ("", "[]", "null", "3", "{", *deep, "9" * 5000):
        refused(text)
    env, evaluation = good["environment"], good["evaluation"]
    for change in (
        {"environment": {}}, {"environment": []}, {"environment": env | {"threads": "two"}},
        {"environment": env | {"versions": {}}}, {"environment": env | {"processor": None}},
        {"evaluation": []}, {"evaluation": evaluation | {"linear": {"top1": "0.5"}}},
        {"evaluation": evaluation | {"linear": {"top1": []}}},
        {"evaluation": evaluation | {"linear": {"top1": {"x": 1}}}},
        {"evaluation": evaluation | {"linear": {"failed": 4}}}, {"evaluation": evaluation | {"linear": {"top1": True}}},
        {"curve": {}}, {"curve": [{"knn": 0.5}]}, {"curve": [{"epoch": "late"}]}, {"curve": [[]]},
        {"recipe": []}, {"recipe": {}}, {"recipe": good["recipe"] | {"method": []}}, {"seed": None},
        {"wall_seconds": "long"}, {"protocols": None}, {"schema": 2},
    ):  # fmt: skip
        refused(json.dumps(good | change))
    for number in ("NaN", "Infinity", "1e999"):
        refused(json.dumps(good).replace(": 3.0", f": {number}"))
        refused(json.dumps(good | {"evaluation": {"linear": {"top1": "@"}}}).replace('"@"', number))
    path.write_text(json.dumps(good))
    assert isinstance(read_record(path), Record)


def test_pretrain_shows_the_figures_of_a_result_that_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"data": "photos", "encoder": {"name": "tiny"}}
    result = {"run": "runs/x", "recipe": recipe, "evaluation": EVALUATION, "initial": "untrained encoder"}
    result |= {"untrained": EVALUATION, "unlabelled": {}, "collapsed": [], "held_out": "a tenth"}
    result |= {"images_per_second": 1.0, "training_seconds": 2.0}

    def pretrain(*_: Any, **__: Any) -> None:
        raise Unwritten("Cannot write runs/x/result.json", result)

    monkeypatch.setattr(api, "pretrain", pretrain)
    shown, json_result = run("pretrain", "--data", "photos"), run("pretrain", "--data", "photos", "--json")
    assert shown.exit_code == json_result.exit_code == 1 and "51.5%" in shown.stdout and "result.json" in shown.stderr
    report = json.loads(json_result.stdout)
    assert report["evaluation"] == EVALUATION and "result.json" in report["error"]


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_pretrain_shows_what_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_result.write_json

    def write(path: Path, value: Any) -> None:
        if path.name == "result.json":
            raise files.cannot_write(path, OSError(errno.ENOSPC, "No space left on device"))
        real(path, value)

    monkeypatch.setattr(run_result, "write_json", write)
    words = ["pretrain", "--data", "digits-canvas", "--batch", "20", "--epochs", "1", "--set", "subset=40", "--json"]
    json_result = run(*words, "--encoder", "tiny", "-o", str(tmp_path / "run"))
    report = json.loads(json_result.stdout)
    assert json_result.exit_code == 1
    assert report["evaluation"]["knn"]["top1"] == 0.5 and "result.json" in report["error"]
