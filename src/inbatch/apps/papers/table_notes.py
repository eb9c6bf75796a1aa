"""Notes below a filled table: the number of runs, the machines, and the differences from the paper."""

from collections.abc import Iterable

from inbatch.apps.papers.filled_table import SURE, FilledTable
from inbatch.apps.papers.results import Record, wall_seconds
from inbatch.errors import many
from inbatch.runtime.text import one_line


def notes(filled: FilledTable) -> list[str]:
    """Return the notes below the figures: the number of runs, the machines, and the differences from the paper."""
    table, at, records = filled.table, filled.table.scales[filled.scale], list(filled.records.values())
    finished = [record for record in records if record.status == "finished"]
    seeds = ", ".join(map(str, at.seeds))
    lines = [f"{len(finished)} of {filled.total_runs} runs, seeds {seeds}; mean ± standard deviation."]
    if any(line.row.against for line in filled.lines):
        references = sorted({line.row.against for line in filled.lines if line.row.against})
        lines.append(
            f"Gain: against {' or '.join(references)} at the same seeds, with p of a paired t-test (* below {SURE}, "
            "not corrected for the number of rows)."
        )
    if mixed := filled.mixed_pairs:
        lines.append(
            f"{many(mixed, 'gain')} between runs of different precision or instructions of the processor, which has an "
            "effect of its own: repeat one of the runs."
        )
    if old := sum(record.outdated for record in finished):
        lines.append(
            f"{many(old, 'run')} with fusion by convolutions had wrong gradients of these convolutions "
            "(docs/user-faults.md, section 58) and must be repeated: remove the files."
        )
    if repeated := filled.repetitions:
        lines.append(
            f"{many(len(repeated), 'gain')} against repetitions, on the same kind of processor, of the runs that are "
            "shown: the mean gain is not the difference of the means."
        )
    lines += [f"{one[0].upper()}{one[1:]}." for one in at.differs]
    sources = {record.data: record.source for record in finished if record.source not in ("drawn", record.data)}
    if "cifar10-jpeg" in sources.values():
        lines.append(
            "CIFAR-10 is a JPEG copy (quality about 75): accuracies are slightly below those on the original files."
        )
    if finished:
        run = [*finished, *{id(record): record for record in repeated}.values()]
        lines.append(f"Measured on {_machines(run)}; {hours(wall_seconds(run))} if run one after another.")
    lines += [
        f"Failed: {record.command}{protocol and f', evaluated by {protocol}'}: {sentence}"
        for record in records
        for protocol, sentence in record.failures.items()
    ]
    lines += [*([f"Cost: {at.cost}."] if at.cost else []), f"Source: {table.source}."]
    return [one_line(line) for line in lines]  # records may come from elsewhere


def _machines(records: Iterable[Record]) -> str:
    def name(record: Record) -> str:
        where = record.environment
        what = where["processor"] if where["device"] == "cpu" else where["device"]
        details = [many(where["threads"], "thread"), f"torch {where['versions']['torch']}"]
        details += [part for part in (where.get("instructions"), record.precision) if part]
        return f"{what} ({', '.join(details)})"

    return ", ".join(sorted({name(record) for record in records}))


def hours(seconds: float) -> str:
    """Return seconds as readable minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
