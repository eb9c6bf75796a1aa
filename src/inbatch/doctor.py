"""What this machine can do, what of it is in use, and what that gains (`inbatch doctor`)."""

import math
import os
import platform
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from inbatch import process
from inbatch.build import device_for, precision_for
from inbatch.busy import others_busy
from inbatch.data import cache
from inbatch.data.jpeg import fast_jpeg
from inbatch.environment import environment
from inbatch.errors import InbatchError
from inbatch.limits import affine, cores, launched, limited_bytes
from inbatch.machine import free_bytes
from inbatch.products import onednn
from inbatch.threads import adapts, threads_beside
from inbatch.views import fused

_SHARED = Path("/dev/shm")
_ROOM = 2**30
"""Bytes of shared memory below which data workers may fail: containers often get 64 MB."""
_LARGE = 96
"""Side in pixels from which on views without numba take a share of a step that is seen."""

BUDGET = 40.0
"""Seconds that `measure` takes at most."""
FORECAST, MEASURED = 32.0, 46.0
"""Seconds after the start of the program when `inbatch doctor`, which answers within 60, begins no other forecast and
ends `measure`."""
LIMIT = 15.0
"""Seconds that the products and copies, or one answer of a contestant, may take."""
_BATCHES = (32, 16, 8, 4)
_STEP = 0.7
"""Seconds that a step should take at half of the processor's fastest products; smaller batches are taken for it."""
_VIEW = 3.33e9
"""Operations of a ResNet-18 on a view of 32 pixels, forward and backward, as torch counts them."""

CONTESTANTS: dict[str, dict[str, Any]] = {
    "as torch ships: float32, NCHW": {"bf16": False, "channels_last": False},
    "channels_last": {"bf16": False, "channels_last": True},
    "bf16": {"bf16": True, "channels_last": False},
    "bf16, channels_last": {"bf16": True, "channels_last": True},
    "the same, as the program sets its process": {"bf16": True, "channels_last": True, "tune": True},
    "float32, channels_last, as the program sets its process": {"bf16": False, "channels_last": True, "tune": True},
}
"""What a step of an encoder is measured with."""


@dataclass(frozen=True)
class Finding:
    """One thing about the machine: what is in use, and what to do where more could be."""

    what: str
    found: str
    advice: str = ""


def examine(device: str = "auto") -> list[Finding]:
    """What there is and what is in use; nothing is measured but how busy the cores are."""
    on = device_for(device)
    found = [_threads(on), _busy(on), _memory(), *_gpu(on), _precision(on), _products(), _allocator(), _denormals()]
    return [*found, _views(), _jpeg(), _shared_memory(), _cache(), *_extras()]


def advice(device: torch.device, largest: int, workers: int) -> str:
    """One line for the start of a run: what would make it faster here; nothing where there is nothing.

    largest: side of the largest view in pixels. workers: processes that stream images.
    """
    found = [_jpeg()]
    if workers:
        found += [_shared_memory()]
    if device.type == "cpu":
        found = [_threads(device), _busy(device), _allocator(), *found]
        if largest >= _LARGE:
            found += [_views()]
    wanted = [finding.advice for finding in found if finding.advice]
    return f"Could be faster: {'; '.join(wanted)} (inbatch doctor tells more)." if wanted else ""


def measure(quick: bool = False, until: float = math.inf) -> dict[str, Any]:
    """Measure what the processor reaches, and an encoder's steps by setting, in processes that take turns.

    What has no result when the time is over has the key "failed" with the reason. bf16 is left out if the processor
    does not multiply it: emulated, it takes minutes.

    Args:
        quick: fewer and smaller measurements.
        until: when it must be over, by `time.monotonic`; it takes `BUDGET` seconds at most anyway.

    Returns:
        ceilings: products in float32 and bf16 (operations a second; None for bf16 that is left out) and copies (bytes a
            second). threads: fewer beside busy processes. batch: images of a step, fewer on slow processors. tower:
            views a second of a ResNet-18 on 32 pixels, forward and backward, by setting.
    """
    from inbatch.bench.measure import ceilings
    from inbatch.bench.runner import Contestant, Race

    began, threads, reached = time.monotonic(), torch.get_num_threads(), dict[str, Any]()
    if adapts(torch.device("cpu")):  # as a run does; threads that share a core with others wait for each other
        threads = threads_beside(others_busy(), cores(), threads)
    until = min(began + BUDGET, until)
    try:
        reached = ceilings("cpu", threads, quick, each=2.0, limit=min(LIMIT, until - began))
    except InbatchError as error:
        reached = {"failed": str(error)}
    batch = _BATCHES[-1] if quick else batch_for(reached.get("float32", 0))
    job = {"device": "cpu", "threads": threads, "quick": quick, "seconds": 0.1 if quick else 1.0}
    mine = job | {"module": "inbatch.bench.tower", "make": "tower", "batch": batch, "waits": True}
    bf16 = precision_for("auto", torch.device("cpu")) == torch.bfloat16
    chosen = {who: settings for who, settings in CONTESTANTS.items() if bf16 or not settings["bf16"]}
    field = [Contestant(who, mine | settings, limit=LIMIT, until=until) for who, settings in chosen.items()]
    race = Race("encoder", "views/s", field).run(1 if quick else 3, reached, show_missing=True)
    found = {"environment": environment(torch.device("cpu")), "ceilings": reached, "threads": threads, "batch": batch}
    return found | {"tower": race["contestants"]}


def batch_for(rate: float) -> int:
    """How many images a step of `tower` takes, two views of each, if products reach so many operations a second."""
    return next((n for n in _BATCHES if 2 * n * _VIEW <= _STEP * rate / 2), _BATCHES[-1])


