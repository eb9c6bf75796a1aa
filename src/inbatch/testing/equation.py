"""Tests of the loss alone, on rows of a small network."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from inbatch.batch import Batch, Rows, split_state
from inbatch.errors import listed
from inbatch.methods.base import Method
from inbatch.testing.derivative import Constants
from inbatch.testing.memory import attributes, buffers, changed
from inbatch.testing.report import Finding
from inbatch.testing.trial import Trial, difference

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows that are all zero": torch.zeros_like,
    "rows that are all equal": torch.ones_like,
    "rows of which one is zero": lambda x: x * (torch.arange(x.shape[1]) > 0)[:, None],
    "rows of length 10,000": lambda x: x * 1e4,
    "rows of length 1e-8": lambda x: x * 1e-8,
}


class Call:
    """One call of a loss on copies of rows: value, next state, gradients of the rows, and what it changed."""

    def __init__(self, method: Method, online: Rows, target: Rows, batch: Batch, seed: int = 0) -> None:
        self.leaves = {name: x.detach().clone().requires_grad_() for name, x in online.items()}
        inputs = self.leaves, {name: x.clone() for name, x in target.items()}, copy.deepcopy(batch)
        saved, plain = buffers(method), attributes(method)
        with seeded(seed):
            self.losses, state = split_state(method.loss(*inputs))
        self.state = {name: x.detach().clone() for name, x in state.items()}
        self.value = self.losses["loss"].detach().clone()
        if self.losses["loss"].requires_grad:
            self.losses["loss"].backward()
        self.gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in self.leaves.items()}
        self.buffers, self.attributes = changed(saved, buffers(method)), changed(plain, attributes(method))
        before = [*online.values(), *target.values(), batch.index, batch.label]
        after = [*self.leaves.values(), *inputs[1].values(), inputs[2].index, inputs[2].label]
        self.overwritten = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def equals(self, other: "Call") -> bool:
        """Return whether value, gradients and next state have the same bits."""
        pairs = [(self.value, other.value), *((x, other.gradients[n]) for n, x in self.gradients.items())]
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
        return same and not changed(self.state, other.state)

    def finite(self) -> bool:
        """Return whether value and gradients are finite."""
        return bool(self.value.isfinite()) and all(bool(x.isfinite().all()) for x in self.gradients.values())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python, and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def purity(trial: Trial) -> Finding:
    """Test that a call changes no state."""
    first = Call(*trial.rows())
    if first.buffers:
        return Finding("purity", False, f"loss changes the buffers {listed(first.buffers)}: move that to after_step, "
                       "which runs after the optimiser. A queue that is filled before the look-up finds the sample "
                       "itself, and a step in several context groups would count it twice")  # fmt: skip
    if first.attributes:
        return Finding("purity", False, f"loss changes the attributes {listed(first.attributes)}: keep state in "
                       "buffers (register_buffer) and change it in after_step")  # fmt: skip
    return Finding("purity", True, "loss changes nothing")


def constancy(trial: Trial) -> Finding:
    """Test that a second call gives the same value."""
    rows = trial.rows()
    first, second = Call(*rows), Call(*rows)
    if not first.equals(second):
        return Finding("value", False, f"a second call of loss gives another value or gradient ({first.value:.6g}, "
                       f"then {second.value:.6g}): it must depend on its arguments, "
                       "on options and on buffers only")  # fmt: skip
    return Finding("value", True, "a second call of loss gives the same value and gradient")


def rows(trial: Trial) -> Finding:
    """Test that the loss does not overwrite its arguments."""
    wrong = ("loss overwrites its arguments: rows and labels are used after it, so replace operations in place "
             "(x /= y, x.add_(y), x[i] = y) by others (x = x / y)")  # fmt: skip
    try:
        method, online, target, batch = trial.rows()
        overwritten = Call(method, online, target, batch).overwritten
    except RuntimeError as error:
        if "in-place operation" not in str(error):
            raise
        overwritten = True
    return Finding("rows", not overwritten, wrong if overwritten else "loss leaves rows, indices and labels unchanged")


def randomness(trial: Trial) -> Finding:
    """Test that neither loss and hooks nor heads and constructor depend on the state of global random generators."""
    method, online, target, batch = trial.rows()
    calls = [Call(copy.deepcopy(method), online, target, batch, seed) for seed in (0, 1)]
    states = []
    for seed in (0, 1):
        again = copy.deepcopy(method)
        with seeded(seed), torch.no_grad():
            again.after_step(online, target, batch, 0.0)
        states.append(buffers(again))
    steps = []
    for seed in (0, 1):
        with seeded(seed):
            steps.append(trial.train(trial.parts(), steps=1))
    cases = {
        "loss": not calls[0].equals(calls[1]), "after_step": bool(changed(*states)),
        "another hook, a head or the constructor": difference(*steps)[0] > 0,
    }  # fmt: skip
    for name, different in cases.items():
        if different:
            return Finding("random", False, f"{name} draws random numbers from a global generator: a resumed run and "
                           "other ranks draw others. Draw them from a key, for example "
                           "inbatch.rng.uniform(batch.seed, batch.epoch, batch.index, -1, 1)")  # fmt: skip
    return Finding("random", True, "no part depends on the state of global random generators")


def labels(trial: Trial) -> Finding:
    """Test that only a method with `labels` reads labels, and that they may be unknown."""
    method, online, target, batch = trial.rows()
    unknown = Call(copy.deepcopy(method), online, target, Batch(batch.index, torch.full_like(batch.label, -1)))
    if not unknown.finite():
        return Finding("labels", False, f"without any known label (-1) the loss is {unknown.value:.4g} or its gradient "
                       "is not finite: divide by max(1, number of labelled samples)")  # fmt: skip
    if not method.labels and not unknown.equals(Call(method, online, target, batch)):
        return Finding("labels", False, "loss reads batch.label, but the class does not say so: set labels = True, or "
                       "use no labels")  # fmt: skip
    what = "learns from labels" if method.labels else "does not read labels"
    return Finding("labels", True, f"the method {what}, as declared, and is finite if none is known")


def order(trial: Trial) -> Finding:
    """Test that the loss does not depend on the order of the samples."""
    method, online, target, batch = trial.rows()
    moved = torch.randperm(trial.batch, generator=torch.Generator().manual_seed(4))
    with Constants() as watched:
        first = Call(copy.deepcopy(method), online, target, batch)
    there = [{name: x[:, moved] for name, x in rows.items()} for rows in (online, target)]
    second = Call(method, there[0], there[1], batch.take(moved))
    plain, shuffled, least = first.value, second.value, 1e-4 if watched.narrow else 1e-10
    gap, where = difference(second.state, first.state)
    if not gap < least:
        return Finding("order", False, f"the next value of {where} depends on the order of the samples in the batch, "
                       "which is that of ranks and workers: write a sample's value at batch.index")  # fmt: skip
    gap = float((plain - shuffled).abs() / plain.abs().clamp(min=1))
    if not gap < least:
        return Finding("order", False, f"the loss depends on the order of the samples in the batch ({plain:.6g} and "
                       f"{shuffled:.6g}): the order is that of ranks and workers. Key choices by batch.index, or pass "
                       "any_order=False if the equation means it")  # fmt: skip
    return Finding("order", True, "the loss does not depend on the order of the samples")


def finite(trial: Trial) -> Finding:
    """Test that extreme rows have a finite loss and gradient, in the precisions of training."""
    method, online, target, batch = trial.rows()
    cases = [(kind, make, torch.float32) for kind, make in KINDS.items()]
    cases += [(f"rows in {str(half)[6:]}", lambda x: x, half) for half in (torch.bfloat16, torch.float16)]
    for kind, make, precision in cases:
        parts = [{name: make(x).to(precision) for name, x in rows.items()} for rows in (online, target)]
        call = Call(copy.deepcopy(method).float(), parts[0], parts[1], batch)
        if not call.finite():
            what = "the gradient" if call.value.isfinite() else "the loss"
            return Finding("finite", False, f"{what} is not finite for {kind}: guard divisions and logarithms; "
                           "inbatch.nn.functional has normalize, logsumexp_rows and moments, computed in float32 "
                           "or wider")  # fmt: skip
    return Finding("finite", True, "the loss and its gradient are finite for extreme rows and in half precision")
