"""Mixing: images of a context group are mixed in pairs before the encoder, and the loss is shared by the two samples.

Partner, share and box are pure functions of (seed, step, view, position in the batch).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.rng import fold, uniform_from_hash


@dataclass(frozen=True)
class Draw:
    """The pairs of all groups of a batch for one view. Image m of a group contains its samples m and `partner[m]`.

    Attributes:
        partner: (groups, M) position in the group of the second sample.
        share: (groups, M) float64, share of the first sample: its weight in pixels and target.
        box: (groups, M, 4) top, left, bottom, right of the pixels of the second sample; None: all pixels are blended.
    """

    partner: Int[Tensor, "groups m"]
    share: Float[Tensor, "groups m"]
    box: Int[Tensor, "groups m 4"] | None = None

    def images(self, group: int, x: Float[Tensor, "g c h w"]) -> Float[Tensor, "m c h w"]:
        """Return the mixed images of a group from its plain images."""
        partner = self.partner[group].to(x.device)
        own, other = x[: len(partner)], x[partner]
        if self.box is None:
            share = self.share[group].to(x)[:, None, None, None]
            return share * own + (1 - share) * other
        top, left, bottom, right = self.box[group].to(x.device)[:, None, None, :].unbind(-1)
        y = torch.arange(x.shape[-2], device=x.device)[:, None]
        z = torch.arange(x.shape[-1], device=x.device)
        inside = (top <= y) & (y < bottom) & (left <= z) & (z < right)
        return torch.where(inside[:, None], other, own)


class Mixer:
    """A rule by which the images of a context group are mixed.

    replaces: mixed images replace the plain ones of their view; else they are added, and so is their loss.
    first_only: of the views that the online network learns from, only the first is mixed.
    every_key: a mixed view is compared with the keys of all views, also with those of its own view.
    candidates: see `batch.Mixture`.
    parts: number of parts of equal size that a group is divided into.
    weight: of the loss of mixed images, if it is added.
    temperature: of the similarities of mixed rows; None is the method's.
    """

    replaces: ClassVar[bool] = True
    first_only: ClassVar[bool] = False
    every_key: ClassVar[bool] = False
    candidates: ClassVar[Literal["batch", "own"]] = "batch"
    parts: ClassVar[int] = 1
    weight: float = 1.0
    temperature: float | None = None

    def size(self, group: int) -> int:
        """Return the number of mixed images of a group."""
        return group // self.parts

    def draw(self, key: int, places: Int[Tensor, "groups g"], side: tuple[int, int]) -> Draw:
        """Return the pairs of a view.

        Args:
            key: hash of seed, step and view.
            places: positions in the batch of the samples of each group.
            side: height and width of the images in pixels.
        """
        raise NotImplementedError


class IMix(Mixer):
    """i-Mix (arXiv 2010.08887): every image is blended with another one of its group, which replaces the plain image.

    The first sample of a pair has the larger share.

    alpha: the share is drawn from Beta(alpha, alpha) for every image; 1 is the uniform distribution.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = _positive("mix.alpha", alpha)

    def draw(self, key: int, places: Int[Tensor, "groups g"], side: tuple[int, int]) -> Draw:
        share = _beta(_uniform(key, 1, places), self.alpha)
        return Draw(_permuted(key, places), torch.maximum(share, 1 - share))


