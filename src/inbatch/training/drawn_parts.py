"""The parts of a run that have random weights, drawn from its seed in a fixed order, and its views."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from inbatch.context.fusion import Fusion
from inbatch.context.mixing import Mixer
from inbatch.data import Source
from inbatch.data.views import AnyViews
from inbatch.errors import ConfigError, reason
from inbatch.methods.base import Method, call_hook, check_heads, check_widths
from inbatch.models import Encoder, check_side
from inbatch.models.lora import add_lora
from inbatch.nn.heads import Head
from inbatch.training.build_checks import check_momentum, check_views
from inbatch.training.first_layer import fit_first_layer
from inbatch.training.plug_ins import fusion, mixer_of
from inbatch.training.presets import method_named
from inbatch.training.recipe import Recipe
from inbatch.training.run_encoder import make_encoder, seeded, starting_weights, view_sides
from inbatch.training.run_views import views_of
from inbatch.training.teacher import load_teacher


@dataclass(frozen=True)
class DrawnParts:
    """What draws random weights, in the order in which it draws them, and the views.

    fused: numbers of the views that `fuse` fuses. mixer: mixing of images, if any.
    notes: sentences for the user. teacher: frozen encoder, if any.
    """

    method: Method
    encoder: Encoder
    views: AnyViews
    heads: dict[str, Head]
    fuse: Fusion | None
    fused: Sequence[int]
    mixer: Mixer | None
    notes: list[str]
    teacher: Encoder | None


def draw_weights(
    recipe: Recipe, source: Source, device: torch.device, context: int, kept: tuple[Path | None, Path | None]
) -> DrawnParts:
    """Create method, encoder, heads and fusion with weights from the recipe's seed, or from the copies in a run."""
    notes: list[str] = []
    start, teacher = kept[0] or starting_weights(recipe, notes), load_teacher(recipe, kept[1], notes)
    with seeded(recipe, device):
        with settings_of("method", recipe.method.name):
            method = method_named(recipe.method.name)(**recipe.method.options)
        encoder = make_encoder(recipe, start)
        notes += encoder.init_notes
        for side, setting in view_sides(recipe).items():
            check_side(encoder, side, setting)
        if start is None:
            fit_first_layer(encoder, source)
        views = views_of(recipe, encoder.mean, encoder.std)
        check_views(recipe, method, len(views))
        with settings_of("method", recipe.method.name):
            method.teacher_width = teacher.feature_width if teacher else 0
            classes = int(source.labels.max()) + 1
            data = {"images": len(source), "classes": classes, "batch": recipe.batch_size, "views": len(views)}
            call_hook(method, "prepare", **data)
            heads = call_hook(method, "heads", encoder.width)
            check_heads(method, heads, len(views))
            if "method" in recipe.own:
                check_widths(heads, encoder.width)
            check_momentum(method)
        if recipe.lora:
            notes.append(_adapted(recipe, encoder))
        notes += method.notes(len(source))
        mixer = mixer_of(recipe, method, len(views), context)
        fuse, fused = fusion(recipe, method, views, encoder, context, mixer)
        if mixer is not None and mixer.replaces:  # the mixed images of a view are fused as its plain ones would be
            fused = [*fused, *(~v for v in fused)]
        return DrawnParts(method, encoder, views, heads, fuse, fused, mixer, notes, teacher)


def _adapted(recipe: Recipe, encoder: Encoder) -> str:
    """Let only matrices of low rank learn in the encoder; return a sentence about them."""
    if recipe.encoder.options.get("init") is None and "encoder" not in recipe.own:
        raise ConfigError(
            "encoder.lora freezes the weights of the encoder, and these are random: name weights to start from "
            "(--init), or leave out encoder.lora"
        )
    return add_lora(encoder, recipe.lora or 0)


@contextlib.contextmanager
def settings_of(part: str, name: str) -> Iterator[None]:
    """Turn errors of a constructor (a negative width, a rate below 0) into a ConfigError that names the setting."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AssertionError) as e:
        raise ConfigError(f"{part} {name} cannot be made with these settings: {str(e) or reason(e)}") from e
