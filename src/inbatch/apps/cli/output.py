"""Print the results of runs and evaluations: tables of figures, planned runs and repeated steps."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inbatch.apps.console import print_table, say
from inbatch.errors import many
from inbatch.runtime.own_parts import is_own

if TYPE_CHECKING:  # at run time, every --help would import torch
    from inbatch.apps.quickstart import Verdict

FIGURES = {
    "k-NN": ("knn", "top1"),
    "linear": ("linear", "top1"),
    "NMI": ("clustering", "nmi"),
    "ACC": ("clustering", "acc"),
    "ARI": ("clustering", "ari"),
    "mAP": ("retrieval", "map"),
    "fine-tuned": ("finetune", "top1"),
    "head NMI": ("head", "nmi"),
    "head ACC": ("head", "acc"),
    "head ARI": ("head", "ari"),
}
"""Heading -> location of the figure in an evaluation; NMI, ACC and ARI compare clusters with classes."""


def figures(evaluation: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the main figures that an evaluation contains."""
    results = evaluation or {}
    return {name: results[protocol][key] for name, (protocol, key) in FIGURES.items() if protocol in results}


def conditions(evaluation: Mapping[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """Return the evaluations with few labels or on corrupted images, by description: k-NN and linear probe each."""
    results = evaluation or {}
    rows = [(f"{share} of the labels", part) for share, part in results.get("few", {}).get("shares", {}).items()]
    if corrupted := results.get("corruptions"):
        rows += [("corrupted", corrupted), *((f"by {kind}", part) for kind, part in corrupted["kinds"].items())]
    return rows


def print_figures(evaluations: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Print a table of the main figures in percent, with a row per name and condition."""
    rows = [
        row
        for name, evaluation in evaluations.items()
        for row in ((name, figures(evaluation)), *((f"  {how}", figures(f)) for how, f in conditions(evaluation)))
    ]
    columns = [name for name in FIGURES if any(name in row for _, row in rows)]
    cells = [[name, *(f"{row[c]:.1%}" if c in row else "" for c in columns)] for name, row in rows]
    print_table(["", *columns], cells, numbers=True)


MEASURES = {
    "same_image": "same image found", "rankme": "RankMe", "lidar": "LiDAR", "alpha": "alpha-ReQ",
    "sigreg_distance": "SIGReg distance", "feature_std": "feature std",
}  # fmt: skip
"""Titles of the measures without labels."""


def print_measures(measures: Mapping[str, Mapping[str, Any]], before: str, after: str) -> None:
    """Print a table of the measures without labels: before and after training, and which direction is better."""

    def cell(name: str, value: float | None) -> str:
        return "" if value is None or value != value else f"{value:.1%}" if name == "same_image" else f"{value:.3g}"

    rows = [
        (MEASURES.get(name, name), cell(name, measure["untrained"]), cell(name, measure["trained"]), measure["better"])
        for name, measure in measures.items()
    ]
    count = max((measure.get("images", 0) for measure in measures.values()), default=0)
    what = f"without labels, {many(count, 'image')}" if count else "without labels"  # older results have no count
    print_table([what, before, after, "better"], rows, numbers=True)


def evaluation_lines(evaluation: Mapping[str, Any], held_out: str) -> list[str]:
    """Return lines on the images behind the figures and balanced accuracy, with notes on what limits clustering."""
    count, classes = evaluation["test"]["labelled"], len(evaluation["test"].get("per_class", ()))
    lines = [f"Judged by:  {many(count, 'image')}: {held_out}"]
    if balanced := [f"{name} {one['balanced']:.1%}" for name, one in _per_class(evaluation).items()]:
        lines.append(f"Balanced:   {', '.join(balanced)} (mean over the classes: {classes:,})")
    if one := evaluation.get("retrieval"):
        recall = ", ".join(f"{value:.1%} at {k}" for k, value in one["recall"].items())
        alone = f"; {one['left_out']:,} of classes with one image" if one["left_out"] else ""
        lines.append(f"Retrieval:  recall {recall}; {many(one['queries'], 'image')} as queries{alone}")
    for name, one in (("clustering", evaluation.get("clustering", {})), ("the head", evaluation.get("head", {}))):
        if one.get("used", 0) < one.get("clusters", 0):
            lines.append(f"Note:       {name} found {one['used']:,} of {one['clusters']:,} clusters; others are empty")
    clusters = evaluation.get("clustering", {}).get("clusters", 0)
    if clusters == 1:
        lines.append("Note:       NMI, ACC and ARI of images of one class are 1 for any features")
    elif count < 10 * clusters:
        lines.append(f"Note:       NMI and ACC of {count:,} images in {clusters:,} clusters are high by chance alone")
    return lines


def print_evaluation(evaluation: Mapping[str, Any], run: str) -> None:
    """Print the figures of a run's encoder, and the images behind them."""
    if "unlabelled" in evaluation:
        print_measures(evaluation["unlabelled"], evaluation["initial"], run)
        say("", f"Judged by:  {evaluation['images']:,} images without labels")
    else:
        untrained = {evaluation["initial"]: evaluation["untrained"]} if evaluation["untrained"] else {}
        print_figures(untrained | {run: evaluation})
        print_classes(evaluation)
        say("", *evaluation_lines(evaluation, evaluation["held_out"]))
    say(*([f"Note:       {evaluation['note']}"] if evaluation["note"] else []))


def print_classes(evaluation: Mapping[str, Any], most: int = 20) -> None:
    """Print the accuracy of each class, or of the `most` classes with the lowest, lowest first."""
    accuracies, counts = _per_class(evaluation), evaluation["test"]["per_class"]
    if not accuracies:
        return
    first = next(iter(accuracies.values()))["per_class"]
    names = sorted(counts, key=first.__getitem__)
    cells = [
        [name, f"{counts[name]:,}", *(f"{one['per_class'][name]:.1%}" for one in accuracies.values())]
        for name in names[:most]
    ]
    say("")
    print_table(["class", "images", *accuracies], cells, numbers=True)
    if len(names) > most:
        say(f"and {len(names) - most:,} more classes, none with a lower accuracy (--json prints all)")


def _per_class(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluations with an accuracy per class, by their heading; older results have none."""
    parts = {name: evaluation.get(protocol, {}) for name, (protocol, _) in FIGURES.items()}
    return {name: part for name, part in parts.items() if "per_class" in part}


def print_verdict(verdict: "Verdict") -> None:
    """Print the table of a quickstart, its plots, and the next command."""
    folder = verdict.run.directory
    print_figures(verdict.rows)
    if verdict.reached:
        say("", f"{verdict.sentence()}.")
    say("", f"Curves:      {folder / 'curves.png'}", f"Neighbours:  {folder / 'neighbours.png'}")
    say("", "Now your own photos, labelled or not:", "", "  inbatch pretrain --data ~/photos")


def print_run(result: Mapping[str, Any]) -> None:
    """Print the table of a finished run, its speed, its directory ("run"), and the next commands."""
    run, folder, data = result["run"], shlex.quote(result["run"]), shlex.quote(result["recipe"]["data"])
    if result["evaluation"]:
        print_figures({result["initial"]: result["untrained"], "trained encoder": result["evaluation"]})
        say("", *evaluation_lines(result["evaluation"], result["held_out"]), "")
    print_measures(result["unlabelled"], result["initial"], "trained encoder")
    if not result["evaluation"]:
        why = f" ({result['label_note']})" if "label_note" in result else ""
        folders = "With a sub-folder per class, or labelled --set test=FOLDER, there is one."
        say("", f"No labels{why}, so no accuracy. {folders}")
    say("", f"Neighbours: {Path(run) / 'neighbours.png'} (left: before training, right: after)")
    for sentence in result["collapsed"]:
        say(f"Warning:    at the end of the run {sentence}", "")
    say(f"Speed:      {result['images_per_second']:,.0f} images/s, {result['training_seconds']:,.0f} s of training")
    name = result["recipe"]["encoder"]["name"]
    typed = f" --encoder {shlex.quote(name)}" if is_own(name) else ""
    say(f"Run:        {run}", "", "Next:", "", f"  inbatch embed {folder} {data} -o features.parquet{typed}")
    if result["evaluation"]:
        say(f"  inbatch evaluate {folder} --k 20{typed}")


def print_dry_run(plan: Mapping[str, Any]) -> None:
    """Print a planned run as a YAML file for --config, with further information in comments."""
    import yaml

    lines = plan["description"].splitlines()
    lines += [f"judged:  by {plan['held_out'] or 'nothing: there are no labels'}"]
    lines += [f"views:   {' + '.join('x'.join(map(str, v)) for v in plan['views'])} (samples x channels x pixels)"]
    lines += [f"rows:    {name} {'x'.join(map(str, v))} (views x samples x width)" for name, v in plan["rows"].items()]
    memory = plan["memory_bytes_estimate"]
    parts = ", ".join(f"{name.replace('_', ' ')} {size_text(n)}" for name, n in memory.items() if n and name != "sum")
    lines += [f"memory:  an estimate of {size_text(memory['sum'])}, in addition to Python and torch: {parts}"]
    if memory["sum"] > plan["memory_bytes_free"]:
        lines += [f"         MORE THAN THE FREE {size_text(plan['memory_bytes_free'])}: use a smaller --context"]
    say(*(f"# {line}" for line in lines))
    say(*yaml.safe_dump(plan["recipe"], sort_keys=False, allow_unicode=True).rstrip().split("\n"))


def print_replay(result: Mapping[str, Any]) -> None:
    """Print a repeated step: whether it failed again, where that begins, and its result in float32."""
    say(f"Captured:  {result['captured']}")
    tries = {result["precision"]: result} | ({"float32": result["float32"]} if "float32" in result else {})
    for precision, one in tries.items():
        how = "not finite again" if one["reproduced"] else "finite"
        say("", f"Again in {precision}: {how}; loss {one['loss']:.6g}, gradient's norm {one['grad_norm']:.6g}")
        places = one["places"]
        say(*(f"  {'first' if i == 0 else 'then'} {place}" for i, place in enumerate(places[:4])))
        if len(places) > 4:
            say(f"  and {len(places) - 4:,} more places behind it (--json lists them)")
    if not result["reproduced"]:
        say("", "It is not repeated here: the same device, versions and number of threads compute the same numbers.")
    elif "float32" in result and not result["float32"]["reproduced"]:
        say("", "In float32 the step is finite: --set precision=float32.")


def size_text(count: float) -> str:
    """Return a number of bytes with its unit."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
