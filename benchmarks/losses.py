"""Cost of losses of a whole batch, compared with literal versions and other libraries: python benchmarks/losses.py

Measure forward and backward of every loss, with the gradient of the rows, in float32 on the CPU. N counts rows, both
views of a batch together (for losses with a queue: its queries). Every implementation runs in its own process; for
small N all implementations of a loss run in alternation, so that changes of the machine's speed affect all equally.
Reported:

- the median over the rounds of an implementation's median within a round, once with the default allocator and once with
  one that keeps freed memory (glibc's mallopt), since allocation is a part of the cost of a large matrix;
- extra memory: the highest resident set during one call minus that before it (Linux only: /proc/self/clear_refs);
- the share of the machine's float32 peak: the products that the loss requires (4 N^2 D for rows against themselves,
  4 N M D if keys have no gradient, 2 N M D to find a neighbour), relative to the fastest product of torch here;
- whether all implementations of a loss agree in value and in the norm of the gradient, to 1e-4 (bf16: 1e-2).

An implementation that needs more memory than --memory allows is reported as "out of memory", one that takes longer than
--limit for one call as too slow. Other libraries are imported from --peers-python (pip install lightly
pytorch-metric-learning; pip install --no-deps solo-learn, of which one file is read); a missing one is reported as
"not installed".

Writes one file per number of threads: results/losses-1thread.json. --plot draws docs/losses.png from them, and
scripts/render_results.py the tables.
"""

# Only the standard library is imported here: this file also runs in the Python of the other libraries.
import argparse
import ctypes
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "losses.json"
PLOT = ROOT / "docs" / "losses.png"

CHILD_PROCESSES = ROOT / "src" / "inbatch" / "runtime" / "child_processes.py"
spec = importlib.util.spec_from_file_location("child_processes", CHILD_PROCESSES)
child_processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child_processes)

OURS = {
    "inbatch": {"mode": "auto"},
    "inbatch, bf16 products": {"mode": "auto", "products": "bf16"},
    "inbatch, tiles": {"mode": "always"},
    "inbatch, whole matrix": {"mode": "never"},
}
"""Implementation -> arguments of inbatch.tiled."""
PEERS = {"lightly": "lightly", "solo-learn": "solo", "pytorch-metric-learning": "pytorch_metric_learning"}
"""Library -> its package."""
TEMPERATURE = 0.1
CLASSES = {"supcon, 10 classes": 10, "supcon, 1000 classes": 1000}


@dataclass(frozen=True)
class Loss:
    """One loss: its implementations, floating-point operations by rows, queue and width, and whether it has a queue."""

    who: tuple[str, ...]
    operations: Callable[[int, int, int], int]
    queue: bool = False


def _symmetric(rows: int, queue: int, dim: int) -> int:
    return 4 * rows**2 * dim


