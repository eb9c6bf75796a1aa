"""The report of `inspect_run` as rows of a table."""

from typing import Any


def report_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of the table: plug-in, measurement, value."""
    leak, lines = report["leak"], []
    if leak is None:
        lines.append(("groups", "identified from one embedding", "not measured: fewer than two groups of 4 samples"))
    else:
        share = f"{leak['leak']:.1%} (chance {leak['leak_chance']:.1%}, standard error {leak['leak_error']:.1%})"
        lines.append(("groups", "identified from one embedding", share))
        lines.append(("", "verdict", leak["told_apart"] or "the context groups cannot be distinguished."))
    if fuse := report.get("fuse"):
        name = f"fuse {fuse['name']}"
        lines.append((name, f"mean change of a pixel, view {fuse['view']}", f"{fuse['change']:.3f} sd"))
        lines.append(("", f"of it not {fuse['own']:.2f} x the image itself", f"{fuse['added']:.3f} sd"))
        lines.append(("", "of that the same for all images", f"{fuse['common']:.1%}"))
    if curate := report.get("curate"):
        when = "" if curate["begun"] else f"; the run is before its first curated epoch, {report['epoch'] + 1}"
        measurement = f"samples that violate, as drawn ({curate['rule']})"
        share = f"{curate['violating_before']:.1%} of {curate['samples']}{when}"
        lines.append(("curate", measurement, share))
        if not curate["violating_before"]:
            lines.append(("", "redrawn", "none: no sample violates the rule"))
        else:
            left = f"{curate['violating']:.1%} ({curate['redrawn']:.2f} redraws per sample)"
            lines.append(("", f"left after {curate['rounds']:.0f} rounds", left))
    if mix := report.get("mix"):
        lines.append(
            (f"mix {mix['name']}", f"mean share of the first image, view {mix['view']}", f"{mix['share']:.3f}")
        )
    if attend := report.get("attend"):
        name = f"attend {attend['name']}"
        for i, block in enumerate(attend["blocks"]):
            values = f"{block['mean']:.4f} / {block['least']:.4f} / {block['largest']:.4f}"
            slot = block["block"].removeprefix("backbone.")
            lines.append(("" if i else name, f"weights in {slot}: mean / least / largest", values))
        if not attend["blocks"]:
            lines.append((name, "weights of samples", "none: attention within each sample only"))
    return lines
