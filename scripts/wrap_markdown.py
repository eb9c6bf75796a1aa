"""Wrap the prose of Markdown pages at 100 characters; see docs/contributing/style.md.

python scripts/wrap_markdown.py            # rewrite paragraphs with a line that is too long
python scripts/wrap_markdown.py --check    # print these lines; exit code 1 if there are any

Tables, code, formulas, headings, generated parts and generated pages stay as they are.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100
PAGES = ("*.md", "docs/**/*.md", "examples/*.md", "tests/golden/*.md", "web/**/*.md", "weights/**/*.md")
GENERATED = {"docs/settings.md", "docs/fault-injection.md", "docs/mutations.md", "docs/reference/cli.md"}
KEPT = re.compile(r"^(```.*?^```|~~~.*?^~~~|\$\$.*?\$\$ *$|<!-- (?!end).*?<!-- end -->|<!--.*?-->)", re.M | re.S)
ITEM = re.compile(r"( *)([-*]|\d+\.) +")
TOKEN = re.compile(r"(?:!\[[^\]]*\]\([^)]*\)|`[^`]*`|\$[^$]*\$|\S)+")
SPECIAL = re.compile(r"([-+*=#>|:]+|\d+[.)])$|#|>|\||~~~|```")


def pages() -> Iterator[Path]:
    """Yield the pages that people write."""
    for page in sorted({page for pattern in PAGES for page in ROOT.glob(pattern)}):
        name = page.relative_to(ROOT).as_posix()
        built = name.startswith(("docs/results/", "docs/_build/")) or "/node_modules/" in name
        if name not in GENERATED and not built:
            yield page


def fill(block: list[str]) -> list[str]:
    """Return the lines of a paragraph or list item, wrapped; a token longer than a line gets its own line."""
    item = ITEM.match(block[0])
    first = item[0] if item else re.match(" *", block[0])[0]  # type: ignore[index]
    rest = " " * len(first)
    words: list[str] = []
    for word in TOKEN.findall(" ".join([block[0][len(first) :], *block[1:]])):
        if words and SPECIAL.match(word):  # at the start of a line it would begin a list, a heading or a table
            words[-1] += f" {word}"
        else:
            words.append(word)
    lines, line = [], first
    for word in words:
        if line.strip() and line != first and len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = rest
        line += word if line in (first, rest) else f" {word}"
    return [*lines, line]


def too_long(line: str) -> bool:
    """Return whether a line of prose is too long and can be broken."""
    return len(line) > WIDTH and len(TOKEN.findall(line)) > 1


def wrap(text: str) -> str:
    """Return the page with wrapped paragraphs."""
    parts = KEPT.split(text)
    return "".join(part if i % 2 else _wrap_prose(part) for i, part in enumerate(parts))


def _wrap_prose(text: str) -> str:
    lines, out, block = text.split("\n"), [], []

    def flush() -> None:
        fixed = any(line.endswith(("  ", "\\")) for line in block)
        out.extend(fill(block) if any(map(too_long, block)) and not fixed else block)
        block.clear()

    for line in lines:
        stays = not line.strip() or line.lstrip().startswith(("|", "#", ">", ":::", "$$", "\\", "[!"))
        if stays or ITEM.match(line):
            flush()
        (out if stays else block).append(line)
    flush()
    return "\n".join(out)


def main() -> int:
    """Wrap the pages, or print the lines to wrap."""
    check, found = "--check" in sys.argv[1:], 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (wrapped := wrap(text)) != text:
            found += 1
            print(page.relative_to(ROOT))
            if not check:
                page.write_text(wrapped, encoding="utf-8")
    return int(check and found > 0)


if __name__ == "__main__":
    sys.exit(main())
