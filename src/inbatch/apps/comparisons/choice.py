"""The best of several variants: chosen on one half of the test images, its figure stated on the other."""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from inbatch.apps.comparisons.metrics import Metric
from inbatch.apps.comparisons.variation import Variation

NEW_SEEDS = "Train it with new seeds (--seeds) before you publish its figure."
Value = Callable[[Variation, int], float]


def best_of(rows: Sequence[Variation], metric: Metric) -> dict[str, Any] | None:
    """Return the best of the variants that have all their runs, the figures of the choice, and a sentence.

    If the figure is known for each half of the test images, the first half chooses, and the figure is that of the
    second half. "by_other_seeds" is what choosing gives if other seeds, on the first half, choose for each seed.
    """
    whole = [row for row in rows if len(row.values) == len(row.cells)]
    if not whole:
        return None
    halved = all(len(row.halves) == len(row.cells) for row in whole)

    def choosing(row: Variation, seed: int) -> float:
        return row.halves[seed][0] if halved else row.values[seed]

    def stating(row: Variation, seed: int) -> float:
        return row.halves[seed][1] if halved else row.values[seed]

    seeds = list(whole[0].values)
    best = _highest(whole, seeds, choosing, metric)
    own, chosen_at = (mean(value(best, seed) for seed in seeds) for value in (stating, choosing))
    others = {seed: [one for one in seeds if one != seed] for seed in seeds if len(seeds) > 1}
    held = [stating(_highest(whole, rest, choosing, metric), seed) for seed, rest in others.items()]
    by_others = mean(held) if held else None
    texts = (metric.text(chosen_at), metric.text(own), None if by_others is None else metric.text(by_others))
    return {
        "name": best.name, "mean": own, "chosen_at": chosen_at, "held_out": halved, "by_other_seeds": by_others,
        "sentence": _sentence(best.name, len(whole), halved, *texts),
    }  # fmt: skip


def _highest(rows: Sequence[Variation], seeds: Sequence[int], value: Value, metric: Metric) -> Variation:
    """Return the variant with the best mean over these seeds, the first of equals."""
    sign = 1 if metric.higher else -1
    return max(rows, key=lambda row: sign * mean(value(row, seed) for seed in seeds))


def _sentence(name: str, count: int, halved: bool, chosen_at: str, own: str, held: str | None) -> str:
    """Return what was chosen, by which images, and the figure on images that the choice did not use."""
    if halved:
        text = (
            f"Best of {count}, chosen on one half of the test images: {name}, {chosen_at} there and {own} on the other "
            "half, which the choice did not use."
        )
        if held is not None:
            text += f" Chosen for each seed by the other seeds, the other half gives {held}."
        return f"{text} {NEW_SEEDS}"
    text = f"Best of {count}: {name}, {own}."
    if held is not None:
        text += f" Chosen for each seed by the other seeds: {held}."
    return (
        f"{text} The choice used the images that evaluate it, so the figure of the best is too high on average: "
        "evaluate the chosen variant on images that no choice has used, and with new seeds."
    )
