"""The network from images of one context group to rows, and the target network."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from inbatch.batch import MIXED, Rows
from inbatch.context.fusion import Fusion
from inbatch.context.grouped import Grouped
from inbatch.nn.eval_mode import evaluating
from inbatch.nn.heads import Head
from inbatch.runtime.device import autocast
from inbatch.runtime.sharding import separate

NEVER_FUSED = 2**30
"""Number of a view that is never fused."""


class Network(nn.Module):
    """Fusion, encoder and heads. Samples interact here only within the context group of one call.

    Args:
        encoder: the encoder.
        heads: heads by name.
        reads: heads that produce the returned rows.
        precision: bfloat16 computes matrix products in it (autocast), float32 keeps the encoder's own type; returned
            rows are float32, or the encoder's type if that is wider.
        channels_last: use the memory layout that is fastest for most convolutions.
        joined: adjacent views of one size pass through the encoder together, and all views through the heads, as in the
            code of SwAV and DINO: they share norm statistics. Encoders without norm statistics always do so.
        fuse: mixes the images of the views numbered `fused` in training.
        fused: numbers of these views.
    """

    def __init__(
        self,
        encoder: nn.Module,
        heads: dict[str, Head],
        reads: Sequence[str],
        precision: torch.dtype = torch.float32,
        channels_last: bool = False,
        joined: bool = False,
        fuse: Fusion | None = None,
        fused: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.fuse, self.fused = fuse, frozenset(fused)
        self.encoder = encoder
        self.heads = nn.ModuleDict({name: head.network for name, head in heads.items()})
        self.sources = {name: head.source for name, head in heads.items()}
        self.reads = tuple(reads)
        self.precision = precision
        self.joined, self.together = joined, joined or not mixes(encoder)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.scale = 1.0  # scale of the images' side, for runs with growing images; set by `Step`
        self.recomputes = False  # whether blocks of the encoder are computed again in the backward pass
        self.frozen = False  # whether the encoder does not learn; set by `freeze_encoder`
        self.adapted = getattr(encoder, "lora", None) is not None  # only LoRA's matrices of the encoder learn
        for norm in norms(encoder) if self.adapted else ():
            norm.eval().track_running_stats = False

    def forward(self, views: Sequence[Tensor], numbers: Sequence[int] | None = None) -> Rows:
        """Return {head: (V, G, D)} for V views (G, C, H, W) of one group. Each view has its own norm statistics.

        numbers: numbers of these views of a sample, by default all, in order; a number below 0 is that of mixed images,
            whose rows (V, M, D) are named MIXED + head.
        """
        numbers = range(len(views)) if numbers is None else numbers
        fuse = nn.Identity() if self.fuse is None else self.fuse
        with self.autocast(views[0]):
            views = [fuse(view) if n in self.fused else view for view, n in zip(views, numbers, strict=True)]
        # Fused and mixed images differ from those of evaluation: norm layers use the plain ones for statistics, if
        # there are any.
        forget = self.fuse is not None and self.fuse.remember == "plain"
        altered = [n < 0 or (forget and n in self.fused) for n in numbers]

        def remembered(changed: bool) -> AbstractContextManager[None]:
            return frozen_statistics(self) if changed and not all(altered) else nullcontext()

        # Autocast caches its bfloat16 weights within a context; one context per run sums their gradients in float32.
        features: list[Tensor] = []
        sizes = [len(view) for view in views]
        alike = [view.shape if self.together else n for n, view in enumerate(views)]
        for (_, changed), run in groupby(zip(alike, altered, views, strict=True), key=lambda at: at[:2]):
            images = [view for _, _, view in run]
            with remembered(changed), self.autocast(views[0]):
                passed = self._features(torch.cat(images) if len(images) > 1 else images[0])
            features += passed.split(len(images[0]))
        if self.joined:
            with self.autocast(views[0]):
                rows = self._heads(torch.cat(features))
            split = {name: rows[name].split(sizes) for name in self.reads}
            outputs = [{name: x[i] for name, x in split.items()} for i in range(len(views))]
        else:
            outputs = []
            for feature, changed in zip(features, altered, strict=True):
                with remembered(changed), self.autocast(views[0]):
                    outputs.append(self._heads(feature))
        return _by_name(outputs, numbers, self.reads)

    def outputs(self, images: Tensor) -> Rows:
        """Return the "features" (G, F) and the rows (G, D) of all heads for images (G, C, H, W)."""
        with self.autocast(images):
            return self._heads(self._features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the features (G, F) alone."""
        with self.autocast(images):
            return _wide(self._features(images))

    def autocast(self, images: Tensor) -> AbstractContextManager[None]:
        """Return the autocast context of the network's precision."""
        return autocast(images.device, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def _features(self, images: Tensor) -> Tensor:
        if self.scale != 1:
            images = adaptive_avg_pool2d(images, round(images.shape[-1] * self.scale))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encoder(images.contiguous(memory_format=self.memory_format))

    def train(self, mode: bool = True) -> "Network":
        """Set the mode; with LoRA, norm layers of the encoder keep and use their running statistics."""
        super().train(mode)
        for norm in norms(self.encoder) if self.adapted else ():
            norm.eval()
        return self

    def freeze_encoder(self, frozen: bool) -> None:
        """Set whether the encoder learns nothing: it gets no gradient, and keeps its running statistics.

        Its norm layers then still use the statistics of their batch in training, so that the heads receive the features
        that they receive afterwards.
        """
        if frozen == self.frozen:
            return
        self.frozen = frozen
        for norm in norms(self.encoder):
            norm.track_running_stats = not (frozen or self.adapted)

    def _heads(self, features: Tensor) -> Rows:
        outputs = {"features": features}
        for name, head in self.heads.items():
            outputs[name] = head(outputs[self.sources[name]])
        return {name: _wide(x) for name, x in outputs.items()}

    def evaluating(self) -> AbstractContextManager[None]:
        """Set evaluation mode without gradient within the context."""
        return evaluating(self)


def _by_name(outputs: Sequence[Rows], numbers: Sequence[int], names: Sequence[str]) -> Rows:
    """Return the rows of the plain views by head, and those of mixed images by MIXED + head."""
    rows: Rows = {}
    for start, below in (("", False), (MIXED, True)):
        chosen = [view for view, n in zip(outputs, numbers, strict=True) if (n < 0) == below]
        rows |= {start + name: torch.stack([view[name] for view in chosen]) for name in names if chosen}
    return rows


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_target_network(network: Network, heads: dict[str, Head], reads: Sequence[str]) -> Network:
    """Return a copy of the network without gradients and without the heads that are online only."""
    kept = {name: head for name, head in heads.items() if not head.online_only}
    slow = copy.deepcopy(network)
    for name in set(slow.heads) - set(kept):
        del slow.heads[name]
    slow.sources = {name: head.source for name, head in kept.items()}
    slow.reads = tuple(reads)
    if slow.fuse is not None and slow.fuse.target == "none":
        slow.fuse = None
    return slow.requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Set target <- momentum * target + (1 - momentum) * online, parameters only (He et al. 2020, Eq. 2).

    Norm statistics are the target's own, from its own images. A shared fusion is copied from the online network.
    """
    new = dict(online.named_parameters())
    # The mean of two equal weights differs from them by rounding.
    frozen, adapted = getattr(online, "frozen", False), getattr(online, "adapted", False)

    def learns(name: str) -> bool:
        return not name.startswith("encoder.") or not (frozen or (adapted and not new[name].requires_grad))

    pairs = [(own, new[name]) for name, own in target.named_parameters() if learns(name)]
    for slow, fast in zip(*(separate(tensors) for tensors in zip(*pairs, strict=True)), strict=True):
        torch._foreach_mul_(slow, momentum)
        torch._foreach_add_(slow, fast, alpha=1 - momentum)
    fuse = getattr(target, "fuse", None)
    if isinstance(fuse, Fusion) and fuse.target == "shared":
        fuse.load_state_dict(online.get_submodule("fuse").state_dict())


def mixes(module: nn.Module) -> bool:
    """Return whether samples of a call may interact in a module.

    They do through batch statistics or attention over samples, or if a custom module declares it (`mixes = True`).
    """

    def interacts(m: nn.Module) -> bool:
        known = isinstance(m, Grouped | nn.modules.batchnorm._BatchNorm) or "running_" in "".join(m._buffers)
        return known or getattr(m, "mixes", False)

    return any(map(interacts, module.modules()))


def norms(module: nn.Module) -> list[Any]:
    """Return the normalisation layers that keep running statistics."""
    return [m for m in module.modules() if getattr(m, "running_mean", None) is not None]


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Return the running means and variances that the next training step updates."""
    layers = [norm for norm in norms(module) if norm.track_running_stats]
    return [statistic for norm in layers for statistic in (norm.running_mean, norm.running_var)]


@contextmanager
def restored_statistics(module: nn.Module) -> Iterator[None]:
    """Restore running statistics afterwards: activation checkpointing computes norm layers twice."""
    layers = [norm for norm in norms(module) if norm.track_running_stats]
    now = [x for norm in layers for x in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
    before = [x.clone() for x in now]
    try:
        yield
    finally:
        for x, old in zip(now, before, strict=True):
            x.copy_(old)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let norm layers use the statistics of their batch, as in training, without updating running statistics."""
    layers = [norm for norm in norms(module) if norm.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
