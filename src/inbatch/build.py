"""A recipe becomes parts: source, loader, views, towers, method, optimiser, step."""

import contextlib
import functools
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inbatch import kernels, ranks
from inbatch.batch import Batch
from inbatch.budget import Timeline
from inbatch.config import Recipe, make, method_named
from inbatch.context.crops import arrange
from inbatch.data import Loader, Source, Subset, open_data, splits
from inbatch.draws import permutation
from inbatch.encoders import Encoder
from inbatch.encoders.convolution import by_product
from inbatch.errors import ConfigError, DataError
from inbatch.methods import METHODS
from inbatch.methods.base import Method
from inbatch.norm import synchronise_norm
from inbatch.optim import build_optimizer, parameter_groups, scaled_lr, set_learning_rate
from inbatch.parts import shown
from inbatch.plug import curator_of, fusion
from inbatch.run_encoder import fit_first_layer, make_encoder, seeded, starting_weights
from inbatch.schedules import step_decay, warmup_cosine
from inbatch.step import Step
from inbatch.tower import Tower, momentum_tower
from inbatch.views import Views, make_views


@dataclass
class Built:
    """The parts of a run, ready for its first step."""

    recipe: Recipe
    source: Source
    loader: Loader
    views: Views
    encoder: Encoder
    method: Method
    tower: Tower
    target: Tower | None
    optimizer: Optimizer
    step: Step
    context: int
    lr: float
    timeline: Timeline
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.timeline.total

    def parts(self) -> dict[str, Any]:
        """Everything whose state makes a checkpoint complete."""
        parts: dict[str, Any] = {"tower": self.tower, "method": self.method, "optimizer": self.optimizer}
        some = {"target": self.target, "curator": self.step.curator}
        return parts | {name: part for name, part in some.items() if part is not None}


def plan(data: Any, settings: Mapping[str, Any], download: bool = False) -> tuple[Recipe, Source]:
    """The complete recipe for some data, and the data opened: size, channels and preset follow the images."""
    settings = dict(settings)
    source = open_data(
        data,
        str(settings.get("split", "train")),
        subset=None if settings.get("subset") is None else _whole("subset", settings["subset"]),
        channels=None if settings.get("channels") is None else _whole("channels", settings["channels"]),
        classes=None if settings.get("classes") is None else str(settings["classes"]),
        levels=_levels(settings.get("levels")),
        download=download,
    )
    settings["data"] = str(data) if isinstance(data, str | Path) else source.name
    settings["channels"] = source.channels
    if settings.get("size") is None:
        method, preset = method_named(settings.get("method.name", "simclr")), settings.get("preset")
        own = method.presets.get(preset, {}) if isinstance(preset, str) else {}
        settings["size"] = own.get("size") or natural_size(source)
    recipe = make(settings)
    if settings.get("preset") is None and settings.get("batch") is None:
        # Nobody asked for a paper's batch: one that these images fill and a laptop holds; the rate follows it.
        recipe = make(settings | {"batch": max(2, min(recipe.batch, 256, 1 << len(source).bit_length() - 1))})
    return recipe, source


def natural_size(source: Source) -> int:
    """The side of the images where they are small squares of one size (at most 96 pixels), else 224."""
    sizes = set()
    for i in torch.linspace(0, len(source) - 1, min(len(source), 16)).long().tolist():
        try:
            with source.open(i) as picture:
                sizes.add(tuple(picture.size))
        except DataError:
            continue  # counted, named and judged where all images are read
    height, width = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    return height if height == width and height <= 96 else 224


def device_for(name: str) -> torch.device:
    """The device of this process: its own GPU where there is one and "auto" or "cuda" is asked for, else the CPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this torch sees no GPU: use --device cpu, or install a build of torch with CUDA")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def precision_for(name: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies in it and "auto" or "bf16" is asked for, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bf16": torch.bfloat16}[name]
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the processor says that it multiplies bf16 (AVX-512 BF16, AMX, ARM); known on Linux only."""
    return bool(_processor_words() & {"avx512_bf16", "amx_bf16", "bf16"})


def slow_weight_gradients() -> bool:
    """Whether oneDNN's bf16 gradient of a small convolution's weights is a slow one: seen with AVX-512 BF16, no AMX."""
    words = _processor_words()
    return "avx512_bf16" in words and not any(word.startswith("amx") for word in words)


@functools.cache
def _processor_words() -> frozenset[str]:
    if platform.system() != "Linux":
        return frozenset()
    return frozenset(Path("/proc/cpuinfo").read_text().split())


