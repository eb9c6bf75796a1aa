"""Seed 43 faults, one at a time, and report which of them the tests notice.

    python scripts/mutate.py                     every fault, against the default suite
    python scripts/mutate.py --only 3,7          two of them
    python scripts/mutate.py --markdown docs/mutations.md

Each fault changes one place of a copy of `src`. The tests that are nearest to it run first; only if they
pass, the whole default suite runs. Exits with 1 if more than one fault is missed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """A change of one place: `old`, which occurs exactly once, becomes `new`. nearest: tests to run first."""

    what: str
    file: str
    old: str
    new: str
    nearest: str


FAULTS = (
    Fault("NT-Xent: the sign of the positives", "methods/simclr.py", "negatives) - positive)",
          "negatives) + positive)", "tests/methods"),
    Fault("NT-Xent: a row is its own negative", "nn/functional.py", "temperature, exclude_self=True)",
          "temperature, exclude_self=False)", "tests/methods"),
    Fault("BYOL: no stop-gradient", "methods/byol.py", "normalize(t.detach())", "normalize(t)", "tests/methods"),
    Fault("SwAV: no stop-gradient on the codes", "methods/swav.py", "cross_prediction(codes.detach()",
          "cross_prediction(codes", "tests/methods"),
    Fault("VICReg: biased variance", "nn/functional.py", "loss_var(wide(z), 1) + eps",
          "loss_var(wide(z), 1, 0) + eps", "tests/methods"),
    Fault("W-MSE, Barlow: covariance over N", "nn/functional.py", "/ (x.shape[-2] - 1)", "/ x.shape[-2]",
          "tests/methods"),
    Fault("MoCo: keys of the online network", "methods/moco.py", 'keys = target["projection"]',
          'keys = online["projection"]', "tests/methods tests/training/test_grad_cache.py"),
    Fault("memory bank: one row too few", "nn/memory_bank.py", "rows[-self.size :]",
          "rows[-self.size :].roll(1, 0)", "tests/nn/test_memory_bank.py"),
    Fault("target network follows before the optimiser's step", "training/step.py",
          "        self.schedule(self.optimizer, step)\n",
          "        if self.target is not None:\n            ema_update(self.target, self.network, "
          "self.method.target_momentum(progress))\n        self.schedule(self.optimizer, step)\n",
          "tests/training/test_grad_cache.py"),
    Fault("EMA: momentum and its complement swapped", "models/network.py", "torch._foreach_mul_(slow, momentum)",
          "torch._foreach_mul_(slow, 1 - momentum)", "tests/models/test_network.py tests/training/test_grad_cache.py"),
    Fault("gradient of ranks: the factor W left out", "training/row_order.py", ", 1) * distributed.world()", ", 1)",
          "tests/training/test_grad_cache.py"),
    Fault("running statistics not averaged over ranks", "runtime/distributed.py", "    flat /= world()\n", "",
          "tests/runtime/test_distributed.py tests/training/test_grad_cache.py"),
    Fault("synchronised norm: a rank's own count", "models/sync_batchnorm.py",
          "count = x.numel() // x.shape[1] * world()", "count = x.numel() // x.shape[1]",
          "tests/training/test_grad_cache.py"),
    Fault("groups: running statistics of the last group alone", "training/grad_cache.py",
          "statistic.copy_(summed / len(groups))", "statistic.copy_(statistic)", "tests/training/test_grad_cache.py"),
    Fault("groups: dropout differs in the second pass", "training/grad_cache.py",
          "with alone, seeded_rng(key, images[0].device):", "with alone, seeded_rng(key + 1, images[0].device):",
          "tests/training/test_grad_cache.py"),
    Fault("schedule: off by one step", "nn/schedules.py", "    if step < warmup:\n",
          "    step += 1\n    if step < warmup:\n", "tests/nn/test_schedules.py"),
    Fault("order of an epoch: the same in every epoch", "rng.py", "manual_seed(fold(seed, epoch))",
          "manual_seed(fold(seed, 0))", "tests/test_rng.py tests/data/test_loader.py"),
    Fault("views: all views of a sample are the same", "rng.py", "        return fold(seed, epoch, view, attempt)",
          "        return fold(seed, epoch, 0, attempt)", "tests/test_rng.py tests/data/test_views.py"),
    Fault("checkpoint: the optimiser's state is lost", "training/build.py", '"optimizer": self.optimizer}', "}",
          "tests/training/test_resume.py"),
    Fault("resume: the target network is not restored", "training/build.py",
          '            "target": None if self.method.teacher else self.target,\n', "", "tests/training/test_resume.py"),
    Fault("tiled log-sum-exp: the row's own key is kept", "nn/exponentials.py", "if self.exclude_self:",
          "if False:", "tests/nn/test_logsumexp.py"),
    Fault("k-NN: the nearest neighbours are the farthest", "evaluation/knn.py",
          "values, place = x.topk(k, sorted=False)", "values, place = x.topk(k, sorted=False, largest=False)",
          "tests/evaluation/test_evaluate.py"),
    Fault("readout: whitened by the covariance, not its root", "models/readout.py", ".clamp(min=1e-12)).rsqrt()",
          ".clamp(min=1e-12)).reciprocal()", "tests/models/test_fast.py"),
    Fault("images of a view: height and width swapped", "data/views/crop.py",
          "top, left, height, width = boxes.unbind(1)", "top, left, width, height = boxes.unbind(1)",
          "tests/data/test_views.py"),
    Fault("budget: time of the evaluation is not reserved", "training/budget.py",
          "left = self.seconds * (1 - self._slack) - self.reserve - used",
          "left = self.seconds * (1 - self._slack) - used", "tests/training/test_budget.py"),
    Fault("LeJEPA: every step has the same directions", "methods/lejepa.py", "        self.step += 1", "        pass",
          "tests/methods/test_lejepa.py"),
    Fault("VISReg: the shape has a gradient through the deviation", "methods/visreg.py",
          "(z - mean) / deviation.detach()", "(z - mean) / deviation", "tests/methods/test_visreg.py"),
    Fault("SogCLR: shares of the estimate swapped", "nn/global_contrast.py",
          "(-share).log1p(), batch + share.log())", "share.log(), batch + (-share).log1p())",
          "tests/methods/test_global_contrast.py"),
    Fault("SogCLR: the sum of both views for their mean", "methods/sogclr.py",
          "torch.logaddexp(log_new[0], log_new[1]) - math.log(2)", "torch.logaddexp(log_new[0], log_new[1])",
          "tests/methods/test_global_contrast.py"),
    Fault("iSogCLR: temperatures move uphill", "methods/isogclr.py", "(tau - self.eta * slope)",
          "(tau + self.eta * slope)", "tests/methods/test_global_contrast.py"),
    Fault("sigmoid: the scale is not applied", "methods/sigmoid.py", "u[i] * t[i, :, None]", "u[i]",
          "tests/methods/test_sigmoid.py"),
    Fault("TiCo: no stop-gradient on the covariance", "methods/tico.py", "past = a.detach() if detach else a",
          "past = a", "tests/methods/test_tico.py"),
    Fault("MMCR: the target network's rows left out of the mean", "methods/mmcr.py",
          "centre = (centre + teacher.mean(0)) / 2", "centre = (centre + centre) / 2", "tests/methods/test_mmcr.py"),
    Fault("HCL: the lower bound of the negatives left out", "nn/negatives.py",
          "(share < 0) & (corrected >= least), least)", "share < 0, least)", "tests/methods/test_hcl.py"),
    Fault("mixing: the share of the other sample", "context/mixing.py", "return share * own + (1 - share) * other",
          "return share * other + (1 - share) * own",
          "tests/context/test_mixing.py tests/context/test_mixing_losses.py"),
    Fault("mixing: the box replaces the rest of the image", "context/mixing.py", "inside[:, None], other, own)",
          "inside[:, None], own, other)", "tests/context/test_mixing.py"),
    Fault("drop-similar: features are not centred", "context/negatives.py", "normalize(rows - rows[:n].mean(0), dim=1)",
          "normalize(rows, dim=1)", "tests/context/test_negatives.py"),
    Fault("drop-similar: groups are joined only once", "context/negatives.py",
          "    while not torch.equal(one := group[a], other := group[b]):",
          "    if len(one := group[a]) and len(other := group[b]):", "tests/context/test_negatives.py"),
    Fault("samplers: a rare class always gets what is left over", "data/samplers.py",
          "larger[(step * rest + i) % len(larger)]", "larger[i % len(larger)]", "tests/data/test_samplers.py"),
    Fault("samplers: images of a group in adjacent places", "data/samplers.py",
          "drawn.view(self.batch, self.steps).T.flatten()", "drawn.flatten()", "tests/data/test_samplers.py"),
    Fault("pair weights: the factor of other groups", "nn/pair_weights.py", "spare.mul_(1 - factor).add_(factor)",
          "spare.mul_(factor - 1).add_(1)", "tests/nn/test_pair_weights.py"),
    Fault("sigmoid sums: large logits without their linear part", "nn/sigmoid_sums.py",
          "spare = spare if over is None else spare.add_(over)", "spare = spare",
          "tests/nn/test_sigmoid_sums.py"),
    Fault("retrieval: a query is in its own ranking", "evaluation/retrieval.py",
          "        similarity[torch.arange(len(at)), at] = -torch.inf\n", "", "tests/evaluation/test_retrieval.py"),
)  # fmt: skip


def pytest(copy: Path, words: list[str]) -> bool:
    """Return whether the tests pass with the sources of a copy."""
    env = os.environ | {"PYTHONPATH": str(copy / "src")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # each run would compile all libraries again
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    return done.returncode == 0


def detect(fault: Fault, copy: Path, nearest_only: bool) -> str:
    """Return which tests detect a fault: "nearest", "suite", or "" if none does."""
    file = copy / "src" / "inbatch" / fault.file
    text = file.read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, f"{fault.file} holds {fault.old!r} {text.count(fault.old)} times, not once"
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        if not pytest(copy, ["-n", "0", *fault.nearest.split()]):
            return "nearest"
        return "suite" if not nearest_only and not pytest(copy, []) else ""
    finally:
        file.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="numbers of faults, from 1, with commas")
    parser.add_argument("--nearest", action="store_true", help="run the nearest tests only, never the whole suite")
    parser.add_argument("--markdown", type=Path, help="write the table into this page")
    args = parser.parse_args()
    chosen = [int(number) for number in args.only.split(",")] if args.only else range(1, len(FAULTS) + 1)
    rows = ["| | fault | file | detected by | seconds |", "| --- | --- | --- | --- | --- |"]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "inbatch"
        tests = sorted({test for number in chosen for test in FAULTS[number - 1].nearest.split()})
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs"))
        assert pytest(copy, ["-n", "0", *tests]), "the tests fail without any fault: nothing can be concluded from them"
        for number in chosen:
            fault, began = FAULTS[number - 1], time.monotonic()
            by = detect(fault, copy, args.nearest)
            missed += not by
            seconds = time.monotonic() - began
            rows.append(f"| {number} | {fault.what} | `{fault.file}` | {by or 'NOTHING'} | {seconds:.0f} |")
            print(rows[-1], flush=True)
    print(f"{len(rows) - 2 - missed} of {len(rows) - 2} faults detected")
    if args.markdown:
        page = args.markdown.read_text(encoding="utf-8") if args.markdown.exists() else "# Seeded faults\n\n"
        args.markdown.write_text(page.partition(rows[0])[0] + "\n".join(rows) + "\n", encoding="utf-8")
    return 1 if missed > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
