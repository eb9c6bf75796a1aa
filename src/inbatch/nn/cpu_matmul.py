"""Which library multiplies float32 matrices on the CPU: the faster one that this processor has."""

import contextlib
import functools
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_LOCK, _users, _before = threading.Lock(), 0, "none"


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """float32 products on the CPU by oneDNN where it is the faster library."""
    if not onednn():
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    global _users, _before
    with _LOCK:  # of losses that run at the same time the first sets it and the last puts it back
        if not _users:
            _before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        _users += 1
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if not _users:
                matmul.fp32_precision = _before


@functools.cache
def onednn() -> bool:
    """Whether oneDNN's float32 products are the faster ones: on AMD's processors, where MKL's take twice as long.

    torch sends products there only where it may round them to bfloat16. oneDNN does so with AMX, which is ruled out,
    and where it did in future, this sees it.
    """
    if platform.system() != "Linux" or not torch.backends.mkldnn.is_available():
        return False
    words = set(Path("/proc/cpuinfo").read_text().split())
    if "AuthenticAMD" not in words or not {"avx2", "avx512f"} & words or any(word.startswith("amx") for word in words):
        return False
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    x = torch.linspace(-1, 1, 2**14).view(128, 128)
    exact = x.double() @ x.double().T
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        found = x @ x.T
    finally:
        matmul.fp32_precision = before
    return bool((found - exact).abs().max() < 1e-5 * exact.abs().max())
