"""Write the tables of docs/choose.md: how well measures without labels order checkpoints and runs by k-NN.

    python scripts/choose_tables.py

Reads every committed record that has a curve with k-NN and measures without labels: results/records (the papers'
tables), results/methods, results/plugins, single runs in results, and results/choose.json (measure_choose.py). Older
records have no LiDAR and alpha-ReQ. A test compares the page, and the figures that `inbatch choose` quotes, with the
records.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inbatch.apps.reports.choose import SCORES
from inbatch.evaluation.rank_correlation import Group, Tau, kendall_tau, pooled_tau
from inbatch.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "choose.md"
QUOTING = ROOT / "src" / "inbatch" / "apps" / "reports" / "choose_study.py"
NEW = "choose.json"
UNITS = 4
"""Smallest number of settings for an interval."""
VARIED = {"seed", "budget", "replans", "test", "command"}
HEADINGS = {"rankme": "RankMe", "lidar": "LiDAR", "alpha": "alpha-ReQ", "std": "feature std", "loss": "loss"}
HEADINGS |= {"same_image": "same image", "step": "later is better"}


@dataclass(frozen=True)
class Run:
    """A run in the records.

    Attributes:
        origin: File or folder of its record.
        group: What is equal for the runs that it is compared with, except the method.
        method: Its method.
        setting: Identifies its settings without the seed.
        curve: Entries of its online evaluations after the start.
        last: Further estimates of its last checkpoint.
    """

    origin: str
    group: str
    method: str
    setting: str
    curve: list[dict[str, float]]
    last: dict[str, Any]


def read_runs(folder: Path = ROOT / "results") -> list[Run]:
    """Return every run in the records whose curve has k-NN and RankMe."""
    runs = [run for name, record in _records(folder) for run in [_run(name, record)] if len(run.curve) > 0]
    for one in json.loads((folder / NEW).read_text())["runs"]:
        setting = f"{one['method']} {one['number']}"
        curve = [*one["curve"][:-1], one["curve"][-1] | {"same_image": one["last"]["same_image_common"]}]
        runs.append(Run(NEW, NEW, one["method"], setting, curve, one["last"]))
    return runs


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of runs with a recipe and a curve, with the name of their file or folder."""
    for path in sorted(folder.glob("records/*.json")):
        yield "records", json.loads(path.read_text())
    for path in sorted(folder.glob("*.json")):
        yield path.name, json.loads(path.read_text())
    for path in sorted([*folder.glob("methods/*.json"), *folder.glob("plugins/*.json")]):
        for part in json.loads(path.read_text()).values():
            for entry in [part] if "runs" in part else part.values():
                for run in entry["runs"]:
                    yield f"{path.parent.name}/{path.name}", run | {"recipe": entry.get("recipe")}


def _run(name: str, record: dict[str, Any]) -> Run:
    recipe, curve = record.get("recipe"), record.get("curve")
    if not isinstance(recipe, dict) or "method" not in recipe or not isinstance(curve, list):
        return Run(name, "", "", "", [], {})
    curve = [entry for entry in curve if entry.get("step") and {"knn", "rankme", "feature_std"} <= entry.keys()]
    same = [name, *(str(recipe.get(key)) for key in ("data", "subset", "image_size", "epochs"))]
    same.append(recipe["encoder"]["name"])
    setting = json.dumps({key: value for key, value in recipe.items() if key not in VARIED}, sort_keys=True)
    return Run(name, " ".join(same), recipe["method"]["name"], setting, curve, {})


def value(score: Callable[[Mapping[str, float]], float], entry: Mapping[str, float]) -> float:
    """Return the score of an entry of a curve, higher is better; nan if it has no such measure."""
    try:
        return score(entry)
    except (KeyError, TypeError):
        return math.nan


def within(runs: list[Run], score: Callable[[Mapping[str, float]], float]) -> tuple[Tau, int]:
    """Return tau-b over the checkpoints of a run, the mean over runs, and their number.

    The interval is by resampling settings: the checkpoints of one run, and the seeds of one setting, are not
    independent.
    """
    units = defaultdict(list)
    for run in runs:
        x, y = [value(score, entry) for entry in run.curve], [entry["knn"] for entry in run.curve]
        if len(x) >= 3 and all(map(math.isfinite, x)) and not math.isnan(tau := kendall_tau(x, y)):
            units[run.origin + run.setting].append(tau)
    return mean_of(list(units.values())), sum(map(len, units.values()))


def mean_of(units: list[list[float]], resamples: int = 1000) -> Tau:
    """Return the mean of all values, with an interval by resampling units of values."""
    import numpy as np

    if not units:
        return Tau(math.nan, math.nan, math.nan)
    sums, counts = np.array([sum(unit) for unit in units]), np.array([len(unit) for unit in units])
    drawn = np.random.default_rng(0).multinomial(len(units), np.full(len(units), 1 / len(units)), resamples)
    low, high = np.percentile((drawn @ sums) / (drawn @ counts), [2.5, 97.5])
    return interval(Tau(float(sums.sum() / counts.sum()), float(low), float(high)), len(units))


def interval(tau: Tau, units: int) -> Tau:
    """Return a value without its interval if there are fewer than `UNITS` settings to resample."""
    return tau if units >= UNITS else tau._replace(low=math.nan, high=math.nan)


