"""Writes README.md beside it from the runs' JSON files, so that no figure is typed by hand: python results/render.py"""

import json
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# Results

One file per run, as `inbatch` wrote it (`result.json` of the run's folder): command, recipe, versions, hardware,
commit, curve, figures with their protocol, speed and memory. Bad runs are kept too. This page is written by `python
results/render.py`, and a test compares it with the files.

CIFAR-10 is the JPEG copy: re-encoded at about quality 75, so accuracies stand a little below those on the
original files.

| run | k-NN untrained | k-NN | linear | NMI / ACC / ARI | images/s | training min | all min | peak GB | on |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(path: Path) -> str:
    """A run's line: figures in percent, k-NN with its k."""
    run = json.loads(path.read_text())
    found, recipe, where = run["evaluation"], run["recipe"], run["environment"]
    clusters = " / ".join(f"{100 * found['clustering'][key]:.1f}" for key in ("nmi", "acc", "ari"))
    cells = [
        f"[{path.stem}]({path.name}): {recipe['method']['name']}, {recipe['encoder']['name']}, "
        f"{run['images']:,} images, {recipe['epochs']} epochs, batch {recipe['batch']}, seed {recipe['seed']}",
        f"{100 * run['curve'][0]['knn']:.1f}",
        f"{100 * found['knn']['top1']:.1f} (k {found['knn']['k']})",
        f"{100 * found['linear']['top1']:.1f}",
        clusters,
        f"{run['images_per_second']:,.0f}",
        f"{run['training_seconds'] / 60:.1f}",
        f"{run['wall_seconds'] / 60:.1f}" if "wall_seconds" in run else "",
        f"{run['peak_memory_bytes'] / 1e9:.1f}",
        f"{where['threads']} threads, {where['processor']}" if where["device"] == "cpu" else where["device"],
    ]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page; files that are no run's result are not in the table."""
    runs = [path for path in sorted(HERE.glob("*.json")) if "curve" in json.loads(path.read_text())]
    return HEAD + "\n".join(row(path) for path in runs) + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())
