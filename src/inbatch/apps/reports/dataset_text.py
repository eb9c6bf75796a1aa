"""Data set report as text for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inbatch.data.resident import SHARE
from inbatch.errors import many

_FEW = 10  # maximum number of unreadable images that are listed
_FILES = 3  # maximum number of files that are named for alpha or a warning
_CLASSES = 12  # maximum number of classes whose names are listed with their counts


def report_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Iterate over the lines of the table: label and value."""
    n, sampled = report["images"], report["looked_at"]
    others = [f"{count:,} in {name}" for name, count in report["splits"].items() if name != report["split"]]
    yield "images", ", ".join([f"{n:,} in {report['split']}", *others])
    if sampled < n:
        yield "looked at", f"a sample of {sampled:,}, evenly spaced: what follows is of them, classes apart"
    yield "classes", _classes(report)
    yield "formats", _counts(report["formats"])
    if report["bits"]:
        yield "bits per value", _counts(report["bits"])
    if report["pages"]:
        yield "pages", f"{_several(report['pages'])}: the first is read"
    if report["alpha"]["images"]:
        yield "alpha", _alpha(report["alpha"], report["channels"])
    if report["skipped"]:
        yield "skipped files", _counts(report["skipped"])
    yield from _sizes(report["sizes"])
    if report["pixels"]["mean"]:
        yield "mean", _numbers(report["pixels"]["mean"])
        yield "deviation", _numbers(report["pixels"]["std"])
        yield "lowest, highest", f"{_numbers(report['pixels']['lowest'])}; {_numbers(report['pixels']['highest'])}"
    same = report["duplicates"]
    yield "duplicates", _same(f"{same['images']:,} images in {same['groups']:,} groups", same["first"])
    for other, leak in report["leaks"].items():
        yield (
            f"{'LEAK into' if leak['images'] else 'also in'} {other}",
            _same(f"{leak['images']:,} images", leak["first"]),
        )
    if report["warnings"]["images"]:
        yield "warnings", f"Pillow warned about {many(report['warnings']['images'], 'image')}"
    yield "unreadable", f"{len(report['unreadable']):,}"
    memory = report["memory"]
    how = "resident" if memory["resident"] else "streamed"
    yield (
        "in a run",
        (
            f"{how}: {memory['decoded_bytes'] / 1e6:,.0f} MB decoded to at most {memory['canvas']} pixels, "
            f"{memory['free_bytes'] / 1e9:,.1f} GB free, limit {SHARE:.0%} of it"
        ),
    )
    yield "an epoch", f"{many(report['steps'], 'step')} of {report['batch']:,} images"


def notes(report: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table."""
    bad = report["unreadable"]
    lines = [one["why"] for one in bad[:_FEW]]
    if report["levels"]:
        low, high = report["levels"]
        bits = max(map(int, report["bits"]))
        lines.append(
            f"Of {bits} bits a run keeps the upper 8; all values lie from {low} to {high}: --set levels=[{low},{high}]"
        )
    if report["pages"]:
        lines.append("The pages of a TIFF file are read as channels with --set channels=N, if all N have one size.")
    alpha, texts = report["alpha"], report["warnings"]["texts"]
    if alpha["not_opaque"] and report["channels"] in (1, 3):
        few = ", ".join(f"{_short(one['image'])} {one['not_opaque']:.0%}" for one in alpha["files"][:_FILES])
        lines.append(
            f"Not opaque and laid on white: {few}{_rest(alpha['images'])}. If alpha is data, such as near infrared, "
            "--set channels=4 keeps it."
        )
    for text, n in list(texts.items())[:_FEW]:
        lines.append(f"Pillow warned about {many(n, 'image')}: {text}")
    if texts:
        few = ", ".join(_short(one["image"]) for one in report["warnings"]["files"][:_FILES])
        lines.append(f"Warnings were about: {few}{_rest(report['warnings']['images'])}")
    if len(bad) > _FEW:
        lines.append(f"and {len(bad) - _FEW:,} more: --json names all")
    if report["picture"]:
        shown = [name for name in report["picture"]["rows"] if name]
        lines.append(
            f"Picture: {report['picture']['out']}" + (f", a row for each of {', '.join(shown)}" if shown else "")
        )
    return lines


def _several(pages: Mapping[str, int]) -> str:
    """Return how many files have how many pages."""
    return ", ".join(f"{many(n, 'file')} of {count} pages" for count, n in pages.items())


def _alpha(alpha: Mapping[str, Any], channels: int) -> str:
    handling = "laid on white" if channels in (1, 3) else "kept as a channel"
    return f"{many(alpha['images'], 'image')}; {alpha['not_opaque']:.1%} of their pixels are not opaque ({handling})"


def _rest(count: int) -> str:
    return f" and {count - _FILES:,} more (--json names all)" if count > _FILES else ""


def _classes(report: Mapping[str, Any]) -> str:
    classes = sorted(report["classes"], key=lambda one: -one["images"])
    if not classes:
        return "unlabelled"
    text = f"{len(classes):,}"
    if len(classes) <= _CLASSES:
        text += ": " + ", ".join(f"{_short(one['name'])} {one['images']:,}" for one in classes)
    else:
        most, least = classes[0], classes[-1]
        text += (
            f", of {least['images']:,} ({_short(least['name'])}) to {most['images']:,} images ({_short(most['name'])})"
        )
    if report["imbalance"] and report["imbalance"] >= 1.5:
        text += f"; the largest is {report['imbalance']:,.1f} times the smallest"
    return text + (f"; {report['unlabelled']:,} images have no label" if report["unlabelled"] else "")


def _sizes(sizes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not sizes["distinct"]:
        return
    most = sizes["most"][0]
    if sizes["distinct"] == 1:
        yield "size", f"all {most['height']}x{most['width']} (height x width, pixels)"
        return
    sides = [
        f"{name} {s['min']:,} / {s['median']:,g} / {s['max']:,}" for name in ("height", "width") for s in [sizes[name]]
    ]
    yield "sizes", f"{sizes['distinct']:,} different ones; least / median / most: {', '.join(sides)}"
    parts, last = [], 0
    for one in sizes["shorter_side"]:
        parts.append(f"{one['images']:,} of {last + 1} to {one['up_to']}")
        last = one["up_to"]
    yield "shorter side", ", ".join(parts)


def _same(how_many: str, first: Sequence[Sequence[str]]) -> str:
    """Format a count with one example; --json has more."""
    return f"{how_many}: {' = '.join(map(_short, first[0]))}" if first else "none"


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:22]}...{name[-22:]}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "none"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
