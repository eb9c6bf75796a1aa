"""Runs with a frozen teacher: it gets the same views, never changes, and is kept in the run."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import on_ranks
from small_runs import assert_same_state, saved, stop_after, tiny

import inbatch
from inbatch import api
from inbatch.errors import ConfigError, Preempted
from inbatch.models import create_encoder, save_encoder
from inbatch.models.teacher import Teacher, TeacherNetwork
from inbatch.training.build import build

SMALL: dict[str, Any] = {"subset": 80, "batch_size": 24, "context": 8, "epochs": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder's folder: another architecture, image size, mean and std than the student's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "encoder"
    save_encoder(create_encoder("fast", size=24, width=4, mean=(0.2,) * 3, std=(0.5,) * 3), path)
    return path


def state_of(folder: Path) -> dict[str, list]:
    """Train two steps with three groups in all; return all weights of student and teacher, and the queue."""
    settings = {"teacher": str(folder), "method.queue_size": 40}
    options = SMALL | {"batch_size": 24, "context": 8}
    if torch.distributed.is_initialized():
        options |= {"context": 4}
    built = api.prepare("digits-canvas", settings=settings, precision="float32", **options)
    for step, batch in zip(range(2), built.loader.epoch(0), strict=False):
        built.step(batch, step)
    modules = {"network": built.network, "target": built.target, "method": built.method}
    return {f"{m}.{k}": x.tolist() for m, module in modules.items() for k, x in module.state_dict().items()}


def test_teacher_gets_the_views_in_its_own_normalisation() -> None:
    teacher = create_encoder("fast", size=24, width=4, mean=(0.2,) * 3, std=(0.5,) * 3).eval()
    student = create_encoder("tiny", size=20)
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (student.mean, student.std))
    wrapped = Teacher(teacher, student).train()
    rows = wrapped((images / 255 - mean) / std)
    np.testing.assert_allclose(rows.detach().numpy(), teacher.embed(images), rtol=1e-4, atol=1e-5)
    assert wrapped(torch.randn(2, 3, 20, 20)).shape == (2, teacher.width)
    assert not teacher.training and not any(p.requires_grad for p in wrapped.parameters())
    grey = Teacher(teacher, create_encoder("tiny", size=24, channels=1))
    np.testing.assert_allclose(
        grey((images[:, :1] / 255 - 0.5) / 0.25).detach().numpy(), teacher.embed(images[:, :1].expand(-1, 3, -1, -1)),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="takes images of 3 channels, and the images have 4"):
        Teacher(teacher, create_encoder("tiny", size=24, channels=4))


def test_a_step_leaves_every_bit_of_the_teacher(folder: Path) -> None:
    settings = {"teacher": str(folder), "method.queue_size": 40, "schedule.warmup_epochs": 0}
    built = api.prepare("digits-canvas", settings=settings, **SMALL)
    assert built.recipe.method.name == "relation" and isinstance(built.target, TeacherNetwork)
    assert built.network.heads["projection"][-1].out_features == 32 and "target" not in built.parts()
    before = {k: x.clone() for k, x in built.target.state_dict().items()}
    student = [p.detach().clone() for p in built.network.parameters()]
    built.network.train()
    built.target.train()
    built.step(next(iter(built.loader.epoch(0))), 0)
    assert_same_state(built.target.state_dict(), before)
    assert not any(map(torch.equal, student, built.network.parameters()))
    assert built.method.queue.filled == 24


@pytest.mark.slow
def test_two_ranks_are_one_process(folder: Path) -> None:
    expected = state_of_context(folder)
    for state in on_ranks(2, state_of, folder):
        for key, value in expected.items():
            np.testing.assert_allclose(state[key], value, rtol=0, atol=2e-5, err_msg=key)


def state_of_context(folder: Path) -> dict[str, list]:
    """Train as `state_of` does on ranks: with context groups of 4."""
    settings = {"teacher": str(folder), "method.queue_size": 40}
    built = api.prepare("digits-canvas", settings=settings, precision="float32", **(SMALL | {"context": 4}))
    for step, batch in zip(range(2), built.loader.epoch(0), strict=False):
        built.step(batch, step)
    modules = {"network": built.network, "target": built.target, "method": built.method}
    return {f"{m}.{k}": x.tolist() for m, module in modules.items() for k, x in module.state_dict().items()}


@pytest.mark.slow
def test_a_resumed_run_needs_only_its_own_copy(
    folder: Path, tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "encoder"
    shutil.copytree(folder, moved)
    options: dict[str, Any] = {"settings": {"teacher": str(moved), "method.queue_size": 40}}
    tiny("relation", tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Preempted):
            tiny("relation", tmp_path / "parts", **options)
    shutil.rmtree(moved)
    assert not any("teacher" in key for key in saved(tmp_path / "parts"))
    tiny("relation", tmp_path / "parts", resume=True, **options)
    assert_same_state(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    assert inbatch.load(tmp_path / "parts").name == "tiny"


def test_a_copy_in_the_run_takes_the_place_of_the_named_teacher(folder: Path) -> None:
    """What a resumed run does: the recipe's path may be gone."""
    built = api.prepare("digits-canvas", settings={"teacher": str(folder), "method.queue_size": 40}, **SMALL)
    recipe = type(built.recipe)(**{**vars(built.recipe), "teacher": "/gone"})
    again = build(recipe, built.source, device=torch.device("cpu"), loader=built.loader, teacher=folder)
    assert_same_state(again.target.state_dict(), built.target.state_dict())
    assert_same_state(again.network.state_dict(), built.network.state_dict())


def test_wrong_teachers_are_refused(folder: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"method.name": "simclr", "teacher": str(folder)}, "simclr does not learn from a teacher"),
        ({"method.name": "relation"}, "relation learns from a teacher: name it, --teacher RUN"),
        ({"teacher": str(tmp_path / "none")}, "is not the folder of a run"),
        ({"teacher": tmp_path / "none"}, "is not the folder of a run"),
        ({"teacher": str(tmp_path)}, "neither recipe.json nor model.safetensors"),
        ({"teacher": "timm/resnet_unknown"}, "timm has no such model"),
        ({"teacher": str(folder), "method.queue_size": 0}, "at least one row, not 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            api.prepare("digits-canvas", settings=settings, **SMALL)
