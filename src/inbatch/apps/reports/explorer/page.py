"""The HTML file: a template, the script bundled from web/explorer, and the data as JSON that cannot end its element."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from inbatch.apps.reports.explorer.sprite import Sprite

_TYPES = {np.dtype(np.float32): "f32", np.dtype(np.uint8): "u8", np.dtype(np.uint16): "u16", np.dtype(np.uint32): "u32"}
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def packed(values: np.ndarray) -> dict[str, str]:
    """Return an array as JSON: its type, and its little-endian bytes in base64."""
    small = np.ascontiguousarray(values)
    return {
        "type": _TYPES[small.dtype],
        "values": base64.b64encode(small.astype(small.dtype.newbyteorder("<")).tobytes()).decode(),
    }


def smallest(values: np.ndarray) -> np.ndarray:
    """Return whole numbers from 0 in the smallest type that holds all of them."""
    most = int(values.max()) if values.size else 0
    return values.astype(np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.uint32)


def data_text(data: dict[str, Any]) -> str:
    """Return JSON in ASCII without <, > and &: nothing in it can end the element, for any names of the images."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def split_root(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the folder that all paths share, with its separator, and the rest of each path."""
    first, last = min(paths), max(paths)  # what these two share, all share
    same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    root = first[: first[:same].rfind("/") + 1]
    return root, [path[len(root) :] for path in paths]


def sprite_json(sprite: Sprite, places: Sequence[str] | None) -> dict[str, Any]:
    """Return where the page gets the sprites from: relative addresses, or the content itself if there are none."""
    inside = (f"data:image/webp;base64,{base64.b64encode(sheet).decode()}" for sheet in sprite.sheets)
    sheets = list(inside if places is None else places)
    return {"tile": sprite.tile, "columns": sprite.columns, "perSheet": sprite.per_sheet, "sheets": sheets}


def render_page(title: str, summary: str, data: dict[str, Any]) -> str:
    """Return the page as HTML.

    Args:
        title: Title of the page; any text.
        summary: Description of the map for screen readers; any text.
        data: What the script reads; `data["maps"]` has one or two maps.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    style, script = resource("page.css"), resource("explorer.js")
    if "</script" in script.lower() or "</style" in style.lower():
        raise ValueError("a resource of the page would end its own element: build web/explorer again")
    sprite = data.get("sprite") or {"sheets": []}
    local_files = "" if all(sheet.startswith("data:") for sheet in sprite["sheets"]) else " 'self' file:"
    # regl compiles its drawing commands with `new Function`, which needs 'unsafe-eval'; no other script can run.
    style_hash = digest(style)
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest(script)}' 'unsafe-eval'; style-src 'sha256-{style_hash}'; "
        f"img-src data: blob:{local_files}; base-uri 'none'; form-action 'none'"
    )
    template = Environment(autoescape=True).from_string(resource("page.html"))
    return template.render(
        title=title, summary=summary, policy=policy, maps=[entry["name"] for entry in data["maps"]],
        style=Markup(style), script=Markup(script), data=Markup(data_text(data)),
    )  # fmt: skip


def resource(name: str) -> str:
    """Return a text file of this package."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """Return the SHA-256 of a script or style in base64, as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
