"""Triton kernels on a GPU: python benchmarks/kernels.py [--rows 4096 16384 65536] [--dim 128] [--repeat 10]

Measure log-sum-exps and their gradients, forward and backward, of rows against themselves (NT-Xent's denominator) and
of rows against a queue without gradient (MoCo's; --queue rows). First the value and gradient of every implementation
are compared with float64; then a round makes one call of each. Reported are medians over the rounds, the memory of a
call in addition to the memory held before it, and the rate of the necessary products (4 N^2 D for rows against
themselves, 4 N M D against a queue). Writes results/kernels-gpu.json; ends with 1 if there is no CUDA or a result is
wrong.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import normalize

from inbatch.apps.console import print_error, print_table, say
from inbatch.nn import logsumexp, triton_logsumexp
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json

OUT = Path(__file__).parents[1] / "results" / "kernels-gpu.json"
TEMPERATURE = 0.1

WAYS: dict[str, dict[str, Any]] = {
    "kernels, float32": {"mode": "always", "products": "float32"},
    "kernels, tf32x3": {"mode": "always", "products": "tf32x3"},
    "kernels, bf16": {"mode": "always", "products": "bf16"},
    "torch's products, tiles": {"mode": "always"},
    "torch's products, whole matrix": {"mode": "never"},
}
"""Implementation -> arguments of inbatch.tiled."""
TOLERANCE = {"kernels, bf16": 1e-2}
"""Relative error in the norm that is allowed; 2e-5 otherwise: a few roundings of float32, magnified by 1 / T."""

Inputs = tuple[Tensor, Tensor | None, Tensor]
"""Rows, the queue if there is one, and the gradient of the log-sum-exps."""


def draw_inputs(n: int, queue: int, dim: int, device: torch.device) -> Inputs:
    """Draw unit rows around centres, so that a softmax is neither flat nor one-hot."""
    g = torch.Generator(device).manual_seed(0)
    centres = torch.randn(64, dim, generator=g, device=device)
    spots = torch.randint(0, 64, (n + queue,), generator=g, device=device)
    rows = normalize(centres[spots] + torch.randn(n + queue, dim, generator=g, device=device), dim=1)
    return rows[:n].clone(), rows[n:].clone() if queue else None, torch.rand(n, generator=g, device=device) / n


def compute(way: str, q: Tensor, k: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log-sum-exps and the gradient of the rows by one of WAYS."""
    q = q.detach().requires_grad_()
    plain = way.startswith("torch")
    with (
        patch.object(triton_logsumexp, "usable", lambda *_: False) if plain else logsumexp.using(),
        logsumexp.using(**WAYS[way]),
    ):
        lse = logsumexp.logsumexp(q, q if k is None else k, TEMPERATURE, exclude_self=k is None)
        lse.backward(gradient)
    assert q.grad is not None
    return lse.detach(), q.grad


