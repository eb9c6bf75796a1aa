"""Callbacks of a run: the user's code after steps, epochs and evaluations."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, SupportsFloat

import torch

from inbatch.errors import ConfigError, InbatchError, TrainingError, reason, type_name
from inbatch.models import Encoder
from inbatch.runtime import distributed
from inbatch.runtime.sharding import local
from inbatch.training.build import RunComponents
from inbatch.training.metric_logger import Log


@dataclass(frozen=True)
class Moment:
    """The state of a run in which a callback is called; read-only.

    Attributes:
        step: Number of completed steps.
        steps: Number of steps of the whole run.
        epoch: Number of the epoch, from 1; 0 before the first step.
        values: "loss" and other numbers (or 0-dim tensors) of the last step; in `on_evaluation`, of the evaluation.
        encoder: The encoder as it is now, in training mode: `encoder.embed(images)` gives features.
        directory: Run directory; only rank 0 should write to it.
        rank: Number of this process.
        world: Number of processes.
    """

    step: int
    steps: int
    epoch: int
    values: Mapping[str, SupportsFloat]
    encoder: Encoder
    directory: Path
    rank: int
    world: int
    _logged: dict[str, float] = field(default_factory=dict, repr=False)
    _reasons: list[str] = field(default_factory=list, repr=False)

    def log(self, name: str, value: SupportsFloat) -> None:
        """Write a number to the log of the run, as CALLBACK/NAME; that of rank 0 is kept."""
        self._logged[name] = float(value)

    def stop(self, reason: str) -> None:
        """End the run after this step with its evaluation and its result; one rank that asks is enough."""
        self._reasons.append(str(reason))


class Callback:
    """Code that a run calls; a subclass defines some of the three methods.

    Every rank calls its own callback, at the same moments. A callback must not change weights, buffers or the mode of
    layers, which is checked after every call; random numbers that it draws do not affect the run.

    changes_weights: whether it may change them. It is then part of the recipe, a resumed run needs it, and it must do
        the same on every rank.
    """

    changes_weights: ClassVar[bool] = False

    def on_step(self, moment: Moment) -> None:
        """Do something after a training step."""

    def on_epoch(self, moment: Moment) -> None:
        """Do something after an epoch, after its evaluation if there is one."""

    def on_evaluation(self, moment: Moment) -> None:
        """Do something after an evaluation of the run, of which the first is before the first step."""

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and tensors that a checkpoint keeps for `load_state_dict`; none by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""


HOOKS = ("on_step", "on_epoch", "on_evaluation")


def named(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Return callbacks by the name of their class, with a number if there are several of one."""
    names: dict[str, Callback] = {}
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks: {callback!r:.80} is not an inbatch.Callback: derive its class from it")
        name, number = type(callback).__name__, 2
        while name in names:
            name, number = f"{type(callback).__name__}-{number}", number + 1
        names[name] = callback
    return names


_PART = "callback "
"""Beginning of the name of a callback's part of a checkpoint."""


def with_state(callbacks: Mapping[str, Callback]) -> dict[str, "KeptState"]:
    """Return the state of the callbacks that have some, by the name of its part of a checkpoint."""
    base = Callback.state_dict
    return {
        f"{_PART}{name}": KeptState(name, one) for name, one in callbacks.items() if type(one).state_dict is not base
    }


@dataclass(frozen=True)
class KeptState:
    """The part of a checkpoint that a callback keeps; a fault in it is an error that names the callback."""

    name: str
    callback: Callback

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the callback; InbatchError if a checkpoint could not hold it."""
        try:
            state = self.callback.state_dict()
        except Exception as error:  # of any code
            raise InbatchError(f"the callback {self.name} failed in state_dict: {reason(error)}") from error
        if (kind := _not_kept(state) if isinstance(state, dict) else type_name(state)) is not None:
            raise InbatchError(
                f"the callback {self.name} returns {kind} in state_dict: a checkpoint holds a dict of numbers, texts, "
                "lists, dicts and tensors; convert it, such as by float(...)"
            )
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the callback."""
        self.callback.load_state_dict(state)


def _not_kept(value: Any) -> str | None:
    """Return the type of a value that a checkpoint cannot hold, such as a number of NumPy; None if there is none."""
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return next((kind for kind in map(_not_kept, parts) if kind is not None), None)
    if value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str):
        return None
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return type_name(value)
    return None


