"""run.json, metrics.jsonl and data.json are neither trusted nor needed."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import assert_same_state, leave_out_evaluation, saved, stop_after, tiny, use_few_images

from inbatch.errors import Preempted
from inbatch.training.metric_logger import Log, elapsed_seconds
from inbatch.training.monitors.curve_plot import plot_curves
from inbatch.training.side_files import damaged, move_aside, report_of

pytestmark = pytest.mark.usefixtures("narrow")

GOOD = b'{"step": 1, "epoch": 0, "loss": 2.5, "lr": null, "elapsed": 3.0}'
LINES = {
    "cut": b'{"step": 1, "lo',
    "NUL": b"\0" * 4096,
    "text as loss": b'{"step": 1, "loss": "abc"}',
    "text as step": b'{"step": "1", "loss": 1.0}',
    "no step": b'{"loss": 1.0}',
    "negative step": b'{"step": -1, "loss": 1.0}',
    "truth as step": b'{"step": true, "loss": 1.0}',
    "list as loss": b'{"step": 1, "loss": [1]}',
    "NaN": b'{"step": 1, "loss": NaN}',
    "Infinity": b'{"step": 1, "loss": 1e999}',
    "no float": b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
    "many digits": b'{"step": 1, "loss": ' + b"1" * 5000 + b"}",
    "deep": b"[" * 200_000,
    "deep loss": b'{"step": 1, "loss": ' + b"[" * 200_000,
    "list": b"[1, 2]",
    "UTF-16": '{"step": 1}'.encode("utf-16"),
    "bytes": b"\xff\xfe\x80",
}
REPORTS = {
    "empty": "", "cut": '{"status": "pre', "list": "[]", "deep": "[" * 100_000, "NUL": "\0" * 100, "null": "null",
}  # fmt: skip


def test_damaged_lines_are_dropped_and_counted(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    for name, line in LINES.items():
        log.write_bytes(line + b"\n" + GOOD + b"\n")
        assert elapsed_seconds(log) == 3.0, name
        console = Console(file=io.StringIO(), width=200)
        with Log(tmp_path, total_steps=9, resume_step=5, console=console):
            assert log.read_bytes() == GOOD + b"\n", name
        assert "1 damaged line dropped" in console.file.getvalue(), name
    log.write_bytes(b"\n".join([*LINES.values(), GOOD]))
    plot_curves(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_an_empty_log_gets_the_evaluations_of_the_checkpoint(tmp_path: Path) -> None:
    curve = [{"step": 0, "epoch": 0, "knn": 0.25}, {"step": 4, "epoch": 2, "loss": 1.5, "knn": 0.5}]
    for content, expected in (("", curve), (GOOD.decode() + "\n", [json.loads(GOOD)])):
        (tmp_path / "metrics.jsonl").write_text(content)
        with Log(tmp_path, total_steps=9, resume_step=5, quiet=True) as log:
            log.restore(curve)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == expected


def test_damaged_report_is_dropped_and_reported(tmp_path: Path) -> None:
    for name, text in REPORTS.items():
        (tmp_path / "run.json").write_text(text)
        (tmp_path / "data.json").write_text(text)
        assert report_of(tmp_path) == {}, name
        sentences = damaged(tmp_path)
        assert len(sentences) == 2 and all("it is not needed" in sentence for sentence in sentences), name
    values = {"status": ["failed"], "last_step": -1, "steps": True, "context": [1], "world": 0}
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "data.json").unlink()
    assert report_of(tmp_path) == {} and not damaged(tmp_path)
    good = {"status": "failed", "last_step": 3, "steps": 4, "context": 8, "world": 1}
    (tmp_path / "run.json").write_text(json.dumps(good))
    assert report_of(tmp_path) == good


def test_a_folder_in_the_place_of_a_file_is_renamed(tmp_path: Path) -> None:
    for name in ("run.json", "metrics.jsonl", "run.json.damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics.jsonl" / "mine").write_text("mine")
    (tmp_path / "tensorboard").write_text("a file")
    (tmp_path / "encoder").mkdir()
    sentences = move_aside(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [
        "encoder", "metrics.jsonl.damaged", "metrics.jsonl.damaged/mine", "run.json.damaged", "run.json.damaged-2",
        "tensorboard.damaged",
    ]  # fmt: skip
    assert len(sentences) == 3 and "tensorboard is not a folder; it was renamed to tensorboard.damaged" in sentences[2]
    assert move_aside(tmp_path) == []


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        use_few_images(patch)
        leave_out_evaluation(patch)
        stop_after(patch, 3)
        tiny("simclr", out)
    return out


def cut(run: Path) -> None:
    log = run / "metrics.jsonl"
    log.write_bytes(b"\n".join([*LINES.values(), log.read_bytes()]))
    (run / "run.json").write_text("")
    (run / "data.json").write_text("[" * 100_000)


def replaced(run: Path) -> None:
    for name in ("run.json", "metrics.jsonl"):
        (run / name).unlink()
        (run / name).mkdir()
    (run / "data.json").unlink()


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (cut, ("17 damaged lines dropped", "run.json cannot be read", "data.json cannot be read")),
        pytest.param(
            replaced, ("renamed to run.json.damaged", "renamed to metrics.jsonl.damaged", "was empty"),
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_run_continues_without_its_side_files(
    damage: Callable[[Path], None], messages: tuple[str, ...], stopped: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(stopped, tmp_path / "run")
    damage(tmp_path / "run")
    tiny("simclr", tmp_path / "run", resume=True, quiet=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    shown = capfd.readouterr().err
    for words in messages:
        assert words in shown, words
    if damage is replaced:
        shutil.copytree(stopped, tmp_path / "whole")
        tiny("simclr", tmp_path / "whole", resume=True)
        assert_same_state(saved(tmp_path / "run"), saved(tmp_path / "whole"))
