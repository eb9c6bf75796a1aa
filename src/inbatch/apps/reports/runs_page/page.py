"""Write the page of many runs as one HTML file that opens without a network."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from inbatch.apps.reports.explorer.page import data_text, digest
from inbatch.apps.reports.runs_page.contents import collect_runs
from inbatch.errors import ConfigError, many
from inbatch.runtime.files import check_writable, replacing
from inbatch.runtime.paths import path_of


def write_runs_page(places: Sequence[str | Path], out: str | Path = "runs.html") -> dict[str, Any]:
    """Write a page with the table, the curves and the differences of runs; return its description, ready for JSON.

    Args:
        places: Run folders, folders that hold some at any depth, or folders of records.
        out: HTML file to write.

    Returns:
        "out", "bytes", "runs": the number of runs, "unreadable": messages.

    Raises:
        ConfigError: If there are no runs, or too many, or the file does not end in .html.
        DataError: If no run can be read.
        InbatchError: If the file cannot be written.
    """
    path = path_of(out, "out")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{path}: the page is written to a file that ends in .html")
    check_writable(path)
    runs, problems = collect_runs(places)
    text = render_runs(runs)
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))
    return {"out": str(path), "bytes": path.stat().st_size, "runs": len(runs), "unreadable": problems}


def render_runs(runs: list[dict[str, Any]]) -> str:
    """Return the page as HTML, without any address of another file."""
    from jinja2 import Environment
    from markupsafe import Markup

    style, script = _resource("page.css"), _resource("page.js")
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest(script)}'; style-src 'sha256-{digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    template = Environment(autoescape=True).from_string(_resource("page.html"))
    return template.render(
        title=many(len(runs), "run"), policy=policy, style=Markup(style), script=Markup(script),
        data=Markup(data_text({"runs": runs})),
    )  # fmt: skip


def _resource(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
