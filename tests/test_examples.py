"""The scripts in examples/ run and print what the documentation shows."""

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from rank_pool import on_ranks
from small_runs import evaluate_on_few_images
from torch import distributed

import inbatch
from inbatch.api import pretrain
from inbatch.methods import METHODS
from inbatch.models import create_encoder, save_encoder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def run_script(name: str, *arguments: str) -> str:
    """Run a script in this process, which has imported torch already, and return its output."""
    output = io.StringIO()
    with patch.object(sys, "argv", [name, *arguments]), contextlib.redirect_stdout(output):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return output.getvalue()


def run_program(name: str, *arguments: str) -> str:
    """Run a script as a user does, in a process of its own, and return its output."""
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number_after(text: str, output: str) -> float:
    """Return the first number after a text."""
    return float(re.search(rf"{re.escape(text)}\D*([\d.]+)", output)[1])  # type: ignore[index]


@pytest.fixture(autouse=True)
def in_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Return what embed_and_search.py prints without a run, and the run that it writes."""
    directory = tmp_path_factory.mktemp("search")
    with contextlib.chdir(directory), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("INBATCH_CACHE", "off")
        output = run_script("embed_and_search.py")
    yield output, str(directory / "runs" / "digits")


def test_scripts_are_short_listed_and_state_their_command() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert len(SCRIPTS) == 12
    for script in SCRIPTS:
        text = script.read_text()
        assert len(text.splitlines()) < 60, script.name
        assert f"({script.name})" in table
        command = re.search(r"^    (.*)$", text, re.M)[1].removesuffix(" [RUN]")  # type: ignore[index]
        assert f"`{command}`" in table


def rank_output(script: str) -> str:
    """Return what a script prints on this rank, whose process group exists already."""
    with patch.object(distributed, "init_process_group"), patch.object(distributed, "destroy_process_group"):
        return run_script(script)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "gain"), [("ddp_loop.py", 0.5), ("grad_cache.py", 0.05)])
def test_loops_take_the_same_steps_on_one_and_two_processes(script: str, gain: float) -> None:
    losses = []
    for world in (1, 2):
        first, *others = on_ranks(world, rank_output, script)
        assert not any(others)
        losses.append([float(loss) for loss in re.findall(r"loss ([\d.]+)", first)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    assert losses[0][-1] < losses[0][0] - gain


@pytest.mark.slow
def test_own_loop_saves_an_encoder_that_loads() -> None:
    output = run_script("own_loop.py")
    assert number_after("epoch 1: loss", output) < number_after("epoch 0: loss", output)
    assert "saved and loaded: features (4, " in output and output.startswith("20 steps")


@pytest.mark.slow
def test_monitor_distinguishes_collapse_from_learning() -> None:
    spread = [float(x) for x in re.findall(r"feature std ([\d.]+)", run_script("monitor.py"))]
    assert len(spread) == 6 and max(spread[:3]) < 0.5 * min(spread[3:])


def test_own_method_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few images; what it learns from all of them is checked by the slow test below."""
    evaluate_on_few_images(monkeypatch)
    small = {"subset": 64, "encoder": "tiny"}
    monkeypatch.setattr(inbatch, "pretrain", lambda *args, **fields: pretrain(*args, **(fields | small)))
    before = dict(METHODS)
    output = run_script("own_method.py")
    assert before == METHODS
    assert 0 < number_after("evaluation: k-NN accuracy", output) < 1
    assert 0 < number_after("untrained: k-NN accuracy", output) < 1
    written = Path(re.search(r"run directory: (.*)", output)[1])  # type: ignore[index]
    logged = (written / "metrics.jsonl").read_text()
    assert '"attraction"' in logged and '"repulsion"' in logged
    recipe = json.loads((written / "recipe.json").read_text())
    assert recipe["method"] == {"name": "own_method:Spectral", "weight": 5.0, "width": 64}
    assert len(recipe["own"]["method"]["sha256"]) == 64


@pytest.mark.slow
def test_own_method_learns() -> None:
    output = run_program("own_method.py")
    assert number_after("evaluation: k-NN accuracy", output) > number_after("untrained: k-NN accuracy", output) + 0.03


@pytest.mark.slow
def test_own_backbone_learns() -> None:
    output = run_script("own_backbone.py")
    assert number_after("trained: k-NN accuracy", output) > number_after("random weights: k-NN accuracy", output) + 0.03
    assert output.strip().endswith("loaded: own_backbone:PatchMLP, width 96")


@pytest.mark.slow
def test_own_data_learns_and_logs() -> None:
    output = run_script("own_data.py")
    assert 0.1 < number_after("k-NN accuracy", output) < 1
    assert "data: Digits, views: own_data:shifted" in output
    (log,) = Path("runs").glob("simclr-Digits*/metrics.jsonl")
    assert '"StopWhenFlat/fall"' in log.read_text()


@pytest.mark.slow
def test_embed_and_search_finds_neighbours_of_the_same_class(search: tuple[str, str]) -> None:
    output, _ = search
    assert number_after("neighbours of the same class:", output) > 0.3
    assert len(output.splitlines()) == 9


@pytest.mark.slow
def test_few_labels_are_worth_more_on_learned_features(search: tuple[str, str]) -> None:
    rows = [re.split(r"\s{2,}", row) for row in run_script("few_labels.py", search[1]).splitlines()[1:]]
    linear = {(name, int(labels)): float(accuracy) for name, labels, _, accuracy in rows}
    assert linear["trained encoder", 63] > linear["pixels", 63] + 0.1
    assert linear["trained encoder", 63] > linear["untrained encoder", 63] + 0.1


@pytest.mark.slow
def test_onnx_inference_gives_the_features_of_the_encoder(tmp_path: Path) -> None:
    """Up to the rounding of resized pixels to whole numbers, which Pillow does and the encoder does not."""
    pytest.importorskip("onnxruntime")
    inbatch.export_run(untrained_encoder(tmp_path), tmp_path / "onnx", "onnx")
    rng, files = np.random.default_rng(0), []
    for i, sides in enumerate([(30, 50), (64, 48), (41, 41)]):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize(sides).save(files[-1])
    rows, names = runpy.run_path(str(EXAMPLES / "onnx_inference.py"))["outputs"](str(tmp_path / "onnx"), files)
    assert names == []
    expected = inbatch.load(tmp_path / "encoder").embed([Image.open(file) for file in files])
    assert np.linalg.norm(rows - expected) < 0.02 * np.linalg.norm(expected)
    assert "(2, 96)" in run_script("onnx_inference.py")


def untrained_encoder(folder: Path) -> Path:
    """Return the folder of an untrained encoder."""
    encoder = create_encoder("fast", size=32, width=8, check=False).eval()
    save_encoder(encoder, folder / "encoder")
    return folder / "encoder"


@pytest.mark.slow
def test_sklearn_pipeline_classifies(search: tuple[str, str]) -> None:
    assert number_after("accuracy", run_script("sklearn_pipeline.py", search[1])) > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_documented_command_runs(script: Path) -> None:
    if script.stem in ("onnx_inference", "ray_train"):
        pytest.importorskip({"onnx_inference": "onnxruntime", "ray_train": "ray"}[script.stem])
    words = shlex.split(re.search(r"^    (.*)$", script.read_text(), re.M)[1].removesuffix(" [RUN]"))  # type: ignore[index]
    program = [sys.executable]
    if words[0] == "torchrun":
        program += ["-m", "torch.distributed.run", "--standalone"]
    completed = subprocess.run([*program, *words[1:-1], str(script)], capture_output=True, text=True, timeout=280)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout
