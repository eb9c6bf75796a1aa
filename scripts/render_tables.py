"""Write docs/results from results/records, so that no figure is typed by hand."""

from pathlib import Path

from inbatch.apps.papers import TABLES
from inbatch.apps.papers.curve_plot import curves
from inbatch.apps.papers.effects import effects
from inbatch.apps.papers.filled_table import FilledTable, fill
from inbatch.apps.papers.render import markdown
from inbatch.apps.papers.results import Records, read_records, wall_seconds
from inbatch.apps.papers.table_notes import hours

HERE = Path(__file__).resolve().parents[1] / "results"
DOCS = HERE.parent / "docs" / "results"
SCALES = ("cpu", "laptop", "gpu", "paper")
HEAD = """# The papers' tables and figures

Each table or figure is one command, `inbatch table NAME`, and one file of
[src/inbatch/apps/papers/tables](../../src/inbatch/apps/papers/tables) with its rows, their settings, the paper's figures, and the
differences from the paper. All values are computed from the files in [results/records](../../results/records), one per run. This
page and those below are written by `python scripts/render_tables.py`; a test compares them with the files.

```bash
inbatch table                                                    # list of tables
inbatch table ba-ssl-3                                           # results, differences, every command; runs nothing
inbatch table ba-ssl-3 --scale cpu --data cifar10=FOLDER         # run missing cells on two cores
inbatch table ba-ssl-3 --scale cpu --on digits --row SimCLR --seed 0   # one cell
inbatch table ba-ssl-3 --scale laptop --precision float32 --data cifar10=FOLDER   # not that of the processor
inbatch table ba-ssl-3 --scale cpu --from runs/table/results -o table.html   # or .md, .tex
```

| scale | content |
| --- | --- |
| `smoke` | 192 digits, one epoch: a functional check |
| `cpu` | embedded digits in colour (30 epochs) and a fifth of CIFAR-10 (4 epochs), a small encoder; about two minutes a run, one run on each core |
| `laptop` | all of CIFAR-10 and of 100 classes of Tiny ImageNet at 32 pixels, the preset [fast](../fast.md), 4 epochs: features are learned (k-NN of SimCLR above 65 %). Ten minutes of training a run on one core, and as long again for its evaluations on all images; the expected time is printed first. The pages state intervals, the seeds that a difference needs, and its cost |
| `gpu` | CIFAR-10 and 100 classes of Tiny ImageNet, ResNet-18, 200 epochs, one GPU |
| `paper` | as published; prints a `torchrun` command for every run, to be launched on a cluster (`inbatch slurm` writes a batch script). The same command then collects the results of finished runs in `--work-dir` |

Each run is a separate process. Its directory and log are in `runs/table`, its result in `runs/table/results`. After Ctrl-C or
SIGTERM, running processes save a checkpoint; the same command continues them and skips finished runs. A run that diverges is a
result, shown as failed with its error message (`--retry-failed` repeats it), as is a protocol that fails after training. A run
without images is not a result. A `--work-dir` holds one table at a time. The precision is that of the machine, bf16 where it is fast; with `--precision` every
machine computes in the same one, and results in another are missing. A page states it. A run that was repeated on another kind of
processor has a second file, of any other name: a row is compared with the run on its own kind. "Gain" is the mean over the seeds of the difference from
the row without, at the same seed, with the p of a paired t-test: with three seeds, only large differences are distinguishable from
chance. `inbatch pretrain ... --compare auto` compares a run with the [curves](../compare.md) of these.

| table or figure | title | cpu scale | time on one core | laptop scale | time on one core |
| --- | --- | --- | --- | --- | --- |
"""


def stem(filled: FilledTable) -> str:
    """Return the file name of a page, without its ending."""
    return filled.table.name if filled.scale == "cpu" else f"{filled.table.name}-{filled.scale}"


def fill_tables(records: Records) -> dict[tuple[str, str], FilledTable]:
    """Return every table at every scale, by their names."""
    return {(table.name, scale): fill(table, scale, records) for table in TABLES.values() for scale in SCALES}


def tables_with_results(every: dict[tuple[str, str], FilledTable]) -> list[FilledTable]:
    """Return those tables of `fill_tables` whose runs answer something."""
    return [
        filled
        for filled in every.values()
        if filled.records and (filled.scale == "cpu" or (_has_training(filled) and _has_comparison(filled)))
    ]


def _has_comparison(filled: FilledTable) -> bool:
    """Return whether two rows can be compared: tables share runs, so that one row alone may have some."""
    compares = any(line.row.against for line in filled.lines)
    return (
        any(effect.time for effect in effects(filled))
        if compares
        else sum(bool(line.records) for line in filled.lines) > 1
    )


def _has_training(filled: FilledTable) -> bool:
    """Return whether a network was trained: counts alone are the same at every scale."""
    return any("pairs" not in record.recipe for record in filled.records.values())


def pages(records: Records) -> dict[str, str]:
    """Return the text of every page by file name."""
    texts, every = {}, fill_tables(records)
    for filled in tables_with_results(every):
        picture = f"{stem(filled)}.png" if filled.table.curve_at(filled.scale) else None
        texts[f"{stem(filled)}.md"] = markdown(filled, picture=picture, runs="../../results/records")
    lines = []
    for table in TABLES.values():
        name = f"[{table.name}]({table.name}.md)" if f"{table.name}.md" in texts else table.name
        cells = [name, table.title]
        for scale in ("cpu", "laptop"):
            filled = every[table.name, scale]
            done = sum(record.status == "finished" for record in filled.records.values())
            page = f"{stem(filled)}.md"
            count = f"{done} of {filled.total_runs} runs"
            cells.append(f"[{count}]({page})" if scale == "laptop" and page in texts else count)
            cells.append(hours(wall_seconds(filled.records.values())) if done else "")
        lines.append(f"| {' | '.join(cells)} |")
    return {"README.md": HEAD + "\n".join(lines) + "\n"} | texts


def main() -> None:
    records = read_records(HERE / "records")
    DOCS.mkdir(exist_ok=True)
    texts = pages(records)
    for old in DOCS.glob("*.md"):
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        (DOCS / name).write_text(text)
    for filled in tables_with_results(fill_tables(records)):
        if filled.table.curve_at(filled.scale) and (png := curves(filled)):
            (DOCS / f"{stem(filled)}.png").write_bytes(png)


if __name__ == "__main__":
    main()
