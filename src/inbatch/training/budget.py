"""Time budgets: parsing them, and adjusting the length of a run while the speed of the machine changes."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from inbatch.errors import ConfigError

LEAST = 60.0
"""Smallest budget in seconds: startup, evaluation and writing alone take up to half of it."""
LATE, EARLY = 0.05, 0.15
"""Largest shares of a budget by which a run may end late, and early."""

_MOST = 1000 * 86400.0
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ONE = r"(\d+(?:\.\d+)?) ?(s|sec|seconds?|m|min|minutes?|h|hours?|d|days?)"
_WRITTEN = re.compile(rf"{_ONE}(?: ?{_ONE})*")


def parse_budget(value: Any) -> float:
    """Return the seconds of a budget such as "45m", "1h 30m" or "2 days", of a number of seconds, or of a timedelta.

    Raises:
        ConfigError: For other text, or a budget of less than `LEAST` seconds.
    """
    text = str(value).strip().lower()
    seconds = math.nan
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = math.inf if abs(value) >= _MOST else float(value)
    elif _WRITTEN.fullmatch(text):
        seconds = sum(float(count) * _UNITS[unit[0]] for count, unit in re.findall(_ONE, text))
    if math.isnan(seconds):
        raise ConfigError(f"budget = {text[:40]!r} is not a time: write minutes, hours or days, such as 45m, 1h30m, 2d")
    if seconds >= _MOST:
        raise ConfigError(f"budget = {text[:40]!r} is too long: give at most {_MOST / 86400:,.0f} days, such as 2d")
    if seconds < LEAST:
        raise ConfigError(f"budget = {text[:40]!r} is too short: a run needs at least {LEAST:g} seconds, such as 10m")
    return seconds


def duration(seconds: float) -> str:
    """Return a readable duration in at most two units: "45 s", "12 min", "3 h 20 min", "11 days"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        hours, rest = divmod(minutes, 60)
        return f"{hours} h {rest} min" if rest and hours < 10 else f"{round(minutes / 60)} h"
    days = seconds / 86400
    return f"{days:,.0f} days" if days < 1000 else f"{days / 365:,.0f} years"


