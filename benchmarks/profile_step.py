"""Time of the parts of a step, and the framework's share: python benchmarks/profile_step.py

Steps as `inbatch pretrain` makes them, including the log, with a clock around every part that any trainer has: views,
network forward and backward, loss and its backward, optimiser, target network. The rest of a step is the framework: the
loader's batch, gradient caching, gathering, checks, norm statistics, schedules, log. Writes results/profile.json, from
which scripts/render_results.py makes the table of docs/speed.md. On a CPU only: a GPU's clock is not the host's.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from inbatch import tune

OUT = Path(__file__).resolve().parents[1] / "results" / "profile.json"
CASES = {
    "simclr, ResNet-18, 32 px, batch 256": dict(method="simclr", encoder="resnet18", batch_size=256),
    "moco, ResNet-18, 32 px, batch 256": dict(method="moco", encoder="resnet18", batch_size=256),
    "simclr, ResNet-18, 32 px, batch 256, 4 groups": dict(
        method="simclr", encoder="resnet18", batch_size=256, context=64
    ),
    "simclr, tiny, 20 px, batch 128": dict(method="simclr", data="digits-canvas", batch_size=128),
}


class Clock:
    """Seconds by part; time of a nested part counts only for the inner one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[tuple[str, float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._stop()
        self._running.append((name, time.perf_counter()))
        try:
            yield
        finally:
            self._stop()
            self._running.pop()
            if self._running:
                self._running[-1] = (self._running[-1][0], time.perf_counter())

    def _stop(self) -> None:
        if self._running:
            name, began = self._running[-1]
            self.seconds[name] += time.perf_counter() - began

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return call(*args, **options)

        return timed


def profile(case: dict[str, Any], steps: int, warm: int) -> dict[str, Any]:
    """Return the medians over the steps of the seconds of every part."""
    import torch

    from inbatch.api import prepare
    from inbatch.training import step
    from inbatch.training.metric_logger import Log

    case = dict(case)
    size = case["batch_size"] * 4
    data = case.pop("data", None) or torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
    built = prepare(data, epochs=1000, **case)
    clock = Clock()
    step_of = built.step
    step_of.views = clock.around("views", step_of.views)
    step_of.call = clock.around("network, forward", step_of.call)
    built.network.forward = clock.around("network, forward", built.network.forward)
    if built.target is not None:
        built.target.forward = clock.around("target network", built.target.forward)
    object.__setattr__(built.method, "loss", clock.around("loss", built.method.loss))
    built.optimizer.step = clock.around("optimiser", built.optimizer.step)
    kept = torch.Tensor.backward, torch.autograd.backward, step.ema_update
    torch.Tensor.backward = clock.around("loss", kept[0])
    step.ema_update = clock.around("target network", kept[2])

    def backward(*args: Any, **options: Any) -> None:  # of the network; that of the loss uses Tensor.backward
        with clock.part(clock._running[-1][0] if clock._running[-1][0] == "loss" else "network, backward"):
            kept[1](*args, **options)

    torch.autograd.backward = backward
    timings: list[dict[str, float]] = []
    try:
        with tempfile.TemporaryDirectory() as folder, Log(Path(folder), total_steps=10**6, quiet=True) as log:
            number, epoch = 0, 0
            while len(timings) < warm + steps:
                batches = built.loader.epoch(epoch)
                while len(timings) < warm + steps:
                    clock.seconds.clear()
                    with clock.part("framework"):
                        batch = next(batches, None)
                        if batch is None:
                            break
                        losses = built.step(batch, number)
                        number += 1
                        log.step(number, epoch, losses | {"lr": 0.0}, built.recipe.batch_size)
                    timings.append(dict(clock.seconds))
                epoch += 1
    finally:
        torch.Tensor.backward, torch.autograd.backward, step.ema_update = kept
    names = sorted({name for one in timings for name in one}, key=lambda n: (n == "framework", n))
    parts = {name: median(one.get(name, 0.0) for one in timings[warm:]) for name in names}
    totals = [sum(one.values()) for one in timings[warm:]]
    return {"steps": steps, "seconds": median(totals), "least": min(totals), "most": max(totals), "parts": parts,
            "precision": str(built.network.precision).removeprefix("torch.")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=2, help="steps before those that count")
    parser.add_argument("--case", action="append", choices=list(CASES), help="all by default")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tune()
    import torch

    from inbatch.runtime.environment import environment
    from inbatch.runtime.files import write_json

    if args.threads:
        torch.set_num_threads(args.threads)
    cases = {}
    for name in args.case or CASES:
        cases[name] = profile(CASES[name], args.steps, args.warm)
        parts = ", ".join(f"{part} {s / cases[name]['seconds']:.1%}" for part, s in cases[name]["parts"].items())
        print(f"{name}: {cases[name]['seconds']:.3f} s: {parts}", file=sys.stderr)
    result = {"command": shlex.join(["python", "benchmarks/profile_step.py", *sys.argv[1:]])}
    write_json(args.out, result | {"environment": environment(torch.device("cpu")), "cases": cases})


if __name__ == "__main__":
    main()
