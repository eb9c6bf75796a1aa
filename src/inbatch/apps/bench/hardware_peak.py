"""Hardware peak: rates of matrix products and memory copies by torch."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inbatch.nn.cpu_matmul import fast_products

SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 512, 4096), (4096, 4096, 128))
"""Products (n, k) by (k, m); the fastest is the peak."""
LARGE = ((8192, 8192, 8192), (16384, 2048, 16384))
"""Products that fill a GPU."""
_CALLS = 4
"""Minimum number of calls; the first is a warm-up."""
ERROR = 1e-5
"""Maximum error of float32 products relative to the largest entry in float64.

Results with a larger one are rejected.
"""


def ceilings(job: dict[str, Any]) -> tuple[Callable[[], int], dict[str, Any]]:
    """Measure float32 and bf16 in operations per second, and copies in bytes read and written per second.

    bf16 is None if the job has `bf16` false: the hardware does not support it.
    """
    device, patience = torch.device(job["device"]), 0.02 if job["quick"] else 0.3
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = LARGE if device.type == "cuda" else SHAPES[:1] if job["quick"] else SHAPES
    each = job["each"]
    plain = products(device, torch.float32, shapes, patience, each)
    half = products(device, torch.bfloat16, shapes, patience, each) if job["bf16"] else None
    rates: dict[str, Any] = {"float32_plain": plain, "bf16": half}
    if device.type == "cpu":
        with fast_products():  # oneDNN products if they are faster and exact
            rates["float32_onednn"] = products(device, torch.float32, shapes, patience, each)
    rates["float32"] = max(plain, rates.get("float32_onednn", 0))
    source = torch.ones((1 if job["quick"] else 16) * 2**20 * (16 if device.type == "cuda" else 4), device=device)
    into = torch.empty_like(source)
    seconds = fastest(partial(into.copy_, source), device, patience)
    rates["copy"] = 2 * source.numel() * source.element_size() / seconds
    return (lambda: 1), rates


def products(device: torch.device, kind: torch.dtype, shapes: Any, patience: float, each: float = math.inf) -> float:
    """Return the highest rate over the shapes in operations per second; 0 if no float32 product is exact.

    Args:
        device: Device of the matrices.
        kind: Data type of the matrices.
        shapes: Sizes (n, k, m).
        patience: Minimum seconds of measurement per shape.
        each: Maximum seconds in total; shapes that would exceed it at the rate measured so far are skipped.
    """
    best, until = 0.0, time.perf_counter() + each
    for n, k, m in shapes:
        if best and time.perf_counter() + _CALLS * 2 * n * k * m / best > until:
            continue
        a, b = (torch.randn(*size, device=device).to(kind) for size in ((n, k), (k, m)))
        out = torch.empty(n, m, device=device, dtype=kind)
        seconds = fastest(partial(torch.mm, a, b, out=out), device, patience)
        if kind != torch.float32 or device.type != "cpu" or exact(a[:64], b, out[:64]):
            best = max(best, 2 * n * k * m / seconds)
    return best


def exact(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Return whether a product's largest error is at most `ERROR` times its largest entry in float64."""
    true = a.double() @ b.double()
    return bool((out - true).abs().max() <= ERROR * true.abs().max())


def fastest(call: Callable[[], Any], device: torch.device, patience: float) -> float:
    """Return the seconds of the fastest of several calls."""

    def timed() -> float:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    timed()
    spent: list[float] = []
    while len(spent) < _CALLS - 1 or sum(spent) < patience:
        spent.append(timed())
    return min(spent)
