"""The encoder of a run: as created by its recipe, before training, and in its current state, finished or stopped."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inbatch.data.views import make_views
from inbatch.errors import PASS_A_RUN, ConfigError, DataError, InbatchError, reason
from inbatch.models import Encoder, create_encoder, load_encoder, save_encoder
from inbatch.models.initial_weights import is_named
from inbatch.models.likely_encoder import encoder_of_weights
from inbatch.models.lora import merged
from inbatch.models.shipped_weights import with_shipped
from inbatch.models.weights import fill
from inbatch.models.whitened_patches import WhitenedPatches
from inbatch.rng import fold
from inbatch.runtime import own_parts
from inbatch.runtime.files import object_in, read_json
from inbatch.runtime.paths import path_of
from inbatch.training import checkpoint
from inbatch.training.checkpoint_recipe import check_recipe
from inbatch.training.presets import method_named
from inbatch.training.recipe import Recipe, Settings, make
from inbatch.training.settings_file import read_file
from inbatch.training.side_files import report_of

CPU = torch.device("cpu")
ENDED = ("preempted", "interrupted", "failed", "crashed")
"""Status values in run.json of a run that was stopped and recorded it; a killed run still has "running"."""


@dataclass(frozen=True)
class RunEncoder:
    """The encoder of a run or of an encoder's folder, in evaluation mode.

    Attributes:
        encoder: The encoder.
        step, steps: Its step and the number of steps, if the folder contains them.
        note: A sentence for the user if it is not the encoder of a finished run.
    """

    encoder: Encoder
    step: int | None = None
    steps: int | None = None
    note: str | None = None

    def stage(self) -> dict[str, Any]:
        """Return everything except the encoder, for JSON."""
        return {"step": self.step, "steps": self.steps, "note": self.note}


@contextmanager
def seeded(recipe: Recipe, device: torch.device = CPU) -> Iterator[None]:
    """Seed torch's random numbers from the recipe, and restore the caller's random state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(fold(recipe.seed, 0x1217))
        yield


def make_encoder(recipe: Recipe, init: str | Path | Encoder | None) -> Encoder:
    """Create the encoder of a recipe, with weights from torch's random numbers or from `init`.

    It takes images of all sizes of the recipe's views, if its library can build it so, and has no LoRA yet.
    """
    attend = recipe.attend
    options = {k: v for k, v in recipe.encoder.options.items() if k != "lora"} | {"init": init}
    blocks = {k: v for k, v in attend.options.items() if v is not None} if attend else {}
    state = torch.get_rng_state()

    def created(**more: Any) -> Encoder:
        return create_encoder(
            recipe.encoder.name, size=recipe.image_size, channels=recipe.channels, **options | more,
            attend=attend.name if attend else None, attend_options=blocks, check=False,
        )  # fmt: skip

    encoder = created()
    if len(view_sides(recipe)) > 1 and getattr(encoder.backbone, "dynamic_img_size", None) is False:
        torch.set_rng_state(state)
        encoder = created(dynamic_img_size=True)  # timm's ViT and Swin; the weights are the same
    encoder.levels = recipe.levels
    return encoder


def view_sides(recipe: Recipe) -> dict[int, str]:
    """Return the sides of the images that the encoder of a recipe gets, in pixels, with the setting of each."""
    views = [view.size for view in make_views(recipe.views.name, recipe.views.options, recipe.channels)]
    grown = {round(recipe.grow_from * side): "grow_from x views.size" for side in views if recipe.grow_until}
    options = {value: f"views.{key}" for key, value in recipe.views.options.items() if key in ("size", "small_size")}
    sides = grown | dict.fromkeys(views, "views") | options
    return {side: name for side, name in sides.items() if side in views or side in grown} | {
        recipe.image_size: "image_size"
    }


def starting_weights(recipe: Recipe, notes: list[str]) -> str | Path | Encoder | None:
    """Return the value of `encoder.init`; if it is a run, finished or stopped, the encoder of that run.

    Args:
        recipe: The recipe.
        notes: Receives a sentence if that run has not finished.
    """
    init = recipe.encoder.options.get("init")
    if init is None or is_named(init):
        return init
    init = with_shipped(path_of(init, "encoder.init"))
    if not (init / "recipe.json").is_file():
        return init
    with own_parts.any_source():
        loaded = load_run_encoder(init)
    notes += [loaded.note] if loaded.note else []
    return loaded.encoder


def with_encoder_of_init(settings: Settings) -> Settings:
    """Return the settings with the encoder and options that `encoder.init` was saved with, if they name no encoder.

    A run, or a folder that `save_encoder` wrote, states them. Of other weights, usual encoders are recognised; for
    others the settings are returned unchanged.
    """
    init = settings.get("encoder.init")
    if settings.get("encoder.name") is not None or not isinstance(init, str | Path) or init == "timm":
        return settings
    if is_named(init):
        return _with_name(settings, encoder_of_weights(init))
    folder = with_shipped(path_of(init, "encoder.init"))
    file = folder / "config.json"
    if (folder / "recipe.json").is_file():
        encoder = make(read_file(folder / "recipe.json")).encoder
        arguments = {"name": encoder.name} | encoder.options
    elif saved := object_in(read_json(file), "inbatch", file) if file.is_file() else {}:
        arguments = {"name": saved.get("name")} | object_in(saved, "arguments", file)
        if "readout" in saved:
            arguments["whiten"] = True
    else:
        return _with_name(settings, encoder_of_weights(folder))
    if arguments["name"] == "fast":  # an encoder saved without this layer must not get it from a preset
        arguments.setdefault("whiten_patches", False)
    saved_settings = {
        f"encoder.{key}": value
        for key, value in arguments.items()
        if key not in ("init", "init_min_match", "lora") and value is not None
    }
    return saved_settings | settings


