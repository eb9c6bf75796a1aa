"""Run the benchmark section by section: hardware peak, implementations in turns, results as one dictionary."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from inbatch.apps.bench.options import Options
from inbatch.apps.bench.runner import Implementation
from inbatch.apps.bench.suites import MAKERS, Field
from inbatch.errors import InbatchError, Unwritten
from inbatch.runtime.device import device_for, precision_for
from inbatch.runtime.environment import environment
from inbatch.runtime.files import check_writable, write_json
from inbatch.runtime.signals import ending
from inbatch.runtime.unfinished import remove_abandoned, unfinished

_SCRATCH = "inbatch-bench-"


def bench(options: Options, on_complete: Callable[[dict[str, Any]], None] = lambda comparison: None) -> dict[str, Any]:
    """Measure the chosen sections.

    Args:
        options: What to measure.
        on_complete: Called with the result of each comparison when it is complete.

    Returns:
        Environment, settings, hardware peaks and, by section, the results of every implementation.

    Raises:
        ConfigError: If the options are invalid.
        DataError: If the data cannot be read.
        Unwritten: If the file cannot be written; the error holds the result.
    """
    options.check()
    if options.out is not None:
        check_writable(options.out)
    device = device_for(options.device).type
    load = {"load": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    data = options.data and Path(options.data).name
    settings = options.settings() | {"methods": options.methods, "device": device, "data": data}
    where = environment(device_for(options.device)) | load
    results: dict[str, Any] = {"command": options.command(), "environment": where, "settings": settings}
    results |= {"ceilings": {}, "sections": {}}
    for section in options.chosen:
        threads = options.threads_of(section)
        if str(threads) not in results["ceilings"]:
            results["ceilings"][str(threads)] = ceilings(device, threads, options.quick)
        with scratch_folder() as folder:
            comparisons = MAKERS[section](Field(options, section, device, folder))
            results["sections"][section] = []
            for comparison in comparisons:
                known = results["ceilings"][str(threads)]
                result = comparison.run(settings["rounds"], known, show_missing=options.peers is True)
                results["sections"][section].append(result)
                on_complete(result)
    if options.out is not None:
        try:
            write_json(options.out, results)
        except InbatchError as error:
            raise Unwritten(str(error), results) from error
    return results


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder for synthetic images, and remove those that killed benchmarks left."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        remove_abandoned(left)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, ignore_cleanup_errors=True) as name, unfinished(Path(name)):
        yield Path(name)


def ceilings(
    device: str, threads: int, quick: bool, *, each: float = math.inf, limit: float = math.inf
) -> dict[str, Any]:
    """Measure the hardware peak with the given number of threads, in a separate process.

    The bf16 peak is None if the hardware does not multiply bf16; emulated, it takes minutes.

    Args:
        device: "cpu" or "cuda".
        threads: Number of torch threads.
        quick: Only measure small products.
        each: Seconds after which no larger products of a kind are tried.
        limit: Maximum total seconds.

    Raises:
        InbatchError: If the process failed or exceeded the limit.
    """
    job = {
        "module": "inbatch.apps.bench.hardware_peak",
        "make": "ceilings",
        "seconds": 0.01,
        "quick": quick,
        "each": each,
    }
    bf16 = precision_for("auto", torch.device(device)) == torch.bfloat16
    one = Implementation("ceiling", job | {"device": device, "threads": threads, "bf16": bf16}, limit=limit)
    with ending():
        try:
            one.warm_up()
        except BaseException:
            one.kill()
            raise
        finally:
            row = one.end()
    if "failed" in row:
        raise InbatchError(f"the machine's ceiling: {row['failed']}")
    return {key: value for key, value in row.items() if key not in ("rounds", "first_seconds", "calls", "versions")}
