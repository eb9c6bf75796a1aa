"""Guards against slowdowns: python benchmarks/guards.py, two to three minutes.

Every guard is a ratio: how many times faster a part of inbatch is than a plain implementation of the same work. Both
run in this process in alternation, so that the ratio is valid on any machine and next to other work. A guard is "slow"
below its floor, which is well below the measured value; then the exit code is 1. --only selects guards. --quick reduces
all sizes: it shows that the script works, but no speed is checked.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inbatch import tune
from inbatch.apps.bench import inbatch_workloads, reference_workloads, synthetic_data
from inbatch.apps.console import print_table, say
from inbatch.batch import Batch
from inbatch.runtime.device import precision_for
from inbatch.runtime.memory import threads

Work = tuple[Callable[[], int], dict[str, Any]]


@dataclass(frozen=True)
class Guard:
    """One guard. ours, reference: factories of the two implementations. floor: the smallest acceptable ratio of rates.

    job: input of both. threads: None for all cores.
    """

    ours: Callable[[dict[str, Any]], Work]
    reference: Callable[[dict[str, Any]], Work]
    floor: float
    job: dict[str, Any]
    threads: int | None = 1


def bare(job: dict[str, Any]) -> Work:
    """SimCLR's step written directly with the same parts; the difference to inbatch's step is its overhead."""
    run = inbatch_workloads.built(job)
    batches = inbatch_workloads.endless(run)

    def call() -> int:
        batch = next(batches)
        rows = run.network(list(run.views(batch).images))
        loss = run.method.loss(rows, {}, Batch(batch.index, batch.label))["loss"]
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        run.optimizer.step()
        return len(batch)

    return call, {}


def eager(job: dict[str, Any]) -> Work:
    """Compute the network in float32, in torch's default memory layout."""
    return inbatch_workloads.network(job | {"settings": {"precision": "float32", "channels_last": False}})


def decode_pil(job: dict[str, Any]) -> Work:
    """Decode the same files by Pillow."""
    from PIL import Image

    paths = sorted(Path(job["data"]).rglob("*.jpg"))

    def decode(path: Path) -> np.ndarray:
        return np.asarray(Image.open(path).convert("RGB"))

    return reference_workloads.in_turn(paths, job["per_call"], decode), {}


def guards(folder: Path, quick: bool) -> dict[str, Guard]:
    """Return every guard by name; their input files are in the folder."""
    bf16 = precision_for("auto", torch.device("cpu")) == torch.bfloat16
    base = {"method": "simclr", "compile": False, "device": "cpu", "count": False, "unit": "views"}
    small, large = (
        base | {"size": size, "folder": str(folder / str(size)), "data": str(folder / str(size) / "jpegs")}
        for size in (32, 224)
    )
    small |= {"batch": 8 if quick else 256, "encoder": "tiny", "per_call": 8 if quick else 64, "files": 10**6}
    large |= {"batch": 2 if quick else 16, "encoder": "tiny", "per_call": 1 if quick else 4, "files": 10**6}
    network = small | {"batch": 8 if quick else 64, "encoder": "tiny" if quick else "resnet18"}
    loss = base | {"rows": 64 if quick else 4096, "dim": 128}
    near = base | {"folder": str(folder), "queries": 64 if quick else 2000, "classes": 10, "k": 5 if quick else 200}
    return {
        "views, 32 px, over torchvision v2": Guard(inbatch_workloads.views, reference_workloads.views_tensor, 5, small),
        "views, 224 px, over torchvision v2": Guard(
            inbatch_workloads.views, reference_workloads.views_tensor, 3, large
        ),
        "JPEG, 32 x 32 files, over Pillow": Guard(inbatch_workloads.decode, decode_pil, 1.5, small),
        "JPEG, 500 x 375 files, over Pillow": Guard(inbatch_workloads.decode, decode_pil, 1.05, large),
        "NT-Xent, 4,096 rows, over literal": Guard(inbatch_workloads.loss, reference_workloads.loss, 1.3, loss, None),
        "k-NN, over product and top-k": Guard(
            inbatch_workloads.neighbours, reference_workloads.neighbours, 0.9, near, None
        ),
        "network, over eager float32": Guard(inbatch_workloads.network, eager, 1.4 if bf16 else 1.0, network, None),
        "step, over a bare loop": Guard(inbatch_workloads.step, bare, 0.9, network, None),
    }


def lay_out(folder: Path, quick: bool) -> None:
    """Write images, JPEG files and features."""
    for size, count in ((32, 16 if quick else 512), (224, 2 if quick else 24)):
        inside = folder / str(size)
        inside.mkdir()
        images = synthetic_data.draw_images(count, size)
        np.save(inside / "images.npy", images)
        synthetic_data.write_folder(synthetic_data.jpegs(images, size), inside / "jpegs")
    for name, array in synthetic_data.features(264 if quick else 22_000, 256, 10).items():
        np.save(folder / f"{name}.npy", array)


def ratio(guard: Guard, seconds: float, rounds: int) -> tuple[float, float, float]:
    """Return how many times faster inbatch is, and both rates of the fastest turns, which other work slows least."""
    torch.set_num_threads(guard.threads or threads())
    calls = [make(guard.job)[0] for make in (guard.ours, guard.reference)]
    best = [0.0, 0.0]
    for number in range(rounds + 1):  # the first turn is a warm-up
        for which, call in enumerate(calls):
            begin, units = time.perf_counter(), 0
            while not units or time.perf_counter() - begin < seconds:
                units += call()
            if number:
                best[which] = max(best[which], units / (time.perf_counter() - begin))
    return best[0] / best[1], best[0], best[1]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="guards whose names hold one of these")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each of the two")
    parser.add_argument("--quick", action="store_true", help="small, and nothing is judged")
    args = parser.parse_args(words)
    if args.rounds < 1:
        parser.error("--rounds is 1 or more")
    slow, cells, threads = [], [], torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="inbatch-guards-") as place:
        folder = Path(place)
        every = guards(folder, args.quick)
        chosen = {n: g for n, g in every.items() if not args.only or any(word in n for word in args.only)}
        if not chosen:
            parser.error(f"no guard is called so; there are: {'; '.join(every)}")
        lay_out(folder, args.quick)
        for name, guard in chosen.items():
            times, own, other = ratio(guard, 0.0 if args.quick else 0.3, 1 if args.quick else args.rounds)
            bad = times < guard.floor and not args.quick
            slow += [name] if bad else []
            verdict = "" if args.quick else "SLOW" if bad else "ok"
            cells.append((name, f"{times:.2f}", f"{guard.floor:g}", f"{own:,.1f}", f"{other:,.1f}", verdict))
    torch.set_num_threads(threads)
    print_table(("guard", "times faster", "floor", "ours / s", "reference / s", ""), cells, numbers=True)
    if slow:
        say("", "Below its floor: " + "; ".join(slow))
    return 1 if slow else 0


if __name__ == "__main__":
    tune()
    os.environ["INBATCH_CACHE"] = "off"  # the cache is disabled, so that images are decoded
    sys.exit(main())
