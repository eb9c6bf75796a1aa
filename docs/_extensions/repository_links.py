"""Let links between files of the repository work on the site.

The pages in contributing/ show files from the top of the repository. A link to such a file leads to its page; a link to
another file outside docs/ becomes text, because the site holds neither source nor results.
"""

import re
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx

PAGES = {
    "CHANGELOG.md": "contributing/changelog",
    "CODE_OF_CONDUCT.md": "contributing/code-of-conduct",
    "CONTRIBUTING.md": "contributing/guide",
    "README.md": "index",
    "SECURITY.md": "contributing/security",
    "examples/README.md": "tutorials/examples",
}
"""File of the repository -> the page of the site that shows it."""
SHOWN = {page: file for file, page in PAGES.items() if page != "index"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")


def rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the shown file into its page, replace links that lead out of docs/, and complete the navigation."""
    docs = Path(app.srcdir).resolve()
    folder = (docs / docname).parent
    if docname in SHOWN:
        file = docs.parent / SHOWN[docname]
        source[0], folder = file.read_text(encoding="utf-8"), file.parent
        app.env.note_dependency(str(file))

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if not target:
            return match[0]
        path = (folder / target).resolve()
        inside = str(PurePosixPath(path.relative_to(docs.parent))) if path.is_relative_to(docs.parent) else target
        if inside in PAGES:
            path = docs / f"{PAGES[inside]}.md"
        if path.is_relative_to(docs):
            up = "../" * docname.count("/")
            return f"[{text}]({up}{path.relative_to(docs).as_posix()}{anchor})"
        return text if "`" in text or text == inside else f"{text} (`{inside}`)"

    if docname.endswith("/README"):  # lists the pages of its folder in the navigation
        source[0] += "\n\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"
    outside_code = re.split(r"(^```.*?^```|^~~~.*?^~~~)", source[0], flags=re.M | re.S)
    source[0] = "".join(part if i % 2 else LINK.sub(replace, part) for i, part in enumerate(outside_code))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