def _one_way(rows: int, queue: int, dim: int) -> int:
    return 4 * (rows // 2) ** 2 * dim


BOTH = ("inbatch", "literal")
LOSSES = {
    "nt_xent": Loss((*OURS, "literal", *PEERS), _symmetric),
    "supcon, 10 classes": Loss((*BOTH, "pytorch-metric-learning"), _symmetric),
    "supcon, 1000 classes": Loss((*BOTH, "pytorch-metric-learning"), _symmetric),
    "info_nce": Loss((*BOTH, "lightly"), lambda rows, queue, dim: 4 * rows * queue * dim, queue=True),
    "neighbours": Loss(BOTH, lambda rows, queue, dim: 2 * rows * queue * dim, queue=True),
    "dcl": Loss((*BOTH, "lightly"), _symmetric),
    "nnclr": Loss(BOTH, _one_way),
    "nnclr, both ways": Loss((*BOTH, "lightly"), _symmetric),
    "ctr": Loss(BOTH, _one_way),
    "cc, instances": Loss(BOTH, _symmetric),
}
ALLOCATORS = {"ships": "as it ships", "kept": "memory kept"}
SMALL = 4096**2
"""Largest number of pairs for which implementations alternate; above it, each is measured once and alone."""
PATIENCE = 30.0
"""Seconds: a longer call is not repeated."""
BRIEF = 2.0
"""Seconds: an implementation with a longer call runs once instead of --repeat times."""


# In the process of an implementation


def ours(loss: str, z: Any, queue: Any) -> Callable[[], Any]:
    """Return inbatch's loss of two views: (2, n, d), or a list of them if the loss takes them separately."""
    import torch

    from inbatch.losses import ctr, dcl, info_nce, nnclr, nt_xent, supcon
    from inbatch.methods.cc import contrast
    from inbatch.methods.nnclr import neighbours

    t, filled = TEMPERATURE, torch.tensor(len(queue))
    if loss in CLASSES:
        label = torch.arange(len(z[0])) % CLASSES[loss]
        return lambda: supcon(z, label, t, base_temperature=t)
    return {
        "nt_xent": lambda: nt_xent(z, t),
        "info_nce": lambda: info_nce(z[0], z[1], queue, t),
        "neighbours": lambda: (neighbours(z[0], queue, filled) * z[0]).sum(-1).mean(),
        "dcl": lambda: dcl(z, t),
        "nnclr": lambda: nnclr(z[0], z[1], t),
        "nnclr, both ways": lambda: nnclr(z[0], z[1], t, "nt_xent"),
        "ctr": lambda: ctr(z[0], z[1], t),
        "cc, instances": lambda: contrast(z, t),
    }[loss]


def literal(loss: str, z: Any, queue: Any) -> Callable[[], Any]:
    """Return the equation as written, with every matrix in memory."""
    import torch
    from torch.nn import functional as F

    n, t = len(z[0]), TEMPERATURE
    label = (torch.arange(n) % CLASSES.get(loss, n)).repeat(2)

    def itself_left_out(x: Any, y: Any) -> Any:
        return (x @ y.T / t).fill_diagonal_(-math.inf)

    def nt_xent(q: Any, k: Any) -> Any:
        u = torch.cat([q, k])
        return F.cross_entropy(itself_left_out(u, u), torch.arange(2 * n).roll(n))

    def supcon(q: Any, k: Any) -> Any:
        u = torch.cat([q, k])
        positive = (label[:, None] == label).fill_diagonal_(False)
        log = itself_left_out(u, u).log_softmax(1)
        return -(log.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()

    def info_nce(q: Any, k: Any) -> Any:
        logits = torch.cat([(q * k.detach()).sum(1, keepdim=True), q @ queue.T], 1) / t
        return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))

    def dcl(q: Any, k: Any) -> Any:
        pairs = ((q, k), (k, q))
        others = (torch.cat([itself_left_out(x, x), itself_left_out(x, y)], 1).logsumexp(1) for x, y in pairs)
        return sum(other.mean() for other in others) / 2 - (q * k).sum(1).mean() / t

    def one_way(q: Any, k: Any) -> Any:
        return F.cross_entropy(q @ k.T / t, torch.arange(n))

    equation = {
        "nt_xent": nt_xent,
        "cc, instances": nt_xent,
        **dict.fromkeys(CLASSES, supcon),
        "info_nce": info_nce,
        "dcl": dcl,
        "nnclr": lambda q, k: one_way(q.detach(), k),
        "nnclr, both ways": lambda q, k: nt_xent(q.detach(), k),
        "ctr": lambda q, k: 2 * t * one_way(q, k.detach()),
    }
    if loss == "neighbours":
        return lambda: (queue[(F.normalize(z[0].detach(), dim=1) @ queue.T).argmax(1)] * z[0]).sum(-1).mean()
    return lambda: equation[loss](*(F.normalize(view, dim=1) for view in z))


def lightly(loss: str, z: Any, queue: Any) -> Callable[[], Any]:
    from lightly.loss import DCLLoss, NTXentLoss

    if loss == "info_nce":
        criterion = NTXentLoss(TEMPERATURE, memory_bank_size=tuple(queue.shape))
        criterion.memory_bank.bank = queue.clone()
        return lambda: criterion(z[0], z[1].detach())
    criterion = DCLLoss(TEMPERATURE) if loss == "dcl" else NTXentLoss(TEMPERATURE)
    if loss == "nnclr, both ways":
        return lambda: criterion(z[0].detach(), z[1])
    return lambda: criterion(z[0], z[1])


