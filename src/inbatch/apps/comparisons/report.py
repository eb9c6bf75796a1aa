"""The result of a comparison: figures by variant, paired tests, and a sentence for each comparison."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from inbatch.apps.comparisons.choice import best_of
from inbatch.apps.comparisons.metrics import METRICS, SHOWN, Metric
from inbatch.apps.comparisons.plan import Plan, differing
from inbatch.apps.comparisons.variation import Variation, variations
from inbatch.apps.papers.results import Records
from inbatch.apps.statistics import (
    LEVEL,
    MOST,
    POWER,
    Difference,
    detectable,
    difference,
    holm,
    largest_deviation,
    seeds_for,
)
from inbatch.errors import many


def report(plan: Plan, records: Records, *, all_pairs: bool, detect: float | None) -> dict[str, Any]:
    """Return the result of a comparison, ready for JSON.

    Args:
        plan: The comparison.
        records: Records of its runs; missing ones are counted.
        all_pairs: Compare all pairs, not only every variant with the first.
        detect: A difference for which the number of seeds is stated, in the unit of the metric.
    """
    metric = plan.metric
    rows = variations(plan, records)
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :] if all_pairs or i == 0]
    tested = [
        (a, b, difference([round(b.values[seed] - a.values[seed], 9) for seed in a.values if seed in b.values]))
        for a, b in pairs
    ]
    known = [one.p for _, _, one in tested if one.p is not None]
    corrected = iter(holm(known))
    comparisons = [
        _comparison(a, b, one, None if one.p is None else next(corrected), len(known), metric, detect)
        for a, b, one in tested
    ]
    ended = [record.status for row in rows for record in row.records if record is not None]
    return {
        "data": rows[0].cells[0].data, "images": plan.images, "judged_by": plan.held_out,
        "metric": _metric_entry(metric),
        "seeds": [cell.seed for cell in rows[0].cells],
        "variants": [
            _row(row, own, metric) | {"command": replace(recipe, seed=row.cells[0].seed).command()}
            for row, own, recipe in zip(rows, differing(plan.recipes), plan.recipes, strict=True)
        ],
        "comparisons": comparisons,
        "best": best_of(rows, metric) if len(rows) > 2 else None,
        "runs": {
            "wanted": sum(len(row.cells) for row in rows), "finished": ended.count("finished"),
            "failed": ended.count("failed"),
        },
        "notes": [*plan.notes, *_notes(rows, metric)],
    }  # fmt: skip


def _metric_entry(metric: Metric) -> dict[str, Any]:
    return {
        "name": next(name for name in METRICS if METRICS[name] == metric), "heading": metric.heading,
        "path": metric.path, "percent": metric.percent, "better": "higher" if metric.higher else "lower",
        "accuracy": metric.labels,
    }  # fmt: skip


def _row(row: Variation, settings: dict[str, Any], metric: Metric) -> dict[str, Any]:
    """Return the figures of a variant; all but the tested one as mean and deviation only."""
    records = [record for record in row.records if record is not None and record.status == "finished"]
    others = {}
    for name in SHOWN:
        values = [value for record in records if (value := METRICS[name].value(record)) is not None]
        if METRICS[name] != metric and values:
            others[name] = {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else None}
    values = list(row.values.values())
    return {
        "name": row.name, "settings": settings,
        "values": {str(seed): value for seed, value in row.values.items()},
        "mean": mean(values) if values else None, "deviation": stdev(values) if len(values) > 1 else None,
        "count": len(values), "failed": row.failed, "others": others,
        "steps": sorted({record.steps for record in records if record.steps is not None}),
        "seconds": mean(record.wall_seconds for record in records) if records else None,
        "failures": [text for record in row.records if record is not None for text in record.failures.values()],
    }  # fmt: skip


def _comparison(
    first: Variation, second: Variation, one: Difference, p: float | None, count: int, metric: Metric,
    detect: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Return one comparison with its sentence.

    Args:
        first: The variant that the other is compared with.
        second: The other variant.
        one: Its differences from the first.
        p: p value after Holm's correction; None if there is none.
        count: Number of comparisons that are corrected for.
        metric: The tested figure.
        detect: A difference for which the number of seeds is stated.
    """
    shown = p is not None and p < LEVEL
    plan = _planning(one, count, detect)
    content = {"first": first.name, "second": second.name} | one.json()
    content |= {"holm_p": p, "corrected_for": count, "shown": shown, "planning": plan}
    return content | {"sentence": " ".join(_sentences(content, metric))}