def build(
    recipe: Recipe, source: Source, *, device: torch.device, workers: int | None = None, loader: Loader | None = None,
    init: Path | None = None,
) -> Built:  # fmt: skip
    """Make every part of a run; wrong combinations are errors here, not at some later step.

    loader: one made for the same images, batch, seed and views, to be used again.
    init: where a run keeps the weights that it began with (`run_encoder.kept_initial`).
    """
    world = ranks.world()
    if recipe.loss_precision == "tf32x3" and device.type != "cuda":
        raise ConfigError("loss_precision = tf32x3 is a GPU's: here take float32, or bf16")
    if world > 1:  # ranks that add up what they find must find the same
        ranks.agree({"use of Triton's kernels": kernels.usable(torch.zeros(1, 1, device=device))})
    method_class = METHODS[recipe.method.name]
    options = dict(recipe.method.options)
    if method_class.labels and not bool((source.labels >= 0).any()):
        raise DataError(f"{recipe.method.name} learns from labels, but {source.name} has none: use class sub-folders")
    context, groups = _context(recipe, world)
    if recipe.shuffle_groups and recipe.batch == context:
        raise ConfigError(f"shuffle_groups: the batch of {context} is one group, there is none to shuffle; set context")

    notes: list[str] = []
    start = init or starting_weights(recipe, notes)
    with seeded(recipe, device):
        with _settings_of("method", recipe.method.name):
            method = method_class(**options)
        encoder = make_encoder(recipe, start)
        if start is None:
            fit_first_layer(encoder, source)
        views = views_of(recipe, encoder)
        _check_views(recipe, method, len(views))
        with _settings_of("method", recipe.method.name):
            classes = int(source.labels.max()) + 1
            method.prepare(images=len(source), classes=classes, batch=recipe.batch, views=len(views))
            heads = method.heads(encoder.width)
        fuse, fused = fusion(recipe, method, views, encoder, context)
    loader = loader or Loader(
        source, batch=recipe.batch, views=views, seed=recipe.seed, device=device, rank=ranks.rank(), world=world,
        resident=recipe.resident, workers=workers, whole=recipe.curate is not None, max_bad=recipe.max_bad,
    )  # fmt: skip

    tower = Tower(
        encoder, heads, method.online, precision_for(recipe.precision, device), recipe.channels_last, recipe.joined,
        fuse, fused,
    )  # fmt: skip
    if device.type == "cpu" and tower.precision == torch.bfloat16 and slow_weight_gradients():
        by_product(encoder)
    target = momentum_tower(tower, heads, method.target) if method.target else None
    for module in (tower, target, method):
        if module is not None:
            module.to(device)
    for module in (tower, target):
        if module is not None:
            if recipe.channels_last:
                module.to(memory_format=torch.channels_last)
            if recipe.sync_norm:
                synchronise_norm(module)
                ranks.join_groups(module)
    curator = curator_of(recipe, views, tower, recipe.batch // world // groups, device)
    if recipe.compile:
        views.compile()  # an accelerator's; a CPU has its own kernel
        for module in (tower, target):
            if module is not None:
                module.compile()

    chosen = dict(recipe.optimizer.options)
    lr = scaled_lr(chosen.pop("lr"), recipe.batch, recipe.schedule.scaling)
    vector_lr = chosen.pop("vector_lr", None)
    groups_of = parameter_groups(
        {"encoder": encoder, **tower.heads} | ({} if fuse is None else {"fuse": fuse}),
        lr=lr, weight_decay=chosen.pop("weight_decay"),
        vector_lr=None if vector_lr is None else scaled_lr(vector_lr, recipe.batch, recipe.schedule.scaling),
        own={name: {"constant": True} for name in method.constant_lr()},
    )  # fmt: skip
    with _settings_of("optimizer", recipe.optimizer.name):
        optimizer = build_optimizer(recipe.optimizer.name, groups_of, **chosen)
    timeline = Timeline(recipe.steps or recipe.epochs * loader.steps, list(recipe.replans))
    set_rates(recipe, loader.steps, timeline, optimizer, 0)  # a schedule that cannot be is an error now
    step = Step(
        method=method, tower=tower, call=ranks.wrap(tower), target=target,
        views=lambda batch: drawn(views, batch, device), count=len(views), optimizer=optimizer,
        schedule=functools.partial(set_rates, recipe, loader.steps, timeline), groups=groups,
        progress=timeline.progress, seed=recipe.seed,
        synced=recipe.sync_norm, curator=curator, shuffle=recipe.shuffle_groups, products=recipe.loss_precision,
        variance=recipe.variance, scale=functools.partial(image_scale, recipe),
    )  # fmt: skip
    return Built(
        recipe, source, loader, views, encoder, method, tower, target, optimizer, step, context, lr, timeline,
        tuple(notes),
    )  # fmt: skip


def views_of(recipe: Recipe, encoder: Encoder) -> Views:
    """What draws the views of a recipe, normalised as the encoder takes them."""
    crops, pairs = arrange(recipe.crops, make_views(recipe.views.name, recipe.views.options, recipe.channels))
    return Views(crops, encoder.mean, encoder.std, pairs)


def drawn(views: Views, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """The images of the views of some samples, whose pixels may still lie in the host's memory."""
    return views(batch.to(device)).images


def image_scale(recipe: Recipe, progress: float) -> float:
    """Return the share of its side at which the encoder sees an image at a share of the run."""
    return recipe.grow_from if progress < recipe.grow_until else 1.0


def set_rates(recipe: Recipe, steps: int, timeline: Timeline, optimizer: Optimizer, step: int) -> None:
    """Set the optimiser's learning rates for a step; a pure function of its place (`steps` to an epoch)."""
    s, total, place = recipe.schedule, timeline.planned, timeline.place(step)
    # At most a tenth of a run whose length is given in steps; `config.make` sees to it for one given in epochs.
    warmup = min(s.warmup * steps, total / 10) if recipe.steps else s.warmup * steps
    if s.name == "cosine" or place < warmup:
        factor = warmup_cosine(place, total, warmup, 1.0, s.end)
    else:
        factor = step_decay(place, 1.0, [m * total for m in s.milestones]) if s.name == "step" else 1.0
    set_learning_rate(optimizer, factor)


def held_out(
    recipe: Recipe, source: Source, data: Any, test: Any = None, download: bool = False
) -> tuple[Source, Source, str] | None:
    """Sources to judge features by, bank and queries, and in words where they are from; None without labels.

    The queries are the test data given or named in the recipe, else the data's own test split, else a tenth of the
    images. The bank is what is learned from, or where that has no labels, the rest of the test data. Raises DataError
    for test data without labels or with other classes.
    """
    given = test if test is not None else recipe.test
    labelled = bool((source.labels >= 0).any())
    if given is None and not labelled:
        return None
    where, reading = data if given is None else given, recipe.reading | {"download": download}
    own = "test" in splits(where) and (given is not None or recipe.split != "test")
    if not own and (given is None or not labelled):
        whole = source if given is None else open_data(given, splits(given)[0], **reading)
        seen = "; their labels were trained on" if given is None and METHODS[recipe.method.name].labels else ""
        return _tenth(whole, f"a tenth of {whole.name}, held out from the bank{seen}")
    split = "test" if own else splits(where)[0]
    bank = source if labelled else open_data(where, "train", **reading)
    queries = open_data(where, split, **reading)
    if queries.classes != bank.classes:
        raise DataError(f"{queries.name} has other classes than {bank.name}: features cannot be judged by it")
    return bank, queries, f"{split} split of {queries.name}"


def _tenth(source: Source, how: str) -> tuple[Source, Source, str]:
    """Nine tenths as the bank and one as queries, chosen by a fixed permutation."""
    if not bool((source.labels >= 0).any()):
        raise DataError(f"{source.name} has no labels, and features are judged by them: use class sub-folders")
    order = permutation(0, 0, len(source))
    cut = max(1, len(source) // 10)
    bank, queries = (Subset(source, part.sort().values, how) for part in (order[cut:], order[:cut]))
    return bank, queries, how


def share_of(recipe: Recipe, world: int) -> int:
    """How many samples are cut into context groups: a rank's part of the batch, with sync_norm the batch."""
    if recipe.batch % world:
        raise ConfigError(f"a batch of {recipe.batch} cannot be shared by {world} processes: use a multiple of {world}")
    return recipe.batch if recipe.sync_norm else recipe.batch // world


def _context(recipe: Recipe, world: int) -> tuple[int, int]:
    """Samples of a context group, and groups per rank."""
    if recipe.context == "auto":
        raise ConfigError("context = auto is found before a run is built: inbatch.fit.resolve puts in a number")
    share = share_of(recipe, world)
    context = recipe.context or share
    if context > share or share % context or (recipe.sync_norm and context % world):
        whose = "the batch" if world == 1 or recipe.sync_norm else "a rank's share of the batch"
        raise ConfigError(f"a context of {context} does not divide {whose}, {share}: choose a divisor of it")
    if context // (world if recipe.sync_norm else 1) < 2:
        raise ConfigError("a context group needs at least 2 samples on every rank: its statistics would be nothing")
    return context, share // context


def _check_views(recipe: Recipe, method: Method, views: int) -> None:
    least, most = method.views
    if views < least or (most is not None and views > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(
            f"{recipe.method.name} learns from {wanted} views, but views {recipe.views.name} draws {views}: "
            "choose other views (--set views.name=...)" + (" or views.views" if "views" in recipe.views.options else "")
        )


@contextlib.contextmanager
def _settings_of(part: str, name: str) -> Iterator[None]:
    """What a constructor refuses (a negative width, a rate below 0) is the setting's fault."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as e:
        raise ConfigError(f"{part} {name} cannot be made with these settings: {e}") from e


def _levels(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = map(float, value)
    except (TypeError, ValueError, OverflowError):
        low, high = 0.0, 0.0
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"levels = {shown(value)}: give two numbers, the lower one first, such as [0, 4095]")
    return low, high


def _whole(key: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key} = {shown(value)}: input should be a whole number") from None
