"""Estimated cost of a batch over many ranks, checked on small cases: python benchmarks/scaling.py [--keep-cases]

For W ranks and a batch of B samples: operations, bytes sent and bytes held by one rank in one step of SimCLR, and the
seconds that they would take at stated rates, with gathered rows and with own rows. The small cases are NT-Xent of
gathered rows alone, on 1 and more processes of one thread each (gloo, one machine): seconds, and the bytes that a rank
passed to collectives; `benchmarks/ring.py` measures own rows. Writes results/scaling.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inbatch.apps.console import print_table, say
from inbatch.methods.simclr import nt_xent
from inbatch.nn import logsumexp
from inbatch.runtime import distributed
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.training.size_estimate import COPIES, OWN_COPIES

OUT = Path(__file__).parents[1] / "results" / "scaling.json"
VIEWS, WIDTH, FLOAT = 2, 128, 4
ENCODERS = {"resnet18, 32 px": (1.11e9, 11.2e6), "resnet50, 224 px": (8.2e9, 23.5e6)}
"""Operations of a forward pass of an image, and parameters."""
STATE = 3
"""Numbers held per parameter: weight, gradient, momentum."""
CARD = {"encoder": 200e12, "loss": 50e12, "network": 25e9}
"""Assumed rates of one rank: bf16 products in convolutions, float32 products, bytes per second to the others."""


def paper(world: int, batch: int, encoder: str, products: int = 6) -> dict[str, float]:
    """Estimate one rank's step. products: 4 if tiles of the symmetric half suffice (CPU), 6 in the kernels."""
    forward, parameters = ENCODERS[encoder]
    n, others = VIEWS * batch, (world - 1) / world
    rows = n * WIDTH * FLOAT
    estimate = {
        "encoder_operations": VIEWS * batch / world * forward * 4,  # forward, forward again and backward (2)
        "loss_operations": products * n * n * WIDTH / world,
        "gathered_bytes": 3 * others * rows + 2 * others * n * FLOAT,  # rows once; sums and gradients are added up
        "own_bytes": world // 2 * 3 * (rows + n * FLOAT) / world,  # as in benchmarks/ring.py
        "gradient_bytes": 2 * others * parameters * FLOAT,
        "gathered_held_bytes": COPIES * rows,
        "own_held_bytes": OWN_COPIES * rows / world if world > 1 else COPIES * rows,
        "state_bytes": STATE * parameters * FLOAT,
        "sharded_state_bytes": STATE * parameters * FLOAT / world,
    }
    estimate["encoder_seconds"] = estimate["encoder_operations"] / CARD["encoder"]
    estimate["loss_seconds"] = estimate["loss_operations"] / CARD["loss"]
    network = {
        way: (estimate[f"{way}_bytes"] + estimate["gradient_bytes"]) / CARD["network"] for way in ("gathered", "own")
    }
    return estimate | {f"{way}_network_seconds": seconds for way, seconds in network.items()}


def even(encoder: str) -> float:
    """Return the rows at which the loss needs as many operations as the encoder, on any number of ranks."""
    return ENCODERS[encoder][0] * 4 / (6 * WIDTH)


def case(rank: int, world: int, n: int, repeat: int, folder: str) -> None:
    """Run one rank of a small case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    sent, seconds = [0], []

    def add(x: torch.Tensor) -> None:
        sent[0] += x.numel() * x.element_size()
        distributed.add_(x)

    z = torch.randn(VIEWS, n // VIEWS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for number in range(repeat + 1):
        dist.barrier()
        sent[0], z.grad, begin = 0, None, time.perf_counter()
        with logsumexp.using(mode="always", rank=rank, world=world, add=add):
            nt_xent(z, 0.1).backward()
        if number:
            seconds.append(time.perf_counter() - begin)
    if rank == 0:
        torch.save({"seconds": seconds, "added": sent[0]}, f"{folder}/figures")
    dist.destroy_process_group()


def small(world: int, n: int, repeat: int) -> dict[str, Any]:
    """Measure a small case."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.multiprocessing.start_processes(
            partial(case), args=(world, n, repeat, folder), nprocs=world, start_method="spawn"
        )
        figures = torch.load(f"{folder}/figures", weights_only=True)
    return {
        "ranks": world,
        "rows": n,
        "seconds": statistics.median(figures["seconds"]),
        "added_bytes": figures["added"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep-cases", action="store_true", help="compute the estimates again, measure nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.keep_cases:
        result = json.loads(args.out.read_text())
        cases, where = result["cases"], result["environment"]
    else:
        cases = [small(world, n, args.repeat) for n in args.rows for world in args.ranks]
        where = environment(torch.device("cpu"))
    for one in cases:
        alone = next(other for other in cases if other["rows"] == one["rows"] and other["ranks"] == 1)
        one["times_faster"] = alone["seconds"] / one["seconds"]
        one["operations"] = 4 * one["rows"] ** 2 * WIDTH / one["ranks"]
        one["added_on_paper"] = one["rows"] * (WIDTH + 1) * FLOAT
    sheet = [
        {"ranks": world, "batch": batch, "encoder": encoder} | paper(world, batch, encoder)
        for encoder in ENCODERS
        for world, batch in ((1, 4096), (8, 32768), (64, 65536), (1024, 65536), (1024, 2**20))
    ]
    result = {"cases": cases, "paper": sheet, "rates": CARD, "even_rows": {name: even(name) for name in ENCODERS}}
    write_json(args.out, result | {"environment": where})
    print_table(
        ("ranks", "rows", "ms", "times faster", "added MB", "on paper"),
        [
            (str(c["ranks"]), f"{c['rows']:,}", f"{1e3 * c['seconds']:.0f}", f"{c['times_faster']:.2f}",
             f"{c['added_bytes'] / 1e6:.2f}", f"{c['added_on_paper'] / 1e6:.2f}")
            for c in cases
        ],
        numbers=True,
    )  # fmt: skip
    print_table(
        ("encoder", "ranks", "batch", "encoder s", "loss s", "network s", "own rows", "rows GB", "own rows"),
        [
            (s["encoder"], f"{s['ranks']:,}", f"{s['batch']:,}", f"{s['encoder_seconds']:.3g}",
             f"{s['loss_seconds']:.3g}", f"{s['gathered_network_seconds']:.3g}", f"{s['own_network_seconds']:.3g}",
             f"{s['gathered_held_bytes'] / 1e9:.3g}", f"{s['own_held_bytes'] / 1e9:.3g}")
            for s in sheet
        ],
    )  # fmt: skip
    for name, n in result["even_rows"].items():
        say(f"{name}: the loss costs as much as the encoder at {n:,.0f} rows")


if __name__ == "__main__":
    main()