def solo_learn(loss: str, z: Any, queue: Any) -> Callable[[], Any]:
    """Return the loss from its file alone: the package imports a framework that cannot be installed with this torch."""
    import torch

    (folder,) = importlib.util.find_spec(PEERS["solo-learn"]).submodule_search_locations
    file = Path(folder) / "losses" / "simclr.py"
    spec = importlib.util.spec_from_file_location("solo_losses_simclr", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    criterion = module.simclr_loss_func
    if "indexes" in criterion.__code__.co_varnames:  # from 1.0.4 on: rows of all views, and the sample of each
        indexes = torch.arange(len(z[0])).repeat(2)
        return lambda: criterion(z.flatten(0, 1), indexes, TEMPERATURE)
    return lambda: criterion(z[0], z[1], TEMPERATURE)


def metric_learning(loss: str, z: Any, queue: Any) -> Callable[[], Any]:
    import torch
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

    label, criterion = torch.arange(len(z[0])), (SupConLoss if loss in CLASSES else NTXentLoss)(TEMPERATURE)
    label = (label % CLASSES.get(loss, len(label))).repeat(2)
    return lambda: criterion(z.flatten(0, 1), label)


MAKERS = {
    "literal": literal,
    "lightly": lightly,
    "solo-learn": solo_learn,
    "pytorch-metric-learning": metric_learning,
}
MAKERS |= dict.fromkeys(OURS, ours)


class Measured:
    """One implementation of a loss on some rows: its calls, their value and gradient, their time and memory."""

    def __init__(self, loss: str, who: str, rows: int, queue: int, dim: int) -> None:
        import torch
        from torch.nn import functional as F

        g = torch.Generator().manual_seed(0)
        n = rows if LOSSES[loss].queue else rows // 2
        z = torch.randn(2, n, dim, generator=g) + torch.randn(n, dim, generator=g)
        self.leaves = [view.clone().requires_grad_() for view in z]
        # The input is already in the form that the implementation takes, so that no conversion is measured.
        apart = who in ("lightly", "solo-learn") or loss in (
            "info_nce",
            "neighbours",
            "nnclr",
            "nnclr, both ways",
            "ctr",
        )
        if not apart:
            self.leaves = [z.requires_grad_()]
        inputs = self.leaves if apart else z
        keys = F.normalize(torch.randn(queue if LOSSES[loss].queue else 0, dim, generator=g), dim=1)
        self.loss, self.plan, self.value = MAKERS[who](loss, inputs, keys), OURS.get(who), math.nan

    def call(self) -> None:
        """Run forward and backward."""
        for leaf in self.leaves:
            leaf.grad = None
        with self._planned():
            value = self.loss()
            value.backward()
        self.value = value.detach()

    def _planned(self) -> Any:
        if self.plan is None:
            return nullcontext()
        from inbatch.nn import logsumexp

        return logsumexp.using(**self.plan)

    def figures(self) -> dict[str, float]:
        """Return the value and the norm of the gradient of the last call."""
        squares = (float(leaf.grad.double().square().sum()) for leaf in self.leaves if leaf.grad is not None)
        return {"value": float(self.value), "gradient": math.sqrt(sum(squares))}

    def memory(self) -> int | None:
        """Return the additional bytes of a call; None if the system does not report them."""
        for leaf in self.leaves:
            leaf.grad = None
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # freed memory must not count as held
        try:
            Path("/proc/self/clear_refs").write_text("5")  # reset the highest resident set
        except OSError:
            self.call()
            return None
        before = _status("VmRSS")
        self.call()
        return _status("VmHWM") - before


def _status(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def keep_freed_memory() -> None:
    """Make glibc serve large blocks from the heap and keep freed memory. Raises OSError without glibc."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        raise OSError("no glibc") from None
    for parameter, setting in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
        if not mallopt(parameter, setting):
            raise OSError("mallopt refused")


def within(seconds: int, call: Callable[[], Any]) -> Any:
    """Run the call; after the limit the alarm ends this process, even within a product."""
    if not hasattr(signal, "alarm"):
        return call()
    signal.alarm(seconds)
    try:
        return call()
    finally:
        signal.alarm(0)


def serve(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Measure one implementation: value and memory of a call, then, per line on stdin, the seconds of some calls."""
    import torch

    torch.set_num_threads(job["threads"])
    size, limit = {key: job[key] for key in ("loss", "who", "queue", "dim")}, job["limit"]
    cubic = job["who"] == "pytorch-metric-learning" and job["loss"] not in CLASSES
    few = min(job["rows"], 128 if cubic else 256 if LOSSES[job["loss"]].queue else 4096)
    within(limit, Measured(rows=few, **size).call)  # one-time costs: threads, compiled products, pages of libraries
    measured = Measured(rows=job["rows"], **size)
    begin = time.perf_counter()
    extra = within(limit, measured.memory)
    first = time.perf_counter() - begin
    send({"versions": versions(job["who"]), "first": first, "memory_bytes": extra} | measured.figures())
    for _ in sys.stdin:
        if first < 0.1:
            measured.call()  # after a pause caches are cold and clocks are low
        spent: list[float] = []
        while not spent or (sum(spent) < 0.3 and len(spent) < 100):
            begin = time.perf_counter()
            within(limit, measured.call)
            spent.append(time.perf_counter() - begin)
        send({"seconds": spent})


def versions(who: str) -> dict[str, str]:
    """Return the versions of torch and of the library."""
    installed = {}
    for name in ("torch", who):
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def ceiling(threads: int) -> dict[str, float]:
    """Return the GFLOP/s of float32 products such as the losses use, by torch and by oneDNN, and the largest.

    oneDNN's rate counts if it is true float32: its error against float64 is at most 1e-5 of the largest entry.
    """
    import torch

    torch.set_num_threads(threads)
    result: dict[str, float] = {}
    for name in ("plain", "onednn"):
        if name == "onednn":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # selects oneDNN; it need not round
        rates, errors = [], []
        for n, k, m in ((1024, 128, 1024), (1024, 1024, 128), (512, 128, 512), (4096, 128, 4096), (4096, 4096, 128)):
            a, b, c = torch.randn(n, k), torch.randn(k, m), torch.empty(n, m)
            torch.mm(a, b, out=c)
            exact = a.double() @ b.double()
            errors.append(float((c - exact).abs().max() / exact.abs().max()))
            spent: list[float] = []
            while len(spent) < 5 or sum(spent) < 0.15:
                begin = time.perf_counter()
                torch.mm(a, b, out=c)
                spent.append(time.perf_counter() - begin)
            rates.append(2 * n * k * m / min(spent) / 1e9)
        result |= {name: max(rates), f"{name}_error": max(errors)}
    result["gflops"] = max(result["plain"], result["onednn"] if result["onednn_error"] <= 1e-5 else 0)
    return result


def one(job: dict[str, Any]) -> None:
    """Run one measuring process: every answer is a line of JSON on stdout, separate from the output of libraries."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    if "ceiling" in job:
        return send(ceiling(job["threads"]))
    if importlib.util.find_spec(PEERS.get(job["who"], "json")) is None:
        return send({"failed": "not installed"})
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (job["memory"], job["memory"]))
    try:
        if job["allocator"] == "kept":
            keep_freed_memory()
        serve(job, send)
    except (ImportError, OSError) as error:
        send({"failed": str(error)})
    except (RuntimeError, MemoryError) as error:
        asked = re.search(r"tried to allocate (\d+) bytes", str(error))
        if not asked and not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        failed = {"failed": "out of memory", "versions": versions(job["who"])}
        send(failed | ({"asked_bytes": int(asked[1])} if asked else {}))


# In the main process


@dataclass
class Implementation:
    """Handle of a process that computes a loss, used by the main process to control it."""

    job: dict[str, Any]
    python: str
    row: dict[str, Any] = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)

    def start(self) -> "Implementation":
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.job["threads"]))
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in end()
        self.process = child_processes.start(
            [self.python, __file__, "--one", json.dumps(self.job)], env=os.environ | threads,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        return self

    def warm_up(self) -> None:
        """Wait until it is ready or has failed."""
        self.row = self._answer()

    def run_round(self) -> None:
        """Run one round of calls."""
        if "failed" in self.row:
            return
        with suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        answer = self._answer()
        if "failed" in answer:
            self.row = answer
        else:
            self.rounds.append(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        if hasattr(signal, "SIGALRM") and code == -signal.SIGALRM:
            return {"failed": f"over {self.job['limit']} s"}
        if hasattr(signal, "SIGKILL") and code == -signal.SIGKILL:
            return {"failed": "out of memory"}  # the operating system's limit
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [f"ended with {code}"]
        return {"failed": lines[-1]}

    def end(self) -> dict[str, Any]:
        """End the process and return its results."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()
        if "failed" in self.row:
            return self.row
        rounds = [median(spent) for spent in self.rounds] or [self.row["first"]]
        best = min((min(spent) for spent in self.rounds), default=self.row["first"])
        calls = sum(map(len, self.rounds)) or 1
        return {"seconds": median(rounds), "best": best, "rounds": rounds, "calls": calls} | {
            key: value for key, value in self.row.items() if key != "first"
        }


def pairs(loss: str, rows: int, queue: int) -> int:
    """Return the products of two rows; a literal version stores some matrices of this size."""
    return rows * (queue if LOSSES[loss].queue else rows)


Block = dict[str, dict[str, dict[str, Any]]]
"""One loss and one N: implementation -> allocator -> result."""


def measure(loss: str, rows: int, threads: int, args: argparse.Namespace) -> Block:
    """Measure all implementations of a loss at one N: in alternation if it is small, else one after another."""
    held = pairs(loss, rows, args.queue)
    shared = {"loss": loss, "rows": rows, "threads": threads, "memory": args.memory_bytes}
    shared |= {key: getattr(args, key) for key in ("queue", "dim", "limit")}
    implementations = [
        Implementation(
            shared | {"who": who, "allocator": allocator}, args.peers_python if who in PEERS else sys.executable
        )
        for allocator in args.allocators for who in LOSSES[loss].who if who in args.who
        if who != "inbatch, tiles" or held <= SMALL  # with more pairs "inbatch" uses tiles itself
    ]  # fmt: skip
    block: Block = {}

    def end(implementation: Implementation) -> None:
        block.setdefault(implementation.job["who"], {})[implementation.job["allocator"]] = implementation.end()

    if held <= SMALL:
        started = [implementation.start() for implementation in implementations]
        for implementation in started:
            implementation.warm_up()
        for _ in range(args.repeat):
            for implementation in started:
                if not implementation.rounds or median(implementation.rounds[0]) < BRIEF:
                    implementation.run_round()
        for implementation in started:
            end(implementation)
        return block
    for implementation in implementations:
        if sys.platform != "linux" and implementation.job["who"] not in OURS and 12 * held > args.memory_bytes:
            # No memory limit applies here: every implementation holds at least three matrices.
            block.setdefault(implementation.job["who"], {})[implementation.job["allocator"]] = {
                "failed": "not started: too large"
            }
            continue
        implementation.start().warm_up()
        if implementation.row.get("first", math.inf) < PATIENCE:
            implementation.run_round()
        end(implementation)
    return block


def judge(block: Block) -> None:
    """Compare every implementation with the literal version, or with inbatch if that did not run."""
    ran = {who: row for who, by in block.items() for row in by.values() if "seconds" in row}
    reference = next((ran[who] for who in ("literal", "inbatch") if who in ran), None)
    for who, by in block.items():
        for row in by.values():
            if reference is not None and "seconds" in row:
                off = [abs(row[key] - reference[key]) / abs(reference[key]) for key in ("value", "gradient")]
                row["off"] = max(off)
                row["agrees"] = row["off"] <= (1e-2 if "bf16" in who else 1e-4)


def shares(result: dict[str, Any]) -> None:
    """Add every time as a share of the highest rate that products have reached."""
    best, settings = max(one["gflops"] for one in result["ceilings"]), result["settings"]
    for loss, blocks in result["losses"].items():
        for rows, block in blocks.items():
            work = LOSSES[loss].operations(int(rows), settings["queue"], settings["dim"])
            for row in (row for by in block.values() for row in by.values() if "seconds" in row):
                row["share"] = work / row["seconds"] / 1e9 / best


# Tables and figures

MISSING = {"failed": ""}


def milliseconds(row: dict[str, Any]) -> str:
    """Return the time, or the reason why it is missing."""
    return f"{1e3 * row['seconds']:,.{0 if row['seconds'] >= 0.1 else 1}f}" if "seconds" in row else row["failed"]


def megabytes(row: dict[str, Any]) -> str:
    return f"{row['memory_bytes'] / 1e6:,.0f}" if row.get("memory_bytes") is not None else ""


def ratio(other: dict[str, Any], row: dict[str, Any], key: str) -> str:
    """Return how many times more the other needs, or the reason why it has no number."""
    if not row.get(key):
        return ""
    return f"{other[key] / row[key]:.1f}" if other.get(key) else other.get("failed", "")


def peer(block: Block) -> str:
    """Return the baseline of the ratios: another library if measured, else the literal version."""
    measured = (w for w in PEERS if any(row.get("failed") != "not installed" for row in block.get(w, {}).values()))
    return next(measured, "literal")


DETAILS = ("N", "who", "ms", "other / it", "ms, memory kept", "other / it", "MB", "other / it", "of the ceiling", "")


def details(rows: int, block: Block) -> Iterator[Sequence[str]]:
    """Yield a row per implementation at one N, and how many times more the baseline needs."""
    other = block.get(peer(block), {})
    for who, by in block.items():
        row, kept = by.get("ships", MISSING), by.get("kept", MISSING)
        against, against_kept = other.get("ships", MISSING), other.get("kept", MISSING)
        chosen = row if "seconds" in row or not kept.get("seconds") else kept
        note = f"asked for {chosen['asked_bytes'] / 1e9:,.1f} GB" if "asked_bytes" in chosen else ""
        note = note if chosen.get("agrees", True) else f"DISAGREES by {chosen['off']:.0e}"
        yield (
            f"{rows:,}", who, milliseconds(row), ratio(against, row, "seconds"), milliseconds(kept),
            ratio(against_kept, kept, "seconds"), megabytes(chosen), ratio(against, row, "memory_bytes"),
            f"{chosen['share']:.0%}" if "share" in chosen else "", note,
        )  # fmt: skip


SUMMARY = ("loss", "N", "ms", "literal / it", "peer / it", "ms, memory kept", "literal / it", "peer / it", "MB",
           "literal / it", "peer / it", "of the ceiling")  # fmt: skip


def summary(loss: str, rows: int, block: Block) -> Sequence[str]:
    """Return a row of one loss and N: inbatch, and how many times more the literal version and another library need."""
    name, cells = peer(block), [loss, f"{rows:,}"]
    by, literal, other = (block.get(who, {}) for who in ("inbatch", "literal", name if name != "literal" else ""))
    for allocator, key in (("ships", "seconds"), ("kept", "seconds"), ("ships", "memory_bytes")):
        row = by.get(allocator, MISSING)
        cells.append(milliseconds(row) if key == "seconds" else megabytes(row))
        cells.append(ratio(literal.get(allocator, MISSING), row, key))
        against = ratio(other.get(allocator, MISSING), row, key)
        cells.append(f"{against} ({name})" if against else "")
    share = by.get("ships", MISSING).get("share")
    return [*cells, f"{share:.0%}" if share is not None else ""]


def plot(result: dict[str, Any], png: Path) -> None:
    """Draw memory and time of NT-Xent against N, for inbatch and other libraries; a cross marks a failure."""
    from matplotlib.figure import Figure

    blocks = {int(rows): block for rows, block in result["losses"]["nt_xent"].items()}
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    drawn = {"inbatch": "#0072b2", "literal": "#999999", "lightly": "#d55e00", "solo-learn": "#009e73",
             "pytorch-metric-learning": "#cc79a7"}  # fmt: skip
    limit = result["settings"]["memory_bytes"] / 1e6
    wanted = (("memory_bytes", 1e-6, "extra memory, MB"), ("seconds", 1e3, "forward and backward, ms"))
    for panel, (key, unit, label) in zip(panels, wanted, strict=True):
        rows = {
            who: {n: by["ships"] for n, b in blocks.items() if (by := b.get(who)) and "ships" in by} for who in drawn
        }
        points = {who: [(n, row[key] * unit) for n, row in by.items() if row.get(key)] for who, by in rows.items()}
        top = limit if key == "memory_bytes" else 2 * max((y for curve in points.values() for _, y in curve), default=1)
        if key == "memory_bytes":
            panel.axhline(limit, color="black", linewidth=0.8, linestyle=":", label="limit of a process")
        for i, (who, colour) in enumerate(drawn.items()):
            style = {"color": colour, "linewidth": 2 if who == "inbatch" else 1.2, "markersize": 4}
            panel.plot(*zip(*points[who], strict=True) if points[who] else ([], []), "o-", label=who, **style)
            failed = [n for n, row in rows[who].items() if row.get("failed", "not installed") != "not installed"]
            panel.plot(failed, [top * 1.35**i] * len(failed), "x", color=colour, markersize=5)
        panel.plot([], [], "kx", label="out of memory, or too slow")
        panel.set(xscale="log", yscale="log", xlabel="rows N (both views)", ylabel=label)
        panel.set_xticks(list(blocks), [f"{n:,}" for n in blocks], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    threads = result["environment"]["threads"]
    figure.suptitle(
        f"NT-Xent, D = {result['settings']['dim']}, float32, {threads} thread{'s' * (threads > 1)}", fontsize=9
    )
    figure.savefig(png, dpi=120)


# --------------------------------------------------------------------------------------------------------------------


def available() -> float:
    """Return the bytes of memory that are available to a process."""
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    return math.inf


def file_of(out: Path, threads: int) -> Path:
    return out.with_name(f"{out.stem}-{threads}thread{'s' * (threads > 1)}{out.suffix}")


def repeatable(words: Sequence[str]) -> str:
    """Return the command without the directories of this machine."""
    parts = iter([part for w in words for part in (w.split("=", 1) if w.startswith("--") else [w])])
    kept = [f"{w} {Path(next(parts)).name}" if w in ("--peers-python", "--out") else shlex.quote(w) for w in parts]
    return " ".join(["python benchmarks/losses.py", *kept])


def begun(args: argparse.Namespace, threads: int, file: Path, command: str) -> dict[str, Any]:
    """Return an empty result, or the existing one that --update continues."""
    import torch

    from inbatch.runtime.environment import environment

    keys = ("dim", "queue", "repeat", "limit", "memory_bytes")
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")) | {"threads": threads}, "commands": [command],
        "settings": {key: getattr(args, key) for key in keys} | {"temperature": TEMPERATURE},
        "ceilings": [], "versions": {}, "losses": {},
    }  # fmt: skip
    if args.update and file.exists():
        old = json.loads(file.read_text())
        if any(old["settings"][key] != result["settings"][key] for key in ("dim", "queue")):
            raise SystemExit(f"error: {file} was measured with another --dim or --queue; leave out --update")
        result |= {key: old[key] for key in ("ceilings", "versions", "losses")}
        result["commands"] = [*old["commands"], command]
    return result


def measure_ceiling(threads: int) -> dict[str, float]:
    """Return the machine's rate, and its load average before the measurement."""
    load = {"load": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    call = [sys.executable, __file__, "--one", json.dumps({"ceiling": True, "threads": threads})]
    out, _ = child_processes.start(call, stdout=subprocess.PIPE).communicate()
    return load | json.loads(out)


def main(words: Sequence[str] | None = None) -> dict[int, dict[str, Any]]:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[512, 4096, 16384, 65536, 131072], help="N, even numbers"
    )
    parser.add_argument("--queries", type=int, nargs="+", default=[256, 1024, 4096], help="N of losses with a queue")
    parser.add_argument("--queue", type=int, default=65536, help="rows in the queue")
    parser.add_argument("--dim", type=int, default=128, help="width of the rows")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS")
    parser.add_argument("--who", nargs="+", choices=MAKERS, default=list(MAKERS), metavar="WHO")
    parser.add_argument("--repeat", type=int, default=5, help="rounds, where a literal version holds up to 67 MB")
    parser.add_argument("--allocator", choices=("ships", "kept", "both"), default="both")
    parser.add_argument("--limit", type=int, default=120, help="seconds that one forward and backward may take")
    parser.add_argument("--memory", type=float, default=20, help="GB that a process may take; never over 90 %% of free")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has the other libraries")
    parser.add_argument("--update", action="store_true", help="keep what the file holds of other losses and other N")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw docs/losses.png")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.one:
        child_processes.end_with_parent()
        one(json.loads(args.one))
        return {}

    from inbatch.apps.console import print_table, say
    from inbatch.runtime.files import write_json

    if args.plot:
        plot(json.loads(file_of(args.out, args.threads[0]).read_text()), PLOT)
        say(f"Drawn to {PLOT}")
        return {}
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    if min(args.rows) < 4 or any(n % 2 for n in args.rows):
        parser.error("--rows are even numbers from 4 on: both views of 2 samples or more")
    if min(*args.threads, *args.queries, args.queue, args.dim, args.repeat, args.limit) < 1 or args.memory <= 0:
        parser.error("threads, queries, queue, dim, repeat, limit and memory are positive")
    args.allocators = list(ALLOCATORS) if args.allocator == "both" else [args.allocator]
    args.memory_bytes = int(min(1e9 * args.memory, 0.9 * available()))
    results, command = {}, repeatable(words)
    for threads in args.threads:
        file = file_of(args.out, threads)
        result = results[threads] = begun(args, threads, file, command)
        result["ceilings"].append(measure_ceiling(threads))
        if (load := result["ceilings"][-1].get("load", 0)) > 0.5:
            say(
                f"Warning: other work runs here (load {load:.1f}). It makes figures worse, most of all with threads.",
                "",
            )
        for loss in args.losses:
            for rows in args.queries if LOSSES[loss].queue else args.rows:
                block = measure(loss, rows, threads, args)
                judge(block)
                for who, by in block.items():
                    for row in by.values():
                        result["versions"].setdefault(who, {}).update(row.pop("versions", {}))
                result["losses"].setdefault(loss, {})[str(rows)] = block
                shares(result)
                say(f"{loss}, {threads} thread{'s' * (threads > 1)}; other: {peer(block)}")
                print_table(DETAILS, details(rows, block), numbers=True)
                say("")
                write_json(file, result)
        result["ceilings"].append(measure_ceiling(threads))
        shares(result)
        write_json(file, result)
        best = max(result["ceilings"], key=lambda one: one["gflops"])
        rates = f"torch's product {best['plain']:,.0f}, oneDNN's {best['onednn']:,.0f}"
        say(f"Ceiling: {best['gflops']:,.0f} GFLOP/s ({rates})")
        say(f"Written to {file}", "")
    return results


def disagreeing(results: dict[int, dict[str, Any]]) -> list[str]:
    """Return the implementations whose value or gradient differs from the others."""
    return [
        f"{loss}, N {rows}, {who}"
        for result in results.values()
        for loss, blocks in result["losses"].items()
        for rows, block in blocks.items()
        for who, by in block.items()
        if not all(row.get("agrees", True) for row in by.values())
    ]


if __name__ == "__main__":
    if wrong := disagreeing(main()):
        sys.exit("error: another value or gradient than the literal version: " + "; ".join(wrong))
