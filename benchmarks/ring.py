"""NT-Xent of gathered rows and of own rows that pass from rank to rank: python benchmarks/ring.py

For both ways, on processes of one thread each (gloo, one machine): the memory that a rank needs in addition to its own
rows, its time against one process, and the bytes that it sends, counted by a wrapper of its communication and compared
with the formulas, which are then evaluated for up to 1,024 ranks. Values and gradients are compared with one process.
The part "time" measures in turn, in the same processes: one process alone, both ways, and as much work for each process
that exchanges nothing. The last one is what the machine allows.
The part "statistics" counts the numbers that Barlow Twins and VICReg send, whose statistics are added up.
Writes results/ring.json.
"""

import argparse
import functools
import json
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inbatch.apps.console import print_table
from inbatch.methods.barlow import barlow_twins
from inbatch.methods.simclr import nt_xent
from inbatch.methods.vicreg import vicreg
from inbatch.nn import logsumexp
from inbatch.runtime import distributed, memory
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.runtime.ring import OwnRows

OUT = Path(__file__).parents[1] / "results" / "ring.json"
VIEWS, WIDTH, FLOAT = 2, 128, 4
WAYS = ("gathered", "own rows")
ALONE, SEPARATE = "one process", "separate"
CPU = torch.device("cpu")
STATISTICS: dict[str, tuple[Callable[[Tensor], Any], Callable[[int], int]]] = {
    "barlow twins": (barlow_twins, lambda d: d**2 + 8 * d),
    "vicreg": (vicreg, lambda d: 2 * d**2 + 6 * d + 1),
}
"""Losses of two views, and the numbers that are added over ranks for D features, forward and backward."""


class Counted(OwnRows):
    """Communication between ranks that counts the bytes which this rank sends.

    A sum over ranks sends a tensor 2 (W - 1) / W times, a gather own rows W - 1 times, as rings of collectives do.
    """

    def __init__(self) -> None:
        super().__init__(equal=True)
        self.sent = 0.0

    def add(self, x: Tensor) -> None:
        self.sent += 2 * (self.world - 1) / self.world * x.numel() * x.element_size()
        super().add(x)

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        self.sent += (self.world - 1) * x.numel() * x.element_size()
        return super().gather(x, sizes)

    def exchange(self, tensors: Sequence[Tensor], offset: int, rows: int) -> Callable[[], list[Tensor]]:
        self.sent += sum(x.numel() * x.element_size() for x in tensors)
        return super().exchange(tensors, offset, rows)


def paper(way: str, world: int, rows: int) -> dict[str, float]:
    """Return the bytes that a rank sends, and the rows that it holds, by formula."""
    own = rows / world
    if way == "gathered":  # rows; log-sum-exps and gradients, which are added up
        sent = (world - 1) * own * WIDTH + 2 * (world - 1) / world * rows * (WIDTH + 1)
    else:  # rows and sums; rows, log-sum-exps, their gradients, and the gradients that come home; the loss
        sent = world // 2 * own * 3 * (WIDTH + 1) + 2 * (world - 1) / world
    return {"sent_bytes": FLOAT * sent, "rows": rows if way == "gathered" else own}


def once(way: str, own: Tensor, peers: Counted) -> tuple[Tensor, Tensor]:
    """Return the loss of the whole batch, and the gradient of own rows."""
    world = peers.world
    if way in (ALONE, SEPARATE):
        leaf = own.detach().requires_grad_()
        with logsumexp.using(rank=0, world=1, add=lambda x: None):
            loss = nt_xent(leaf, 0.1)
            loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad
    if way == "gathered" or world == 1:
        whole = peers.gather(own.movedim(1, 0), [own.shape[1]] * world).movedim(0, 1) if world > 1 else own
        leaf = whole.detach().requires_grad_()
        with logsumexp.using(rank=peers.rank, world=world, add=peers.add if world > 1 else distributed.add_):
            loss = nt_xent(leaf, 0.1)
            loss.backward()
        assert leaf.grad is not None
        return loss.detach(), distributed.local_shard(leaf.grad, 1)
    leaf = own.detach().requires_grad_()
    with logsumexp.using(peers=peers):
        loss = nt_xent(leaf, 0.1)
        loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad / world


