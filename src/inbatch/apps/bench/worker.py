"""Benchmark worker: a process that runs one workload on request and reports how long it took.

The job is a JSON object on the command line. `module` and `make` name a function that gets the job and returns the
workload and its properties; one call of the workload returns the number of units done. The first line on stdout
contains the properties. After that, every line on stdin starts a round of calls, answered by its seconds and units.

Only the standard library is imported here: this file also runs in a Python without inbatch.
"""

import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Work = tuple[Callable[[], int], dict[str, Any]]
"""A call of the workload, and the properties to report."""
BRIEF = 0.1
"""Seconds; shorter calls are warmed up at the start of a round, since caches and clock rates drop during a pause."""


def serve(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Prepare the workload, then run one round of it for every line on stdin."""
    import torch

    torch.set_num_threads(job["threads"])
    call, properties = getattr(importlib.import_module(job["module"]), job["make"])(job)
    if job.get("waits"):  # other processes import at the same time
        sys.stdin.readline()
    asynchronous = job["device"].startswith("cuda")

    def timed(count: int) -> tuple[float, int]:
        begin = time.perf_counter()
        units = sum(call() for _ in range(count))
        if asynchronous:
            torch.cuda.synchronize()
        return time.perf_counter() - begin, units

    timed(1)
    first = time.time() - job["began"]
    spent, done = 0.0, 0
    while not done or spent < min(1.0, job["seconds"]):
        spent, done = spent + timed(1)[0], done + 1
    each = spent / done
    calls = job.get("calls") or max(job.get("at_least", 1), round(job["seconds"] / each))
    versions = {}
    for name in ("torch", *job.get("needs", ())):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    signal_workers("SIGSTOP")
    send(properties | {"first_seconds": first, "calls": calls, "versions": versions})
    try:
        for _ in sys.stdin:
            signal_workers("SIGCONT")
            if each < BRIEF:
                timed(1)
            seconds, units = timed(calls)
            signal_workers("SIGSTOP")
            send({"seconds": seconds, "units": units})
    finally:  # a stopped process cannot exit
        signal_workers("SIGCONT")


def signal_workers(name: str) -> None:
    """Stop or resume data workers, so that they do not prefetch during the rounds of other implementations."""
    if hasattr(signal, name):
        for child in multiprocessing.active_children():
            with contextlib.suppress(OSError):
                os.kill(child.pid or 0, getattr(signal, name))


def beside(name: str, folder: Path = HERE) -> Any:
    """Load a file of this folder under its bare name, replacing any module of that name.

    A peer's Python has no inbatch.
    """
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(job: dict[str, Any]) -> None:
    """Run a job; every answer is a line of JSON on the original stdout, even if libraries print."""
    beside("child_processes", HERE.parents[1] / "runtime").end_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    sys.path = [p for p in sys.path if Path(p).resolve() != HERE]
    if any(importlib.util.find_spec(name) is None for name in job.get("needs", ())):
        return send({"failed": "not installed"})
    try:
        if job.get("tune"):  # as the command line does, before torch is imported
            importlib.import_module("inbatch").tune()
        for name in dict.fromkeys(("reference_workloads", job["module"])) if "." not in job["module"] else ():
            beside(name)
        serve(job, send)
    except Exception as error:
        if isinstance(error, ImportError) and job.get("needs"):
            return send({"failed": f"not installed: {error}"})
        full = isinstance(error, MemoryError) or "alloc" in str(error) or "out of memory" in str(error)
        traceback.print_exc()
        send({"failed": "out of memory" if full else str(error), "kind": type(error).__name__})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
