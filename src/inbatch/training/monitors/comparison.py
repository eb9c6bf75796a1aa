"""Compare the curve of a run with a reference during training; the comparison affects no decision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inbatch.errors import listed
from inbatch.training.monitors.reference import FLOORS, Curve, Reference
from inbatch.training.monitors.reference_files import MEASURES, differing


@dataclass(frozen=True)
class Comparison:
    """The curve of a run and its reference.

    Attributes:
        reference: The reference over the evaluations of the run (`Reference.over`).
        curve: The curve of the run, which grows during training.
        epochs: Epochs after which the run is evaluated.
        steps: Steps per epoch.
    """

    reference: Reference
    curve: Curve
    epochs: Sequence[int]
    steps: int

    def opening(self, recipe: Mapping[str, Any]) -> list[str]:
        """Return sentences for the start of a run of this (nested) recipe: the reference and the limits."""
        ref, seeds = self.reference, len(self.reference.curves)
        ends, end = ref.epochs[-1], self.epochs[-1]
        notes = [f"Compared with {ref.name}: {seeds} seed{'s' * (seeds > 1)}, {ends:g} epochs."]
        if seeds == 1:
            floors = (f"{MEASURES[m]} {fixed or f'{share:.0%}'}" for m, (fixed, share) in FLOORS.items())
            notes.append(
                f"The reference has one seed, so the band is +- {', '.join(floors)}; correct runs may leave it."
            )
        if ends != end:
            notes.append(
                f"The reference has {ends:g} epochs, this run {end}: they are compared at equal epochs, but a schedule "
                "of another length has another curve."
            )
        if other := differing(recipe, ref.recipe, {"seed", "epochs", "evaluate_every"}) if ref.recipe else []:
            notes.append(f"Not the reference's: {listed(other)}.")
        if set(self.epochs) - set(ref.epochs) - {epoch for epoch in self.epochs if epoch > ends}:
            notes.append("The reference was evaluated after other epochs: its band is interpolated linearly.")
        if gone := [m for m in MEASURES if not any(ref.band(m, epoch) for epoch in self.epochs)]:
            notes.append(f"Not compared, because the reference has no values at these evaluations: {', '.join(gone)}.")
        return notes

    def new_sentences(self) -> list[str]:
        """Return a sentence for each measure that has left its band, or returned to it, at the last evaluation."""
        notes = []
        for measure in MEASURES:
            *before, now = (self.reference.place(measure, entry) for entry in self.curve)
            if now not in (None, next((place for place in reversed(before) if place), "inside")):
                notes.append(self.reference.sentence(measure, self.curve[-1]))
        return notes

    def json(self) -> dict[str, Any]:
        """Return the entry of `result.json`: the number of compared evaluations, and by measure the epochs outside."""
        places = self._places()
        evaluations = len({epoch for positions in places.values() for epoch in positions})
        outside = {
            m: [epoch for epoch, place in positions.items() if place != "inside"] for m, positions in places.items()
        }
        ref = self.reference
        return {"reference": ref.name, "seeds": len(ref.curves), "looks": evaluations, "outside": outside}

    def summary(self) -> str:
        """Return a summary of the whole run in one line."""
        counts = [
            f"{list(positions.values()).count('inside')} of {len(positions)} evaluations ({MEASURES[measure]})"
            for measure, positions in self._places().items()
        ]
        return f"Compared with {self.reference.name}: inside the band at {', '.join(counts) or 'no evaluation'}."

    def _places(self) -> dict[str, dict[float, str]]:
        """Return measure -> epoch -> position relative to the band, for all compared values."""
        places: dict[str, dict[float, str]] = {}
        for measure in MEASURES:
            for entry in self.curve:
                if place := self.reference.place(measure, entry):
                    places.setdefault(measure, {})[entry["epoch"]] = place
        return places
