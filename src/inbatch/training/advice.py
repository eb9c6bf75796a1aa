"""Check the machine settings that affect a run, and suggest faster ones."""

import platform
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from inbatch.data.decoding.jpeg import fast_jpeg
from inbatch.data.views import numba_backend
from inbatch.runtime import tuning
from inbatch.runtime.cpu_load import others_busy
from inbatch.runtime.paths import variable
from inbatch.runtime.resources import affine, cores, launched
from inbatch.runtime.threads import adapts, threads_beside

_SHARED = Path("/dev/shm")


_ROOM = 2**30
"""Bytes of shared memory below which data workers may fail; containers often get 64 MB."""


_LARGE = 96
"""Side in pixels from which drawing views without numba takes a noticeable share of a step."""


@dataclass(frozen=True)
class Finding:
    """One machine setting: its name, its current value, and advice if a faster value exists."""

    what: str
    state: str
    advice: str = ""


def advice(device: torch.device, largest: int, workers: int) -> str:
    """Return one line of advice for the start of a run; an empty string if nothing would make it faster.

    Args:
        device: Device that the run computes on.
        largest: Side of the largest view in pixels.
        workers: Number of processes that stream images.
    """
    findings = [_jpeg()]
    if workers:
        findings += [_shared_memory()]
    if device.type == "cpu":
        findings = [_threads(device), _busy(device), _allocator(), *findings]
        if largest >= _LARGE:
            findings += [_views()]
    wanted = [finding.advice for finding in findings if finding.advice]
    return f"Could be faster: {'; '.join(wanted)} (details: inbatch doctor)." if wanted else ""


def _threads(device: torch.device) -> Finding:
    near = launched("LOCAL_WORLD_SIZE")
    threads, fair = torch.get_num_threads(), max(1, cores() // near)
    current = f"{threads} threads on {cores()} cores" + ("" if cores() == affine() else f" of {affine()}, by quota")
    # Fewer threads may be torch's own choice (cores that share a multiplier), so more threads are suggested only if
    # OMP_NUM_THREADS is set.
    set_by_user = bool(variable("OMP_NUM_THREADS"))
    if device.type == "cpu" and (threads > fair or (threads < fair and set_by_user)):
        return Finding("threads", current, f"OMP_NUM_THREADS={fair} is a thread for each core")
    return Finding("threads", current)


def _busy(device: torch.device) -> Finding:
    busy, threads = others_busy(), torch.get_num_threads()
    if busy is None:
        return Finding("load", "unknown on this system")
    current, free = f"other processes keep {busy:.1f} cores busy", threads_beside(busy, cores(), threads)
    if free == threads:
        return Finding("load", current)
    if adapts(device):
        return Finding("load", f"{current}; a run computes with {_count(free)} meanwhile")
    return Finding(
        "load", current, f"{current}, and threads wait for each other: OMP_NUM_THREADS={free} until they end"
    )


def _count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _allocator() -> Finding:
    if tuning.keeps_memory:
        return Finding("allocator", "keeps freed memory (INBATCH_ALLOCATOR=system turns this off)")
    if tuning.tuned or platform.libc_ver()[0] != "glibc":
        return Finding("allocator", "the system's default")
    return Finding("allocator", "the system's default", "inbatch.tune() at the top of a script keeps freed memory")


def _views() -> Finding:
    if numba_backend.available():
        return Finding("views", f"one fused pass on a CPU (numba {_version('numba')})")
    return Finding("views", "torch's operations", 'python -m pip install "inbatch[fast]" draws views in one pass')


def _jpeg() -> Finding:
    if fast_jpeg():
        return Finding("JPEG", f"simplejpeg {_version('simplejpeg')}, Pillow {_version('pillow')} for the rest")
    return Finding("JPEG", "Pillow", "python -m pip install simplejpeg decodes faster")


def _shared_memory() -> Finding:
    with suppress(OSError):
        free = shutil.disk_usage(_SHARED).free
        current = f"{free / 1e9:,.1f} GB free for batches of data workers"
        short = f"{_SHARED} has {free / 1e6:,.0f} MB for data workers: docker run --shm-size=8g"
        return Finding("shared memory", current, short if free < _ROOM else "")
    return Finding("shared memory", "unknown on this system")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
