"""Faults 9, 10 and 18: values that are not finite, collapse, and losses at the limits of their precision."""

from functools import partial
from pathlib import Path
from typing import Any

from .stage import MAIN, TORCHRUN, Injection, pretrain, report, run, script

NAN = (
    """
import torch
from inbatch.training.step import Step
real, count = Step.__call__, 0
def call(self, batch, *rest):
    global count
    count += 1
    if count == 4:
        with torch.no_grad():
            next(iter(self.network.parameters())).fill_(float("{value}"))
    return real(self, batch, *rest)
Step.__call__ = call
"""
    + MAIN
)
"""The program, with a weight that is not finite from the fourth step on."""

EXTREMES = """
import itertools, torch
from inbatch import losses as f
from inbatch.nn.functional import normalize
def rows(kind, v, n, d, dtype):
    x = torch.randn(v, n, d, dtype=torch.float32)
    x = {"usual": x, "zero": 0 * x, "constant": torch.ones_like(x), "huge": 1e4 * x, "small": 1e-2 * x}[kind]
    return x.to(dtype).requires_grad_()
queue = normalize(torch.randn(32, 16))
losses = {"nt_xent": lambda z: f.nt_xent(z, 0.01), "info_nce": lambda z: f.info_nce(z[0], z[1], queue, 0.01)}
types = (torch.float32, torch.float16, torch.bfloat16)
bad, count = [], 0
for (name, loss), kind, n, dtype in itertools.product(
    losses.items(), ("usual", "zero", "constant", "huge", "small"), (1, 2, 8), types
):
    z, count = rows(kind, 2, n, 16, dtype), count + 1
    try:
        value = loss(z)
    except ValueError as error:
        assert str(error)
        continue
    value.backward()
    if not (value.isfinite() and z.grad.isfinite().all()):
        bad.append(f"{name} {kind} {n} {dtype}")
print(count, "cases,", len(bad), "not finite", *bad)
"""


def not_finite(value: str, folder: Path) -> dict[str, Any]:
    out = folder / "run"
    program = [TORCHRUN[0], *script(folder, "nan", NAN.replace("{value}", value))]
    ended = run(pretrain(out, epochs=4), by=program)
    results = ended.seen | {"status": report(out)["status"], "captured": (out / "nan_capture").is_dir()}
    return results | {"replayed": run(["replay", str(out)]).code}


def diverged(folder: Path) -> dict[str, Any]:
    """Train with a learning rate so large that all values become nan."""
    words = ["--set", "optimizer.lr=1e30", "--set", "schedule.warmup_epochs=0"]
    out = folder / "run"
    ended = run(pretrain(out, *words, epochs=4))
    return ended.seen | {"status": report(out)["status"], "captured": (out / "nan_capture").is_dir()}


def collapsed(folder: Path) -> dict[str, Any]:
    words = ["--stop-on-collapse", "--set", "method.stop_gradient=false", "--set", "method.predictor=false"]
    words += ["--set", "optimizer.name=sgd", "--set", "optimizer.lr=1", "--set", "schedule.warmup_epochs=0"]
    data = ["--data", "digits-canvas", "--set", "subset=200", "--batch", "40"]
    out = folder / "run"
    ended = run(pretrain(out, *words, method="simsiam", epochs=40, data=data, quiet=False))
    return ended.seen | {"status": report(out)["status"]}


def extremes(folder: Path) -> dict[str, Any]:
    return run([], by=[TORCHRUN[0], *script(folder, "extremes", EXTREMES)]).seen


def whitening(folder: Path) -> dict[str, Any]:
    """W-MSE whitens rows of 128 numbers in groups of 10, whose covariance is singular."""
    data = ["--data", "digits-canvas", "--set", "subset=200", "--batch", "10"]
    ended = run(pretrain(folder / "run", "--set", "method.w_size=10", method="wmse", data=data))
    return {"refused or finite": ended.code in (0, 2, 4) and "Traceback" not in ended.err}


INJECTIONS = [
    *(
        Injection(
            9, f"{value} in a weight", "at step 4; inbatch replay",
            {"exit": 4, "status": "failed", "captured": True, "replayed": 0}, partial(not_finite, value),
        )
        for value in ("nan", "inf")
    ),
    Injection(9, "a rate too large", "optimizer.lr=1e30", {"exit": 4, "status": "failed", "captured": True}, diverged),
    Injection(
        10, "collapse", "SimSiam without stop-gradient and predictor; --stop-on-collapse",
        {"exit": 4, "status": "failed", "says": ("collapse: their", "did not recover")}, collapsed,
    ),
    Injection(
        18, "extremes of precision", "T 0.01; zero, constant, huge, small rows; batch 1; half precision",
        {"exit": 0, "says": ("cases, 0 not finite",)}, extremes, quick=True,
    ),
    Injection(18, "fewer samples than dimensions", "W-MSE, groups of 10", {"refused or finite": True}, whitening),
]  # fmt: skip
