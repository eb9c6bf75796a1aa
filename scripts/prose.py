"""Count idioms per 1,000 words of prose in every folder; see docs/contributing/style.md.

python scripts/prose.py                          # a table, one row per folder
python scripts/prose.py --worst 20               # also the 20 worst lines, with file:line
python scripts/prose.py --max 4                  # exit code 1 if a folder exceeds 4
python scripts/prose.py docs src/inbatch/nn      # only these files or folders

Prose is the text of Markdown pages, without code, formulas and generated tables, and the docstrings, comments,
message strings and names of tests in Python files, without quoted code.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = (
    "README.md", "SECURITY.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "AGENTS.md", "CHANGELOG.md", "docs",
    "src/inbatch", "tests", "benchmarks", "examples", "results", "scripts", "weights", "web",
)  # fmt: skip
QUOTES_IDIOMS = {"docs/contributing/style.md", "scripts/prose.py"}
GENERATED = {"docs/results", "docs/fault-injection.md"}

# Each entry is a regular expression that must match whole words, ignoring case.
IDIOMS = (
    # Code does not speak, know, want or see.
    r"tells?|told|telling|says|speaks?|knows|wants|sees|hears?|thinks?|complain(?:s|ed|ts?)?|noticed",
    r"remember(?:s|ed)?|forgets?|forgotten|asks|asked|asking|judge[sd]?|judging|makes? known|leaves? word",
    r"teach(?:es|ing)?|taught|learns? nothing|in words|for people|what a run|whom|whoever",
    r"nobody(?:'s)?|anybody(?:'s)?|strangers?(?:'s)?|honest(?:ly)?|lonely|befalls?|looks? (?:across|after|on)",
    # Old or poetic words.
    r"anew|beside|besides|alike|whereof|wherever|whatever|whichever|reckoned|mend(?:s|ed|ing)?|hardly",
    r"ours|theirs|to be had|at hand|at stake|at fault|once more|all the (?:more|same)|the (?:one|other) way round",
    r"so many|of (?:its|their|his|your|our|one's) own accord|one's own|(?:its|their|our) own (?:words|good)",
    # Pictures in place of the field's terms.
    r"towers?(?:'s)?|seams?(?:'s)?|sweeps?|sweeping|tally|tallies|contestants?(?:'s)?|blows?|drills?|sheets?",
    r"(?:call|answer|the|a) rolls?|(?:a|the) races?|(?:the|a) way (?:back|there)|of the house|come along",
    r"(?:a|the|each|every|one|of|last|between) looks?|meets?|meeting|met|stands?(?! for)|stood|standing",
    r"hand(?:s|ed)? (?:on|out|over)|put(?:s|ting)? together|(?:is|are|was) gone|gives? (?:way|its place)",
    r"go(?:es|ing)? on|went on|gone on|(?:comes?|came) (?:to|out)",
    # Inversion and riddles.
    r"(?<!there\s)(?:is|are) no(?! longer| more than)|where there (?:is|are|was|were)|what (?:it is|they are)",
    r"what is (?:there|left|seen|said|asked|looked)|(?:and|of|with|for|by|from|on|in|than|to|but) what",
    r"nothing (?:of|but|else|more)|(?:so|nor) (?:do|does|did|is|are) (?:the|a|an|its|it|they|we|that|those)",
    r"(?:and|much) the like|is another(?: one)?|again and again|as (?:they|it) (?:is|are|was)",
    # Fillers.
    r"just|very|really|quite|simply|obviously|of course|actually|basically|pretty|a bit",
)
PATTERN = re.compile(rf"(?<![\w-])(?:{'|'.join(IDIOMS)})(?![\w-])".replace(" ", r"\s+"), re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")
CODE = re.compile(r"``.*?``|`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$|https?://\S+|\]\([^)]*\)", re.DOTALL)


def blank(match: re.Match[str]) -> str:
    """Return as many line breaks as the match has, so that line numbers stay right."""
    return " " + "\n" * match[0].count("\n")


def markdown(text: str) -> Iterator[tuple[int, str]]:
    """Yield the prose of a page, with its first line number."""
    text = re.sub(r"^```.*?^```|^<!-- (?!end).*?<!-- end -->", blank, text, flags=re.MULTILINE | re.DOTALL)
    yield 1, CODE.sub(blank, re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL))


def python(text: str) -> Iterator[tuple[int, str]]:
    """Yield docstrings, comments, strings of at least four words and names of tests, with their first line numbers."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.removeprefix("test_").replace("_", " ")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(WORD.findall(node.value)) >= 4:
            yield node.lineno, CODE.sub(blank, node.value)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#!|# *(fmt:|noqa|type:|pragma)", token.string):
            yield token.start[0], CODE.sub(blank, token.string.lstrip("# "))


def files(paths: list[str]) -> Iterator[Path]:
    """Yield the Markdown and Python files under the paths, without generated ones."""
    for path in (ROOT / name for name in paths):
        candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in candidates:
            name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else ""
            skipped = name in QUOTES_IDIOMS or any(name == g or name.startswith(g + "/") for g in GENERATED)
            if file.suffix in (".md", ".py") and not skipped:
                yield file


def main() -> int:
    """Print the table and the worst lines; return 1 if a folder exceeds the limit."""
    parser = argparse.ArgumentParser(description="Count idioms per 1,000 words of prose in every folder.")
    parser.add_argument("paths", nargs="*", default=list(DEFAULT), help="files or folders (default: the repository)")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="print the N lines with the most idioms")
    parser.add_argument("--max", type=float, metavar="RATE", help="exit with 1 if a folder has more per 1,000 words")
    parser.add_argument("--by-file", action="store_true", help="one row per file instead of one per folder")
    parser.add_argument("--idioms", action="store_true", help="print how often each idiom occurs")
    options = parser.parse_args()
    words: Counter[str] = Counter()
    idioms: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    lines: Counter[tuple[str, int, str]] = Counter()
    if missing := [path for path in options.paths if not (ROOT / path).exists()]:
        parser.error(f"{', '.join(missing)} does not exist: pass files or folders of the repository")
    for file in files(options.paths):
        name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else str(file)
        group = name if options.by_file else name.rpartition("/")[0] or "."
        for first, text in (markdown if file.suffix == ".md" else python)(file.read_text(encoding="utf-8")):
            words[group] += len(WORD.findall(text))
            for match in PATTERN.finditer(text):
                offset = text.count("\n", 0, match.start())
                idioms[group] += 1
                kinds[" ".join(match[0].lower().split())] += 1
                lines[name, first + offset, text.splitlines()[offset].strip()] += 1
    rates = {group: 1000 * idioms[group] / count for group, count in words.items() if count}
    print(f"{'folder':40} {'words':>8} {'idioms':>7} {'per 1,000':>10}")
    for group, rate in sorted(rates.items()):
        print(f"{group:40} {words[group]:8,} {idioms[group]:7,} {rate:10.1f}")
    total = 1000 * idioms.total() / max(words.total(), 1)
    print(f"{'all':40} {words.total():8,} {idioms.total():7,} {total:10.1f}")
    if options.idioms:
        print(", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    for (name, number, line), _ in lines.most_common(options.worst):
        print(f"{name}:{number}: {line}")
    return int(options.max is not None and any(rate > options.max for rate in rates.values()))


if __name__ == "__main__":
    sys.exit(main())
