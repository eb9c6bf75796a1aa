"""Several processes: a run under torchrun, an existing process group, signals, and ranks that disagree."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import on_ranks
from safetensors.torch import load_file
from small_runs import leave_out_evaluation, use_narrow_encoder

import inbatch
import inbatch.training.checkpoint
from inbatch.errors import ConfigError, Preempted
from inbatch.runtime import distributed, shared_work
from inbatch.training import loop

RUN = {"subset": 200, "batch_size": 40, "context": 20, "epochs": 2, "precision": "float32", "quiet": True}


def job(out: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Make a whole run on ranks with an existing process group, as under Ray Train or in a user's script."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_evaluation(patch)
        use_narrow_encoder(patch)
        run = inbatch.pretrain("digits-canvas", "moco", out=out, settings={"method.queue_size": 64}, **(RUN | extra))
    return run.result


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    """The same context, the same weights (to float32 rounding), one directory, the same result on every rank."""
    alone = job(str(tmp_path / "one"), {})
    first, second = on_ranks(2, job, str(tmp_path / "two"), {})
    assert first == second and (first["world"], alone["world"]) == (2, 1)
    assert first["context"] == alone["context"] == 20
    losses = [[look["loss"] for look in result["curve"] if "loss" in look] for result in (alone, first)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0]
    one, two = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)


def evaluated(out: str) -> list[Any]:
    """Return what does not depend on training: the untrained encoder, then the same finished run."""
    run = inbatch.pretrain("digits-canvas", "cc", out=out, **(RUN | {"subset": 120, "epochs": 1}))
    first = {key: value for key, value in run.result["curve"][0].items() if key != "loss"}
    again = inbatch.evaluate_run(f"{Path(out).parent}/one", from_="head")
    del again["environment"], run.result["untrained"]["versions"]
    return [first, run.result["untrained"], again]


@pytest.mark.slow
def test_two_ranks_evaluate_as_one_process(tmp_path: Path) -> None:
    """The same figures, bit for bit, before training and of a finished run; also of heads and of measures by views."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = evaluated(str(tmp_path / "one"))
    torch.set_num_threads(threads)
    for figures in on_ranks(2, evaluated, str(tmp_path / "two")):
        assert figures == alone


def stopped_while_the_ranks_evaluate(out: str) -> tuple[str, int]:
    """Send rank 0 a signal in the evaluation after the first epoch, which would take minutes on both ranks."""
    evaluations: list[int] = []

    def evaluate() -> dict[str, float]:
        evaluations.append(1)
        if len(evaluations) == 2:
            if distributed.rank() == 0:
                signal.raise_signal(signal.SIGUSR2)
            for _ in range(900):
                shared_work.check()
                time.sleep(0.1)
        return {"knn": 0.5}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_online_evaluator", lambda built, split: evaluate)
        with pytest.raises(Preempted) as stopped:
            job(out, {"evaluate_every": 1, "checkpoint_every": 2})
    return str(stopped.value), len(evaluations)


@pytest.mark.slow
def test_a_signal_to_rank_0_in_an_evaluation_stops_all_ranks_at_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = on_ranks(2, stopped_while_the_ranks_evaluate, str(out))
    assert (first[1], second[1]) == (2, 2)
    for sentence, _ in (first, second):
        assert sentence.startswith("stopped by SIGUSR2 at step 5 of 10, checkpoint saved")
    state = inbatch.training.checkpoint.load(out / "checkpoints")
    assert state.step == 5 and [look["step"] for look in state.state["progress"]["curve"]] == [0]
    assert json.loads((out / "run.json").read_text())["status"] == "preempted"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn" in line] == [0]


def disagree(out: str) -> str:
    try:
        job(out, {"seed": distributed.rank()})
    except ConfigError as error:
        return str(error)
    return "went on"


@pytest.mark.slow
def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    """Fault 8: each rank gets another seed."""
    for message in on_ranks(2, disagree, str(tmp_path / "run")):
        assert "rank 1 has a different one from rank 0" in message


class OnRank0(inbatch.Callback):
    """A callback that only rank 0 passes."""


def differ_when_built(out: str) -> str:
    try:
        job(out, {"callbacks": [OnRank0] * (distributed.rank() == 0), "overwrite": True})
    except ConfigError as error:
        return str(error)
    return "went on"


def test_ranks_that_disagree_about_what_they_have_built_replace_no_run(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "recipe.json").write_text("{}")
    for message in on_ranks(2, differ_when_built, str(tmp_path)):
        assert "disagree about the callbacks" in message
    assert {path.name for path in tmp_path.iterdir()} == {"encoder", "recipe.json"}
    assert (tmp_path / "recipe.json").read_text() == "{}"


def test_too_few_processes_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 processes were expected, 1 started"):
        job(str(tmp_path / "run"), {"expect_world_size": 2})


def gathered() -> list[Any]:
    x = torch.arange(4.0).view(2, 2) + 10 * distributed.rank()
    whole = distributed.gather(x, dim=1)
    mean = torch.tensor([1.0, 2.0]) * (1 + distributed.rank())
    distributed.average_([mean])
    mine = distributed.rank()
    return [
        whole.tolist(),
        distributed.local_shard(whole, 1).tolist(),
        mean.tolist(),
        distributed.all_reduce_max(mine),
        distributed.broadcast_object(mine),
    ]


def test_collectives() -> None:
    whole = [[0.0, 1.0, 10.0, 11.0], [2.0, 3.0, 12.0, 13.0]]
    first, second = on_ranks(2, gathered)
    assert first == [whole, [[0.0, 1.0], [2.0, 3.0]], [1.5, 3.0], 1, 0]
    assert second == [whole, [[10.0, 11.0], [12.0, 13.0]], [1.5, 3.0], 1, 0]


def torchrun(out: Path, *words: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        "-m", "inbatch", "pretrain", "moco", "--data", "digits-canvas", "--out", str(out), "--batch", "40",
        "--context", "20", "--expect-world-size", "2", "--set", "subset=200", "--set", "precision=float32",
        "--set", "method.queue_size=64", *words,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_saves_after_a_signal_and_one_process_continues(number: int, tmp_path: Path) -> None:
    """A signal to the launcher: both ranks stop at one step, with one checkpoint; one process can finish the run."""
    out = tmp_path / "run"
    process = torchrun(out, "--epochs", "400", "--set", "evaluate_every=400")
    end = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 12:
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[1]
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    report = json.loads((out / "run.json").read_text())
    assert report["status"] == "preempted", stderr
    assert signal.Signals(number).name in report["reason"]
    # The launcher stays between a job and its workers: all workers must end.
    assert subprocess.run(["pgrep", "-f", str(out)], capture_output=True).returncode == 1

    state = inbatch.training.checkpoint.load(out / "checkpoints")
    assert state.step == report["last_step"] > 0
    recipe = json.loads((out / "recipe.json").read_text()) | {"epochs": state.step // 5 + 1}
    (out / "recipe.json").write_text(json.dumps(recipe))  # a shorter run, so that the test ends too
    kept = state.run | {"recipe": recipe}
    inbatch.training.checkpoint.save(out / "checkpoints", state.state, step=state.step, run=kept)
    run = inbatch.pretrain(resume=out, quiet=True)
    assert run.result["world"] == 1 and run.result["context"] == 20
