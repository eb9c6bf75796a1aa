"""Communication between ranks without collectives, through their rendezvous store: it works after collectives fail."""

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from inbatch.errors import ConfigError, DataError, InbatchError, RankError, TrainingError

GRACE = 10.0
"""Seconds in which ranks must answer `find_failure`. torchrun kills the survivors of a dead process after 30."""

_KINDS: dict[int, type[InbatchError]] = {kind.exit_code: kind for kind in (ConfigError, DataError, TrainingError)}


class RankStore:
    """Store shared by the ranks of one run.

    Args:
        store: torch's store, shared by all ranks.
        run: prefix of all keys, different for every run on the same store.
        rank: this rank.
        world: number of ranks.
        timeout: seconds after which a rank that does not reach a synchronisation point is an error.
        how: how the work of a lost rank is continued, for its error; by default with --resume.
    """

    def __init__(self, store: Any, run: str, rank: int, world: int, timeout: float, how: str = "") -> None:
        self.store, self.run, self.rank, self.world, self.timeout = store, run, rank, world, timeout
        self._comparisons, self._advice = 0, f"{_ADVICE} {how or _RESUME}"

    def compare_facts(self, facts: Mapping[str, str]) -> None:
        """Wait until all ranks have arrived with the same facts; ConfigError on every rank names the differences.

        An error that a rank has reported (`report`) ends the waiting of all others, with its message.
        """
        self._comparisons += 1
        key, arrivals = f"meeting {self._comparisons}", f"meeting {self._comparisons} came"
        self._set(f"{key} {self.rank}", json.dumps(dict(facts)))
        if not self._wait(lambda: self._has(f"{key} 0"), self.timeout):
            raise self._lost(self._missing(key), self.timeout)
        first = json.loads(self._get(f"{key} 0"))
        differences = [
            f"the {name}: rank {self.rank} has a different one from rank 0 ({_short(mine)}, not {_short(other)})"
            for name in sorted(first.keys() | facts.keys())
            if (mine := facts.get(name, "none")) != (other := first.get(name, "none"))
        ]
        if differences:
            problem = (
                f"ranks disagree about {', and about '.join(differences)}. Start all with the same command and files"
            )
            self.report(problem, ConfigError.exit_code)
            error = ConfigError(problem)
            error.alone = True  # rank 0 may be ended before it receives the error
            raise error
        if self._add(arrivals) == self.world:
            self._set(f"{key} all", "")
        if not self._wait(lambda: self._has(f"{key} all"), self.timeout):
            raise self._lost(self._missing(key), self.timeout)

    def report(self, sentence: str, code: int) -> None:
        """Record why this rank ends, for the other ranks to report; the first record wins."""
        if self._add("endings") == 1:
            self._set("ended", json.dumps({"sentence": sentence, "code": code, "rank": self.rank}))

    def find_failure(self) -> InbatchError:
        """Return the error after a failed collective: one reported by a rank, else one that names silent ranks."""
        grace = min(GRACE, self.timeout)
        try:
            self._set(f"here {self.rank}", "")
            self._wait(lambda: not self._missing("here"), grace)
            return self._lost(self._missing("here"), grace)
        except InbatchError as error:
            return error
        except RuntimeError:  # the store may be lost, too: it is in the process of rank 0 or of the launcher
            return self._lost([0], 0, f"lost the store of the ranks, and so rank 0 or the launcher: {self._advice}")

    def interrupt(self, number: int) -> None:
        """Record that this rank was stopped by a signal."""
        self._set("signal", str(number))

    def interrupted(self) -> int:
        """Return the signal by which a rank was stopped; 0 without one."""
        return int(self._get("signal")) if self._has("signal") else 0

    def advance(self, work: str, finished: bool = False) -> None:
        """Record that this rank goes on with some work (a name), or has finished it, for `follow` on other ranks."""
        self._add(f"{work} {self.rank}")
        if finished:
            self._set(f"{work} {self.rank} finished", "")

    def follow(self, work: str, ranks: Iterable[int]) -> None:
        """Wait, however long it takes, until ranks have finished some work, as long as each of them goes on.

        Raises:
            RankError: names the ranks that have not called `advance` for `timeout` seconds.
        """
        known = {rank: (-1, time.monotonic()) for rank in ranks}

        def finished() -> bool:
            for rank, (count, _) in list(known.items()):
                if self._has(f"{work} {rank} finished"):
                    del known[rank]
                elif (now := self.store.add(f"{self.run} {work} {rank}", 0)) != count:
                    known[rank] = now, time.monotonic()
            return not known

        while not self._wait(finished, min(5.0, self.timeout)):
            if silent := [rank for rank, (_, since) in known.items() if time.monotonic() - since > self.timeout]:
                raise self._lost(silent, self.timeout)

    def _lost(self, missing: list[int], waited: float, sentence: str = "") -> RankError:
        """Return an error that names the missing ranks; the lowest of the others reports it for all."""
        if not missing:
            sentence = "the connection between ranks broke, but all of them are running: continue with --resume"
        names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        sentence = sentence or f"lost {names}: no answer for {waited:,.0f} s and no reported error. {self._advice}"
        present = [rank for rank in range(self.world) if rank not in missing]
        return RankError(sentence, reports_for_all=bool(present) and self.rank == present[0])

    def _missing(self, what: str) -> list[int]:
        return [rank for rank in range(self.world) if not self._has(f"{what} {rank}")]

    def _wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Return whether the condition became true in time; raise the error that another rank has reported."""
        end, pause = time.monotonic() + seconds, 0.005
        while not until():
            if self._has("ended"):
                ended = json.loads(self._get("ended"))
                if ended["rank"] != self.rank:
                    kind = _KINDS.get(ended["code"], RankError)
                    raise kind(ended["sentence"])
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
        return True

    def _set(self, key: str, value: str) -> None:
        self.store.set(f"{self.run} {key}", value)

    def _get(self, key: str) -> bytes:
        return self.store.get(f"{self.run} {key}")

    def _has(self, key: str) -> bool:
        return self.store.check([f"{self.run} {key}"])

    def _add(self, key: str) -> int:
        return self.store.add(f"{self.run} {key}", 1)


def new_prefix(store: Any, rank: int, world: int, timeout: float) -> str:
    """Return a prefix for keys that all ranks share and no earlier start has used.

    The store of torchrun survives restarts, including the keys of the previous processes: gloo then connects to dead
    processes (seen with torch 2.14). So a rank accepts from rank 0 only the answer to its own message.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"inbatch hello {rank}", word)
    waiting = set(range(1, world))
    while waiting if rank == 0 else not store.check([f"inbatch answer {word}"]):
        for other in list(waiting) if rank == 0 else ():
            if store.check([f"inbatch {word} {other}"]):
                waiting.discard(other)
            elif store.check([f"inbatch hello {other}"]):
                store.set(f"inbatch answer {store.get(f'inbatch hello {other}').decode()}", word)
        if time.monotonic() > end:
            who = f"ranks {', '.join(map(str, sorted(waiting)))}" if rank == 0 else "rank 0"
            raise RankError(
                f"{world} processes did not connect within {timeout:,.0f} s: {who} did not join. Start all of them, "
                "with the same MASTER_ADDR and MASTER_PORT",
                reports_for_all=True,
            )
        time.sleep(0.02)
    if rank == 0:
        return word
    chosen = store.get(f"inbatch answer {word}").decode()
    store.set(f"inbatch {chosen} {rank}", "")
    return chosen


_ADVICE = (
    "It died (possibly out of memory), hangs, or exceeded --dist-timeout. See its own output for the cause; continue"
)
_RESUME = "from the last checkpoint with --resume"


def _short(fact: str) -> str:
    return fact if len(fact) <= 40 else f"{fact[:40]}..."
