"""The recipe of a run: a frozen value, built from named parts, saved as JSON and printable as a command line.

Settings are flat with dotted keys ("method.temperature"). In increasing precedence they come from the defaults, the
preset of the method, a file and the command line. The constructor of a part is its schema; an unknown key raises an
error with a suggestion.
"""

import dataclasses
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic_core import PydanticCustomError

from inbatch.data.streams import READ_BUFFER
from inbatch.data.views.crop_pairs import CROPS
from inbatch.errors import ConfigError
from inbatch.models import MAX_SIDE
from inbatch.runtime import own_parts
from inbatch.training.budget import parse_budget
from inbatch.training.presets import finite_number, with_preset
from inbatch.training.registry import (
    OPTIONAL,
    PARTS,
    Part,
    Settings,
    check_known,
    make_part,
    nearest,
    shown,
    validated,
)
from inbatch.training.renamed_keys import check_not_renamed

_MOST = 2**31 - 1
"""Upper limit of every count; a larger value is a mistake or malicious, and would cause a crash much later."""
Positive = Annotated[int, pydantic.Field(ge=1, le=_MOST)]
_GROUP = pydantic.TypeAdapter(Annotated[int, pydantic.Field(ge=2, le=_MOST)])


def _context(value: Any) -> Any:
    """Return a valid context; raise one readable error otherwise."""
    if value is None or value == "auto":
        return value
    try:
        return _GROUP.validate_python(value)
    except pydantic.ValidationError:
        wanted = "input should be a whole number of at least 2, auto, or null (the whole share of the batch)"
        raise PydanticCustomError("context", wanted) from None


