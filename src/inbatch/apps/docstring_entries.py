"""Find the entries of a docstring that explain parameters: "name: text" or "first, second: text".

Entries below "Args:" are found, too.
"""

import inspect
import re
from collections.abc import Iterable


def split_entries(doc: str, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the lines of a docstring without its entries, and the text of every entry by its names.

    An entry begins at the start of a line or after a full stop or semicolon. It continues on lines that are indented
    more than its first, or that follow a line without a full stop. An entry of several names is in the dictionary once,
    under "first, second".
    """
    name = f"(?:{'|'.join(sorted(map(re.escape, names), key=len, reverse=True)) or '(?!)'})"
    entry = re.compile(rf"(?:^|(?<=[.;] ))({name}(?:, {name})*)(?: \([^)]*\))?: ")
    rest: list[str] = []
    chunks: list[list[str]] = []
    indent: int | None = None
    for line in inspect.cleandoc(doc).splitlines():
        text = line.strip()
        here = len(line) - len(line.lstrip())
        open_ended = bool(chunks) and not chunks[-1][-1].endswith((".", ";"))
        continued = bool(text) and indent is not None and (here > indent or (here == indent and open_ended))
        if continued and not entry.match(text):
            chunks[-1].append(text)
        elif match := entry.search(text):
            if before := text[: match.start()].rstrip():
                rest.append(before)
            chunks.append([text[match.start() :]])
            indent = here
        else:
            rest.append(line)
            indent = None
    entries: dict[str, str] = {}
    for chunk in chunks:
        _, *pieces = entry.split(" ".join(chunk))
        entries |= {keys: text.strip() for keys, text in zip(pieces[::2], pieces[1::2], strict=True)}
    return rest, entries
