"""Stop a run at any time: a checkpoint holds the state after the last completed step.

A step changes weights, optimiser, target network and memory bank only after its backward pass, and from that point it
completes. Before, it changes only buffers (running statistics of norm layers), which are copied when a step completes.
A step, an online evaluation or a survey can therefore be lost at any time, and a resumed run repeats it.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from inbatch.errors import InbatchError
from inbatch.runtime import distributed, shared_work
from inbatch.runtime.signals import GRACE, Stop, StopRequested, finishing, stopped, watchdog, without_result
from inbatch.training.build import RunComponents
from inbatch.training.checkpoint import save
from inbatch.training.status import Report

Result = TypeVar("Result")


class Stopping:
    """Handle signals in a run of one process; several processes agree after each step (`distributed.all_reduce_max`).

    In an evaluation, which the ranks share, a signal to any of them counts at once.

    Args:
        built: The run.
        parts: All components with state to checkpoint, including `progress`.
        report: Status report of the run.
        stop: Signal state.
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
        handles = check_between_layers(self.built, self.stop) if self.alone else []
        try:
            self.finished()
            yield
        except StopRequested as request:
            self.stop.hold()
            raise self.answer(request.number) from None
        except InbatchError as raised:  # the watchdog may report it: launchers end all ranks after a death
            self._error = self._error or raised
            raise
        finally:
            error = self._error
            watchdog.answer = without_result if error is None else lambda number: error
            for handle in handles:
                handle.remove()

    def begin(self) -> None:
        """Mark the beginning of a training step; a signal waits for its end if the last step was quick."""
        self._step, self._began = self.progress.step, time.monotonic()
        self.stop.quick = self._took < GRACE

    def finished(self) -> None:
        """Keep the current state; a checkpoint uses it if the following step is lost."""
        if self._step + 1 == self.progress.step:
            self._took = time.monotonic() - self._began
        self._kept["progress"] = self.progress.state_dict() | {"curve": list(self.progress.curve)}
        self._logged = self._log.stat().st_size if self._log.exists() else 0
        if not self.alone:
            self.stop.hold()
            return
        # Before the first step of an epoch, the curator's network and a method's clusters are computed again.
        whole = self.progress.step % self.built.loader.steps == 0
        for name, part in self.parts.items():
            if name == "progress":
                continue
            if whole and name in ("curator", "method"):
                self._kept[name] = copy.deepcopy(part.state_dict())
            elif isinstance(part, nn.Module) and name != "method":
                self._kept[name] = {key: x.clone() for key, x in part.named_buffers(remove_duplicate=False)}
            else:
                self._kept.pop(name, None)
        self.stop.release()

    def shared(self, work: Callable[[], Result]) -> Result:
        """Return on every rank rank 0's result of work that all ranks do together, and that may be lost.

        A signal to any rank ends the work and raises StopRequested on every rank.
        """
        if self.alone:
            return work()
        with self.stop.losing(), shared_work.sharing(self.stop):
            result = work()
        return cast(Result, distributed.broadcast_object(result))

    def answer(self, number: int) -> InbatchError:
        """Return the error that ends the run, after saving a checkpoint if needed; any thread may call it.

        A checkpoint is saved if the last one on the disk is older than the state.
        """
        with finishing:
            if self._error is None:
                self._error = self._answer(number)
            return self._error

    def _answer(self, number: int) -> InbatchError:
        step, total = self.progress.step, self.built.total
        kept = self._kept.get("progress", {})
        if kept.get("step") == step:
            unsaved = step and (step, kept["ended"]) != self.progress.saved
            if unsaved and (distributed.rank() == 0 or self.built.whole is not None):
                save(self.out / "checkpoints", self._state(), step=step, run=self.built.facts())
            if distributed.rank() == 0 and self._log.exists():
                os.truncate(self._log, self._logged)  # what a lost evaluation logged will be logged again
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
        """Return the state of every part at the end of the last completed step."""
        state = {}
        for name, part in self.parts.items():
            now = part.state_dict()
            state[name] = now | {key: x for key, x in self._kept.get(name, {}).items() if key in now}
        state["progress"]["before"] = self.progress.wall  # the lost work has taken time
        return state


def check_between_layers(built: RunComponents, stop: Stop) -> list[Any]:
    """Let Python run between the layers of a step, so that signals are handled there; return the handles of the hooks.

    The backward pass runs outside Python, on a CPU for minutes. On a GPU it only launches kernels, and a compiled
    network has no hooks inside. Only layers with a matrix are hooked, because the others take little time.
    """
    if built.recipe.compile or built.loader.device.type != "cpu":
        return []

    def backward(gradient: Tensor) -> None:
        stop.check()

    def forward(module: nn.Module, inputs: Any, output: Any) -> None:
        stop.check()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(backward)

    networks = [network for network in (built.network, built.target) if network is not None]
    modules = [module for network in networks for module in network.modules()]
    layers = [m for m in modules if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    return [layer.register_forward_hook(forward) for layer in layers]