def _with_name(settings: Settings, name: str | None) -> Settings:
    return settings if name is None else {"encoder.name": name} | settings


def save_initial(recipe: Recipe, encoder: Encoder, run: Path) -> None:
    """Save the initial weights of a run if they come from a file, the images or the user's code, not its seed alone."""
    of_images = any(isinstance(module, WhitenedPatches) for module in encoder.modules())
    if recipe.own or of_images or recipe.encoder.options.get("init") is not None:
        save_encoder(encoder, run / "initial")


def kept_initial(run: Path) -> Path | None:
    """Return the directory of a run's initial weights; None if its seed determines them."""
    return run / "initial" if (run / "initial" / "config.json").is_file() else None


def initial_encoder(recipe: Recipe, run: Path, device: torch.device = CPU) -> Encoder:
    """Create the initial encoder of a run, in evaluation mode: the same weights, bit for bit."""
    if kept := kept_initial(run):
        encoder = load_encoder(kept)
    else:
        start = starting_weights(recipe, [])
        with seeded(recipe, device):
            method_named(recipe.method.name)(**recipe.method.options)  # created first, and may draw random numbers
            encoder = make_encoder(recipe, start)
    if recipe.channels_last:
        encoder.to(memory_format=torch.channels_last)
    return encoder.to(device).eval()


def initial_name(recipe: Recipe) -> str:
    """Return the name of that encoder in a table."""
    return "untrained encoder" if recipe.encoder.options.get("init") is None else "encoder before training"


def load_run_encoder(path: str | Path) -> RunEncoder:
    """Return the encoder of a run: from its folder `encoder/`, else from its last checkpoint; needs none of its images.

    Args:
        path: Run directory, a folder that `save_encoder` wrote, or the name of weights of the package.

    Raises:
        ConfigError: If there is neither an encoder nor a checkpoint.
        DataError: If they are damaged.
    """
    path = with_shipped(path_of(path))
    if not path.is_dir():
        raise ConfigError(f"{path} is not the folder of a run: there is no such folder; {PASS_A_RUN}, or an encoder's")
    report = report_of(path)
    if (path / "encoder" / "config.json").is_file():
        return RunEncoder(load_encoder(path / "encoder"), _count(report, "last_step"), _count(report, "steps"))
    if (path / "recipe.json").is_file():
        return _from_checkpoint(path, report)
    if (path / "model.safetensors").exists() or (path / "config.json").exists():
        return RunEncoder(load_encoder(path))
    raise ConfigError(
        f"{path} is not the folder of a run or of an encoder: it has neither recipe.json nor "
        f"model.safetensors; {PASS_A_RUN}, or an encoder's"
    )


def _from_checkpoint(path: Path, report: dict[str, Any]) -> RunEncoder:
    recipe = make(read_file(path / "recipe.json"))
    try:
        saved = checkpoint.load(path / "checkpoints")
    except ConfigError:
        words = ["inbatch", "pretrain", "--config", str(path / "recipe.json"), "--out", str(path), "--resume", "auto"]
        raise ConfigError(
            f"the run in {path} has saved neither an encoder nor a checkpoint: start it again ({shlex.join(words)})"
        ) from None
    except InbatchError as error:
        raise DataError(f"the run in {path} has no encoder, and no checkpoint of it can be used: {error}") from None
    check_recipe(saved, recipe, path / "recipe.json")
    encoder, notes = _without_weights(recipe, path)
    network = saved.state.get("average") or saved.state.get("network")
    try:
        weights = {k.removeprefix("encoder."): v for k, v in dict(network or {}).items() if k.startswith("encoder.")}
        fill(encoder, merged(weights) if recipe.lora else weights, f"the encoder {recipe.encoder.name}")
    except (ConfigError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{saved.path} is not a checkpoint of {path / 'recipe.json'}: {str(error) or reason(error)}"
        ) from None
    if encoder.readout is not None:
        notes = [*notes, "the whitening of its features was fitted at the last evaluation before that step"]
    if recipe.replans:  # run.json of a killed run may be older
        report = report | {"steps": sum(recipe.replans[-1])}
    notes = [_sentence(path, report, saved.step), *([saved.note] if saved.note else []), *notes]
    return RunEncoder(encoder.eval(), saved.step, _count(report, "steps"), ". ".join(notes))


def _count(report: dict[str, Any], key: str) -> int | None:
    """Return a number of steps in run.json; None if it is not an integer."""
    value = report.get(key)
    return value if isinstance(value, int) else None


def _without_weights(recipe: Recipe, path: Path) -> tuple[Encoder, list[str]]:
    """Return the encoder of a run with its mean and std, but not yet its weights."""
    if kept := kept_initial(path):
        return load_encoder(kept), []
    with seeded(recipe):
        try:
            return make_encoder(recipe, starting_weights(recipe, [])), []
        except InbatchError as error:  # of an older version, which did not save them
            if recipe.encoder.options.get("init") is None:
                raise
            encoder = make_encoder(recipe, None)
            return encoder, [f"mean {encoder.mean} and std {encoder.std} are the defaults ({error})"]


def _sentence(path: Path, report: dict[str, Any], step: int) -> str:
    """Return a sentence with the step at which a run was stopped and the step of its encoder."""
    last, steps = max(step, _count(report, "last_step") or 0), _count(report, "steps")
    of = f" of {steps:,}" if steps else ""
    if report.get("status") in ENDED:
        return f"the run in {path} was stopped at step {last:,}{of}; its encoder is from step {step:,}"
    how = "is finished but its encoder folder is missing" if report.get("status") == "finished" else "has not finished"
    return f"the run in {path} {how}; its encoder is from step {step:,}{of}"