def between(runs: list[Run], score: Callable[[Mapping[str, float]], float], methods: bool = False) -> tuple[Tau, int]:
    """Return tau-b over the last checkpoints of comparable runs, pooled over groups, and the number of runs.

    Comparable runs have the same data, encoder and number of epochs, and the same method unless `methods`.
    """
    groups = defaultdict(list)
    for run in runs:
        if math.isfinite(value(score, run.curve[-1])):
            groups[run.group, None if methods else run.method].append(run)
    kept = [group for group in groups.values() if len({run.setting for run in group}) > 1]
    units = sum(len({run.setting for run in group}) for group in kept)
    pooled = [
        Group(
            [value(score, run.curve[-1]) for run in group], [run.curve[-1]["knn"] for run in group],
            [run.setting for run in group],
        )
        for group in kept
    ]  # fmt: skip
    return interval(pooled_tau(pooled), units), sum(map(len, kept))


def cell(tau: Tau) -> str:
    """Return a value with its interval."""
    if math.isnan(tau.value):
        return ""
    return f"{tau.value:+.2f}" + ("" if math.isnan(tau.low) else f" ({tau.low:+.2f} to {tau.high:+.2f})")


def table(runs: list[Run], how: Callable[..., tuple[Tau, int]], measures: Mapping[str, Any], **options: Any) -> str:
    """Return a table with a line per method, one for all of them, and a column per measure."""
    headings = ["method", "runs", *(HEADINGS[name] for name in measures)]
    lines = [f"| {' | '.join(headings)} |", "|" + " --- |" * len(headings)]
    for name, part in by_method(runs).items():
        taus = [how(part, score, **options) for score in measures.values()]
        if count := max(number for _, number in taus):
            lines.append(f"| {name} | {count} | {' | '.join(cell(tau) for tau, _ in taus)} |")
    return "\n".join(lines) + "\n"


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """Return the runs of every method, and those of all of them."""
    names = [name for name in METHODS if any(run.method == name for run in runs)]
    marks = {name: " (labels)" if METHODS[name].labels else "" for name in names}
    return {name + marks[name]: [r for r in runs if r.method == name] for name in names} | {"all": runs}


def tables(runs: list[Run]) -> dict[str, str]:
    """Return the tables of the page by the name of their marker."""
    new, old = [run for run in runs if run.origin == NEW], [run for run in runs if run.origin != NEW]
    known = {name: SCORES[name] for name in ("rankme", "std", "loss")}
    recorded = {name: score for name, score in SCORES.items() if name != "same_image"}
    later = {"step": lambda entry: entry["step"]}
    texts = {"between new": table(new, between, SCORES), "within new": table(new, within, recorded | later)}
    texts |= {"between records": table(old, between, known), "within records": table(old, within, known | later)}
    return texts | {"across": across(new, old), "estimates": estimates(new)}


def across(new: list[Run], old: list[Run]) -> str:
    """Return a table of the runs of all methods compared with each other."""
    lines = [f"| runs | number | {' | '.join(HEADINGS[name] for name in SCORES)} |", "|" + " --- |" * (2 + len(SCORES))]
    for name, runs in (("this study", new), ("records", old)):
        taus = [between(runs, score, methods=True) for score in SCORES.values()]
        lines.append(f"| {name} | {max(n for _, n in taus)} | {' | '.join(cell(tau) for tau, _ in taus)} |")
    return "\n".join(lines) + "\n"


def estimates(new: list[Run]) -> str:
    """Return a table of other estimates of LiDAR and other scores, between the runs of one method."""
    sizes = list(new[0].last["lidar"])
    others: dict[str, Callable[[Run], float]] = {
        f"LiDAR, {size}": lambda run, size=size: run.last["lidar"][size] for size in sizes
    }
    others["LiDAR, 100 x 10, the same views for all runs"] = lambda run: run.last["lidar_common"]
    others["alpha-ReQ, lower is better"] = lambda run: -run.curve[-1]["alpha"]
    others["alpha-ReQ, higher is better"] = lambda run: run.curve[-1]["alpha"]
    lines = ["| estimate | between runs of one method | between all runs |", "| --- | --- | --- |"]
    for name, get in others.items():
        changed = [replace(run, curve=[run.curve[-1] | {"it": get(run)}]) for run in new]
        taus = [between(changed, lambda entry: entry["it"], methods)[0] for methods in (False, True)]
        lines.append(f"| {name} | {' | '.join(map(cell, taus))} |")
    return "\n".join(lines) + "\n"


def quoted(runs: list[Run]) -> str:
    """Return the figures that `inbatch choose` quotes, as Python source."""
    lines = ["BETWEEN: dict[str, dict[str, tuple[float, float, float, int]]] = {"]
    for measure, score in SCORES.items():
        lines.append(f'    "{measure}": {{')
        for name, part in by_method(runs).items():
            tau, count = between(part, score)
            if count and not math.isnan(tau.low):
                figures = ", ".join(repr(round(x, 2) + 0.0) for x in tau)
                lines.append(f'        "{name.partition(" ")[0]}": ({figures}, {count}),')
        lines.append("    },")
    return "\n".join([*lines, "}\n"])


def page(runs: list[Run]) -> str:
    """Return docs/choose.md with new tables between its markers."""
    text = PAGE.read_text()
    for name, new in tables(runs).items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, new=new: match[1] + new + match[2], text, flags=re.S)
    return text


def source(runs: list[Run]) -> str:
    """Return the module that quotes the figures, with new ones."""
    return re.sub(r"BETWEEN: .*?^}\n", lambda _: quoted(runs), QUOTING.read_text(), flags=re.S | re.M)


def main() -> None:
    runs = read_runs()
    PAGE.write_text(page(runs))
    QUOTING.write_text(source(runs))


if __name__ == "__main__":
    main()
