"""Report the capabilities of this machine, which are in use, and their gain (`inbatch doctor`)."""

import math
import time
from importlib.util import find_spec
from typing import Any

import torch

from inbatch.data import cache
from inbatch.errors import InbatchError
from inbatch.nn.cpu_matmul import onednn
from inbatch.runtime.cpu_load import others_busy
from inbatch.runtime.device import device_for, precision_for
from inbatch.runtime.environment import environment
from inbatch.runtime.memory import free_bytes
from inbatch.runtime.resources import cores, limited_bytes
from inbatch.runtime.threads import adapts, threads_beside
from inbatch.training.advice import Finding, _allocator, _busy, _jpeg, _shared_memory, _threads, _version, _views

BUDGET = 40.0
"""Time limit of `measure` in seconds."""
FORECAST, MEASURED = 32.0, 46.0
"""Time limits of `inbatch doctor`, which must finish within 60 seconds.

Seconds after the start of the program from which no further forecast begins, and at which `measure` ends.
"""
LIMIT = 15.0
"""Time limit in seconds of the products and copies, and of one response of an implementation."""
_BATCHES = (32, 16, 8, 4)
_STEP = 0.7
"""Longest duration of a step in seconds at half of the CPU's highest product rate; the batch is reduced to meet it."""
_VIEW = 3.33e9
"""Floating-point operations of a ResNet-18 for a view of 32 pixels, forward and backward, as counted by torch."""

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "as torch ships: float32, NCHW": {"bf16": False, "channels_last": False},
    "channels_last": {"bf16": False, "channels_last": True},
    "bf16": {"bf16": True, "channels_last": False},
    "bf16, channels_last": {"bf16": True, "channels_last": True},
    "the same, as the program sets its process": {"bf16": True, "channels_last": True, "tune": True},
    "float32, channels_last, as the program sets its process": {"bf16": False, "channels_last": True, "tune": True},
}
"""Settings with which the step of an encoder is measured."""


def examine(device: str = "auto") -> list[Finding]:
    """Return the available capabilities and those in use; only the CPU load is measured."""
    on = device_for(device)
    findings = [_threads(on), _busy(on), _memory(), *_gpu(on), _precision(on), _products(), _allocator(), _denormals()]
    return [*findings, _views(), _jpeg(), _shared_memory(), _cache(), *_extras()]


def measure(quick: bool = False, until: float = math.inf) -> dict[str, Any]:
    """Measure the CPU's peak rates, and the steps of an encoder by setting, in processes that take turns.

    A measurement that has no result at the time limit has the key "failed" with the reason. bf16 is omitted if the CPU
    does not multiply it natively: emulation takes minutes.

    Args:
        quick: Make fewer and smaller measurements.
        until: Time limit by `time.monotonic`, in addition to `BUDGET` seconds.

    Returns:
        ceilings: products in float32 and bf16 (operations per second; None if bf16 is omitted) and copies (bytes per
            second). threads: fewer if other processes are busy. batch: images per step, fewer on slow CPUs. encoder:
            views per second of a ResNet-18 on 32 pixels, forward and backward, by setting.
    """
    from inbatch.apps.bench.benchmark import ceilings
    from inbatch.apps.bench.runner import BenchmarkRounds, Implementation

    began, threads, reached = time.monotonic(), torch.get_num_threads(), dict[str, Any]()
    if adapts(torch.device("cpu")):  # as in a run; threads that share a core with other processes wait for each other
        threads = threads_beside(others_busy(), cores(), threads)
    until = min(began + BUDGET, until)
    try:
        reached = ceilings("cpu", threads, quick, each=2.0, limit=min(LIMIT, until - began))
    except InbatchError as error:
        reached = {"failed": str(error)}
    batch = _BATCHES[-1] if quick else batch_for(reached.get("float32", 0))
    job = {"device": "cpu", "threads": threads, "quick": quick, "seconds": 0.1 if quick else 1.0}
    mine = job | {
        "module": "inbatch.apps.bench.network_workload",
        "make": "encoder_step",
        "batch": batch,
        "waits": True,
    }
    bf16 = precision_for("auto", torch.device("cpu")) == torch.bfloat16
    chosen = {who: settings for who, settings in IMPLEMENTATIONS.items() if bf16 or not settings["bf16"]}
    implementations = [
        Implementation(who, mine | settings, limit=LIMIT, until=until) for who, settings in chosen.items()
    ]
    comparison = BenchmarkRounds("encoder", "views/s", implementations).run(
        1 if quick else 3, reached, show_missing=True
    )
    result = {"environment": environment(torch.device("cpu")), "ceilings": reached, "threads": threads, "batch": batch}
    return result | {"encoder": comparison["implementations"]}


def batch_for(rate: float) -> int:
    """Return the images per step of the encoder, with two views each, for a product rate in operations per second."""
    return next((n for n in _BATCHES if 2 * n * _VIEW <= _STEP * rate / 2), _BATCHES[-1])


def _memory() -> Finding:
    limit = ", as a container or job allows" if limited_bytes() else ""
    return Finding("memory", f"{free_bytes(torch.device('cpu')) / 1e9:,.1f} GB free{limit}")


def _gpu(device: torch.device) -> list[Finding]:
    if device.type != "cuda":
        absent = "Apple's, which inbatch does not use" if torch.backends.mps.is_available() else "none visible to torch"
        return [Finding("GPU", "available, not requested" if torch.cuda.is_available() else absent)]
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    kernels = "Triton's kernels for losses" if find_spec("triton") else "no Triton"
    return [Finding("GPU", f"{torch.cuda.get_device_name(device)}, {memory:,.0f} GB; {kernels}")]


def _precision(device: torch.device) -> Finding:
    bf16 = precision_for("auto", device) == torch.bfloat16
    why = "supports bf16" if bf16 else "does not report support for bf16"
    whose = "the GPU" if device.type == "cuda" else "the processor"
    return Finding("precision", f"{'bf16' if bf16 else 'float32'}, channels_last: {whose} {why}")


def _products() -> Finding:
    return Finding("float32 products", "oneDNN's, the faster ones here" if onednn() else "torch's own")


def _denormals() -> Finding:
    flushed = float(torch.tensor(1e-39) * 0.5) == 0
    return Finding("denormal numbers", "count as 0" if flushed else "are computed with")


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


def measurement_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of `measure`'s result: measurement, rate, and ratio to torch's default settings."""
    reached = result["ceilings"]
    lines = [("products and copies", reached["failed"], "")] if "failed" in reached else _reached(**reached)
    base = next(iter(result["encoder"].values())).get("rate")
    for who, row in result["encoder"].items():
        if "rate" not in row or base is None:
            lines.append((who, row.get("failed", ""), ""))
        else:
            lines.append((f"ResNet-18, {who}", f"{row['rate']:,.0f} views/s", f"{row['rate'] / base:.2f}"))
    return lines


def _reached(float32: float, bf16: float | None, copy: float, **more: Any) -> list[tuple[str, str, str]]:
    """Return the rows of the peak rates."""
    half = ("not measured: this processor does not multiply bf16", "")
    if bf16 is not None:
        half = (f"{bf16 / 1e9:,.0f} GFLOP/s", f"{bf16 / float32:.2f}")
    return [
        ("products in float32", f"{float32 / 1e9:,.0f} GFLOP/s", ""),
        ("products in bf16", *half),
        ("copies of memory", f"{copy / 1e9:,.0f} GB/s", ""),
    ]
