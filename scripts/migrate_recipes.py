"""Rename old recipe settings in files and runs to their present names (`inbatch.training.renamed_keys`).

python scripts/migrate_recipes.py recipe.yaml runs/simclr-photos-1   # rewrite a settings file and a run directory
python scripts/migrate_recipes.py --records results/records          # also rename each record after its recipe
python scripts/migrate_recipes.py --check results                    # exit code 1 if anything would be renamed

Only the names change: comments, order and layout of a file stay as they are. Recipes, the options of a saved head, and
`--set name=value` in command lines are rewritten. A file without old names is not touched.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from inbatch.errors import ConfigError
from inbatch.runtime.files import replacing
from inbatch.training.registry import PARTS
from inbatch.training.renamed_keys import RENAMED

FILES = (".json", ".yaml", ".yml")
SET = re.compile(r"(?<=--set )(['\"]?)({})(?==)".format("|".join(map(re.escape, RENAMED))))
ASSIGNMENT = re.compile(r"^({})(?==)".format("|".join(map(re.escape, RENAMED))))


def migrated(text: str) -> str:
    """Return the text of a YAML or JSON file with the present names of settings.

    Raises:
        ConfigError: If the text cannot be parsed.
    """
    try:
        root = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML or JSON: {error}") from None
    edits = {} if root is None else dict(_edits(text, root, _looks_like_a_recipe(root)))
    for (start, end), name in sorted(edits.items(), reverse=True):
        text = text[:start] + name + text[end:]
    return text


def _looks_like_a_recipe(node: yaml.Node) -> bool:
    """Return whether a file holds settings of a run at its top level."""
    if not isinstance(node, yaml.MappingNode):
        return False
    keys = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
    counted_crops = "pairs" in keys
    return not counted_crops and bool(keys & {"method", "method.name", "encoder", "encoder.name", "preset"})


def _edits(text: str, node: yaml.Node, is_recipe: bool) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield (start, end) in the text and the new name."""
    if isinstance(node, yaml.ScalarNode):
        yield from _edits_of_command(text, node)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _edits(text, item, False)
    elif isinstance(node, yaml.MappingNode):
        names = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        for key, value in node.value:
            if is_recipe:
                yield from _renamed(key, key.value)
                if key.value in (*PARTS, "schedule") and isinstance(value, yaml.MappingNode):
                    for option, _ in value.value:
                        yield from _renamed(option, f"{key.value}.{option.value}")
            elif key.value == "options" and {"method", "told"} <= names.keys() and isinstance(value, yaml.MappingNode):
                for option, _ in value.value:  # of a saved head
                    yield from _renamed(option, f"method.{option.value}")
            yield from _edits(text, value, key.value == "recipe" and _looks_like_a_recipe(value))


def _renamed(key: yaml.ScalarNode, setting: str) -> Iterator[tuple[tuple[int, int], str]]:
    if setting in RENAMED:
        new = RENAMED[setting] if "." in key.value else RENAMED[setting].split(".")[-1]
        quote = key.style or ""
        yield (key.start_mark.index, key.end_mark.index), f"{quote}{new}{quote}"


def _edits_of_command(text: str, node: yaml.ScalarNode) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield the settings in a command line, or in one argument of it."""
    start = node.start_mark.index
    raw = text[start : node.end_mark.index]
    for match in SET.finditer(raw):
        yield (start + match.start(2), start + match.end(2)), RENAMED[match[2]]
    quoted = len(node.style or "")
    if match := ASSIGNMENT.match(raw[quoted:]):
        yield (start + quoted, start + quoted + match.end()), RENAMED[match[1]]


def files_in(paths: list[Path]) -> Iterator[Path]:
    """Yield the YAML and JSON files among the paths and inside the directories."""
    for path in paths:
        yield from sorted(p for p in path.rglob("*") if p.suffix in FILES) if path.is_dir() else [path]


def rename_record(path: Path) -> Path:
    """Rename a record after its recipe, of which the file name holds a hash; return its new path."""
    from inbatch.apps.papers.results import read_record

    record = read_record(path)
    identity, data, seed = record.told
    what = record.recipe["crops"] if "pairs" in record.recipe else record.recipe["method"]["name"]
    return path.rename(path.with_name(f"{what}-{data}-{identity}-s{seed}.json"))


def main() -> None:
    """Rewrite the files; print each that changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="settings files, run directories, folders of them")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with code 1 if something would be")
    parser.add_argument("--records", action="store_true", help="the files are records: rename them after their recipes")
    args = parser.parse_args()
    changed = 0
    for path in files_in(args.paths):
        try:
            text = path.read_text(encoding="utf-8")
            new = migrated(text)
        except (OSError, UnicodeError, ConfigError) as error:
            parser.exit(2, f"{path}: {error}\n")
        if new != text:
            changed += 1
            print(path)
            if path.suffix == ".json":
                json.loads(new)  # still JSON
            if not args.check:
                with replacing(path) as file:
                    file.write(new.encode())
        if args.records and not args.check:
            rename_record(path)
    if args.check and changed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