def _threads(device: torch.device) -> Finding:
    near = launched("LOCAL_WORLD_SIZE")
    threads, fair = torch.get_num_threads(), max(1, cores() // near)
    found = f"{threads} threads on {cores()} cores" + ("" if cores() == affine() else f" of {affine()}, by quota")
    # Fewer may be torch's own choice (cores that share a multiplier): only who was told to take fewer is told of more.
    told = "OMP_NUM_THREADS" in os.environ
    if device.type == "cpu" and (threads > fair or (threads < fair and told)):
        return Finding("threads", found, f"OMP_NUM_THREADS={fair} is a thread for each core")
    return Finding("threads", found)


def _busy(device: torch.device) -> Finding:
    busy, threads = others_busy(), torch.get_num_threads()
    if busy is None:
        return Finding("load", "not known here")
    found, free = f"others keep {busy:.1f} cores busy", threads_beside(busy, cores(), threads)
    if free == threads:
        return Finding("load", found)
    if adapts(device):
        return Finding("load", f"{found}; a run computes with {_count(free)} meanwhile")
    return Finding("load", found, f"{found}, and threads wait for each other: OMP_NUM_THREADS={free} until they end")


def _count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _memory() -> Finding:
    limit = ", as a container or job allows" if limited_bytes() else ""
    return Finding("memory", f"{free_bytes(torch.device('cpu')) / 1e9:,.1f} GB free{limit}")


def _gpu(device: torch.device) -> list[Finding]:
    if device.type != "cuda":
        return [Finding("GPU", "there is one, not asked for" if torch.cuda.is_available() else "none that torch sees")]
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    kernels = "Triton's kernels for losses" if find_spec("triton") else "no Triton"
    return [Finding("GPU", f"{torch.cuda.get_device_name(device)}, {memory:,.0f} GB; {kernels}")]


def _precision(device: torch.device) -> Finding:
    bf16 = precision_for("auto", device) == torch.bfloat16
    why = "multiplies bf16" if bf16 else "does not say that it multiplies bf16"
    whose = "the GPU" if device.type == "cuda" else "the processor"
    return Finding("precision", f"{'bf16' if bf16 else 'float32'}, channels_last: {whose} {why}")


def _products() -> Finding:
    return Finding("float32 products", "oneDNN's, the faster ones here" if onednn() else "torch's own")


def _allocator() -> Finding:
    if process.keeps_memory:
        return Finding("allocator", "keeps freed memory (INBATCH_ALLOCATOR=system leaves it alone)")
    if process.tuned or platform.libc_ver()[0] != "glibc":
        return Finding("allocator", "as the system ships it")
    return Finding("allocator", "as the system ships it", "inbatch.tune() at the top of a script keeps freed memory")


def _denormals() -> Finding:
    flushed = float(torch.tensor(1e-39) * 0.5) == 0
    return Finding("denormal numbers", "count as 0" if flushed else "are computed with")


def _views() -> Finding:
    if fused.available():
        return Finding("views", f"one fused pass on a CPU (numba {_version('numba')})")
    return Finding("views", "torch's operations", 'python -m pip install "inbatch[fast]" draws views in one pass')


def _jpeg() -> Finding:
    if fast_jpeg():
        return Finding("JPEG", f"simplejpeg {_version('simplejpeg')}, Pillow {_version('pillow')} for the rest")
    return Finding("JPEG", "Pillow", "python -m pip install simplejpeg decodes faster")


def _shared_memory() -> Finding:
    with suppress(OSError):
        free = shutil.disk_usage(_SHARED).free
        found = f"{free / 1e9:,.1f} GB free for what data workers hand over"
        short = f"{_SHARED} has {free / 1e6:,.0f} MB for data workers: docker run --shm-size=8g"
        return Finding("shared memory", found, short if free < _ROOM else "")
    return Finding("shared memory", "as the system gives it")


def _cache() -> Finding:
    folder = cache.where()
    if folder is None:
        return Finding("cache", "off: decoded images are not kept between runs")
    return Finding("cache", f"{folder}: {cache.used() / 1e9:,.1f} of {cache.limit() / 1e9:,.0f} GB used")


def _extras() -> list[Finding]:
    names = {"pyarrow": "Parquet files", "tensorboard": "TensorBoard logs"}
    return [
        Finding(what, f"{name} {_version(name)}" if find_spec(name) else f"needs {name}, which is not installed")
        for name, what in names.items()
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What `measure` found, in words: what, how fast, how many times as fast as torch ships it."""
    reached = found["ceilings"]
    lines = [("products and copies", reached["failed"], "")] if "failed" in reached else _reached(**reached)
    base = next(iter(found["tower"].values())).get("rate")
    for who, row in found["tower"].items():
        if "rate" not in row or base is None:
            lines.append((who, row.get("failed", ""), ""))
        else:
            lines.append((f"ResNet-18, {who}", f"{row['rate']:,.0f} views/s", f"{row['rate'] / base:.2f}"))
    return lines


def _reached(float32: float, bf16: float | None, copy: float, **more: Any) -> list[tuple[str, str, str]]:
    """The rows of ceilings."""
    half = ("not measured: this processor does not multiply bf16", "")
    if bf16 is not None:
        half = (f"{bf16 / 1e9:,.0f} GFLOP/s", f"{bf16 / float32:.2f}")
    return [
        ("products in float32", f"{float32 / 1e9:,.0f} GFLOP/s", ""),
        ("products in bf16", *half),
        ("copies of memory", f"{copy / 1e9:,.0f} GB/s", ""),
    ]