def case(rank: int, world: int, rows: int, repeat: int, ways: Sequence[str], folder: str) -> None:
    """Run one rank: the ways in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    own = samples(rank, rows // VIEWS // world)
    inputs = dict.fromkeys(WAYS, own)
    if ALONE in ways:
        inputs[ALONE] = torch.cat([samples(r, own.shape[1]) for r in range(world)], 1)
        # Pairs of rows grow with the square of rows: these have one W-th of all pairs.
        inputs[SEPARATE] = samples(rank, round(own.shape[1] * world**0.5))
    figures: dict[str, dict[str, Any]] = {way: {"seconds": [], "processor": [], "bytes": []} for way in ways}
    for number in range(repeat + 1):
        for way in ways:
            peers = Counted()
            memory.release_memory(CPU)
            dist.barrier()
            if way == ALONE and rank:
                continue  # to the next barrier
            before = memory.used_bytes(CPU) or 0
            memory.forget_peak(CPU)
            begin = time.perf_counter(), time.process_time()
            loss, gradient = once(way, inputs[way], peers)
            spent = time.perf_counter() - begin[0], time.process_time() - begin[1]
            mine = figures[way]
            if number or not repeat:
                mine["seconds"].append(spent[0])
                mine["processor"].append(spent[1])
                mine["bytes"].append(memory.peak(CPU) - before)
            mine |= {"sent": peers.sent, "loss": loss, "gradient": gradient}
    torch.save(figures, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def samples(seed: int, count: int) -> Tensor:
    """Return rows of two views."""
    return torch.randn(VIEWS, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def statistics_case(rank: int, world: int, folder: str) -> None:
    """Run one rank: losses of statistics in float64, their gradients, and the numbers that this rank sends."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    figures = {}
    for name, (loss, _) in STATISTICS.items():
        peers, leaf = Counted(), statistics_rows(rank).requires_grad_()
        with logsumexp.using(peers=peers):
            value = loss(leaf)["loss"]
            value.backward()
        assert leaf.grad is not None
        figures[name] = {
            "sent": peers.sent / leaf.element_size(),
            "loss": value.detach(),
            "gradient": leaf.grad / world,
        }
    torch.save(figures, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def statistics_rows(rank: int) -> Tensor:
    """Return a rank's 256 samples of two views."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(VIEWS, 256, WIDTH, generator=generator, dtype=torch.float64)


def measure_statistics(world: int) -> list[dict[str, Any]]:
    """Return what a rank sends for each loss of statistics, and how far loss and gradient are from one process."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.multiprocessing.start_processes(statistics_case, args=(world, folder), nprocs=world)
        ranks = [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(world)]
    results = []
    for name, (loss, numbers) in STATISTICS.items():
        leaf = torch.cat([statistics_rows(rank) for rank in range(world)], 1).requires_grad_()
        value = loss(leaf)["loss"]
        value.backward()
        assert leaf.grad is not None
        gradient = torch.cat([rank[name]["gradient"] for rank in ranks], 1)
        results.append(
            {
                "ranks": world,
                "loss": name,
                "width": WIDTH,
                "sent": max(rank[name]["sent"] for rank in ranks),
                "sent_on_paper": 2 * (world - 1) / world * numbers(WIDTH),
                "loss_differs": abs(ranks[0][name]["loss"] / value.detach() - 1).item(),
                "gradient_differs": ((gradient - leaf.grad).norm() / leaf.grad.norm()).item(),
            }
        )
    return results


def measure(world: int, rows: int, repeat: int, ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """Return both ways on some ranks; every figure is the largest of the ranks, the median of the repetitions."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.multiprocessing.start_processes(case, args=(world, rows, repeat, ways, folder), nprocs=world)
        ranks = [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(world)]
    result: dict[str, Any] = {"ranks": world, "rows": rows}
    for way in ways:
        mine = [rank[way] for rank in ranks if rank[way]["seconds"]]
        worst = {key: max(statistics.median(one[key]) for one in mine) for key in ("seconds", "processor", "bytes")}
        result[way] = worst | {"sent": max(one["sent"] for one in mine), "loss": mine[0]["loss"].item()}
        if way in WAYS:
            result[way]["sent_on_paper"] = paper(way, world, rows)["sent_bytes"]
    if {*WAYS} <= {*ways}:
        gradients = [torch.cat([rank[way]["gradient"] for rank in ranks], 1) for way in WAYS]
        result["gradients_differ"] = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--memory", type=int, nargs=2, default=[4, 65536], help="ranks and rows of the memory case")
    parser.add_argument("--time", type=int, nargs=2, default=[2, 16384], help="ranks and rows of the time case")
    parser.add_argument("--volume", type=int, nargs="+", default=[2, 3, 4], help="ranks of the cases of 3,072 rows")
    kinds = ["statistics", "volume", "memory", "time"]
    parser.add_argument("--parts", nargs="+", choices=kinds, help="default: all; others are kept")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of the memory case; the other is kept")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    parts = args.parts or kinds
    figures: dict[str, Any] = json.loads(args.out.read_text()) if args.parts and args.out.exists() else {}
    figures["paper"] = [
        {"ranks": world, "rows": n} | {way: paper(way, world, n) for way in WAYS}
        for world, n in ((4, 65536), (64, 65536), (1024, 65536), (1024, 2**21))
    ]
    cases: dict[str, Callable[[], Any]] = {
        "statistics": lambda: [case for world in args.volume for case in measure_statistics(world)],
        "volume": lambda: [measure(world, 3072, 1) for world in args.volume],
        # Each way in processes of its own: the second one would find memory that the first one has freed.
        "memory": lambda: functools.reduce(
            operator.or_, (measure(*args.memory, repeat=0, ways=[way]) for way in args.ways), figures.get("memory", {})
        ),
        "time": lambda: measure(*args.time, args.repeat, (ALONE, *WAYS, SEPARATE)),
    }
    for part in parts:
        figures[part] = cases[part]()
        figures.setdefault("load", {})[part] = os.getloadavg()
        figures["ratios"] = ratios(figures)
        write_json(args.out, figures | {"environment": environment(CPU)})
    show(figures, parts)


def show(figures: dict[str, Any], parts: Sequence[str]) -> None:
    """Print the results of some parts."""
    if "statistics" in parts:
        print_table(
            ("ranks", "loss", "numbers sent", "on paper", "loss differs", "gradient differs"),
            [
                (str(c["ranks"]), c["loss"], f"{c['sent']:,.0f}", f"{c['sent_on_paper']:,.0f}",
                 f"{c['loss_differs']:.1e}", f"{c['gradient_differs']:.1e}")
                for c in figures["statistics"]
            ],
            numbers=True,
        )  # fmt: skip
    results = [figures[part] for part in parts if part != "statistics"]
    cases = [c for result in results for c in (result if isinstance(result, list) else [result])]
    if not cases:
        return
    print_table(
        ("ranks", "rows", "way", "ms", "processor ms", "extra MB", "sent MB", "on paper"),
        [
            (str(c["ranks"]), f"{c['rows']:,}", way, f"{1e3 * c[way]['seconds']:.0f}",
             f"{1e3 * c[way]['processor']:.0f}", f"{c[way]['bytes'] / 1e6:.1f}", f"{c[way]['sent'] / 1e6:.3f}",
             f"{c[way]['sent_on_paper'] / 1e6:.3f}" if way in WAYS else "")
            for c in cases for way in (ALONE, *WAYS, SEPARATE) if way in c
        ],
        numbers=True,
    )  # fmt: skip
    print_table(("ratio", ""), [(name, f"{x:.3f}") for name, x in figures["ratios"].items()], numbers=True)


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Return the extra memory of own rows over that of gathered ones, and times of a rank over those of one process."""
    result = {}
    if "memory" in figures:
        result["memory"] = figures["memory"]["own rows"]["bytes"] / figures["memory"]["gathered"]["bytes"]
    if "time" in figures:
        timed, kinds = figures["time"], ("seconds", "processor")
        for way in (*WAYS, SEPARATE):
            result |= {f"{kind}, {way}": timed[way][kind] / timed[ALONE][kind] for kind in kinds}
    return result


if __name__ == "__main__":
    main()
