"""Trackers: their choice, the process that passes a run's log to one, and failures that do not stop the run."""

import importlib.metadata
import json
import math
import os
import sqlite3

import pytest
from small_runs import stop_after, tiny

import inbatch
from inbatch.errors import ConfigError, Preempted
from inbatch.training.trackers import follower, followers, selection
from inbatch.training.trackers.followers import Followers
from inbatch.training.trackers.selection import Selection, requested_trackers, select

TRACKERS = """
import json, time

class Recording:
    def start(self, run):
        self.path = run.folder.with_name("calls.jsonl")
        self.write(["start", run.id, run.name, run.step, run.recipe["method.name"]])

    def log(self, records):
        for record in records:
            self.write(["log", record])

    def close(self, status, result):
        print("a library prints")
        self.write(["close", status, sorted(result)])

    def write(self, call):
        with open(self.path, "a") as file:
            file.write(json.dumps(call) + "\\n")

class Failing(Recording):
    def write(self, call):
        pass

    def log(self, records):
        raise OSError(28, "No space left\\non device")

class Hanging(Recording):
    def close(self, status, result):
        time.sleep(600)
"""


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """Install a package with trackers for this process and its children."""
    package = tmp_path / "package"
    info = package / "fake_trackers-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "fake_trackers.py").write_text(TRACKERS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-trackers\nVersion: 1.0\n")
    names = "\n".join(f"{name.lower()} = fake_trackers:{name}" for name in ("Recording", "Failing", "Hanging"))
    (info / "entry_points.txt").write_text(f"[{selection.GROUP}]\n{names}\n")
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH")))))


def offer(monkeypatch, *names):
    points = [importlib.metadata.EntryPoint(name, "x:y", selection.GROUP) for name in names]
    monkeypatch.setattr(selection, "entry_points", lambda group: points)


def write_log(folder, steps, mode="w"):
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", mode) as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": step / 7, "lr": None if step == 3 else 0.5}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "knn": step / 100}) + "\n")


def write_run(folder, steps, **report):
    write_log(folder, steps)
    (folder / "recipe.json").write_text('{"method": {"name": "simclr"}, "lr": 0.5, "replans": [[1, 2]], "test": null}')
    (folder / "run.json").write_text(json.dumps({"status": "finished"} | report))
    evaluation = {"knn": {"top1": 0.25, "k": 20, "temperature": 0.1, "per_class": {"cat": 0.5}}}
    (folder / "result.json").write_text(json.dumps({"evaluation": evaluation, "curve": [{"step": 1}], "note": None}))


def calls(run):
    return [json.loads(line) for line in (run / "trackers" / "calls.jsonl").read_text().splitlines()]


def test_requested_trackers(monkeypatch):
    offer(monkeypatch, "wandb", "mlflow", "tensorboard", "other")
    monkeypatch.setattr(selection, "find_spec", lambda module: None if module == "alembic" else module)
    assert requested_trackers(None) is None and requested_trackers("none") == ()
    assert requested_trackers(["wandb, other", "wandb"]) == ("wandb", "other")
    for track, message in (
        ("wandbb", "unknown tracker 'wandbb': choose from mlflow, other, tensorboard, wandb, none$"),
        ("trackio", r'none\. The tracker trackio is an extra: pip install "inbatch\[trackio\]"'),
        ("wandb,none", "none leaves out every tracker: name it alone"),
        ("", "unknown tracker ''"),
        ("mlflow", r'the tracker mlflow needs alembic: pip install "inbatch\[mlflow\]"'),
    ):
        with pytest.raises(ConfigError, match=message):
            requested_trackers(track)
    with pytest.raises(ConfigError, match="unknown tracker"):  # before images are opened
        inbatch.pretrain("digits-canvas", track="wandbb", out="nowhere")


def test_selection_is_kept_with_the_run(tmp_path):
    assert select(tmp_path, None, False) == Selection() and not list(tmp_path.iterdir())
    first = select(tmp_path, ("wandb",), False)
    assert first.names == ("wandb",) and first.tensorboard and len(first.id) == 16
    assert select(tmp_path, None, True) == first
    more = select(tmp_path, ("mlflow", "wandb"), True)
    assert more == Selection(first.id, ("wandb", "mlflow"), True) == select(tmp_path, None, True)
    assert select(tmp_path, (), True) == Selection(first.id, (), False) == select(tmp_path, None, True)
    assert select(tmp_path, ("tensorboard",), True) == Selection(first.id, (), True)
    assert select(tmp_path, ("wandb",), False).id != first.id, "another run"
    for damaged in ("[]", '{"id": "x"}', '{"id": "x", "trackers": 3}', "{"):
        (tmp_path / "trackers.json").write_text(damaged)
        assert select(tmp_path, None, True) == Selection()


