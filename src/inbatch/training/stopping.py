"""Stopping a run at any moment: the state after its last finished step is what a checkpoint gets.

A step changes weights, optimiser, target network and memory only after its backward pass, and from there on it is
finished. Before, it changes buffers (running statistics of norm layers), which are copied when a step is finished. So a
step, an evaluation on the way or a survey can be lost at any moment, and a resumed run makes it again.
"""

import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from inbatch.errors import InbatchError
from inbatch.runtime import distributed
from inbatch.runtime.signals import GRACE, Stop, StopRequested, finishing, stopped, watchdog, without_result
from inbatch.training.build import RunComponents
from inbatch.training.checkpoint import save
from inbatch.training.status import Report


class Stopping:
    """Answers signals in a run of one process; several processes agree after each step (`ranks.largest`).

    parts: everything whose state makes a checkpoint complete, `progress` among it.
    """

    def __init__(self, built: RunComponents, parts: dict[str, Any], report: Report, stop: Stop) -> None:
        self.built, self.parts, self.report, self.stop = built, parts, report, stop
        self.progress, self.out = report.progress, report.path.parent
        self.alone = distributed.world() == 1
        self._log = self.out / "metrics.jsonl"
        self._kept: dict[str, dict[str, Any]] = {}
        self._logged = 0
        self._step, self._began, self._took = -1, 0.0, GRACE
        self._error: InbatchError | None = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Save a checkpoint and raise Preempted or Interrupted after a signal in the context."""
        watchdog.answer = self.answer
        self.built.step.commit = self.stop.hold
        handles = turns(self.built, self.stop) if self.alone else []
        try:
            self.finished()
            yield
        except StopRequested as request:
            self.stop.hold()
            raise self.answer(request.number) from None
        finally:
            error = self._error
            watchdog.answer = without_result if error is None else lambda number: error
            for handle in handles:
                handle.remove()

    def begin(self) -> None:
        """A training step begins: a signal waits for its end if the last one was quick."""
        self._step, self._began = self.progress.step, time.monotonic()
        self.stop.quick = self._took < GRACE

    def finished(self) -> None:
        """Remember the state: a checkpoint gets it if what follows is lost."""
        if self._step + 1 == self.progress.step:
            self._took = time.monotonic() - self._began
        if not self.alone:
            self.stop.hold()
            return
        # Before the first step of an epoch the curator's network and a method's clusters are made again.
        whole = self.progress.step % self.built.loader.steps == 0
        for name, part in self.parts.items():
            if name == "progress":
                self._kept[name] = part.state_dict() | {"curve": list(part.curve)}
            elif whole and name in ("curator", "method"):
                self._kept[name] = copy.deepcopy(part.state_dict())
            elif isinstance(part, nn.Module) and name != "method":
                self._kept[name] = {key: x.clone() for key, x in part.named_buffers(remove_duplicate=False)}
            else:
                self._kept.pop(name, None)
        self._logged = self._log.stat().st_size if self._log.exists() else 0
        self.stop.release()

    def answer(self, number: int) -> InbatchError:
        """Return the error of the run, after a checkpoint if the last one on the disk is older. Any thread may ask."""
        with finishing:
            if self._error is None:
                self._error = self._answer(number)
            return self._error

    def _answer(self, number: int) -> InbatchError:
        step, total = self.progress.step, self.built.total
        kept = self._kept.get("progress", {})
        if kept.get("step") == step:
            if step and (step, kept["ended"]) != self.progress.saved:
                save(self.out / "checkpoints", self._state(), step=step)
            if self._log.exists():
                os.truncate(self._log, self._logged)  # what a lost evaluation logged is logged again
        lost = self._step == step
        where = f"during step {step + 1:,} of {total:,}, which is lost" if lost else f"at step {step:,} of {total:,}"
        if step == 0:
            after = "; nothing was saved yet: start again with --overwrite or --resume auto"
        else:
            after = f"; the checkpoint of step {step:,} is saved" if lost else ", checkpoint saved"
            after += f": inbatch pretrain --resume {self.out}"
        error = stopped(number, where + after)
        self.report.ended(error)
        return error

    def _state(self) -> dict[str, dict[str, Any]]:
        """The state of every part as it was when the last step was finished."""
        state = {}
        for name, part in self.parts.items():
            now = part.state_dict()
            state[name] = now | {key: x for key, x in self._kept.get(name, {}).items() if key in now}
        state["progress"]["before"] = self.progress.wall  # what is lost has taken its time
        return state


def turns(built: RunComponents, stop: Stop) -> list[Any]:
    """Let Python run between the products of a step, so that signals are handled there; return the hooks' handles.

    The backward pass runs outside Python, on a CPU for minutes. On a GPU it only starts kernels, and a compiled network
    has no hooks inside. Only layers with a matrix are hooked, as the others take little time.
    """
    if built.recipe.compile or built.loader.device.type != "cpu":
        return []

    def backward(gradient: Tensor) -> None:
        stop.check()

    def forward(module: nn.Module, given: Any, made: Any) -> None:
        stop.check()
        if isinstance(made, Tensor) and made.requires_grad:
            made.register_hook(backward)

    networks = [network for network in (built.network, built.target) if network is not None]
    modules = [module for network in networks for module in network.modules()]
    layers = [m for m in modules if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    return [layer.register_forward_hook(forward) for layer in layers]
