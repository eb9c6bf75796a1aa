"""Losses over all pairs against plain versions, in one process and alternately: python benchmarks/pairs.py

Workloads, forward and backward in float32, rows of 128 numbers, one thread by default:

- nt_xent: inbatch, the literal equation, and lightly's NTXentLoss if it is installed; N rows of two views;
- sigmoid: inbatch, and open_clip's SigLipLoss as its formula (one rank): N rows in each of two views;
- weights: log-sum-exps of N rows without weights, with pairs of a group left out, and with a weight of 0.5.

Reported: the least wall time and the least processor time over the rounds, since other processes of the machine only
add to a time; processor time as a share of the fastest float32 product here (for the 4 N^2 D or 6 N^2 D operations
that are needed), measured in the same rounds; and the additional memory of one call, of a process of its own (Linux).
Values and gradients of all implementations of a workload must agree to 1e-4, or the benchmark fails.

Writes results/pairs.json; scripts/render_results.py writes its tables.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from inbatch.losses import nt_xent, pairwise_sigmoid
from inbatch.nn.cpu_matmul import fast_products
from inbatch.nn.logsumexp import SameGroup, logsumexp
from inbatch.runtime.environment import environment

OUT = Path(__file__).resolve().parents[1] / "results" / "pairs.json"
DIM = 128
SIZES = {"nt_xent": (512, 4096), "sigmoid": (512, 4096, 16384), "weights": (1024, 4096)}
OPERATIONS = {"nt_xent": 4, "sigmoid": 6, "weights": 4}
"""Multiples of N^2 D."""
Call = Callable[[], Tensor]


def views(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(n, DIM, generator=g)
    return [(centre + torch.randn(n, DIM, generator=g)).requires_grad_() for _ in range(2)]


def contrastive(n: int) -> dict[str, tuple[Call, list[Tensor]]]:
    def literal() -> Tensor:
        u = normalize(torch.cat(list(apart)), dim=1)
        return cross_entropy((u @ u.T / 0.1).fill_diagonal_(-math.inf), torch.arange(n).roll(n // 2))

    apart = views(n // 2)
    joined = torch.stack(views(n // 2)).detach().requires_grad_()
    calls: dict[str, tuple[Call, list[Tensor]]] = {
        "inbatch": (lambda: nt_xent(joined, 0.1), [joined]),
        "literal": (literal, apart),
    }
    if find_spec("lightly"):
        from lightly.loss import NTXentLoss

        criterion, own = NTXentLoss(0.1), views(n // 2)
        calls["lightly"] = (lambda: criterion(*own), own)
    return calls


def sigmoids(n: int) -> dict[str, tuple[Call, list[Tensor]]]:
    def parameters() -> tuple[Tensor, Tensor]:
        return torch.tensor(math.log(10)).requires_grad_(), torch.tensor(-10.0).requires_grad_()

    joined, (t, b) = torch.stack(views(n)).detach().requires_grad_(), parameters()
    apart, (t2, b2) = views(n), parameters()

    def plain() -> Tensor:
        first, second = (normalize(x, dim=1) for x in apart)
        logits = t2.exp() * first @ second.T
        logits += b2
        labels = -torch.ones((n, n))
        labels = 2 * torch.eye(n) + labels
        return -logsigmoid(labels * logits).sum() / n

    return {
        "inbatch": (lambda: pairwise_sigmoid(joined, t.exp(), b), [joined, t, b]),
        "open_clip's formula": (plain, [*apart, t2, b2]),
    }


def weighted(n: int) -> dict[str, tuple[Call, list[Tensor]]]:
    u, ids = normalize(torch.cat(views(n // 2)).detach(), dim=1).requires_grad_(), torch.arange(n) // 4
    kinds = {
        "no weights": None,
        "groups left out": SameGroup(ids, ids, 0.0),
        "groups by half": SameGroup(ids, ids, 0.5),
    }
    return {name: (lambda w=w: logsumexp(u, u, 0.1, True, w).mean(), [u]) for name, w in kinds.items()}


WORKLOADS = {"nt_xent": contrastive, "sigmoid": sigmoids, "weights": weighted}


def run(call: Call, leaves: list[Tensor]) -> tuple[float, float]:
    """Run forward and backward; return the value and the norm of the gradients."""
    for leaf in leaves:
        leaf.grad = None
    value = call()
    value.backward()
    return float(value.detach()), math.sqrt(sum(float(x.grad.double().square().sum()) for x in leaves))


def status(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def memory(workload: str, n: int, who: str) -> int | None:
    """Return the additional bytes of the first call in a new process, after one with 1,024 rows."""
    if sys.platform != "linux":
        return None
    words = [sys.executable, __file__, "--memory-of", workload, str(n), who]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def product() -> None:
    x = torch.ones(512, 512)
    with fast_products():
        for _ in range(10):
            torch.mm(x, x)


def measure(workload: str, n: int, seconds: float) -> dict[str, Any]:
    """Alternate the implementations of one size for some seconds, at least twice each."""
    calls = WORKLOADS[workload](n)
    answers = {who: run(*calls[who]) for who in calls}
    value, gradient = next(iter(answers.values()))
    for who, answer in answers.items():
        off = max(abs(answer[0] / value - 1), abs(answer[1] / gradient - 1))
        if workload != "weights" and off > 1e-4:
            raise SystemExit(f"{workload} of {n} rows: {who} and inbatch differ by {off:.1e}")
    turns: dict[str, Callable[[], object]] = {who: lambda c=c: run(*c) for who, c in calls.items()}
    turns["product"] = product
    wall, processor = (dict.fromkeys(turns, math.inf) for _ in range(2))
    begin, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - begin < seconds:
        for who in turns if rounds % 2 else reversed(turns):
            start, used = time.perf_counter(), time.process_time()
            turns[who]()
            used, start = time.process_time() - used, time.perf_counter() - start
            wall[who], processor[who] = min(wall[who], start), min(processor[who], used)
        rounds += 1
    peak = 10 * 2 * 512**3 / processor["product"]
    work = OPERATIONS[workload] * n**2 * DIM
    return {"rounds": rounds, "peak_flops": peak} | {
        who: {
            "seconds": wall[who], "processor_seconds": processor[who], "share": work / processor[who] / peak,
            "memory_bytes": memory(workload, n, who),
        }
        for who in calls
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows; by default those of the workload")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="per size")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        workload, n, who = args.memory_of
        run(*WORKLOADS[workload](1024)[who])
        call = WORKLOADS[workload](int(n))[who]
        before = status("VmRSS")
        run(*call)
        print(status("VmHWM") - before)
        return
    results: dict[str, Any] = {
        "environment": environment(torch.device("cpu")) | {"threads": args.threads}, "load": os.getloadavg()[0],
        "settings": {"dim": DIM, "seconds": args.seconds}, "workloads": {},
    }  # fmt: skip
    for workload in args.workloads:
        blocks = results["workloads"][workload] = {}
        for n in args.rows or SIZES[workload]:
            blocks[str(n)] = measure(workload, n, args.seconds)
            print(workload, n, json.dumps(blocks[str(n)], indent=1), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
