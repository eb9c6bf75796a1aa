"""Encoder of an unfinished run: every command accepts it and reports the step that it is from."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import one_object, run
from safetensors.torch import save_file
from small_runs import assert_same_state, stop_after, tiny

import inbatch
from inbatch import api
from inbatch.errors import ConfigError, DataError, Preempted
from inbatch.models import create_encoder, save_encoder
from inbatch.training import checkpoint
from inbatch.training.recipe import make
from inbatch.training.run_encoder import initial_encoder, with_encoder_of_init
from inbatch.training.settings_file import read_file

SENTENCE = "was stopped at step 7 of 10; its encoder is from step 7"
IMAGES = torch.randint(0, 255, (5, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stop(out: Path, method: str = "simclr", **fields: Any) -> Path:
    """Stop a run of 10 steps after step 7."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 7)
        tiny(method, out, **fields)
    assert not (out / "encoder").exists() and not (out / "result.json").exists()
    return out


def in_checkpoint(out: Path) -> dict[str, torch.Tensor]:
    network = checkpoint.load(out / "checkpoints").state["network"]
    return {key.removeprefix("encoder."): value for key, value in network.items() if key.startswith("encoder.")}


def loaded(out: Path) -> Any:
    with pytest.warns(UserWarning, match="its encoder is from step 7"):
        return inbatch.load(out)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stop(tmp_path_factory.mktemp("my runs") / "a run")


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    """Copy a stopped run, to be changed by a test."""
    return Path(shutil.copytree(stopped, tmp_path / "a copy"))


def words(path: Path) -> str:
    return shlex.quote(str(path))


@pytest.mark.grid(1)
@pytest.mark.parametrize("fields", [{}, {"attend": "ba2m"}, {"attend": "batchformer"}, {"compile": False}])
def test_a_stopped_run_loads_with_the_weights_of_its_checkpoint(tmp_path: Path, fields: dict[str, Any]) -> None:
    out = stop(tmp_path / "run", **fields)
    with pytest.warns(UserWarning, match=SENTENCE):
        encoder = inbatch.load(out)
    assert_same_state(dict(encoder.state_dict()), in_checkpoint(out))
    assert not encoder.training and encoder.embed(IMAGES).shape == (5, encoder.width)


@pytest.mark.slow
def test_the_images_of_a_stopped_run_are_not_needed(copy: Path) -> None:
    expected = loaded(copy).embed(IMAGES)
    recipe = json.loads((copy / "recipe.json").read_text())
    (copy / "recipe.json").write_text(json.dumps(recipe | {"data": "/nowhere"}))
    np.testing.assert_array_equal(loaded(copy).embed(IMAGES), expected)


