"""Gradient caching around a model and a loss of the user's own: the gradient of the whole batch, a chunk at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inbatch.batch import Rows
from inbatch.errors import ConfigError, check_whole
from inbatch.training.grad_cache import backward_groups, cut, forward_groups

Views = Tensor | Sequence[Tensor]
"""The samples (N, ...), or V views of them, (N, ...) each."""


@contextmanager
def grad_cache(model: nn.Module, chunks: int) -> Iterator["CachedStep"]:
    """Return a step that computes the gradient of a loss over a whole batch with the memory of one chunk of samples.

        with inbatch.grad_cache(model, chunks=8) as step:
            for views in loader:
                optimizer.zero_grad()
                loss = step(views, lambda rows: nt_xent(rows, 0.2))
                optimizer.step()

    The model computes the rows of all chunks without a graph; the loss and the gradients of the rows are computed from
    all of them; then every chunk passes through the model again, with the same random numbers (dropout), and its
    gradient is propagated back (Gao et al. 2021, arXiv 2101.06983). The result is that of one graph over the chunks;
    the price is a second forward pass. Batch norm uses the statistics of each chunk, of adjacent views of one shape
    together, and its running statistics end as the mean of those that each chunk alone would have left.

    Args:
        model: maps samples (N, ...) to rows (N, D), or a dict or tuple of rows; may be a DistributedDataParallel, which
            then synchronises in the last chunk only.
        chunks: number of chunks of a batch.

    Raises:
        ConfigError: if `chunks` is not a whole number of at least 1.
    """
    check_whole("chunks", chunks, 1)
    yield CachedStep(model, chunks)


class CachedStep:
    """The step of `grad_cache`; calling it adds the gradient of a batch to the gradients of the parameters.

    Args:
        model: the model.
        chunks: number of chunks.
    """

    def __init__(self, model: nn.Module, chunks: int) -> None:
        self.model, self.chunks = model, chunks

    def __call__(self, views: Views, loss: Callable[..., Any], *, scaler: Any = None) -> Any:
        """Compute the loss of a batch and add its gradient to `.grad` of the parameters; no optimiser step.

        Args:
            views: the samples (N, ...), or a sequence of V views (N, ...) of them.
            loss: called once, with the rows of the whole batch: (N, D) for samples, (V, N, D) for views, in float32 or
                wider; returns a scalar, or a dict with the scalar "loss". On several processes, it gathers them first
                (`inbatch.distributed.gather_rows`).
            scaler: a torch.amp.GradScaler, which multiplies the loss before the backward pass.

        Returns:
            What `loss` returns, without graph.

        Raises:
            ConfigError: if the views do not hold the same samples, the samples are fewer than the chunks, or the loss
                is not a scalar or does not depend on the rows.
        """
        several = not isinstance(views, Tensor)
        images: list[Tensor] = [views] if isinstance(views, Tensor) else list(views)
        _check_views(images, self.chunks)
        call = _Rows(self.model, several)
        groups = [partial(tuple, group) for group in cut(images, self.chunks)]
        keys = torch.randint(2**62, (len(groups),)).tolist()  # from torch's generator, as dropout
        # The first pass needs no synchronisation; that of buffers takes place in the second.
        plain = _Rows(self.model.module, several) if isinstance(self.model, DistributedDataParallel) else call
        forward = forward_groups(plain, call, groups, range(len(images)), keys, grad=True)  # type: ignore[arg-type]
        leaves = {name: x.requires_grad_() for name, x in forward.rows.items()}
        result = loss(_rebuilt(plain if len(groups) > 1 else call, {name: x.view_as(x) for name, x in leaves.items()}))
        value: Any = result.get("loss") if isinstance(result, dict) else result
        _check_loss(value)
        (value if scaler is None else scaler.scale(value)).backward()
        if all(x.grad is None for x in leaves.values()):
            raise ConfigError("the loss does not depend on the rows: compute it from the argument of the function")
        gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
        backward_groups(forward, call, call, gradients)  # type: ignore[arg-type]
        return _without_graph(result)


class _Rows(nn.Module):
    """The model with the interface of `grad_cache`: V views (n, ...) -> {number of the output: (V, n, D)}."""

    recomputes = False

    def __init__(self, model: nn.Module, several: bool) -> None:
        super().__init__()
        self.model, self.several = model, several
        self.layout: type = Tensor
        if hasattr(model, "no_sync"):
            self.no_sync = model.no_sync

    def forward(self, views: Sequence[Tensor], numbers: Sequence[int]) -> Rows:
        """Pass adjacent views of one shape through the model together."""
        samples = len(views[0])
        parts: list[Rows] = []
        # An outer autocast would reuse the weights of the first pass, which were cast without a graph.
        kind = views[0].device.type
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            for _, run in groupby(views, key=lambda view: view.shape):
                images = list(run)
                output = self._named(self.model(torch.cat(images) if len(images) > 1 else images[0]))
                _check_output(output, len(images) * samples)
                split = {name: x.unflatten(0, (len(images), samples)) for name, x in output.items()}
                parts += [{name: x[v] for name, x in split.items()} for v in range(len(images))]
        rows = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in rows.items()}

    def _named(self, output: Any) -> Rows:
        """Return the outputs of the model by name, and remember how they were held."""
        self.layout = type(output)
        if isinstance(output, Tensor):
            return {"0": output}
        if isinstance(output, dict):
            return dict(output)
        if isinstance(output, tuple | list):
            return {str(i): x for i, x in enumerate(output)}
        raise ConfigError(f"the model returns {type(output).__name__}: grad_cache takes a tensor, or a dict or tuple")


def _rebuilt(model: _Rows, rows: Rows) -> Any:
    """Return rows as the model returns them."""
    rows = rows if model.several else {name: x[0] for name, x in rows.items()}
    if issubclass(model.layout, Tensor):
        return rows["0"]
    return rows if issubclass(model.layout, dict) else tuple(rows.values())


def _check_output(output: Rows, samples: int) -> None:
    for x in output.values():
        if not isinstance(x, Tensor) or x.ndim < 1 or len(x) != samples:
            kind = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(f"the model must return one row per sample, ({samples}, D), but returns {kind}")


def _check_views(views: list[Any], chunks: int) -> None:
    if not views or not all(isinstance(view, Tensor) and view.ndim for view in views):
        raise ConfigError("grad_cache takes the samples as a tensor (N, ...), or a sequence of tensors, one per view")
    sizes = sorted({len(view) for view in views})
    if len(sizes) > 1:
        raise ConfigError(f"the views hold {sizes} samples: every view holds the same samples, (N, ...)")
    if sizes[0] < chunks:
        raise ConfigError(f"{sizes[0]} samples cannot be cut into {chunks} chunks: choose at most {sizes[0]}")


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"the loss must be a scalar tensor, or a dict with the scalar 'loss', not {kind}")
    if not value.requires_grad:
        raise ConfigError("the loss carries no gradient: compute it from the argument of the function, without detach")


def _without_graph(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: x.detach() if isinstance(x, Tensor) else x for name, x in result.items()}
    return result.detach()
