"""A million images in a folder: python benchmarks/million.py [--images N] [--folder WHERE] [--workers W]

Makes a tree of N hard links to 400 real JPEG files of 8x8 pixels, with paths of 60 bytes in 1,000 folders and one of
250, and removes it at the end. Measured, each in its own process: seconds and memory of a scan; of the next scan, from
the cache; seconds from `inbatch pretrain` to the end of the first step, streamed and unlabelled, compared with those
for a thousand images; and the unique (USS) and proportional (PSS) memory of every data worker during an epoch without
training. Writes results/million.json. Linux.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inbatch.apps.console import print_table, say
from inbatch.runtime.child_processes import end_with_parent, start
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.runtime.memory import forget_peak, peak, used_bytes

OUT = Path(__file__).parents[1] / "results" / "million.json"
SEEDS, FOLDERS, POINTS = 400, 1000, 21
RUN = "--encoder tiny --set image_size=8 --set cache_on_device=false --batch 256 --epochs 1 --quiet"


def make(root: Path, images: int) -> dict[str, float]:
    """Make the tree under root/photos; return the bytes of its paths, relative to root."""
    from sklearn.datasets import load_digits

    where = os.statvfs(root)
    if where.f_favail and where.f_favail < 2 * FOLDERS:
        raise SystemExit(f"{root} has {where.f_favail:,} free inodes")
    if images // SEEDS > 60_000:
        raise SystemExit("ext4 gives a file at most 65,000 names: fewer images")
    seeds = []
    for i, pixels in enumerate(load_digits().images[:SEEDS]):
        file = root / f".seed-{i}.jpg"  # hidden: not found by the scan
        Image.fromarray((pixels * 15.9).astype(np.uint8)).convert("RGB").save(file, quality=90)
        seeds.append(file)
    total = 0
    for number in range(FOLDERS):
        folder = root / "photos" / f"n{number:08d}"
        folder.mkdir(parents=True)
        for i in range(number, images - 1, FOLDERS):
            path = folder / f"n{number:08d}_a-picture-of-something_{i:07d}.jpeg"
            os.link(seeds[i % SEEDS], path)
            total += len(os.path.relpath(path, root))
    long = root / "photos" / ("x" * 120) / ("y" * 118 + ".jpeg")
    long.parent.mkdir()
    os.link(seeds[0], long)
    longest = len(os.path.relpath(long, root))
    return {"mean": (total + longest) / images, "longest": longest}


def scan(folder: str) -> dict[str, Any]:
    """Open the folder as a run does, in a process of its own."""
    from inbatch.data import open_data

    device = torch.device("cpu")
    forget_peak(device)
    before, began = used_bytes(device) or 0, time.perf_counter()
    forget_peak(device)
    source = open_data(folder)
    seconds = time.perf_counter() - began
    top, after = peak(device), used_bytes(device) or 0
    figures = {"seconds": seconds, "images": len(source), "classes": len(source.classes)}
    return figures | {"held_bytes": after - before, "peak_bytes": top - before}


def private(pid: int) -> tuple[int, int]:
    """Return USS and PSS of a process, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Pss"]


def children() -> list[int]:
    """Return the child processes of this one: the workers, in the order of their numbers."""
    return sorted(int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def epoch(folder: str, workers: int) -> dict[str, Any]:
    """Load the batches of an epoch without training, in a process of its own; record the memory of the workers."""
    from inbatch.api import prepare

    settings = {"encoder.name": "tiny", "image_size": 8, "cache_on_device": False, "batch_size": 256}
    loader = prepare(folder, settings=settings, device="cpu", workers=workers).loader
    marks = {round(x) for x in np.linspace(1, loader.steps, POINTS)}
    points, began = [], time.perf_counter()
    for step, _ in enumerate(loader.epoch(0), 1):
        if step in marks:
            points.append([step * loader.batch, *map(list, zip(*(private(pid) for pid in children()), strict=True))])
    seconds = time.perf_counter() - began
    images, uss = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    later = slice(1 + len(points) // 10, None)  # the allocator still grows in the first tenth
    slopes = [float(np.polyfit(images[later], uss[later, w], 1)[0] * 1e6) for w in range(workers)]
    figures = {"workers": workers, "images": loader.steps * loader.batch, "seconds": seconds}
    return figures | {"bytes_per_million_images": slopes, "points": points}


def first_step(folder: str, cache: Path) -> float:
    """Return the seconds from the start of the program to the log line of its first step."""
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "-m", "inbatch", "pretrain", "--data", folder, "--out", out, *RUN.split()]
        began = time.perf_counter()
        run = start(words, env=os.environ | {"INBATCH_CACHE": str(cache)}, stdout=subprocess.DEVNULL)
        log = Path(out) / "metrics.jsonl"
        while not (log.is_file() and '"step": 1,' in log.read_text()):
            if run.poll() is not None:
                raise SystemExit(f"the run ended with {run.returncode}")
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        run.send_signal(signal.SIGTERM)
        run.wait()
    return seconds


def apart(cache: Path, *words: str) -> Any:
    """Run this file with these arguments in a new process; return its result."""
    call = [sys.executable, __file__, *words]
    one = start(call, env=os.environ | {"INBATCH_CACHE": str(cache)}, stdout=subprocess.PIPE)
    out, _ = one.communicate()
    if one.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {one.returncode}")
    return json.loads(out.splitlines()[-1])


def main(words: Sequence[str] | None = None) -> None:
    end_with_parent()  # if this process was started by this file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the tree is made")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=("scan", "epoch"), help=argparse.SUPPRESS)
    parser.add_argument("--tree", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.only:
        print(json.dumps(scan(args.tree) if args.only == "scan" else epoch(args.tree, args.workers)))
        return
    root = Path(tempfile.mkdtemp(prefix="million-", dir=args.folder))
    try:
        began = time.perf_counter()
        result: dict[str, Any] = {"environment": environment(torch.device("cpu")), "images": args.images}
        result["path_bytes"] = make(root, args.images)
        say(f"{args.images:,} files in {time.perf_counter() - began:,.0f} s")
        cache, tree = root / ".cache", str(root / "photos")
        for name in ("scan", "from_cache"):
            result[name] = apart(cache, "--only", "scan", "--tree", tree)
            print_table(("", "seconds", "MB held", "MB at most"), [_row(name, result[name])], numbers=True)
        shutil.rmtree(cache, ignore_errors=True)
        runs = {"a thousand": root / "photos" / "n00000000", "all": root, "all, scan from the cache": root}
        result["first_step_seconds"] = {name: first_step(str(data), cache) for name, data in runs.items()}
        say(*(f"first step of {name}: {seconds:.1f} s" for name, seconds in result["first_step_seconds"].items()))
        result["epoch"] = apart(cache, "--only", "epoch", "--tree", tree, "--workers", str(args.workers))
        say(f"workers grow by {result['epoch']['bytes_per_million_images']} bytes in a million images")
        write_json(args.out, result)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(root)


def _row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    return name, f"{figures['seconds']:.1f}", f"{figures['held_bytes'] / 1e6:.0f}", f"{figures['peak_bytes'] / 1e6:.0f}"


if __name__ == "__main__":
    main()