Context = Annotated[int | Literal["auto"] | None, pydantic.BeforeValidator(_context)]
Seconds = Annotated[
    float | None, pydantic.BeforeValidator(lambda value: None if value is None else parse_budget(value))
]
Replan = tuple[Annotated[int, pydantic.Field(ge=0, le=_MOST)], Annotated[int, pydantic.Field(ge=0, le=_MOST)]]


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule.

    Attributes:
        name: After the warm-up: half a cosine to `end` times the rate, steps at `milestones`, or constant.
        warmup_epochs: Epochs of linear increase from 0; if it is not set, or the length is in steps, at most a tenth of
            the run.
        end: Final rate of the cosine, as a share of the rate.
        milestones: Shares of the run at which "step" multiplies the rate by 0.1.
        freeze_encoder_epochs: Epochs at the start in which only the heads learn: the encoder gets no gradient and keeps
            its norm statistics. If the length is in steps, at most a tenth of the run.
        scaling: optimizer.lr is for 256 images per batch ("linear"), for 1 ("sqrt"), or unscaled ("none").
    """

    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 10
    end: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 0.0
    milestones: tuple[Annotated[float, pydantic.Field(gt=0, lt=1)], ...] = (0.6, 0.8)
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    freeze_encoder_epochs: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the computation of a run; the machine and the output are not part of it.

    Attributes:
        data: Images to learn from.
        split: Split of the data to learn from.
        subset: Number of images to learn from, drawn with seed 0; None for all.
        test: Data set for evaluation; None for the test split of the data or a held-out tenth.
        channels: Channels of the images: 1 (grey), 3 (RGB), 2 or 4 (the same with alpha), or the number of channels of
            TIFF files and arrays.
        classes: File with the names of the classes; None for those of the data.
        levels: The two values of images with more than 8 bits per channel that become 0 and 255; None for the full
            16-bit range.
        image_column: Column of the images, in tar files their extension; None for the usual names.
        label_column: Column of the labels; None for the usual names, "none" for no labels.
        group_column: Column of known groups of the images, such as the video of a frame; of files "folder", or a
            regular expression with brackets for their paths; None for no groups.
        image_size: Side in pixels of the encoder's input images.
        batch_size: Global batch: samples per step over all ranks.
        context: Samples per context group, which interact before the loss (batch norm, plug-ins). None is the local
            batch. "auto" is the largest divisor of it that fits in memory (`auto_context`); the resulting number
            replaces it before anything is written.
        teacher: Frozen encoder from whose relations the method `relation` learns: a run, an encoder's folder, or
            timm/NAME. A copy of it is kept in the run.
        fuse, curate, attend: The plug-ins by which samples interact before the loss; None disables a plug-in.
        sampler: Which samples form a batch; None: a random order.
        negatives: Which samples are negatives of a contrastive method, and how they count; None: all others alike.
        mix: Rule by which images are mixed with others of their context group, and their targets with them.
        crops: Geometry of the crops of a sample's two views relative to each other (`inbatch crops`).
        shuffle_groups: The target network's context groups (without one: those of every view except the first) are
            other permutations of the batch, so that common properties of a group do not solve the task.
        precision: Precision of the networks.
        loss_precision: Precision of the products in a loss's log-sum-exps (`nn.logsumexp`).
        variance_weight: Weight of VICReg's variance term (`nn.functional.variance_hinge`), added to the loss of any
        method.
        grow_from, grow_until: Progressive resizing: until the share `grow_until` of the run, the encoder receives its
            views at the share `grow_from` of their side, at the square of that cost; then at full size. With 1 and 0,
            always at full size.
        joint_norm: Views of one size run through the encoder together, and all views through the heads: they share norm
            statistics, as in the code of SwAV and DINO.
        cache_on_device: Keep the decoded images on the device. None decides by the free memory when the run starts; its
            recipe then states the choice, because the two resize crops by other code and differ in the last digits.
        read: How streamed images are read: "random" by their index, "sequential" from tar and Parquet files that are
            read from beginning to end, in random order (`data.streams`). A new run on remote files chooses sequential.
        read_buffer: With "sequential": samples that each stream of files holds, to draw the next one from.
        read_streams: With "sequential": streams that fill the batch together. None is 16 for each rank; the recipe
            then states their number, on which the order depends.
        max_unreadable: Largest share of unreadable images.
        knn_k: Number of neighbours in k-NN evaluation.
        evaluate_every: Epochs from one online evaluation to the next.
        checkpoint_every: Epochs from one checkpoint to the next.
        epochs: Passes over the images.
        seed: Seed of weights, order and views.
        sync_norm: Batch normalisation uses the statistics of all ranks; context then counts the samples of all ranks.
        channels_last: Use the memory layout channels-last for images and convolution weights.
        compile: Compile the networks with torch.compile.
        shard: Divide the weights of the encoder, their gradients and the optimiser's state over the ranks (FSDP2), for
            models larger than a card; no effect on one rank.
        checkpoint_activations: Compute the blocks of the encoder again in the backward pass instead of keeping their
            activations.
        preset: Named settings with lower priority than explicit ones: of the method, or of `SHARED_PRESETS`.
        steps: Length of the run in optimiser steps; the run ends there, even within an epoch. None: `epochs` is the
            length.
        budget: Time budget in seconds for the whole run, from the start of the command to the written result.
        replans: (step, steps left from there) for each change of the length to keep the budget; written by the run.
        own: Version and SHA-256 of the source of every part that is code of the user (`runtime.own_parts`), by part;
            written by the run.
    """

    data: str
    method: Part
    views: Part
    encoder: Part
    optimizer: Part
    schedule: Schedule = Schedule()
    fuse: Part | None = None
    curate: Part | None = None
    attend: Part | None = None
    negatives: Part | None = None
    mix: Part | None = None
    sampler: Part | None = None
    teacher: str | None = None
    crops: str = "default"
    shuffle_groups: bool = False
    split: str = "train"
    subset: Positive | None = None
    test: str | None = None
    channels: Positive = 3
    classes: str | None = None
    levels: tuple[float, float] | None = None
    image_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    image_size: Annotated[int, pydantic.Field(ge=1, le=MAX_SIDE)] = 224
    epochs: Positive = 100
    batch_size: Annotated[int, pydantic.Field(ge=2, le=_MOST)] = 256
    context: Context = None
    sync_norm: bool = False
    seed: Annotated[int, pydantic.Field(ge=0, le=2**32 - 1)] = 0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    loss_precision: Literal["float32", "tf32x3", "bf16"] = "float32"
    channels_last: bool = True
    variance_weight: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 0.0
    grow_from: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    grow_until: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    joint_norm: bool = False
    compile: bool = False
    shard: bool = False
    checkpoint_activations: bool = False
    cache_on_device: bool | None = None
    read: Literal["random", "sequential"] = "random"
    read_buffer: Positive = READ_BUFFER
    read_streams: Positive | None = None
    max_unreadable: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.01
    knn_k: Positive = 200
    evaluate_every: Positive = 10
    checkpoint_every: Positive = 1
    steps: Positive | None = None
    budget: Seconds = None
    replans: tuple[Replan, ...] = ()
    preset: str = "imagenet"
    own: dict[str, dict[str, str | None]] = dataclasses.field(default_factory=dict)

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of `data.open_data` by which the images of the run are read."""
        return {"channels": self.channels, "classes": self.classes, "levels": self.levels} | self.columns

    @property
    def learning(self) -> dict[str, Any]:
        """Arguments of `data.open_data` by which the images to learn from are read: with their groups."""
        return self.reading | {"group_column": self.group_column}

    @property
    def columns(self) -> dict[str, str | None]:
        """Arguments of `data.open_data` and `data.splits` that name columns."""
        return {"image_column": self.image_column, "label_column": self.label_column}

    @property
    def lora(self) -> int | None:
        """Rank of LoRA in the encoder; None: all weights are trained."""
        rank: int | None = self.encoder.options.get("lora")
        return rank

    def flat(self) -> Settings:
        """Return the recipe as settings, which `make` turns into the same recipe."""
        settings: Settings = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Part):
                settings[f"{f.name}.name"] = value.name
                settings |= {f"{f.name}.{k}": v for k, v in value.options.items()}
            elif isinstance(value, Schedule):
                settings |= {f"{f.name}.{k}": v for k, v in dataclasses.asdict(value).items()}
            elif f.name not in OPTIONAL and (f.name != "own" or value):
                settings[f.name] = value
        return settings

    def nested(self) -> dict[str, Any]:
        """Return the recipe in the form of a file."""
        file: dict[str, Any] = {}
        for key, value in self.flat().items():
            *part, last = key.split(".")
            (file.setdefault(part[0], {}) if part else file)[last] = list(value) if isinstance(value, tuple) else value
        return file

    def command(self) -> str:
        """Return the command line that repeats the run, independent of the size that its images would suggest."""
        mine = self.flat()
        # A part with another name than in the preset starts without the preset's options; the same holds here.
        names = {key: value for key, value in mine.items() if key.endswith(".name") and key != "schedule.name"}
        own = {key: value for key, value in mine.items() if key.split(".")[0] in self.own}
        settings = {key: mine[key] for key in ("data", "preset", "image_size", "channels")} | own | names
        named = {key: value for key, value in make(settings).flat().items() if key not in own or key in names}
        less = {key: settings[key] for key in ("data", "preset", "image_size", "channels", "method.name")} | {
            key: value for key, value in own.items() if key.startswith("method.")
        }
        preset = make(less).flat()
        words = ["inbatch", "pretrain", self.method.name, "--data", self.data, "--preset", self.preset]
        for key, value in mine.items():
            if key.endswith(".name") and own_parts.is_own(value) and key != "method.name":
                words += [f"--{key.removesuffix('.name')}", value]
                continue
            known = preset if key in names else named
            followed = key in known and known[key] == value and key not in ("image_size", "channels")
            if key not in ("data", "method.name", "preset", "own") and not followed:
                words += ["--set", f"{key}={_one_line(list(value) if isinstance(value, tuple) else value)}"]
        return shlex.join(words)


def _one_line(value: Any) -> str:
    """Return a value in one line of YAML, which would wrap long lists and sentences."""
    text = ""
    for style in (None, '"'):  # the second style has an escape for line breaks
        text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=math.inf)
        text = text.removesuffix("\n").removesuffix("\n...")
        if "\n" not in text:
            break
    return text


def make(settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe of these settings; missing values come from the preset, then from the defaults.

    Raises:
        ConfigError: For an unknown key or name (with a suggestion), or an invalid value.
    """
    merged = with_preset(settings)
    if "data" not in merged:
        raise ConfigError("no images: pass --data FOLDER, or set data in the file")
    top, options = _split(merged)
    check_known("crops", top.get("crops", "default"), CROPS)
    epochs, schedule = finite_number(top.get("epochs", 100)), options.pop("schedule")
    size = int(finite_number(top.get("image_size", 224)))  # if it is invalid, the validation below names it
    if "schedule.warmup_epochs" not in settings:
        # That of a preset, or the default, applies to its own length; in a shorter run it is limited to a tenth.
        schedule["warmup_epochs"] = min(schedule.get("warmup_epochs", Schedule.warmup_epochs), max(epochs, 0) / 10)
    if top.get("evaluate_every") is None:
        top["evaluate_every"] = max(1, int(epochs) // 10)
    parts = {part: make_part(part, chosen, size) for part, chosen in options.items()}
    recipe = validated(_schema(), top | parts | {"schedule": schedule}, "")
    if recipe.replans and not sum(recipe.replans[-1]):
        raise ConfigError("replans end the run before its first step: leave them out, a run with a budget writes them")
    return recipe


def _split(settings: Settings) -> tuple[Settings, dict[str, Settings]]:
    """Return the settings of the run itself, and those of the schedule and of each part without its name."""
    fields = {f.name for f in dataclasses.fields(Recipe)} - {*PARTS, "schedule"}
    schedule = {f.name for f in dataclasses.fields(Schedule)}
    top: Settings = {}
    options: dict[str, Settings] = {part: {} for part in (*PARTS, "schedule")}
    unknown = []
    for key, value in settings.items():
        part, _, option = key.partition(".")
        if (option and part in PARTS) or (part == "schedule" and option in schedule):
            options[part][option] = value
        elif key in fields:
            top[key] = value
        else:
            unknown.append(key)
    if unknown:
        for key in unknown:
            check_not_renamed(key)
        raise ConfigError(f"unknown setting {shown(unknown[0])}{nearest(unknown[0], _all_keys(options))}")
    return top, options


@cache
def _schema() -> pydantic.TypeAdapter[Recipe]:
    """Build the schema once: building takes longer than validation."""
    return pydantic.TypeAdapter(Recipe)


def _all_keys(options: Mapping[str, Settings]) -> list[str]:
    keys = {f.name for f in dataclasses.fields(Recipe)} - {*PARTS, "schedule"}
    keys |= {f"schedule.{f.name}" for f in dataclasses.fields(Schedule)}
    return sorted(keys | {f"{p}.{k}" for p, chosen in options.items() if p in PARTS for k in ("name", *chosen)})
