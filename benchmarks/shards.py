"""Tar shards read one after the other and by index: python benchmarks/shards.py [--images N] [--folder WHERE]

Writes N small JPEG files (digits, 32x32 pixels) into tar shards of uneven sizes, and removes them at the end. torchrun
starts two ranks (gloo), each with two loaders of two workers: one with read = sequential, one with read = random. They
take turns, so that both meet the same load, until both have delivered an epoch. Measured on every rank: images per
second of both, and the unique memory (USS) of each process during the epoch. Every rank counts its samples, and the
ranks compare the counts and sums of all. Writes results/shards.json. Linux; the files are in the page cache.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inbatch.apps.console import print_table, say
from inbatch.runtime import distributed
from inbatch.runtime.environment import environment
from inbatch.runtime.files import read_json, write_json
from inbatch.runtime.process_group import process_group

OUT = Path(__file__).parents[1] / "results" / "shards.json"
SEEDS, WORLD, WORKERS, BATCH, TURN, POINTS = 400, 2, 2, 256, 20, 20
WAYS = ("sequential", "random")


def make(root: Path, images: int, shards: int) -> list[int]:
    """Write the shards; return their numbers of images, which differ by up to a fifth."""
    from sklearn.datasets import load_digits

    seeds = []
    for pixels in load_digits().images[:SEEDS]:
        large = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32)).convert("RGB")
        large.save(file := io.BytesIO(), "JPEG", quality=90)
        seeds.append(file.getvalue())
    ends = np.linspace(0, images, shards + 1)
    ends[1:-1] += np.random.default_rng(0).uniform(-0.1, 0.1, shards - 1) * images / shards
    sizes = np.diff(ends.astype(int)).tolist()
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(root / f"train-{shard:03d}.tar", "w") as file:
            for _ in range(size):
                member = tarfile.TarInfo(f"{number:07d}.jpg")
                member.size = len(seeds[number % SEEDS])
                file.addfile(member, io.BytesIO(seeds[number % SEEDS]))
                number += 1
    return sizes


def private(pid: int) -> int:
    """Return the USS of a process, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def worker_ids(loader: Any) -> list[int]:
    """Return the process ids of the workers of a loader that has begun an epoch."""
    return [worker.pid for worker in loader._stream._iterator._workers]


def rank(data: str, out: Path) -> None:
    """Deliver an epoch of both loaders in turn, as one rank of torchrun; rank 0 writes the figures of all."""
    from inbatch.api import prepare

    with process_group():
        settings = {"encoder.name": "tiny", "image_size": 16, "cache_on_device": False, "batch_size": BATCH}
        loaders = {
            way: prepare(data, settings=settings | {"read": way}, device="cpu", workers=WORKERS).loader for way in WAYS
        }
        batches = {way: iter(loader.epoch(0)) for way, loader in loaders.items()}
        seconds, steps, points = dict.fromkeys(WAYS, 0.0), loaders["random"].steps, []
        numbers = {way: np.full((steps, BATCH // WORLD), -1) for way in WAYS}
        marks = {round(x) for x in np.linspace(TURN, steps, POINTS)}
        for first in range(0, steps, TURN):
            turn = range(first, min(first + TURN, steps))
            for way in WAYS if first // TURN % 2 else WAYS[::-1]:
                distributed.all_reduce_max(0)  # the ranks begin together
                began = time.perf_counter()
                for step in turn:
                    numbers[way][step] = next(batches[way]).index.numpy()
                seconds[way] += time.perf_counter() - began
            if marks & set(range(turn.start + 1, turn.stop + 1)):
                used = {way: list(map(private, worker_ids(loader))) for way, loader in loaders.items()}
                points.append({"images": turn.stop * BATCH, "rank": private(os.getpid())} | used)
        ended = {way: next(batches[way], None) is None for way in WAYS}  # the check at the end of an epoch has passed
        own = {"seconds": seconds, "points": points, "ended": ended, "numbers": numbers, "steps": steps}
        parts = distributed.distribute_tasks(lambda _: own, WORLD)
        for loader in loaders.values():
            loader.close()
        if distributed.rank() == 0:
            write_json(out, figures(parts, loaders["sequential"].report()))


def figures(parts: Sequence[dict[str, Any]], report: str) -> dict[str, Any]:
    """Return the figures of all ranks."""
    result: dict[str, Any] = {"report": report.splitlines()[-1], "steps": parts[0]["steps"]}
    for way in WAYS:
        every = np.concatenate([part["numbers"][way] for part in parts]).ravel()
        slowest = max(part["seconds"][way] for part in parts)
        result[way] = {
            "images": len(every), "different_images": len(np.unique(every)), "seconds": slowest,
            "images_per_second": len(every) / slowest, "checked": all(part["ended"][way] for part in parts),
            "workers_mb_per_100000_images": [
                slope(part["points"], lambda p, way=way, w=w: p[way][w]) for part in parts for w in range(WORKERS)
            ],
        }  # fmt: skip
    result["ratio"] = result["sequential"]["images_per_second"] / result["random"]["images_per_second"]
    result["ranks_mb_per_100000_images"] = [slope(part["points"], lambda point: point["rank"]) for part in parts]
    result["points"] = [part["points"] for part in parts]
    return result


def slope(points: Sequence[dict[str, Any]], value: Any) -> float:
    """Return the growth of a memory in MB per 100,000 images of an epoch, without the first tenth of it."""
    later = points[1 + len(points) // 10 :]
    return float(np.polyfit([p["images"] for p in later], [value(p) / 1e6 for p in later], 1)[0] * 1e5)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the shards are made")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rank-data", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.rank_data:
        rank(args.rank_data, args.out)
        return
    root = Path(tempfile.mkdtemp(prefix="shards-", dir=args.folder))
    try:
        sizes = make(root, args.images, args.shards)
        say(f"{args.images:,} images in {args.shards} shards of {min(sizes):,} to {max(sizes):,}")
        part = root / "figures.json"
        call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), __file__]
        words = [*call, "--rank-data", str(root), "--out", str(part)]
        subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        result = {"environment": environment(torch.device("cpu")), "load": os.getloadavg()[0]}
        result |= {"images": args.images, "shards": args.shards, "sizes": [min(sizes), max(sizes)]}
        result |= {"ranks": WORLD, "workers": WORKERS, "batch": BATCH} | read_json(part)
        print_table(
            ("", "images", "images/s", "MB per 100,000 images, each worker"),
            [
                (way, f"{result[way]['different_images']:,}", f"{result[way]['images_per_second']:,.0f}",
                 ", ".join(f"{x:.2f}" for x in result[way]["workers_mb_per_100000_images"]))
                for way in WAYS
            ],
            numbers=True,
        )  # fmt: skip
        growth = result["ranks_mb_per_100000_images"]
        say(f"sequential is {result['ratio']:.2f} times as fast; ranks grow by {growth} MB")
        write_json(args.out, result)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
