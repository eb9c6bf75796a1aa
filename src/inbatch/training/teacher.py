"""The frozen teacher of a run: an encoder that the recipe names, copied into the run directory."""

from pathlib import Path

import torch

from inbatch.errors import ConfigError
from inbatch.methods import METHODS
from inbatch.models import Encoder, create_encoder, load_encoder, save_encoder
from inbatch.models.network import Network
from inbatch.models.teacher import Teacher, TeacherNetwork
from inbatch.training.presets import method_named
from inbatch.training.recipe import Recipe
from inbatch.training.run_encoder import load_run_encoder

FOLDER = "teacher"
TIMM = "timm/"


def load_teacher(recipe: Recipe, kept: Path | None, notes: list[str]) -> Encoder | None:
    """Return the teacher of a recipe; None if its method has none. It draws no random numbers of the caller.

    Args:
        recipe: The recipe.
        kept: Directory of the run's copy (`kept_teacher`).
        notes: Receives a sentence if it is the encoder of an unfinished run.

    Raises:
        ConfigError: If the method needs a teacher and the recipe names none, or the reverse.
    """
    name = recipe.method.name
    if method_named(name).teacher != (recipe.teacher is not None):
        others = ", ".join(key for key, method in METHODS.items() if method.teacher)
        raise ConfigError(
            f"{name} learns from a teacher: name it, --teacher RUN, the folder of an encoder, or timm/NAME"
            if recipe.teacher is None
            else f"{name} does not learn from a teacher: leave out --teacher, or choose the method {others}"
        )
    if recipe.teacher is None:
        return None
    with torch.random.fork_rng(devices=[]):
        if kept is not None:
            return load_encoder(kept)
        if recipe.teacher.startswith(TIMM):
            return _of_timm(recipe.teacher.removeprefix(TIMM))
        loaded = load_run_encoder(recipe.teacher)
    notes += [f"Teacher: {loaded.note}"] if loaded.note else []
    return loaded.encoder


def _of_timm(name: str) -> Encoder:
    """Return a model of timm with its published weights, at the size of their images."""
    import timm

    if not timm.is_model(name):
        raise ConfigError(f"teacher = timm/{name}: timm has no such model; timm.list_models() lists them")
    return create_encoder(name, size=published_size(name), init="timm").eval()


def published_size(name: str) -> int:
    """Return the side of the images of a timm model's published weights, in pixels."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return 224 if config is None else int(config.input_size[-1])


def teacher_network(teacher: Encoder, student: Encoder, precision: torch.dtype, channels_last: bool) -> Network:
    """Return the network of the teacher, which takes the student's views."""
    return TeacherNetwork(Teacher(teacher, student), precision, channels_last)


def save_teacher(target: Network | None, run: Path) -> None:
    """Save the teacher in a run directory: a resumed run needs no other file, and no checkpoint holds it."""
    if isinstance(target, TeacherNetwork):
        save_encoder(target.frozen_encoder, run / FOLDER)


def kept_teacher(run: Path) -> Path | None:
    """Return the directory of a run's copy of its teacher; None without a teacher."""
    return run / FOLDER if (run / FOLDER / "config.json").is_file() else None
