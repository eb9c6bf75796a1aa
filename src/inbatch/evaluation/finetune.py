"""Fine-tuning: a linear layer on the encoder, and training of all weights with labels."""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from inbatch.batch import Batch
from inbatch.data.views import View, Views
from inbatch.errors import ConfigError, DataError, TrainingError
from inbatch.evaluation.accuracy import hits
from inbatch.evaluation.embed import Encoder, Kept, Source, embed, hold_in_memory, readable
from inbatch.evaluation.embeddings import check_one_label, matched_labels
from inbatch.evaluation.few_labels import few_labels
from inbatch.rng import fold, permutation
from inbatch.runtime import child_processes
from inbatch.runtime.isolation import usual_state


@dataclass(frozen=True)
class Finetune:
    """SGD with Nesterov momentum on all weights; the rate falls along half a cosine, without warm-up.

    lr is multiplied by batch / 256. steps: minimum number of steps, by more epochs if there are few images.
    area, flip: minimum share of an image in a random resized crop, and the probability of a mirror image.
    """

    epochs: int = 30
    batch: int = 64
    lr: float = 0.05
    steps: int = 300
    momentum: float = 0.9
    weight_decay: float = 0.0
    area: float = 0.2
    flip: float = 0.5


TUNINGS = {
    "small": Finetune(),
    "upright": Finetune(flip=0.0),
    "simclr-1": Finetune(epochs=60, batch=4096, steps=0, area=0.08),
    "simclr-10": Finetune(epochs=30, batch=4096, steps=0, area=0.08),
}
"""simclr-1, simclr-10: SimCLR's (Chen et al. 2020, appendix B.5) for 1 % of ImageNet's labels, and for 10 % and more.
small: the same with batches, steps and crops for thousands of images. upright: small without mirror images (digits).
"""


