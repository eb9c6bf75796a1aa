"""Rename old recipe settings in files and runs to their present names (`inbatch.training.renamed_keys`).

python scripts/migrate_recipes.py recipe.yaml runs/simclr-photos-1   # rewrite a settings file and a run directory
python scripts/migrate_recipes.py --records results/records          # also rename each record after its recipe
python scripts/migrate_recipes.py --check results                    # exit code 1 if anything would be renamed

Only the names change: comments, order and layout of a file stay as they are. Recipes, the options of a saved head, and
`--set name=value` in command lines are rewritten. In a directory, files that hold no whole recipe stay as they are; a
file that is named on the command line holds settings at its top level.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from inbatch.errors import ConfigError, DataError
from inbatch.methods import METHODS
from inbatch.runtime.files import replacing
from inbatch.training.registry import PARTS
from inbatch.training.renamed_keys import RENAMED

FILES = (".json", ".yaml", ".yml")
NAMES = "|".join(map(re.escape, sorted(RENAMED, key=len, reverse=True)))
SET = re.compile(rf"--set(?:=|[\s\\]+)[\\\"']*({NAMES})(?==)")
ASSIGNMENT = re.compile(rf"({NAMES})(?==)")
OLD = re.compile(rf"\b({'|'.join(sorted({name.split('.')[-1] for name in RENAMED}))})\b")
COMPLETE = {"data", "method", "views", "encoder", "optimizer"}
"""Keys by which a recipe is recognised in a file that was not named: benchmark results have settings, too."""
Edits = Iterator[tuple[tuple[int, int], str]]


def migrated(text: str, named: bool = True) -> str:
    """Return the text of a YAML or JSON file with the present names of settings.

    Args:
        text: Content of the file.
        named: The user named this file: its top level holds settings, even if only some.

    Raises:
        ConfigError: If the text cannot be parsed, or holds a setting under both names.
    """
    if not OLD.search(text):
        return text
    mark = "\ufeff" * text.startswith("\ufeff")
    text = text.removeprefix(mark)
    try:
        root = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        edits = {} if root is None else dict(_edits(text, root, _holds_settings(root, named)))
        new = text
        for (start, end), name in sorted(edits.items(), reverse=True):
            new = new[:start] + name + new[end:]
        yaml.compose(new, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML or JSON: {error}") from None
    return mark + new


def _keys(node: yaml.Node) -> dict[str, yaml.Node]:
    """Return the values of a mapping by key; empty for other nodes."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}


def _holds_settings(node: yaml.Node, named: bool) -> bool:
    """Return whether the keys of a mapping are settings of a run; counted crops have others."""
    keys = _keys(node).keys()
    return "pairs" not in keys and "recipe" not in keys and (named or keys >= COMPLETE)


def _edits(text: str, node: yaml.Node, settings: bool = False, command: bool = False) -> Edits:
    """Yield (start, end) in the text and the new name."""
    keys = _keys(node)
    if isinstance(node, yaml.ScalarNode) and command:
        yield from _edits_of_command(text, node)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _edits(text, item, command=command)
    elif isinstance(node, yaml.MappingNode):
        if settings:
            yield from _edits_of_settings(node)
        elif {"method", "options", "told"} <= keys.keys() and keys["method"].value in METHODS:  # of a saved head
            yield from _renamed(keys["options"], "method.")
        for name, value in keys.items():
            yield from _edits(text, value, name == "recipe" and _holds_settings(value, True), name == "command")


def _edits_of_settings(node: yaml.MappingNode) -> Edits:
    keys = _keys(node)
    method = keys.get("method", keys.get("method.name"))
    method = _keys(method).get("name") if isinstance(method, yaml.MappingNode) else method
    yield from _renamed(node)
    for part in (*PARTS, "schedule"):
        if part in keys and (part != "method" or method is None or method.value in METHODS):
            yield from _renamed(keys[part], f"{part}.")


def _renamed(node: yaml.Node, part: str = "") -> Edits:
    """Yield the new names of the keys of a mapping."""
    keys = _keys(node)
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        setting = part + str(key.value)
        if setting in RENAMED:
            new = RENAMED[setting].removeprefix(part)
            if new in keys:
                raise ConfigError(f"{setting} and {RENAMED[setting]} are both set: remove one of them")
            quote = key.style or ""
            yield (key.start_mark.index, key.end_mark.index), f"{quote}{new}{quote}"


def _edits_of_command(text: str, node: yaml.ScalarNode) -> Edits:
    """Yield the settings in a command line, or in one argument of it."""
    start = node.start_mark.index
    raw = text[start : node.end_mark.index]
    for match in SET.finditer(raw):
        yield (start + match.start(1), start + match.end(1)), RENAMED[match[1]]
    quoted = len(node.style or "")
    if match := ASSIGNMENT.match(raw[quoted:]):
        yield (start + quoted, start + quoted + match.end()), RENAMED[match[1]]


def files_in(paths: list[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield the named files, and the YAML and JSON files inside the named directories, and whether they were named."""
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix in FILES) if path.is_dir() else []
        yield from ((p, p.name == "recipe.json") for p in inside)
        if not path.is_dir():
            yield path, True


def rewrite(path: Path, named: bool, check: bool) -> bool:
    """Return whether a file holds old names, after renaming them in it unless `check`."""
    text = path.read_bytes().decode("utf-8")
    new = migrated(text, named)
    if new != text and not check:
        mode = path.stat().st_mode
        with replacing(path) as file:
            file.write(new.encode())
        path.chmod(mode)
    return new != text


def rename_record(path: Path) -> Path:
    """Rename a record after its recipe, of which the file name holds a hash; return its new path."""
    from inbatch.apps.papers.results import read_record

    record = read_record(path)
    identity, data, seed = record.run_key
    what = record.recipe["crops"] if "pairs" in record.recipe else record.recipe["method"]["name"]
    return path.rename(path.with_name(f"{what}-{data}-{identity}-s{seed}.json"))


def main() -> None:
    """Rewrite the files; print each that changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="settings files, run directories, folders of them")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with code 1 if something would be")
    parser.add_argument("--records", action="store_true", help="the files are records: rename them after their recipes")
    args = parser.parse_args()
    changed, problems = 0, 0
    for path, named in files_in(args.paths):
        try:
            if rewrite(path, named, args.check):
                changed += 1
                print(path)
            if args.records and not args.check:
                rename_record(path)
        except (OSError, UnicodeError, ConfigError, DataError) as error:
            problems += 1
            print(f"{path}: {error}", file=sys.stderr)
    if problems or (args.check and changed):
        raise SystemExit(2 if problems else 1)


if __name__ == "__main__":
    main()
