"""A run's curve beside a reference while it trains: what to say, and what its result holds. Nothing here decides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inbatch.training.monitors.reference import FLOORS, Curve, Reference
from inbatch.training.monitors.reference_files import MEASURES, differing, listed


@dataclass(frozen=True)
class Comparison:
    """A run's curve and what it is compared with.

    reference: over the looks (`Reference.over`). curve: the run's, which grows while it trains.
    looks: the epochs after which the run is looked at. steps: of an epoch.
    """

    reference: Reference
    curve: Curve
    looks: Sequence[int]
    steps: int

    def opening(self, recipe: Mapping[str, Any]) -> list[str]:
        """Sentences for the start of a run of this (nested) recipe: with what it is compared, and how far that goes."""
        ref, seeds = self.reference, len(self.reference.curves)
        ends, end = ref.epochs[-1], self.looks[-1]
        notes = [f"Compared with {ref.name}: {seeds} seed{'s' * (seeds > 1)}, {ends:g} epochs."]
        if seeds == 1:
            floors = (f"{MEASURES[m]} {fixed or f'{share:.0%}'}" for m, (fixed, share) in FLOORS.items())
            notes.append(
                f"One seed does not say how far seeds lie apart: the band is +- {', '.join(floors)}, and sound runs "
                "may leave it."
            )
        if ends != end:
            notes.append(
                f"The reference has {ends:g} epochs, this run {end}: they are compared at equal epochs, but a schedule "
                "of another length has another curve."
            )
        if other := differing(recipe, ref.recipe, {"seed", "epochs", "evaluate_every"}) if ref.recipe else []:
            notes.append(f"Not the reference's: {listed(other)}.")
        if set(self.looks) - set(ref.epochs) - {epoch for epoch in self.looks if epoch > ends}:
            notes.append("The reference was looked at after other epochs: between them its band is a straight line.")
        if gone := [m for m in MEASURES if not any(ref.band(m, epoch) for epoch in self.looks)]:
            notes.append(f"Not compared, for the reference has none at these looks: {', '.join(gone)}.")
        return notes

    def news(self) -> list[str]:
        """Sentences for the last look: which measures have left their band since the look before, or come back."""
        notes = []
        for measure in MEASURES:
            *before, now = (self.reference.place(measure, entry) for entry in self.curve)
            if now not in (None, next((place for place in reversed(before) if place), "inside")):
                notes.append(self.reference.sentence(measure, self.curve[-1]))
        return notes

    def json(self) -> dict[str, Any]:
        """For `result.json`: at how many looks there was something to compare, and by measure the epochs outside."""
        places = self._places()
        looks = len({epoch for found in places.values() for epoch in found})
        outside = {m: [epoch for epoch, place in found.items() if place != "inside"] for m, found in places.items()}
        ref = self.reference
        return {"reference": ref.name, "seeds": len(ref.curves), "looks": looks, "outside": outside}

    def summary(self) -> str:
        """The whole run in one line."""
        counts = [
            f"{list(found.values()).count('inside')} of {len(found)} looks ({MEASURES[measure]})"
            for measure, found in self._places().items()
        ]
        return f"Compared with {self.reference.name}: inside the band at {', '.join(counts) or 'no look'}."

    def _places(self) -> dict[str, dict[float, str]]:
        """Measure -> epoch -> where it lay, where there was something to compare."""
        found: dict[str, dict[float, str]] = {}
        for measure in MEASURES:
            for entry in self.curve:
                if place := self.reference.place(measure, entry):
                    found.setdefault(measure, {})[entry["epoch"]] = place
        return found