@pytest.mark.slow
def test_embed_states_the_step_of_the_encoder(stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npz"
    result = run(f"embed {words(stopped)} digits-canvas --split test -o {out}")
    assert result.exit_code == 0 and f"the run in {stopped} {SENTENCE}" in result.stdout
    report = one_object(run(f"embed {words(stopped)} digits-canvas --split test -o {out} --json").stdout)
    assert (report["images"], report["step"], report["steps"]) == (500, 7, 10) and SENTENCE in report["note"]
    source = inbatch.data.open_data("digits-canvas", "test")
    expected = loaded(stopped).embed([source.image(i) for i in range(5)])
    vectors = np.load(out, allow_pickle=False)["vector"]
    np.testing.assert_allclose(vectors[:5], expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match=SENTENCE):
        inbatch.embed_run(stopped, (IMAGES, [0] * 5), out)


@pytest.mark.slow
def test_evaluate_accepts_a_stopped_run(copy: Path) -> None:
    result = run(f"evaluate {words(copy)} --protocol knn,clustering")
    assert result.exit_code == 0 and SENTENCE in result.stdout and "untrained encoder" in result.stdout
    written = json.loads((copy / "evaluation.json").read_text())
    assert (written["step"], written["steps"]) == (7, 10) and SENTENCE in written["note"]
    assert written["held_out"] == "test split of digits-canvas"
    assert set(written["untrained"]) >= {"knn", "clustering"} and "linear" not in written["untrained"]


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_to_begin_from(stopped: Path, tmp_path: Path, finished: bool) -> None:
    other = tiny("simclr", tmp_path / "other", epochs=1).directory if finished else stopped
    line = f"pretrain --data digits-canvas --set subset=200 --batch 40 --epochs 1 --init {words(other)} --out new"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = run(line)
    assert result.exit_code == 0, result.stderr
    assert (SENTENCE in result.stderr) == (not finished)
    assert "encoder before training" in result.stdout and "untrained" not in result.stdout
    begun = inbatch.load(tmp_path / "new" / "initial").state_dict()
    assert_same_state(dict(begun), dict((inbatch.load if finished else loaded)(other).state_dict()))


def test_a_run_to_begin_from_must_fit(stopped: Path, tmp_path: Path) -> None:
    result = run(f"pretrain --data digits-canvas --encoder resnet10 --init {words(stopped)} --out {tmp_path / 'new'}")
    assert result.exit_code == 2 and "do not fit resnet10 (the encoder tiny)" in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_initial_weights_of_a_run_are_not_needed_later(tmp_path: Path) -> None:
    """Its weights, mean and std are stored with the run: to load, to evaluate, to resume."""
    weights = tmp_path / "weights"
    with torch.random.fork_rng():
        save_encoder(create_encoder("tiny", size=20, channels=1, mean=(0.3,), std=(0.4,)), weights)
    whole = tiny("simclr", tmp_path / "whole", settings={"encoder.init": str(weights)})
    out = stop(tmp_path / "run", settings={"encoder.init": str(weights)})
    began = inbatch.load(weights)
    shutil.rmtree(weights)
    encoder = loaded(out)
    assert encoder.mean == (0.3,) and encoder.std == (0.4,)
    assert_same_state(dict(encoder.state_dict()), in_checkpoint(out))
    recipe = make(read_file(out / "recipe.json"))
    assert_same_state(dict(initial_encoder(recipe, out).state_dict()), dict(began.state_dict()))
    assert inbatch.evaluate_run(out, protocols=["knn"])["untrained"]["knn"]["top1"] > 0
    resumed = tiny("simclr", out, resume=True, settings={"encoder.init": str(weights)})
    assert_same_state(dict(resumed.encoder.state_dict()), dict(whole.encoder.state_dict()))
    assert resumed.result["untrained"] == whole.result["untrained"]

    shutil.rmtree(out / "initial")  # as older versions wrote it
    shutil.rmtree(out / "encoder")
    with pytest.warns(UserWarning, match=r"mean \(0\.5,\) and std \(0\.25,\) are the defaults"):
        assert inbatch.load(out).mean == (0.5,)
    evaluation = inbatch.evaluate_run(out, protocols=["knn"])
    assert evaluation["untrained"] is None and "the encoder before training cannot be created" in evaluation["note"]


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_a_run_from_weights_of_another_program_resumes_without_them(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth.tar"
    weights = create_encoder("tiny", size=20, channels=1).backbone.state_dict()
    torch.save({"state_dict": {f"module.encoder_q.{k}": v + 0.01 for k, v in weights.items()}}, file)
    settings = {"encoder.init": str(file), "encoder.init_min_match": 0.9}
    whole = tiny("simclr", tmp_path / "whole", settings=settings)
    out = stop(tmp_path / "run", settings=settings)
    file.unlink()
    began = inbatch.load(tmp_path / "whole" / "initial").backbone.state_dict()
    assert all(torch.equal(began[k], v + 0.01) for k, v in weights.items() if v.is_floating_point())
    resumed = tiny("simclr", out, resume=True, settings=settings)
    assert_same_state(dict(resumed.encoder.state_dict()), dict(whole.encoder.state_dict()))


@pytest.mark.parametrize(
    ("method", "fields"),
    [("simclr", {}), ("moco", {"encoder": "resnet10"}), ("swav", {"attend": "ba2m"}), ("cc", {"seed": 5})],
)
def test_the_initial_encoder_is_that_of_the_run_bit_for_bit(
    tmp_path: Path, method: str, fields: dict[str, Any]
) -> None:
    built = api.prepare("digits-canvas", method, subset=200, batch_size=40, **fields)
    before = torch.get_rng_state()
    again = initial_encoder(built.recipe, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(dict(again.state_dict()), dict(built.encoder.state_dict()))


def test_averaged_weights_are_preferred(copy: Path) -> None:
    saved = checkpoint.load(copy / "checkpoints")
    average = {key: value * 0.5 for key, value in saved.state["network"].items() if value.is_floating_point()}
    checkpoint.save(copy / "checkpoints", saved.state | {"average": saved.state["network"] | average}, step=7)
    own, weights = in_checkpoint(copy), loaded(copy).state_dict()
    assert all(torch.equal(weights[key], value * 0.5) for key, value in own.items() if value.is_floating_point())


# Errors and stages


def test_run_without_encoder_and_checkpoint_is_refused(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    for line in (
        f"embed {words(copy)} digits-canvas -o f.npz",
        f"export {words(copy)} -o new",
        f"evaluate {words(copy)}",
    ):
        result = run(line)
        assert result.exit_code == 2 and "neither an encoder nor a checkpoint" in result.stderr, result.output
        assert "--resume auto" in result.stderr and result.stderr.count("error") == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither recipe\.json nor model\.safetensors"):
        inbatch.load(tmp_path / "empty")


def test_damaged_checkpoints(copy: Path) -> None:
    last, previous = (copy / "checkpoints" / name for name in (checkpoint.LAST, checkpoint.PREVIOUS))
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"at step 7 of 10; its encoder is from step 5\. .* is damaged"):
        inbatch.load(copy)
    previous.write_bytes(b"")
    result = run(f"export {words(copy)} -o new")
    assert result.exit_code == 3 and "is damaged" in result.stderr and "Traceback" not in result.output


@pytest.mark.slow
def test_a_checkpoint_of_another_recipe(copy: Path) -> None:
    recipe = json.loads((copy / "recipe.json").read_text())
    (copy / "recipe.json").write_text(json.dumps(recipe | {"encoder": {"name": "resnet10"}}))
    with pytest.raises(ConfigError, match=r"recipe\.json was edited after .*encoder\.name = 'resnet10'"):
        inbatch.load(copy)
    saved = checkpoint.load(copy / "checkpoints")
    checkpoint.save(copy / "checkpoints", saved.state, step=saved.step)  # an earlier version did not keep the recipe
    with pytest.raises(DataError, match=r"last\.pt is not a checkpoint of .*recipe\.json: the weights do not fit"):
        inbatch.load(copy)


@pytest.mark.slow
def test_a_run_that_was_killed(copy: Path) -> None:
    """A killed run could not record that it was stopped, and may still be running."""
    report = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(report | {"status": "running", "last_step": 0}))
    with pytest.warns(UserWarning, match="has not finished; its encoder is from step 7 of 10"):
        inbatch.load(copy)
    (copy / "run.json").write_text('{"status": ["failed"], "last_step": "many", "steps": [1]}')
    with pytest.warns(UserWarning, match="has not finished; its encoder is from step 7$"):
        inbatch.load(copy)
    (copy / "run.json").unlink()
    with pytest.warns(UserWarning, match="has not finished; its encoder is from step 7$"):
        inbatch.load(copy)
    (copy / "encoder").mkdir()  # killed between the two files of its encoder
    (copy / "encoder" / "model.safetensors").write_bytes(b"")
    loaded(copy)


def test_the_full_result_is_refused(stopped: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has not finished: continue it with inbatch pretrain --resume '.*inbatch export"
    ):
        inbatch.load_run(stopped)


# inbatch export


def test_export_writes_what_loads_again(stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "an encoder"
    result = run(f"export {words(stopped)} -o {words(out)}")
    assert result.exit_code == 0 and SENTENCE in result.stdout and f"inbatch.load('{out}')" in result.stdout
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json"}
    np.testing.assert_array_equal(inbatch.load(out).embed(IMAGES), loaded(stopped).embed(IMAGES))
    again = one_object(run(f"export {words(stopped)} -o {words(out)} --json").stdout)  # its own output may be replaced
    assert (again["step"], again["steps"], again["encoder"], again["width"]) == (7, 10, "tiny", 96)
    assert again["timm"] is False and again["out"] == str(out) and SENTENCE in again["note"]


@pytest.mark.usefixtures("brief")
def test_export_of_a_finished_run_is_its_encoder(tmp_path: Path) -> None:
    out = tiny("simclr", tmp_path / "run", epochs=1).directory
    report = inbatch.export_run(out, tmp_path / "new")
    assert report["note"] is None and (report["step"], report["steps"]) == (5, 5)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (out / "encoder" / name).read_bytes()


def test_export_overwrites_nothing_foreign(stopped: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"architecture": "resnet18"}')
    (theirs / "model.safetensors").write_bytes(b"theirs")
    for out in (file, folder, theirs):
        result = run(f"export {words(stopped)} -o {words(out)}")
        assert result.exit_code == 2 and "choose another folder" in result.stderr
    assert file.read_text() == "mine" and (theirs / "model.safetensors").read_bytes() == b"theirs"
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_an_encoder_with_a_readout_is_exported_twice(tmp_path: Path) -> None:
    """It has a third file, which an export may replace, too."""
    encoder = create_encoder("fast", size=32, whiten=True).eval()
    assert encoder.readout is not None
    encoder.readout.fit(torch.randn(50, encoder.readout.width))
    save_encoder(encoder, tmp_path / "encoder")
    for _ in range(2):
        inbatch.export_run(tmp_path / "encoder", tmp_path / "out")
    images = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    np.testing.assert_array_equal(inbatch.load(tmp_path / "out").embed(images), encoder.embed(images))


@pytest.mark.slow
def test_timm_reads_what_it_can_build(tmp_path: Path) -> None:
    import timm

    images = torch.randint(0, 255, (8, 3, 72, 72), dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 1)
        inbatch.pretrain(
            images, out=tmp_path / "run", encoder="resnet10", batch_size=4, epochs=1, image_size=72, quiet=True
        )
    result = run(f"export {words(tmp_path / 'run')} -o {words(tmp_path / 'out')}")
    assert result.exit_code == 0 and f"timm.create_model('local-dir:{tmp_path / 'out'}'" in result.stdout
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    encoder = inbatch.load(tmp_path / "out")
    with torch.no_grad():
        rows = model(encoder.prepare(images))
    np.testing.assert_allclose(rows.numpy(), encoder.embed(images), rtol=1e-4, atol=1e-5)


def test_the_encoder_of_init_is_that_of_the_weights(tmp_path: Path) -> None:
    """--init alone also selects the encoder, because weights of another one would not fit."""
    encoder = create_encoder("fast", size=32, width=8, whiten=True)
    save_encoder(encoder, tmp_path / "encoder")
    settings = with_encoder_of_init({"encoder.init": str(tmp_path / "encoder")})
    assert {k: settings[k] for k in ("encoder.name", "encoder.width", "encoder.whiten")} == {
        "encoder.name": "fast", "encoder.width": 8, "encoder.whiten": True,
    }  # fmt: skip
    recipe = make(settings | {"data": "photos", "image_size": 32, "preset": "fast", "epochs": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe.nested()))
    again = with_encoder_of_init({"encoder.init": tmp_path / "run"})
    assert again["encoder.name"] == "fast" and again["encoder.width"] == 8
    assert again["encoder.init"] == tmp_path / "run"
    for requested in ({}, {"encoder.init": "timm"}, {"encoder.init": "w.pth"}, settings | {"encoder.name": "tiny"}):
        assert with_encoder_of_init(requested) == requested
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        create_encoder("tiny", size=32, init="nowhere")


def test_the_encoder_of_a_folder_of_the_hub_is_recognised(tmp_path: Path) -> None:
    """By the architecture of timm that its config.json states, else by its tensors."""
    with torch.device("meta"):
        weights = timm.create_model("resnet18", num_classes=0).state_dict()
    empty = {name: torch.zeros_like(x, device="cpu") for name, x in weights.items()}
    save_file(empty, tmp_path / "model.safetensors")
    for config, name in ((None, "resnet18"), ({"architectures": ["ResNetModel"]}, "resnet18"),
                         ({"architecture": "resnet10t"}, "resnet10t")):  # fmt: skip
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        assert with_encoder_of_init({"encoder.init": str(tmp_path)})["encoder.name"] == name