@runtime_checkable
class Trainable(Encoder, Protocol):
    """Interface of an encoder that can be fine-tuned: a module such as `inbatch.models.Encoder`."""

    size: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned copy of an encoder with a linear layer on the output of its `forward`.

    Attributes:
        encoder: the copy, in evaluation mode and without a readout.
        head: the linear layer, (C, width).
        protocol: settings in effect and the labels used, in JSON types.
    """

    encoder: Any
    head: nn.Linear
    protocol: dict[str, Any]


@usual_state()
def finetune(
    encoder: Encoder,
    train: Source,
    test: Source,
    settings: str | Finetune = "small",
    *,
    share: float = 1.0,
    seed: int = 0,
    batch: int = 512,
    workers: int = 0,
) -> dict[str, Any]:
    """Return the figures of `hits` on clean test images, with the protocol and the duration in seconds.

    Args:
        encoder: a module; it is not changed.
        train: labelled training images.
        test: labelled test images.
        settings: a name in TUNINGS, or custom settings.
        share: see `tune`.
        seed: see `tune`.
        batch: test images at a time.
        workers: processes that decode images.

    Raises:
        ConfigError: as `tune`.
        DataError: as `tune`, or if the test images have other classes.
        TrainingError: as `tune`.
    """
    began = time.perf_counter()
    check_one_label(test.labels, test.name)
    labels = matched_labels(train, test)
    tuned = tune(
        encoder, train, settings, classes=int(labels.max()) + 1, share=share, seed=seed, workers=workers
    )  # fmt: skip
    with torch.backends.cudnn.flags(deterministic=True):
        embeddings = embed(tuned.encoder, test, batch=batch, workers=workers).labelled()
        scores = tuned.head(embeddings.vectors.to(encoder.device)).detach()
    figures = hits(scores, labels[embeddings.index], getattr(train, "classes", ()))
    return {**figures, **tuned.protocol, "seconds": time.perf_counter() - began}


@usual_state()
def tune(
    encoder: Encoder,
    train: Source,
    settings: str | Finetune = "small",
    *,
    classes: int = 0,
    share: float = 1.0,
    seed: int = 0,
    workers: int = 0,
) -> Tuned:
    """Train a copy of an encoder and a linear layer on labelled images; return both, in evaluation mode.

    The copy is trained in its own precision; norm layers use batches of the labelled images. The same seed, machine
    and number of threads give the same weights bit for bit. A whitened readout was fitted to the weights before and is
    left out.

    Args:
        encoder: a module; it is not changed.
        train: labelled training images.
        settings: a name in TUNINGS, or custom settings.
        classes: least number of classes; there are as many as the labels need.
        share: share of the labels of every class, drawn by `few_labels`.
        seed: seed of the training.
        workers: processes that decode images.

    Raises:
        ConfigError: for other names, or an encoder that is not a module.
        DataError: if an image has several labels, or if there are fewer than two classes.
        TrainingError: if the loss is not finite.
    """
    name = settings if isinstance(settings, str) else "custom"
    if isinstance(settings, str):
        if settings not in TUNINGS:
            raise ConfigError(f"there is no fine-tuning called {settings!r}: choose one of {', '.join(TUNINGS)}.")
        settings = TUNINGS[settings]
    if not isinstance(encoder, Trainable) or not isinstance(encoder, nn.Module):
        raise ConfigError("fine-tuning trains an encoder: give a module like inbatch.models.Encoder.")
    check_one_label(train.labels, train.name)
    chosen = few_labels(train.labels, share, seed)
    counts = train.labels[chosen].bincount()
    if (counts > 0).sum() < 2:
        raise DataError(f"{train.name} has labels of fewer than two classes: at least two are needed.")
    classes = max(len(counts), classes)
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    # Randomness within the encoder (dropout) uses torch's generator, which is restored afterwards.
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.backends.cudnn.flags(deterministic=True):
        torch.manual_seed(fold(seed))
        tuned: Any = copy.deepcopy(encoder).requires_grad_(True)
        tuned.readout = None
        head = nn.Linear(tuned.width, classes, device=encoder.device)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        used = _train(tuned, head, _Chosen(train, chosen, 2 * tuned.size), settings, seed, workers)
    protocol = {
        "settings": name,
        **asdict(settings),
        "nesterov": settings.momentum > 0,
        **used,
        "share": share,
        "images": len(chosen),
        "of_a_class": [int(counts[counts > 0].min()), int(counts.max())],
        "seed": seed,
        "classes": classes,
    }
    return Tuned(tuned.eval().requires_grad_(False), head.requires_grad_(False), protocol)


def _train(
    tuned: Any, head: nn.Linear, source: "_Chosen", settings: Finetune, seed: int, workers: int
) -> dict[str, Any]:
    """Train encoder and head in place; return the settings in effect."""
    held = hold_in_memory(source)
    if isinstance(held, Kept):
        held.read()
        workers = 0  # they would each keep the images
    parts = math.ceil(len(held) / settings.batch)  # batches of nearly the same size: no image is left out
    epochs = max(settings.epochs, math.ceil(settings.steps / parts))
    batch, total = math.ceil(len(held) / parts), epochs * parts
    lr = settings.lr * batch / 256
    optimiser = torch.optim.SGD(
        [*tuned.parameters(), *head.parameters()],
        lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )
    view = View(tuned.size, scale=(settings.area, 1.0), flip=settings.flip)
    views = Views([view], tuned.mean, tuned.std, fused=False)  # the same with and without the compiled kernel
    order = (
        (epoch, numbers)
        for epoch in range(epochs)
        for numbers in permutation(seed, epoch, len(held)).tensor_split(parts)
    )
    loader: DataLoader = DataLoader(
        _Canvases(held), sampler=order, batch_size=None, num_workers=workers,
        worker_init_fn=child_processes.begin_worker,  # type: ignore[arg-type]
    )  # fmt: skip
    tuned.train()
    loss = torch.zeros(())
    for step, (epoch, index, images, size) in enumerate(child_processes.batches(loader)):
        if len(index) < 2:  # too few for norm layers
            continue
        label = held.labels[index]
        drawn = views(Batch(index, label, seed, epoch, images=images, size=size).to(tuned.device))
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
        loss = F.cross_entropy(head(tuned(drawn.images[0])), label.to(tuned.device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    if not loss.isfinite():
        raise TrainingError(f"fine-tuning diverged: its loss is not finite with lr {settings.lr:g}. Use a smaller one.")
    return {"epochs": epochs, "steps": total, "batch": batch, "lr_used": lr}


class _Chosen:
    """Some images of a source, with large ones reduced to `longest` pixels: crops need no more."""

    def __init__(self, source: Source, places: Int[Tensor, "m"], longest: int) -> None:
        self.source, self.places, self.longest = source, places.tolist(), longest
        self.name, self.labels = source.name, source.labels[places]

    def __len__(self) -> int:
        return len(self.places)

    def identity(self, i: int) -> str:
        return self.source.identity(self.places[i])

    def image(self, i: int) -> UInt8[Tensor, "c h w"]:
        image = self.source.image(self.places[i])
        scale = self.longest / max(image.shape[1:])
        if scale >= 1:
            return image
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


class _Canvases(Dataset[tuple[int, Tensor, Tensor, Tensor]]):
    """Readable images of a batch on a common canvas with their sizes, for an epoch and some numbers."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, at: tuple[int, Tensor]) -> tuple[int, Tensor, Tensor, Tensor]:
        epoch, numbers = at
        bad: dict[int, str] = {}
        images = list(readable(self.source, numbers.tolist(), bad))
        index = torch.tensor([i for i in numbers.tolist() if i not in bad])
        size = torch.tensor([image.shape[1:] for image in images]).view(-1, 2)
        if not images:
            return epoch, index, torch.empty(0), size
        canvas = images[0].new_zeros(len(images), len(images[0]), *size.amax(0).tolist())
        for into, image in zip(canvas, images, strict=True):
            into[:, : image.shape[1], : image.shape[2]] = image
        return epoch, index, canvas, size