class Memory:
    def __init__(self):
        self.calls = []

    def start(self, run):
        self.calls.append(("start", run))

    def log(self, records):
        self.calls.append(("log", *records))

    def close(self, status, result):
        self.calls.append(("close", status, result))


def test_follower_passes_the_log_while_it_is_written(tmp_path):
    write_run(tmp_path, range(2))
    memory, parts = Memory(), ['{"step": 2, "lo', 'ss": null}\nnot JSON\n{"step": 3}\n{"step": 4, "l']

    def ended(seconds):
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(parts.pop(0))
        return not parts

    run = follower.described(tmp_path, "memory", "id", 5)
    follower.follow(tmp_path, memory, run, ended)
    start, first, second, end = memory.calls
    assert start == ("start", run) and (run.id, run.name, run.step) == ("id", tmp_path.name, 5)
    assert run.folder == tmp_path / "trackers" / "memory"
    assert run.recipe == {"method.name": "simclr", "lr": 0.5, "replans": "[[1, 2]]", "test": None}
    assert first == (
        "log",
        {"step": 0, "loss": 0.0, "lr": 0.5},
        {"step": 0, "knn": 0.0},
        {"step": 1, "loss": 1 / 7, "lr": 0.5},
    )
    assert second[1]["step"] == 2 and math.isnan(second[1]["loss"]) and second[2:] == ({"step": 3},)
    assert end == ("close", "finished", {"result/evaluation/knn/top1": 0.25})


def test_follower_reports_the_end_of_the_run(tmp_path):
    for status, reported in (("preempted", "preempted"), ("failed", "failed"), ("running", "killed")):
        write_run(tmp_path, [], status=status)
        memory = Memory()
        follower.follow(tmp_path, memory, follower.described(tmp_path, "memory", "id", 0), lambda seconds: True)
        assert [call[0] for call in memory.calls] == ["start", "close"] and memory.calls[1][1:] == (reported, {})


@pytest.mark.slow
def test_a_stopped_run_keeps_its_trackers_and_a_failure_does_not_stop_it(tmp_path, monkeypatch, capfd, offered, brief):
    out = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Preempted):
        stop_after(patched, 7)
        tiny("simclr", out, track="recording,failing", quiet=False)
    assert calls(out)[-1] == ["close", "preempted", []]
    tiny("simclr", out, resume=True, quiet=False)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, second = [i for i, call in enumerate(calls(out)) if call[0] == "start"]
    identity = json.loads((out / "trackers.json").read_text())["id"]
    assert calls(out)[first] == ["start", identity, "run", 0, "simclr"]
    assert calls(out)[second] == ["start", identity, "run", 7, "simclr"]
    assert [call[1] for call in calls(out)[second + 1 : -1]] == records
    assert calls(out)[-1][:2] == ["close", "finished"] and "result/evaluation/knn/top1" in calls(out)[-1][2]
    assert (out / "trackers" / "recording.log").read_text() == "a library prints\n"
    seen = capfd.readouterr()
    sentence = "failing no longer records this run, which continues: OSError: [Errno 28] No space left on device"
    assert seen.err.count(sentence) == 2 and "a library prints" not in seen.out + seen.err
    assert "track" not in json.loads((out / "recipe.json").read_text())


def test_failures_are_reported_once_and_kept(tmp_path, monkeypatch, offered):
    write_run(tmp_path, range(3))
    notes, untracked = [], {}
    monkeypatch.setattr(followers, "_WAIT", {True: 20.0, False: 1.0})
    running = Followers(tmp_path, Selection("id", ("failing", "removed", "hanging")), untracked)
    running.start(0, notes.append)
    for name in ("failing", "removed"):
        running._processes[name].wait(60)
    running.check()
    running.check()
    hanging = running._processes["hanging"]
    running.close(finished=False)
    hanging.kill()
    hanging.wait()
    assert untracked == {
        "failing": "OSError: [Errno 28] No space left on device",
        "removed": "LookupError: no installed package offers it",
    }
    assert len(notes) == 3 and notes[2].startswith("hanging still records the run, in process ")


