"""Results of `inbatch duplicates` and `inbatch outliers` as text for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from inbatch.errors import many

_ROWS = 30  # maximum number of duplicates that are listed
_UNREADABLE = 3  # maximum number of unreadable images that are named


def duplicate_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Iterate over the lines of the table: image to keep, duplicate, splits, check."""
    count = 0
    for group in result["groups"]:
        for one in group["duplicates"]:
            if count == _ROWS:
                return
            count += 1
            splits = dict.fromkeys((group["keep"]["split"], one["split"]))
            check = "identical" if one["identical"] else f"{one['check']:.3f}"
            yield group["keep"]["path"], one["path"], " and ".join(splits), check


def duplicate_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table."""
    near = result["duplicates"] - result["identical"]
    lines = []
    if result["duplicates"] > _ROWS:
        lines.append(f"and {result['duplicates'] - _ROWS:,} more: --json names all")
    if result["duplicates"]:
        lines.append(
            f"{many(result['images'], 'image')}: {many(result['duplicates'], 'duplicate')} of "
            f"{many(len(result['groups']), 'other')}, {result['identical']:,} identical and {near:,} nearly (check of "
            f"{result['threshold']:g} or more)"
        )
    else:
        lines.append(f"{many(result['images'], 'image')}: no duplicates (no check of {result['threshold']:g} or more)")
    if len(result["splits"]) > 1:
        leaks = result["leaks"]
        lines.append(f"Leaks: {many(leaks, 'group')} across splits, listed first" if leaks else "Leaks: none")
    lines += _unreadable(result["unreadable"])
    if result["written"]:
        lines.append(f"Keep:    {result['written']}, {many(result['kept'], 'image')}; nothing was deleted")
    if result["picture"]:
        lines.append(f"Picture: {result['picture']}, pairs around the threshold")
    return lines


def outlier_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Iterate over the lines of the table: image, reason or rank, and its scores."""
    rows = [(one, f"{one['reason']}: {one['measured']}") for one in (result["broken"] or ())[:_ROWS]]
    rows += [(one, f"outlier {rank}") for rank, one in enumerate(result["outliers"][:_ROWS], 1)]
    for one, why in rows:
        yield one["path"], why, f"{one['distribution']:.2f}", f"{one['distance']:.3f}", f"{one['density']:.2f}"


def outlier_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table."""
    lines = []
    hidden = sum(max(0, len(result[name] or ()) - _ROWS) for name in ("broken", "outliers"))
    if hidden:
        lines.append(f"and {hidden:,} more: --json names all")
    lines.append(f"{many(result['images'], 'image')}: {many(len(result['outliers']), 'outlier')} by {result['order']}")
    if result["broken"] is None:
        lines.append("The pixels were not examined: pass the images (DATA) to list broken ones")
    else:
        reasons = ", ".join(f"{count:,} {name}" for name, count in result["reasons"].items())
        lines.append(f"Broken-looking: {reasons or 'none'}")
    lines += _unreadable(result["unreadable"])
    if result["written"]:
        lines.append(f"Keep:    {result['written']}, {many(result['kept'], 'image')}; nothing was deleted")
    if result["picture"]:
        lines.append(f"Picture: {result['picture']}, broken-looking images first")
    return lines


def _unreadable(reasons: list[str]) -> list[str]:
    more = len(reasons) - _UNREADABLE
    return [f"Unreadable: {why}" for why in reasons[:_UNREADABLE]] + [f"and {more:,} more"] * (more > 0)