def come_or_gone(parts: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Return the parts of callbacks that only a resumed run has, or only its checkpoint: none changes weights."""
    return [name for name in (*parts, *state) if name.startswith(_PART) and not (name in parts and name in state)]


class Callbacks:
    """Call the callbacks of a run, check them, and let the ranks agree on the consequences.

    Args:
        callbacks: The callbacks, by name.
        built: The run.
        out: Run directory.
        log: Log of the run.
        save: Saves a checkpoint; all ranks call it.
    """

    def __init__(
        self, callbacks: Mapping[str, Callback], built: RunComponents, out: Path, log: Log, save: Callable[[], None]
    ) -> None:
        self.built, self.out, self.log, self.save = built, out, log, save
        self.by_hook = {hook: {n: c for n, c in callbacks.items() if _overrides(c, hook)} for hook in HOOKS}

    def __call__(self, hook: str, step: int, epoch: int, values: Mapping[str, SupportsFloat]) -> str | None:
        """Call one method of all callbacks; return the reason if one of them asks to stop the run.

        Raises:
            TrainingError: If a callback fails, after a checkpoint is saved, or if it has changed weights without saying
                that it may, without one.
        """
        if not self.by_hook[hook]:
            return None
        problem, reasons, changed = "", list[str](), False
        with self.built.gathered():  # once: a rank that leaves out callbacks after a failure must not miss an exchange
            for name, callback in self.by_hook[hook].items():
                where = f"the callback {name} ({hook}, step {step:,})"
                moment = Moment(
                    step, self.built.total, epoch, MappingProxyType(dict(values)), self.built.encoder, self.out,
                    distributed.rank(), distributed.world(),
                )  # fmt: skip
                before = None if callback.changes_weights else self._fingerprint()
                try:
                    with torch.random.fork_rng():
                        getattr(callback, hook)(moment)
                except InbatchError as error:
                    problem = f"{where} failed: {error}"
                except Exception as error:  # of any code
                    problem = f"{where} failed: {reason(error)}"
                if before is not None and (what := self._difference(before)):
                    problem, changed = f"{where} changed {what}: a callback may not, unless its class says so", True
                if problem:
                    break
                if moment._logged:
                    self.log.record(step, {f"{name}/{key}": value for key, value in moment._logged.items()})
                reasons += (f"{name}: {text}" for text in moment._reasons)
        return self._agreed(problem, changed, reasons)

    def _agreed(self, problem: str, changed: bool, reasons: list[str]) -> str | None:
        """Return the reason to stop; raise TrainingError on every rank if a callback has failed on one of them."""
        outcome = distributed.all_reduce_max(3 if changed else 2 if problem else 1 if reasons else 0)
        if outcome == 3:
            raise TrainingError(f"{problem or 'a callback of another rank changed weights'} (changes_weights = True)")
        if outcome == 2:
            self.save()
            raise TrainingError(f"{problem or 'a callback failed on another rank'}; a checkpoint is saved")
        if outcome == 1:
            return str(distributed.broadcast_object("; ".join(reasons)) or "a callback of another rank asked for it")
        return None

    def _fingerprint(self) -> tuple[Any, ...]:
        """Return values that change with the weights, buffers and modes of the networks and the method."""
        built = self.built
        modules = [module for module in (built.network, built.target, built.method) if module is not None]
        tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
        tensors = [local(x.detach()) for x in tensors]
        floats = [x for x in tensors if x.is_floating_point() and x.numel()]
        # the version of a tensor misses changes through `.data`, which the norms show
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(floats)]) if floats else torch.zeros(0)
        modes = [one.training for module in modules for one in module.modules()]
        return [(x._version, x.data_ptr()) for x in tensors], norms, modes

    def _difference(self, before: tuple[Any, ...]) -> str | None:
        now = self._fingerprint()
        if before[0] != now[0] or not torch.equal(before[1], now[1]):
            return "weights or buffers of the run"
        return None if before[2] == now[2] else "the mode of layers (use `with encoder.evaluating()`)"


def _overrides(callback: Callback, hook: str) -> bool:
    return getattr(type(callback), hook) is not getattr(Callback, hook)