def reference(q: Tensor, k: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same in float64, a block of rows at a time."""
    q, keys, gradient = q.double(), (q if k is None else k).double(), gradient.double()
    size = max(1, 2**26 // len(keys))

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for i in range(0, len(q), size):
            logits = q[i : i + size] @ keys.T / TEMPERATURE
            if k is None:
                logits.diagonal(i).fill_(-torch.inf)
            yield slice(i, i + size), logits

    lse = torch.cat([logits.logsumexp(1) for _, logits in blocks()])
    dq = torch.empty_like(q)
    for rows, logits in blocks():
        weights = gradient[rows, None] * (logits - lse[rows, None]).exp()
        if k is None:
            weights += gradient * (logits - lse).exp()
        dq[rows] = weights @ keys / TEMPERATURE
    return lse, dq


def off(computed: Tensor, expected: Tensor) -> float:
    """Return the relative error in the norm."""
    return float((computed.double() - expected).norm() / expected.norm())


def check(ways: Sequence[str], what: Inputs) -> dict[str, dict[str, Any]]:
    """Return the errors of every implementation against float64; out_of_memory if it needs too much."""
    expected = reference(*what)
    rows: dict[str, dict[str, Any]] = {}
    for way in ways:
        try:
            computed = compute(way, *what)
        except torch.OutOfMemoryError:
            rows[way] = {"out_of_memory": True}
            continue
        rows[way] = {"lse_error": off(computed[0], expected[0]), "gradient_error": off(computed[1], expected[1])}
        worst = max(rows[way].values())
        rows[way]["right"] = worst <= TOLERANCE.get(way, 2e-5)  # also false for NaN
    return rows


def seconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(what: Inputs, repeat: int) -> dict[str, dict[str, Any]]:
    """Measure errors, seconds and bytes of every implementation on the same rows."""
    rows = check(list(WAYS), what)
    ways = [way for way in WAYS if "out_of_memory" not in rows[way]]
    for way in ways:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute(way, *what)
        torch.cuda.synchronize()
        rows[way]["extra_bytes"] = torch.cuda.max_memory_allocated() - before
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way in ways:
            taken[way].append(seconds(lambda way=way: compute(way, *what)))  # type: ignore[misc]
    (n, dim), columns = what[0].shape, len(what[0] if what[1] is None else what[1])
    for way in ways:
        rows[way]["seconds"] = statistics.median(taken[way])
        rows[way]["tflops"] = 4 * n * columns * dim / rows[way]["seconds"] / 1e12
    return rows


def lines(rows: dict[str, dict[str, Any]]) -> Iterator[Sequence[str]]:
    """Yield the rows of one table."""
    whole = rows["torch's products, whole matrix"].get("seconds")
    for way, row in rows.items():
        if "out_of_memory" in row:
            yield way, "out of memory", "", "", "", "", ""
            continue
        ratio = f"{whole / row['seconds']:.2f}" if whole else ""
        errors = (f"{row['lse_error']:.1e}", f"{row['gradient_error']:.1e}{'' if row['right'] else ' WRONG'}")
        yield (
            way,
            f"{1e3 * row['seconds']:,.2f}",
            ratio,
            f"{row['tflops']:.1f}",
            f"{row['extra_bytes'] / 1e6:,.0f}",
            *errors,
        )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384, 65536], help="N, both views together")
    parser.add_argument("--queue", type=int, default=65536, help="M, rows of the queue")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=10, help="rounds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    if min(*args.rows, args.queue, args.dim, args.repeat) < 1:
        parser.error("--rows, --queue, --dim and --repeat are 1 or more")
    if not torch.cuda.is_available():
        print_error(
            "There is no CUDA device: these kernels are measured on a card. tests/nn/test_kernels.py tries them here."
        )
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    if not triton_logsumexp.usable(torch.empty(1, args.dim, device=device)):
        print_error(f"The kernels cannot be used: {torch.cuda.get_device_name(device)}, rows {args.dim} wide.")
        return 1
    settings = {name: value for name, value in vars(args).items() if name != "out"} | {"temperature": TEMPERATURE}
    result: dict[str, Any] = {"environment": environment(device), "settings": settings, "cases": {}}
    right = True
    for n in args.rows:
        for name, queue in (("rows meet themselves", 0), ("rows against a queue", args.queue)):
            rows = measure(draw_inputs(n, queue, args.dim, device), args.repeat)
            result["cases"].setdefault(name, {})[str(n)] = rows
            right &= all(row.get("right", True) for row in rows.values())
            say(f"{name}, N = {n:,}{f', M = {queue:,}' if queue else ''}, D = {args.dim}, forward and backward")
            headings = ("", "ms", "times whole", "TFLOP/s", "MB", "error of lse", "of gradient")
            print_table(headings, lines(rows), numbers=True)
            say("")
            write_json(args.out, result)
    say(f"Written to {args.out}")
    if not right:
        print_error("Some results are wrong: see the table.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
