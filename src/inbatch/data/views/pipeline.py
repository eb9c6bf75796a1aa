"""Views of a batch: each image draws its own, keyed by (seed, epoch, sample, view), on the batch's device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from inbatch.batch import Batch
from inbatch.data.views import crop, numba_backend, operation
from inbatch.data.views.colour import Exposure, Grey, Jitter, Noise, Solarise
from inbatch.data.views.filters import Affine, Blur
from inbatch.data.views.operation import Operation, idle
from inbatch.data.views.view import View
from inbatch.errors import ConfigError, DataError
from inbatch.rng import head, uniform_from_hash

_CACHE = 2**17
"""Values per core processed at a time on a CPU: half a megabyte stays in its cache."""

PAIR = -1
"""View number used as the key of the random numbers of box pairs."""


@runtime_checkable
class Pairs(Protocol):
    """Joint sampler of the boxes of two views from `draws` uniform numbers per image; height 0 if it has no box."""

    draws: int

    def __call__(self, u: Float[Tensor, "b draws"], size: Int[Tensor, "b 2"]) -> Int[Tensor, "2 b 4"]: ...


@dataclass(frozen=True)
class Drawn:
    """V views of B samples.

    Attributes:
        images: Per view (B, C, s, s) float32, normalised.
        boxes: (V, B, 4) int64: top, left, height and width of each crop in pixels of its image.
        flipped: (V, B) bool: whether the view is mirrored left to right.
    """

    images: tuple[Float[Tensor, "b c _ _"], ...]
    boxes: Int[Tensor, "v b 4"]
    flipped: Bool[Tensor, "v b"]


class Views:
    """Draw `views` of every image and normalise them per channel.

    Args:
        views: Parameters of each view.
        mean: Mean per channel, of values in [0, 1].
        std: Standard deviation per channel.
        pairs: Joint sampler of the boxes of two views; everything else of a view is drawn as without it.
        fused: None: on a CPU, the compiled kernel draws the views it supports (`numba_backend`). False: torch
            operations draw all of them. The views are equal up to rounding.

    Raises:
        ConfigError: If a view needs red, green and blue and there are not three channels.
    """

    def __init__(
        self,
        views: Sequence[View],
        mean: Sequence[float],
        std: Sequence[float],
        pairs: Pairs | None = None,
        fused: Literal[False] | None = None,
    ) -> None:
        self.views, self.mean, self.std, self.pairs, self.fused = tuple(views), tuple(mean), tuple(std), pairs, fused
        if not self.views or not self.mean or len(self.mean) != len(self.std):
            raise ConfigError("Views need at least one view, and one mean and one std per channel.")
        if len(self.mean) != 3 and any(view.needs_colour for view in self.views):
            raise ConfigError(
                f"Saturation, hue and greyscale need red, green and blue, but the images have {len(self.mean)} "
                "channel(s). Set saturation, hue and grey to 0, or choose a preset without colour (digits)."
            )
        if pairs is not None and len(self.views) != 2:
            raise ConfigError(f"Pairs of crops need two views of every image, not {len(self.views)}.")
        # equal adjacent views are drawn in one pass
        groups = groupby(range(len(self.views)), key=lambda number: self.views[number])
        self._groups = [(view, list(numbers), operations(view)) for view, numbers in groups]
        self._compiled: Callable[..., Drawn] | None = None

    whole = False
    """Whether the loader must deliver whole images, because the views crop by themselves."""

    def __len__(self) -> int:
        return len(self.views)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compiled": None}

    def compile(self, **options: Any) -> None:
        """Use torch.compile with these options to draw views on an accelerator; CPUs use their own kernel.

        Every new number of samples triggers a recompilation.
        """
        self._compiled = torch.compile(self._draw, dynamic=False, **options)

    def boxes(
        self, index: Int[Tensor, "b"], size: Int[Tensor, "b 2"], seed: int, epoch: int,
        attempt: int | Int[Tensor, "b"] = 0,
    ) -> Int[Tensor, "v b 4"]:  # fmt: skip
        """Return each view's box: top, left, height, width in pixels of images of these sizes; a pure function."""
        heads = self._heads(seed, epoch, attempt, index.device)
        return self._boxes(uniform_from_hash(heads[:-1], index, crop.DRAWS), heads[-1], index, size)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Drawn:
        """Draw the views of a batch; crops already in the batch are used unchanged.

        Every attempt of a sample (`batch.attempt`) is drawn from its own random stream.

        Raises:
            DataError: If the images do not fit the views.
        """
        inputs, cut = self._checked(batch)
        index, at, size = batch.index, batch.at if cut is None else None, batch.size
        if cut is None:
            at = torch.arange(len(batch), device=index.device) if at is None else at
            height, width = inputs[0].shape[2:]
            size = torch.stack([torch.full_like(index, x) for x in (height, width)], 1) if size is None else size
        heads = self._heads(batch.seed, batch.epoch, 0 if batch.attempt is None else batch.attempt, index.device)
        draw = self._draw if self._compiled is None or operation.can_branch(index) else self._compiled
        return draw(heads, index, size, at, inputs, cut)

    def _heads(self, seed: int, epoch: int, attempt: int | Tensor, device: torch.device) -> Tensor:
        """Return the keys of the random numbers of every view and of the pairs, (V + 1, 1 or b).

        They are tensors because they change from step to step, which must not trigger a recompilation. They are filled
        in because a copy would wait for the device.
        """
        heads = [head(seed, epoch, number, attempt) for number in (*range(len(self)), PAIR)]
        return torch.stack([x if isinstance(x, Tensor) else torch.full((1,), x, device=device) for x in heads])

    def _boxes(self, u: Tensor, pair_head: Tensor, index: Tensor, size: Tensor) -> Tensor:
        """Return the boxes of all views from uniform numbers u (V, b, crop.DRAWS or more)."""
        alone = torch.cat(
            [
                _boxes(view, u[numbers[0] : numbers[-1] + 1].flatten(0, 1), size.repeat(len(numbers), 1))
                for view, numbers, _ in self._groups
            ]
        ).unflatten(0, (len(self), len(index)))
        if self.pairs is None:
            return alone
        paired = self.pairs(uniform_from_hash(pair_head, index, self.pairs.draws), size)
        return torch.where(paired[..., 2:3] > 0, paired, alone)

    def _draw(
        self, heads: Tensor, index: Tensor, size: Tensor | None, at: Tensor | None, inputs: list[Tensor],
        cut: Tensor | None,
    ) -> Drawn:  # fmt: skip
        """Draw views from images of `size` at positions `at` of given[0], or from crops `given` with boxes `cut`."""
        count, drawn = len(index), uniform_from_hash(heads[:-1], index, COLUMNS)
        if cut is None:
            assert size is not None and at is not None
            placed = self._boxes(drawn, heads[-1], index, size)
        else:
            placed = cut
        images, flipped = [], []
        for view, numbers, steps in self._groups:
            u, where = (x[numbers[0] : numbers[-1] + 1].flatten(0, 1) for x in (drawn, placed))
            flip = u[:, crop.DRAWS] < view.flip
            if at is None:
                pixels, source = torch.cat([inputs[number] for number in numbers]), None
            else:
                pixels, source = inputs[0], at.repeat(len(numbers))
            images += self._render(view, steps, u, pixels, source, where, flip).split(count)
            flipped.append(flip)
        return Drawn(tuple(images), placed, torch.cat(flipped).unflatten(0, (len(self), count)))

    def _render(
        self,
        view: View,
        steps: list[tuple[Operation, slice]],
        u: Tensor,
        pixels: Tensor,
        source: Tensor | None,
        boxes: Tensor,
        flip: Tensor,
    ) -> Tensor:
        """Draw n views from images `source` of `pixels`, or from ready crops (source None), and apply every step."""
        todo = [step for step, _ in steps]
        settings = [step.settings_of(u[:, columns]) for step, columns in steps]

        def work(take: Callable[[Tensor], Tensor]) -> Tensor:
            if source is None:
                x = crop.mirror(take(pixels).float().div_(255), take(flip))
            else:
                x = crop.resample(pixels, take(source), take(boxes), take(flip), view.size, view.interpolation)
            for step, drawn in zip(todo, settings, strict=True):
                kind, *parameters = map(take, drawn)
                if not idle(kind):
                    x = step(x, kind, *parameters)
            for channel, mean, std in zip(x.unbind(1), self.mean, self.std, strict=True):
                channel.sub_(mean).div_(std)
            return x

        if not operation.can_branch(u):
            return work(lambda t: t)
        if self.fused is None and numba_backend.supports(todo) and numba_backend.available():
            return numba_backend.draw_views(view, todo, settings, pixels, source, boxes, flip, self.mean, self.std)
        # A core's cache holds a few images. Images are sorted by treatment, so that whole pieces skip an operation.
        treatment = torch.zeros(len(u), dtype=torch.long)
        for kind, *_ in settings:
            treatment = treatment * 8 + kind
        out = torch.empty(len(u), len(self.mean), view.size, view.size)
        piece = max(1, _CACHE * torch.get_num_threads() // out[0].numel())
        for rows in treatment.argsort(stable=True).split(piece):
            out.index_copy_(0, rows, work(partial(torch.index_select, dim=0, index=rows)))
        return out

    def _checked(self, batch: Batch) -> tuple[list[Tensor], Tensor | None]:
        """Return the batch's images (one tensor) and None, or its crops (one tensor per view) and their boxes."""
        crops, channels = batch.crops, len(self.mean)
        inputs = [x for x in ([batch.images] if crops is None else crops) if x is not None]
        if not inputs or any(x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != channels for x in inputs):
            raise DataError(
                f"Views are drawn from uint8 images of {channels} channel(s) (B, C, H, W), but the batch holds "
                f"{[(x.dtype, tuple(x.shape)) for x in inputs]}. Open the data with this number of channels."
            )
        if crops is None:
            return inputs, None
        sides = [view.size for view in self.views]
        if [tuple(x.shape[2:]) for x in inputs] != [(side, side) for side in sides] or batch.boxes is None:
            raise DataError(
                f"The workers' crops are {[tuple(x.shape[2:]) for x in inputs]} pixels, the views {sides} square "
                "(with boxes). Load with the views that are drawn."
            )
        return inputs, batch.boxes


def _boxes(view: View, u: Tensor, size: Tensor) -> Tensor:
    if view.scale is None:
        return crop.centre_boxes(size, view.centre)
    return crop.random_boxes(u[:, : crop.DRAWS], size, view.scale, view.ratio)


def _table(view: View) -> tuple[tuple[object, type[Operation], tuple[object, ...]], ...]:
    """Return all operations in order: whether the view uses it, its class and its parameters."""
    moved = (view.zoom, view.aspect, view.rotation, view.shear, view.shift) != ((1, 1), 1, 0, 0, 0)
    exposed = (view.gain, view.offset) != ((1, 1), (0, 0))
    strengths = (view.brightness, view.contrast, view.saturation, view.hue)
    return (
        (moved, Affine, (view.zoom, view.aspect, view.rotation, view.shear, view.shift, view.padding)),
        (view.jitter, Jitter, (view.jitter, *strengths)),
        (view.grey, Grey, (view.grey,)),
        (view.blur, Blur, (view.blur, view.sigma, view.taps)),
        (view.solarise, Solarise, (view.solarise, view.threshold)),
        (exposed, Exposure, (view.gain, view.offset)),
        (view.noise, Noise, (view.noise,)),
    )


COLUMNS = crop.DRAWS + 1 + sum(kind.draws for _, kind, _ in _table(View(1)))
"""Random numbers per view: those of the crop, the flip and each operation."""


def operations(view: View) -> list[tuple[Operation, slice]]:
    """Return the operations of a view after crop and flip, each with the columns of its random numbers.

    The columns are the same in every view, so the draws of an operation do not depend on which others are used.
    """
    steps, at = [], crop.DRAWS + 1
    for wanted, kind, parameters in _table(view):
        if wanted:
            steps.append((kind(*parameters), slice(at, at + kind.draws)))
        at += kind.draws
    return steps