def _planning(one: Difference, count: int, detect: float | None) -> dict[str, Any] | None:
    """Return numbers of seeds for the level of one of `count` comparisons; None without an estimate of the spread."""
    spread, effect = one.deviation, one.mean
    if not spread or effect is None:
        return None
    level, cautious = LEVEL / max(1, count), largest_deviation(spread, len(one.values))
    plan: dict[str, Any] = {
        "power": POWER, "level": level, "deviation": spread, "cautious_deviation": cautious,
        "detectable": detectable(spread, len(one.values), level),
        "observed": {"seeds": seeds_for(effect, spread, level), "cautious": seeds_for(effect, cautious, level)},
    }  # fmt: skip
    if detect is not None:
        seeds = {"seeds": seeds_for(detect, spread, level), "cautious": seeds_for(detect, cautious, level)}
        plan["stated"] = {"difference": detect} | seeds
    return plan


def _sentences(one: dict[str, Any], metric: Metric) -> list[str]:
    """Return what a comparison shows, how it was tested, and what more seeds would show."""
    names, seeds = f"{one['second']} against {one['first']}", many(len(one["values"]), "seed")
    if one["mean"] is None:
        return [f"{names}: no seed has both runs, so nothing is shown."]
    size = f"{metric.text(one['mean'], sign=True)}{metric.unit} of {metric.heading}"
    if one["interval"] is None:
        return [f"{names}: {size} with 1 seed. One seed shows nothing: use at least 3, better 6."]
    if one["deviation"] == 0:
        return [f"{names}: {size} with each of {seeds}. Equal differences cannot be tested; check that seeds differ."]
    low, high = (metric.text(end, sign=True) for end in one["interval"])
    tests = (
        f"95 % interval {low} to {high}, {seeds}, paired t-test p {_p(one['p'])}, "
        f"after Holm's correction for {many(one['corrected_for'], 'comparison')} {_p(one['holm_p'])}"
    )
    if one["shown"]:
        better = (one["mean"] > 0) == metric.higher
        verdict = f"Shown: {one['second']} is {'better' if better else 'worse'} than {one['first']} by {size}"
        return [f"{verdict} ({tests}).", *_sign_flip_sentences(one)]
    return [
        f"Not shown: {names} is {size} ({tests}). This does not show that they are equal.",
        *_planning_sentences(one, metric),
    ]


def _sign_flip_sentences(one: dict[str, Any]) -> list[str]:
    """Return a sentence if the test without the assumption of normal differences does not agree."""
    if one["sign_flip_p"] < LEVEL / one["corrected_for"]:
        return []
    least = one["smallest_sign_flip_p"]
    limit = f", its smallest value with {many(len(one['values']), 'seed')}" if one["sign_flip_p"] <= least else ""
    return [
        f"It rests on the t-test's assumption that differences are normally distributed: the sign-flip test, which "
        f"assumes only symmetry, has p {_p(one['sign_flip_p'])}{limit}."
    ]


def _planning_sentences(one: dict[str, Any], metric: Metric) -> list[str]:
    plan = one["planning"]
    if plan is None:
        return []
    power, digits = f"{100 * plan['power']:.0f} %", metric.digits + 1
    sentences = [
        f"With {many(len(one['values']), 'seed')} and this spread ({plan['deviation']:.{digits}f}), only a true "
        f"difference of {plan['detectable']:.{digits}f}{metric.unit} or more is shown with a power of {power}."
    ]
    if one["mean"]:
        sentences.append(f"A true difference of the observed size needs {_seeds(plan['observed'])}.")
    if "stated" in plan:
        size = f"{metric.text(plan['stated']['difference'])}{metric.unit}"
        sentences.append(f"A true difference of {size} needs {_seeds(plan['stated'])}.")
    return sentences


def _seeds(counts: dict[str, int | None]) -> str:
    """Return numbers of seeds as text; the cautious one is for the upper limit of the spread."""
    if counts["seeds"] is None:
        return f"more than {MOST:,} seeds"
    cautious = counts["cautious"]
    upper = f"more than {MOST:,}" if cautious is None else f"{cautious:,}"
    total = f"{many(counts['seeds'], 'seed')} in all"
    return total if cautious == counts["seeds"] else f"about {total}, cautiously {upper}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "below 0.001"


def _notes(rows: Sequence[Variation], metric: Metric) -> list[str]:
    notes = [
        "Differences are paired by seed; the spread is over seeds (weights, order, views), with the same images and "
        "the same split, and not over other images.",
        "The t-test assumes normally distributed differences, which few seeds cannot confirm.",
    ]
    if not metric.labels:
        notes.insert(0, f"{metric.heading} needs no labels and is not an accuracy: a better value can come with worse "
                        "features.")  # fmt: skip
    if lost := sum(row.failed for row in rows):
        verb = "is" if lost == 1 else "are"
        notes.append(f"{many(lost, 'run')} failed and {verb} not in the means, which may be too good for that variant.")
    sizes = {
        (part["train"]["labelled"], part["test"]["labelled"])
        for row in rows
        for record in row.records
        if record is not None and "train" in (part := record.evaluation or {})
    }
    if len(sizes) > 1:
        notes.append(f"The runs were not evaluated on equally many images: {sorted(sizes)}.")
    return notes
