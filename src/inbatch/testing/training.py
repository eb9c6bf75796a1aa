"""Tests of whole steps: memory, context groups, resuming and repeating."""

from collections.abc import Callable
from typing import Any

from inbatch.errors import listed, reason
from inbatch.testing.memory import attributes, buffers, changed
from inbatch.testing.report import Finding
from inbatch.testing.trial import Trial, difference

READERS = ("loss", "on_gradients", "online_views", "target_views", "target_momentum", "constant_lr", "surveys", "notes")
TOLERANCE = 1e-9


def memory(trial: Trial) -> Finding:
    """Test in real steps that only after_step, on_weights and survey change what the method holds."""
    parts = trial.parts()
    method, culprits = parts.method, list[str]()

    def watched(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before = buffers(method), attributes(method)
            result = hook(*args, **options)
            names = [*changed(before[0], buffers(method)), *changed(before[1], attributes(method))]
            culprits.extend(f"{name} changes {listed(names)}" for _ in names[:1])
            return result

        return call

    for name in READERS:
        object.__setattr__(method, name, watched(name, getattr(method, name)))
    trial.train(parts)
    if culprits:
        return Finding("memory", False, f"{culprits[0]}: only after_step, on_weights and survey may change the "
                       "memory of a method, so that a step uses the memory of the step before")  # fmt: skip
    return Finding("memory", True, "memory changes after the optimiser only")


def saved_state(trial: Trial) -> Finding:
    """Test that steps change nothing that a checkpoint does not hold."""
    parts = trial.parts()

    def unsaved() -> dict[str, Any]:
        heads = attributes(parts.network.heads).items()
        return attributes(parts.method) | {f"heads.{name}": value for name, value in heads}

    before = unsaved()
    trial.train(parts)
    if names := changed(before, unsaved()):
        return Finding("state", False, f"training changes {listed(names)}, which state_dict() does not hold: a resumed "
                       "run starts without it. Make it a buffer (register_buffer, or a MemoryBank of "
                       "inbatch.nn.memory_bank), or compute it from batch.epoch and progress")  # fmt: skip
    return Finding("state", True, "state_dict() holds everything that training changes")


def resume(trial: Trial) -> Finding:
    """Test that a run that loads a checkpoint continues with the same bits."""
    whole = trial.parts()
    trial.train(whole)
    saved = whole.saved()
    resumed = trial.parts()
    try:
        resumed.load(saved)
    except RuntimeError as error:
        return Finding("resume", False, f"a checkpoint cannot be loaded ({reason(error)}): make every buffer, with its "
                       "final shape, in the constructor or in prepare")  # fmt: skip
    expected, actual = (trial.train(parts, first=2) for parts in (whole, resumed))
    gap, where = difference(actual, expected)
    if gap:
        return Finding("resume", False, f"a resumed run differs from an uninterrupted one by {gap:.2g} in {where}: "
                       "state_dict() must hold all state that the loss and the hooks use")  # fmt: skip
    return Finding("resume", True, "a resumed run continues with the same bits")


def repeat(trial: Trial) -> Finding:
    """Test that a second run in the same process gives the same bits."""
    first, second = trial.train(trial.parts()), trial.train(trial.parts())
    gap, where = difference(second, first)
    if gap:
        return Finding("repeat", False, f"a second run in the same process differs by {gap:.2g} in {where}: state is "
                       "held outside of the method, in its class or module, or comes from an unseeded generator. Make "
                       "it a buffer of the instance")  # fmt: skip
    return Finding("repeat", True, "a second run in the same process gives the same bits")


def groups(trial: Trial) -> Finding:
    """Test that context groups with gradient caching give the step of plain autograd."""
    for count in (1, 2, 4):
        if trial.batch % count or trial.batch // count < 2:
            continue
        gap, where = difference(trial.train(trial.parts(), groups=count), trial.literal(count))
        if not gap < TOLERANCE:
            return Finding("groups", False, f"a step in {count} context group{'s' * (count > 1)} differs from plain "
                           f"autograd by {gap:.2g} in {where}: {_cause(count)}")  # fmt: skip
    return Finding("groups", True, "context groups with gradient caching give the step of plain autograd")


def _cause(count: int) -> str:
    if count == 1:
        return "the loss must use the rows that it is given, and hooks must not replace them or keep their graph"
    return (
        "heads run twice for every group, so they must not change state (a statistic, a stored row) in their forward "
        "pass, except the running statistics of norm layers; keep memory in the method, by after_step"
    )