@dataclass
class Timeline:
    """The length of a run in steps, and the schedule position of each step after changes of that length.

    Schedules are functions of the position. Until the first change the position of a step is the step itself. After a
    change, the rest of the plan is scaled to the remaining steps, so that every schedule reaches its end.

    Attributes:
        planned: Number of steps of the recipe.
        changes: (step, number of steps left from there), in order.
    """

    planned: int
    changes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of steps of the whole run, as currently known."""
        return sum(self.changes[-1]) if self.changes else self.planned

    def place(self, step: int) -> float:
        """Return the position of a step in the planned run, from 0 to `planned`."""
        place, start, left = 0.0, 0, self.planned
        applied = False
        for at, rest in self.changes:
            if step < at:
                break
            place += (self.planned - place) * (at - start) / left if left else 0.0
            start, left, applied = at, rest, True
        if not applied:
            return step
        return place + (self.planned - place) * (step - start) / left if left else float(self.planned)

    def progress(self, step: int) -> float:
        """Return the completed share of the run at a step, from 0 to 1."""
        return self.place(step) / self.planned

    def change(self, step: int, left: int) -> None:
        """Set the number of steps that remain from `step` on."""
        self.changes = [change for change in self.changes if change[0] < step]
        self.changes.append((step, left))


_TOLERATED, _FEW = 0.02, 20
"""A run is shortened if its steps are late by more than this share of the rest, in the last few steps by any amount."""


@dataclass
class Pace:
    """Decide when the length of a run must change so that it ends within its budget.

    Attributes:
        seconds: The budget.
        reserve: Seconds reserved for the work after the last step.
        growth: (end as a share of the run, relative cost of a step until there; 1 is the highest cost), for runs with
            progressive resizing.
    """

    seconds: float
    reserve: float = 0.0
    growth: Sequence[tuple[float, float]] = ()
    _slack: float = 0.015

    def fitting(self, used: float, per_step: float, progress: float) -> int:
        """Return the number of steps that still fit if a step at this point of the run takes `per_step` seconds."""
        left = self.seconds * (1 - self._slack) - self.reserve - used
        return max(0, int(left / (per_step * self._mean_cost(progress) / self.cost(progress))))

    def revised(
        self, step: int, timeline: Timeline, used: float, per_step: float, surveys: Callable[[int], float] | None = None
    ) -> int | None:
        """Return the number of steps that must remain for the run to end in time; None if the plan holds.

        surveys: Seconds of the surveys of the data set before so many more steps; None for 0.
        """
        progress, planned = timeline.progress(step), timeline.total - step
        fits = self.fitting(used, per_step, progress)
        least = 0
        while surveys is not None and least < fits:  # the more steps, the more surveys
            middle = -(-(least + fits) // 2)
            if middle <= self.fitting(used + surveys(middle), per_step, progress):
                least = middle
            else:
                fits = middle - 1
        if fits < planned * (1 - _TOLERATED) or (fits < planned and planned <= _FEW):
            return fits
        # Time becomes available if other processes stop; near the end it does not justify another schedule.
        return fits if fits > planned * 1.1 + 1 and progress < 0.8 else None

    def cost(self, progress: float) -> float:
        """Return the relative cost of a step at a share of the run."""
        return next((cost for end, cost in self.growth if progress < end), 1.0)

    def _mean_cost(self, progress: float) -> float:
        """Return the mean relative cost of the steps from here to the end."""
        if progress >= 1:
            return 1.0
        total, at = 0.0, progress
        for end, cost in (*self.growth, (1.0, 1.0)):
            if end > at:
                total, at = total + (end - at) * cost, end
        return total / (1 - progress)


class RunClock:
    """Monitor the clock of a run: when to check it, whether the length must change, when to save a checkpoint.

    One process decides (rank 0), because clocks differ.

    Args:
        pace: The pace of a run with a budget; None for a run without one, for which only checkpoints are timed.
        clock: Return the seconds that the run has taken.
        every: Seconds between two checkpoints.
    """

    def __init__(self, pace: Pace | None, clock: Callable[[], float], every: float = 600.0) -> None:
        self.pace, self.elapsed, self.every = pace, clock, every
        self.per_step: float | None = None
        self.evaluation_seconds = self.survey_seconds = 0.0
        self.reported_total = 0  # the final step that was last reported to the user
        self._saved = self._checked = clock()
        self._idle, self._step, self._cost = 0.0, 0, math.nan
        self._interval = max(0.5, 0.01 * pace.seconds) if pace else every

    def start(self, step: int, total: int) -> None:
        """Start timing with the next step; the run currently ends at step `total`."""
        self.reported_total = total
        self._step, self._checked, self._idle = step, self.elapsed(), 0.0

    def due(self) -> bool:
        """Return whether the clock must be checked."""
        now = self.elapsed()
        hurry = self.pace is not None and now > 0.9 * (self.pace.seconds - self.pace.reserve)
        return now - self._checked >= self._interval * (0.2 if hurry else 1) or now - self._saved >= self.every

    def paused(self, seconds: float) -> None:
        """Exclude time from the pace that was not training: an online evaluation, a survey, a checkpoint."""
        self._idle += seconds

    def saved(self) -> None:
        """Record that a checkpoint has been written."""
        self._saved = self.elapsed()

    def check(
        self, step: int, timeline: Timeline, evaluations_left: int, frozen: int = 0,
        surveys_left: Callable[[int], int] = lambda steps: 0,
    ) -> tuple[int | None, bool]:  # fmt: skip
        """Return how many steps must remain (None: as planned), and whether to save a checkpoint.

        Args:
            step: Number of completed steps.
            timeline: Length of the run.
            evaluations_left: Number of evaluations that follow.
            frozen: Number of steps at the start in which the encoder does not learn; they do not predict the others.
            surveys_left: Return the number of surveys of the data set before so many more steps.
        """
        now = self.elapsed()
        cost = self.pace.cost(timeline.progress(step)) if self.pace else 1.0
        if self._step < frozen:
            self.per_step = None
        elif cost != self._cost:  # the image size has changed: earlier steps do not predict the next ones
            self.per_step, self._cost = None, cost
        elif step > self._step:
            recent = max(1e-9, now - self._checked - self._idle) / (step - self._step)
            self.per_step = recent if self.per_step is None else (self.per_step + recent) / 2
        self._step, self._checked, self._idle = step, now, 0.0
        left = None
        if self.pace is not None and self.per_step is not None:
            used, each = now + self.evaluation_seconds * evaluations_left, self.survey_seconds
            surveys = (lambda steps: each * surveys_left(steps)) if each else None
            left = self.pace.revised(step, timeline, used, self.per_step, surveys)
        return left, now - self._saved >= self.every
