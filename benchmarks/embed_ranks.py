"""Time of `inbatch.embed_run` on several ranks, against one: python benchmarks/embed_ranks.py

Synthetic images of 32 pixels in a NumPy file, embedded by 1 and more processes of one thread each (gloo, one machine),
in turn. The time begins when all processes are ready and ends when the joined file is written; starting Python and
importing torch are not in it. Processor time is stated, too: it depends less on what else the machine does. The files
of all numbers of ranks must have the same bytes. Writes results/embed-ranks.json.
"""

import argparse
import hashlib
import json
import os
import resource
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from inbatch.api import embed_run
from inbatch.apps.console import print_table, say
from inbatch.models import create_encoder, save_encoder
from inbatch.runtime import tuning
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json

OUT = Path(__file__).parents[1] / "results" / "embed-ranks.json"


def write_images(file: Path, count: int) -> None:
    """Write smooth random images, (N, 3, 32, 32)."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), np.uint8)
    np.save(file, coarse.repeat(4, 2).repeat(4, 3))


def case(rank: int, world: int, folder: Path, port: int) -> None:
    """Embed the images as one rank."""
    os.environ["LOCAL_RANK"] = str(rank)
    tuning.ready()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    out = folder / f"features-{world}.npz"
    embed_run(folder / "encoder", folder / "few.npy", folder / "warm-up.npz", device="cpu")
    dist.barrier()
    began, used = time.perf_counter(), time.process_time()
    count = embed_run(folder / "encoder", folder / "images.npy", out, device="cpu")
    figures = {
        "images": count,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def measured(world: int, folder: Path) -> dict[str, Any]:
    """Return the figures of one start: the longest time of a rank, and the processor time of all."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(case, args=(world, folder, port), nprocs=world, start_method="spawn")
    figures = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]
    return {
        "ranks": world,
        "images": figures[0]["images"],
        "seconds": max(one["seconds"] for one in figures),
        "cpu_seconds": [one["cpu_seconds"] for one in figures],
        "peak_bytes": [one["peak_bytes"] for one in figures],
        "sha256": hashlib.sha256((folder / f"features-{world}.npz").read_bytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--encoder", default="tiny")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images.npy", args.images)
        write_images(folder / "few.npy", 512)
        torch.manual_seed(0)
        save_encoder(create_encoder(args.encoder, size=32), folder / "encoder")
        runs = [measured(world, folder) for _ in range(args.repeat) for world in args.ranks]
    wall = {world: statistics.median(r["seconds"] for r in runs if r["ranks"] == world) for world in args.ranks}
    work = {
        world: statistics.median(max(r["cpu_seconds"]) for r in runs if r["ranks"] == world) for world in args.ranks
    }
    result = {
        "encoder": args.encoder,
        "runs": runs,
        "times_faster": {world: wall[args.ranks[0]] / wall[world] for world in args.ranks},
        "times_less_processor_time": {world: work[args.ranks[0]] / work[world] for world in args.ranks},
        "load": os.getloadavg(),
        "cores": os.cpu_count(),
    }
    write_json(args.out, result | {"environment": environment(torch.device("cpu"))})
    print_table(
        ("ranks", "images", "seconds", "processor s of a rank", "peak MB of a rank", "same file"),
        [
            (str(r["ranks"]), f"{r['images']:,}", f"{r['seconds']:.1f}", f"{max(r['cpu_seconds']):.1f}",
             f"{max(r['peak_bytes']) / 1e6:,.0f}", str(r["sha256"] == runs[0]["sha256"]))
            for r in runs
        ],
        numbers=True,
    )  # fmt: skip
    for world in args.ranks[1:]:
        say(
            f"{world} ranks: {result['times_faster'][world]:.2f} times faster than {args.ranks[0]}, "
            f"{result['times_less_processor_time'][world]:.2f} times less processor time of a rank"
        )


if __name__ == "__main__":
    main()