class CutMix(Mixer):
    """CutMix (arXiv 1905.04899) in i-Mix: a box of every image is replaced by that of another image of its group.

    The share is the kept part of the area.

    alpha: the part kept before the box is cut at the border is drawn from Beta(alpha, alpha) for every image.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = _positive("mix.alpha", alpha)

    def draw(self, key: int, places: Int[Tensor, "groups g"], side: tuple[int, int]) -> Draw:
        box, share = _boxes(_beta(_uniform(key, 1, places), self.alpha), _centres(key, places), side)
        return Draw(_permuted(key, places), share, box)


class MixCo(Mixer):
    """MixCo (arXiv 2010.06300): the halves of a group are blended, and the loss of these images is added.

    The share is uniform between 0 and 1 for every pair.

    weight: of the loss of the mixed images.
    temperature: of the similarities of mixed rows; null is that of the method.
    """

    replaces, parts = False, 2

    def __init__(self, weight: float = 1.0, temperature: float | None = None) -> None:
        self.weight = _positive("mix.weight", weight)
        self.temperature = None if temperature is None else _positive("mix.temperature", temperature)

    def draw(self, key: int, places: Int[Tensor, "groups g"], side: tuple[int, int]) -> Draw:
        half = self.size(places.shape[1])
        partner = torch.arange(half, 2 * half).expand(len(places), half)
        return Draw(partner, _uniform(key, 1, places[:, :half]))


class UnMix(Mixer):
    """Un-Mix (arXiv 2003.05438): a group is mixed with itself in reverse order, and the loss of these images is added.

    One share, or one box, is drawn for the whole batch. Only the first view is mixed, and it is compared with the keys
    of every view.

    alpha: the share is drawn from Beta(alpha, alpha).
    region: probability that a box is replaced instead, as in cutmix.
    weight: of the loss of the mixed images.
    """

    replaces, first_only, every_key, candidates = False, True, True, "own"

    def __init__(self, alpha: float = 1.0, region: float = 0.5, weight: float = 1.0) -> None:
        self.alpha, self.weight = _positive("mix.alpha", alpha), _positive("mix.weight", weight)
        if not 0 <= region <= 1:
            raise ConfigError(f"mix.region = {region:g} is a probability: choose a number from 0 to 1")
        self.region = region

    def draw(self, key: int, places: Int[Tensor, "groups g"], side: tuple[int, int]) -> Draw:
        groups, size = places.shape
        partner = torch.arange(size - 1, -1, -1).expand(groups, size)
        one = torch.zeros(1, 1, dtype=torch.long)
        share = _beta(_uniform(key, 1, one), self.alpha)
        if not bool(_uniform(key, 3, one) < self.region):
            return Draw(partner, share.expand(groups, size))
        box, share = _boxes(share, _centres(key, one), side)
        return Draw(partner, share.expand(groups, size), box.expand(groups, size, 4))


MIXERS: dict[str, type[Mixer]] = {"imix": IMix, "mixco": MixCo, "unmix": UnMix, "cutmix": CutMix}
"""Name -> mixing."""


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} = {value:g} must be a finite number above 0")
    return value


def _uniform(key: int, use: int, places: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a number in [0, 1) for every place."""
    return uniform_from_hash(fold(key, use), places, 1)[..., 0].double()


def _centres(key: int, places: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape 2"]:
    """Return a point of the unit square for every place."""
    return uniform_from_hash(fold(key, 2), places, 2).double()


def _permuted(key: int, places: Int[Tensor, "groups g"]) -> Int[Tensor, "groups g"]:
    """Return a permutation of every group."""
    return _uniform(key, 0, places).argsort(dim=1, stable=True)


def _beta(u: Float[Tensor, "*shape"], alpha: float) -> Float[Tensor, "*shape"]:
    """Return the quantiles u of Beta(alpha, alpha)."""
    if alpha == 1:
        return u
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, u.numpy())).view_as(u)


def _boxes(
    share: Float[Tensor, "*shape"], centre: Float[Tensor, "*shape 2"], side: tuple[int, int]
) -> tuple[Int[Tensor, "*shape 4"], Float[Tensor, "*shape"]]:
    """Return boxes of 1 - share of the area, cut at the border, and the share of the area outside of them."""
    edges = []
    for axis, length in enumerate(side):
        half = (length * (1 - share).sqrt()).long() // 2
        middle = (centre[..., axis] * length).long()
        edges.append(((middle - half).clamp(min=0), (middle + half).clamp(max=length)))
    (top, bottom), (left, right) = edges
    area = (bottom - top) * (right - left)
    return torch.stack([top, left, bottom, right], -1), 1 - area.double() / math.prod(side)
