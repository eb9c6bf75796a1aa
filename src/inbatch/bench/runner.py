"""Contestants take turns, each a process of its own, so that what changes with time hits all alike."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from inbatch import errors

SCRIPT = Path(__file__).with_name("contest.py")
OURS = "inbatch"
"""The contestant that the others are compared with is called so, or begins so."""


@dataclass
class Contestant:
    """A process that works when it is told to, as seen from the one that tells it.

    job: what `contest.py` gets. python: whose libraries it imports. peer: whether it may be missing.
    """

    who: str
    job: Mapping[str, Any]
    python: str = sys.executable
    peer: bool = False
    row: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def meet(self) -> None:
        """Start it, and wait until it is warm or could not be. Raises what our own settings or data are guilty of."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.job["threads"]))
        # Nobody's figures hang on what an earlier run has left in a cache of decoded images.
        env = os.environ | {"INBATCH_CACHE": "off"} | threads
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in end()
        self.process = subprocess.Popen(
            [self.python, str(SCRIPT), json.dumps(dict(self.job) | {"began": time.time()})], text=True, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.row = self._answer()
        kind = {"ConfigError": errors.ConfigError, "DataError": errors.DataError}.get(self.row.get("kind", ""))
        if kind is not None and not self.peer:
            raise kind(self.row["failed"])

    def go(self) -> None:
        """One round."""
        if "failed" in self.row or self.process is None:
            return
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        answer = self._answer()
        if "failed" in answer:
            self.row = answer
        else:
            self.rates.append(answer["units"] / answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process and self.process.stdout
        if line := self.process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self.process.wait()
        if code == -9:  # the system's own limit
            return {"failed": "out of memory"}
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines() or [f"ended with {code}"]
        return {"failed": said[-1]}

    def end(self) -> dict[str, Any]:
        """Let the process end; what was found."""
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
class Race:
    """Contestants that do the same work.

    unit: of what they are told in: something "/s", or "s" or "ms" of one piece of work.
    """

    title: str
    unit: str
    contestants: Sequence[Contestant]

    def run(self, rounds: int, ceilings: Mapping[str, Any], *, show_missing: bool) -> dict[str, Any]:
        """Rounds in turns, every other one in the opposite order; what was found, fit for JSON.

        ceilings: what the machine does, by which a contestant that says what it needs is told its share.
        show_missing: also name libraries that are not installed.
        """
        found: dict[str, Any] = {}
        try:
            for one in self.contestants:  # one after another: a warm-up is no other's disturbance
                one.meet()
            for number in range(rounds):
                for one in self.contestants[:: 1 if number % 2 == 0 else -1]:
                    one.go()
        finally:
            rows = {one.who: one.end() for one in self.contestants}
        for who, row in rows.items():
            if show_missing or not row.get("failed", "").startswith("not installed"):
                found[who] = row | shared(row, ceilings)
        threads = sorted({one.job["threads"] for one in self.contestants})
        return {"title": self.title, "unit": self.unit, "threads": threads, "contestants": found}


def shared(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """A rate as a share of a ceiling: `needs` of a unit (operations or bytes) over what the machine does of `of`."""
    if "rate" not in row or "of" not in row or not ceilings.get(row["of"]):
        return {}
    return {"share": row["rate"] * row["needs"] / ceilings[row["of"]]}
