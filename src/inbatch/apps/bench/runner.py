"""Run implementations in turns, each in its own process, so that changes over time affect all of them equally."""

import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from inbatch import errors
from inbatch.runtime import child_processes
from inbatch.runtime.signals import ending
from inbatch.runtime.tuning import without_tuning

SCRIPT = Path(__file__).with_name("worker.py")
OURS = "inbatch"
"""Name, or prefix of the name, of the implementation that the others are compared with."""


@dataclass
class Implementation:
    """Process that runs one workload on request.

    Attributes:
        who: Name in the table.
        job: Job of `worker.py`.
        python: Interpreter with the libraries to import.
        peer: Whether the library may be missing.
        limit: Maximum seconds per answer.
        until: Deadline of all rounds, by `time.monotonic`. A process that exceeds the limit or the deadline is killed;
            its completed rounds count.
        row: Result of the process so far.
        rates: Units per second of each completed round.
        late: Whether the process was killed for being late.
        process: The running process.
    """

    who: str
    job: Mapping[str, Any]
    python: str = sys.executable
    peer: bool = False
    limit: float = math.inf
    until: float = math.inf
    row: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    late: bool = False
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process, which imports its libraries and warms up."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.job["threads"]))
        # The figures must not depend on a cache of decoded images that an earlier run has left.
        env = without_tuning() | {"INBATCH_CACHE": "off"} | threads
        self.began = time.monotonic()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in end()
        self.process = child_processes.start(
            [self.python, str(SCRIPT), json.dumps(dict(self.job) | {"began": time.time()})], env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Start the process and wait until it is warm or has failed.

        Raise ConfigError or DataError for own settings or data.
        """
        if self.process is None:
            self.start()
        if self.job.get("waits"):
            self._send_go()
        self.row = self._answer()
        kind = {"ConfigError": errors.ConfigError, "DataError": errors.DataError}.get(self.row.get("kind", ""))
        if kind is not None and not self.peer:
            raise kind(self.row["failed"])

    def run_round(self) -> None:
        """Run one round."""
        if "failed" in self.row or self.process is None or self.late or time.monotonic() > self.until:
            return
        self._send_go()
        answer = self._answer()
        if "failed" in answer:
            self.row |= {} if self.late and self.rates else answer
        else:
            self.rates.append(answer["units"] / answer["seconds"])

    def _send_go(self) -> None:
        assert self.process and self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self.process and self.process.stdout
        allowed = min(self.limit, self.until - time.monotonic(), threading.TIMEOUT_MAX)
        timer = threading.Timer(max(0.0, allowed), self._stop)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self.process.wait()
        if self.late:
            return {"failed": f"not measured: stopped after {time.monotonic() - self.began:.0f} s"}
        if code == -9:  # the system's memory limit
            return {"failed": "out of memory"}
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [f"ended with {code}"]
        return {"failed": lines[-1]}

    def _stop(self) -> None:
        """Kill a late process, in a thread separate from the waiting one."""
        self.late = True
        self.kill()

    def kill(self) -> None:
        """Kill the process immediately."""
        if self.process is not None:
            self.process.kill()

    def end(self) -> dict[str, Any]:
        """End the process and return its results."""
        if self.process is not None:
            assert self.process.stdin and self.process.stdout
            with suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.errors.close()
            self.process = None
        if "failed" in self.row:
            return {"failed": self.row["failed"]}
        rates = {"rate": median(self.rates), "low": min(self.rates), "high": max(self.rates)} if self.rates else {}
        return rates | {"rounds": self.rates} | self.row


@dataclass
class BenchmarkRounds:
    """Comparison of implementations of the same workload.

    Attributes:
        title: Title of the table.
        unit: Unit of the results: something "/s", or "s" or "ms" per call.
        implementations: Implementations to compare.
    """

    title: str
    unit: str
    implementations: Sequence[Implementation]

    def run(self, rounds: int, ceilings: Mapping[str, Any], *, show_missing: bool) -> dict[str, Any]:
        """Run the rounds in turns, every other round in the opposite order; return the results, ready for JSON.

        Args:
            rounds: Number of rounds.
            ceilings: Hardware peak, to compute the share reached by implementations that state their operations or
                bytes.
            show_missing: Also list libraries that are not installed.
        """
        results: dict[str, Any] = {}
        with ending():
            try:
                for one in self.implementations:
                    if one.job.get("waits"):  # all import at the same time
                        one.start()
                for one in self.implementations:  # one after another, so that warm-ups do not disturb each other
                    one.warm_up()
                for number in range(rounds):
                    for one in self.implementations[:: 1 if number % 2 == 0 else -1]:
                        one.run_round()
            except BaseException:  # including signals: otherwise the processes would finish their work first
                for one in self.implementations:
                    one.kill()
                raise
            finally:
                rows = {one.who: one.end() for one in self.implementations}
        for who, row in rows.items():
            if show_missing or not row.get("failed", "").startswith("not installed"):
                results[who] = row | shared(row, ceilings)
        threads = sorted({one.job["threads"] for one in self.implementations})
        return {"title": self.title, "unit": self.unit, "threads": threads, "implementations": results}


def shared(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rate as a share of the peak: `needs` per unit (operations or bytes) over the machine's rate of `of`."""
    if "rate" not in row or "of" not in row or not ceilings.get(row["of"]):
        return {}
    return {"share": row["rate"] * row["needs"] / ceilings[row["of"]]}
