"""Expected duration of missing runs, from the durations of similar ones."""

from collections.abc import Iterable, Sequence
from statistics import mean

from inbatch.apps.papers.results import Record
from inbatch.apps.papers.spec import Cell
from inbatch.apps.papers.table_notes import hours
from inbatch.errors import many

SIMILAR = ("preset", "image_size", "epochs", "subset", "batch_size")
"""Settings that decide most of a run's duration, in addition to data set and encoder."""


def expected_time(cells: Sequence[Cell], records: Iterable[Record], jobs: int) -> str:
    """Return a sentence with the expected duration of the runs; empty if there is no similar record.

    A run is expected to take as long as those with the same recipe and other seeds, or as those on the same data set
    with the same length, encoder and image size.

    Args:
        cells: The missing runs.
        records: Records with durations.
        jobs: Number of concurrent runs.
    """
    same: dict[tuple[str, str], list[float]] = {}
    similar: dict[tuple[object, ...], list[float]] = {}
    for record in records:
        if record.status == "finished" and "pairs" not in record.recipe:
            same.setdefault(record.run_key[:2], []).append(record.wall_seconds)
            similar.setdefault(_kind(record.data, record.recipe), []).append(record.wall_seconds)
    durations, unknown = [], 0
    for cell in cells:
        if cell.counts:
            continue
        times = same.get((cell.key, cell.data)) or similar.get(_kind(cell.data, cell.recipe().nested()))
        if times:
            durations.append(mean(times))
        else:
            unknown += 1
    if not durations:
        return ""
    seconds = max(max(durations), sum(durations) / jobs)
    others = f"; {unknown} without a similar run are not included" if unknown else ""
    return (
        f"{many(len(durations), 'run')}, {jobs} at a time: about {hours(seconds)} if they take as long as similar runs "
        f"in the results{others}."
    )


def _kind(data: str, recipe: dict[str, object]) -> tuple[object, ...]:
    """Return what runs of about the same duration have in common."""
    encoder = recipe.get("encoder")
    name = encoder.get("name") if isinstance(encoder, dict) else encoder
    return (data, name, *(recipe.get(setting) for setting in SIMILAR))
