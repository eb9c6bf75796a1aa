"""Writes docs/results from the records in records/, so that no figure is typed by hand: python results/tables.py"""

from pathlib import Path

from inbatch.papers import TABLES
from inbatch.papers.render import curves, hours, markdown
from inbatch.papers.results import Records, read_records, wall_seconds
from inbatch.papers.sheet import Sheet, fill

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "results"
SCALES = ("cpu", "gpu", "paper")
HEAD = """# The papers' tables and figures

Each is one command, `inbatch table NAME`, and one file of [src/inbatch/papers](../../src/inbatch/papers): its rows and their
settings, the paper's figures, what we do otherwise. `--scale cpu` runs what is missing on two cores, `--scale gpu` on
one GPU, `--scale paper` prints the commands for a cluster. Figures are made of the files in [results/records](../../results/records),
one for each run; this page and those below are written by `python results/tables.py`, and a test compares them with the files.

| table or figure | what | cpu scale | time on one core |
| --- | --- | --- | --- |
"""


def stem(sheet: Sheet) -> str:
    """The name of a page."""
    return sheet.table.name if sheet.scale == "cpu" else f"{sheet.table.name}-{sheet.scale}"


def sheets(records: Records) -> list[Sheet]:
    """Every table at every scale that has a run."""
    every = [fill(table, scale, records) for table in TABLES.values() for scale in SCALES]
    return [sheet for sheet in every if sheet.records and (sheet.scale == "cpu" or _learned(sheet))]


def _learned(sheet: Sheet) -> bool:
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
    for name, text in pages(records).items():
        (DOCS / name).write_text(text)
    for sheet in sheets(records):
        if sheet.table.curve and (png := curves(sheet)):
            (DOCS / f"{stem(sheet)}.png").write_bytes(png)


if __name__ == "__main__":
    main()
