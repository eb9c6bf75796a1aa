"""Write docs/results from results/records, so that no figure is typed by hand."""

from pathlib import Path

from inbatch.apps.papers import TABLES
from inbatch.apps.papers.curve_plot import curves
from inbatch.apps.papers.filled_table import FilledTable, fill
from inbatch.apps.papers.render import hours, markdown
from inbatch.apps.papers.results import Records, read_records, wall_seconds

HERE = Path(__file__).resolve().parents[1] / "results"
DOCS = HERE.parent / "docs" / "results"
SCALES = ("cpu", "gpu", "paper")
HEAD = """# The papers' tables and figures

Each is one command, `inbatch table NAME`, and one file of [src/inbatch/apps/papers/tables](../../src/inbatch/apps/papers/tables): its rows and their
settings, the paper's figures, what we do otherwise. Figures are made of the files in [results/records](../../results/records), one
for each run; this page and those below are written by `python scripts/render_tables.py`, and a test compares them with the files.

```bash
inbatch table                                                    # what there is
inbatch table ba-ssl-3                                           # what came out, what differs, every command; runs nothing
inbatch table ba-ssl-3 --scale cpu --data cifar10=FOLDER         # run what is missing on two cores
inbatch table ba-ssl-3 --scale cpu --on digits --row SimCLR --seed 0   # one cell
inbatch table ba-ssl-3 --scale cpu --from runs/table/results -o table.html   # or .md, .tex
```

| scale | what |
| --- | --- |
| `smoke` | 192 digits, one epoch: whether everything works |
| `cpu` | embedded digits in colour (30 epochs) and a fifth of CIFAR-10 (4 epochs), a small encoder; about two minutes a run, one run on each core |
| `gpu` | CIFAR-10 and 100 classes of Tiny ImageNet, ResNet-18, 200 epochs, one GPU |
| `paper` | as published; prints a `torchrun` command for every run, to be launched where there is a cluster (`inbatch slurm` writes a batch script). Runs that lie finished in `--work` become results by the same command |

A run is a process of its own, and lies in `runs/table` with its log; its result in `runs/table/results`. Ctrl-C or SIGTERM lets the running ones save themselves, and the same command goes on; what has a result is not run again. A
run that diverges is a result, shown as failed with its last words (`--again` runs it anew), and so is a protocol that does after the training; a run without images is none. A `--work` holds one table at a time. "Gain" is the mean over the seeds of the difference from the row without, at the same seed, with the p of a paired
t-test: with three seeds only large differences are told from chance. `inbatch pretrain ... --compare auto` holds a run of your own against the [curves](../compare.md) of these.

| table or figure | what | cpu scale | time on one core |
| --- | --- | --- | --- |
"""


def stem(sheet: FilledTable) -> str:
    """The name of a page."""
    return sheet.table.name if sheet.scale == "cpu" else f"{sheet.table.name}-{sheet.scale}"


def sheets(records: Records) -> list[FilledTable]:
    """Every table at every scale that has a run."""
    every = [fill(table, scale, records) for table in TABLES.values() for scale in SCALES]
    return [sheet for sheet in every if sheet.records and (sheet.scale == "cpu" or _learned(sheet))]


def _learned(sheet: FilledTable) -> bool:
    """Whether anything was learned: what is only counted is the same at every scale."""
    return any("pairs" not in record.recipe for record in sheet.records.values())


def pages(records: Records) -> dict[str, str]:
    """The text of every page by its file's name."""
    made = {}
    for sheet in sheets(records):
        picture = f"{stem(sheet)}.png" if sheet.table.curve else None
        made[f"{stem(sheet)}.md"] = markdown(sheet, picture=picture, runs="../../results/records")
    lines = []
    for table in TABLES.values():
        sheet = fill(table, "cpu", records)
        name = f"[{table.name}]({table.name}.md)" if f"{table.name}.md" in made else table.name
        done = sum(record.status == "finished" for record in sheet.records.values())
        spent = hours(wall_seconds(sheet.records.values())) if done else ""
        lines.append(f"| {name} | {table.title} | {done} of {sheet.wanted} runs | {spent} |")
    return {"README.md": HEAD + "\n".join(lines) + "\n"} | made


def main() -> None:
    records = read_records(HERE / "records")
    DOCS.mkdir(exist_ok=True)
    made = pages(records)
    for old in DOCS.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (DOCS / name).write_text(text)
    for sheet in sheets(records):
        if sheet.table.curve and (png := curves(sheet)):
            (DOCS / f"{stem(sheet)}.png").write_bytes(png)


if __name__ == "__main__":
    main()