def test_unwritable_folder_of_a_tracker_is_not_an_error(tmp_path):
    write_run(tmp_path, range(3))
    (tmp_path / "trackers").write_text("a file")
    notes, untracked = [], {}
    with Followers(tmp_path, Selection("id", ("x",)), untracked) as running:
        running.start(0, notes.append)
    assert len(notes) == 1 and "File exists" in untracked["x"]


def tracked(folder, name, step=0):
    """Record a run directory with a tracker, in its own process without a network."""
    untracked = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(followers, "_WAIT", {True: 400.0, False: 5.0})
        for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR", "TRACKIO_SPACE_ID"):
            patched.delenv(variable, raising=False)
        with Followers(folder, Selection("3f2a", (name,)), untracked) as running:
            running.start(step, print)
    log = (folder / "trackers" / f"{name}.log").read_text()
    assert not untracked and "tried to reach" not in log, log


def stopped_and_resumed(folder, name):
    """Record a run that logs beyond its checkpoint at step 10, is killed, and continues there."""
    write_run(folder, range(16), status="running")
    tracked(folder, name)
    write_run(folder, range(11))
    write_log(folder, range(11, 26), "a")
    tracked(folder, name, step=10)


LOSSES = [(step, step / 7) for step in range(26)]


@pytest.mark.slow
def test_mlflow(tmp_path):
    pytest.importorskip("alembic")
    pytest.importorskip("mlflow")
    stopped_and_resumed(tmp_path / "run", "mlflow")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/run/trackers/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("inbatch").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((value.step, value.value) for value in history) == LOSSES
    assert [v.step for v in client.get_metric_history(run.info.run_id, "knn")] == [0, 10, 20]
    lr = {value.step: value.value for value in client.get_metric_history(run.info.run_id, "lr")}
    assert math.isnan(lr[3]) and lr[4] == 0.5
    assert run.data.metrics["result/evaluation/knn/top1"] == 0.25
    assert run.data.params == {"method.name": "simclr", "lr": "0.5", "replans": "[[1, 2]]", "test": "None"}
    assert run.data.tags == {"inbatch.id": "3f2a", "inbatch.status": "finished", "mlflow.runName": "run"}
    assert run.info.status == "FINISHED" and run.info.run_name == "run"


@pytest.mark.slow
def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    stopped_and_resumed(tmp_path / "run", "trackio")
    database = sqlite3.connect(tmp_path / "run" / "trackers" / "trackio" / "inbatch.db")
    rows = [
        (step, name, json.loads(x)) for step, name, x in database.execute("select step, run_name, metrics from metrics")
    ]
    assert {name for _, name, _ in rows} == {"run-3f2a"}
    assert sorted((step, x["loss"]) for step, _, x in rows if "loss" in x) == LOSSES
    assert sorted(step for step, _, x in rows if "knn" in x) == [0, 10, 20]
    assert [x for _, _, x in rows if "status" in x] == [{"status": "finished", "result/evaluation/knn/top1": 0.25}]
    ((config,),) = database.execute("select config from configs")
    assert json.loads(config)["method.name"] == "simclr" and json.loads(config)["_Username"] is None


def read_wandb(path):
    """Yield the records in a file of Weights & Biases: protobuf messages in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


@pytest.mark.slow
def test_wandb(tmp_path):
    pytest.importorskip("wandb")
    stopped_and_resumed(tmp_path / "run", "wandb")
    (path,) = (tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/run-3f2a.wandb")
    records = list(read_wandb(path))
    rows = [
        {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["_step"], row["loss"]) for row in rows if "loss" in row] == LOSSES
    assert [(row["_step"], row["knn"]) for row in rows if "knn" in row] == [(0, 0.0), (10, 0.1), (20, 0.2)]
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {"".join(item.nested_key) or item.key: item.value_json for item in run.config.update}
    assert (run.run_id, run.project, run.display_name, run.host) == ("3f2a", "inbatch", "run", "")
    assert config["method.name"] == '"simclr"'
    summary = {
        "".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in records
        for item in record.summary.update
    }
    assert summary["status"] == "finished" and summary["result/evaluation/knn/top1"] == 0.25
    assert not [record for record in records if record.HasField("environment")], "no host, user or program"
