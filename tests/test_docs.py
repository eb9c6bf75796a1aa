"""The documentation matches the code: examples run, commands are valid recipes, tables hold the code's values."""

import importlib.util
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import small_methods as small
import test_methods
import torch
from step_states import assert_same

from inbatch.apps.cli.part_output import explain_method, explain_plugins
from inbatch.errors import ConfigError
from inbatch.methods import METHODS
from inbatch.methods.base import Method
from inbatch.models.attention_slots import ATTENDS
from inbatch.training.recipe import make
from inbatch.training.registry import plugins
from inbatch.training.settings_file import parse_assignment

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = pytest.mark.parametrize("name", METHODS)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def table(page: Path, head: str) -> dict[str, list[str]]:
    """Return the rows of the table with this first column heading: first cell -> the other cells."""
    text = page.read_text()
    rows = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    return {first: rest for first, *rest in cells}


def recipe(command: str) -> None:
    """Parse a command line as a recipe; raise if a name or key is unknown."""
    words = shlex.split(command)
    assert words[:2] == ["inbatch", "pretrain"]
    settings = {"method.name": words[2], "data": "photos"}
    rest = iter(words[3:])
    for flag in rest:
        if flag in SWITCHES:
            settings |= SWITCHES[flag]
            continue
        assert flag in ("--data", "--preset", "--set", "--context", *PLUGS)
        value = next(rest)
        settings |= parse_assignment(value) if flag == "--set" else {PLUGS.get(flag, flag[2:]): value}
    make(settings)


PLUGS = {"--fuse": "fuse.name", "--attend": "attend.name", "--crops": "crops", "--negatives": "negatives.name"}
PLUGS |= {"--group-column": "group_column", "--mix": "mix.name", "--sampler": "sampler.name"}
SWITCHES = {"--curate": {"curate.name": "redraw"}, "--shuffle-groups": {"shuffle_groups": True}}
CONTEXT = {"fuse": ("conv", "set"), "curate": ("redraw",), "attend": ("ba2m", "batchformer"), "crops": (), "README": ()}
CONTEXT |= {"negatives": ("drop-similar", "debias", "hard"), "mix": ("imix", "cutmix", "mixco", "unmix")}
CONTEXT |= {"sampler": ("balanced", "apart", "neighbours")}


@pytest.mark.parametrize("name", CONTEXT)
def test_pages_of_plug_ins_run(name: str) -> None:
    page = DOCS / "context" / f"{name}.md"
    before = dict(ATTENDS)
    try:
        for code in blocks(page, "python"):
            exec(code, {})
    finally:
        ATTENDS.clear()
        ATTENDS.update(before)
    commands = [line for block in blocks(page, "bash") for line in block.splitlines()]
    for command in (c for c in commands if c.startswith("inbatch pretrain")):
        recipe(command)
    assert commands


@pytest.mark.parametrize("name", ["curate", "fuse", "negatives", "mix", "sampler"])
def test_options_of_plug_ins_are_the_code_s(name: str) -> None:
    rows = table(DOCS / "context" / f"{name}.md", "option")
    documented = {option.strip("`"): cells for row, cells in list(rows.items())[2:] for option in row.split(", ")}
    for column, plugin in enumerate(CONTEXT[name]):
        options = plugins()[plugin][2]
        assert {option for option, cells in documented.items() if cells[column]} == set(options)
        for option, default in options.items():
            row = next(row for row in list(rows)[2:] if f"{option}" in row.replace("`", "").split(", "))
            place = row.replace("`", "").split(", ").index(option)
            assert rows[row][column].split(", ")[place] == str(default), option


def test_every_option_is_explained_in_whole_sentences() -> None:
    """A text that continues on the next line of the docstring was cut: "samples in the support set, by view 0's"."""
    for part in [*explain_plugins(), *map(explain_method, METHODS)]:
        cut = [name for name, option in part["options"].items() if not option["what"].endswith((".", "by default"))]
        assert not cut, part["name"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parts-alone", "check-method"])
def test_pages_on_parts_run(name: str) -> None:
    codes = blocks(DOCS / f"{name}.md", "python")
    assert len(codes) >= 2
    names = {"projections": torch.randn(2, 8, 4, requires_grad=True)}
    for code in codes:  # in order, as a reader types them
        exec(code, names)


@PAGES
def test_code_runs_and_commands_are_recipes(name: str) -> None:
    page = DOCS / "methods" / f"{name}.md"
    for code in blocks(page, "python"):
        exec(code, {})
    commands = [line for block in blocks(page, "bash") for line in block.splitlines()]
    assert commands
    for command in commands:
        recipe(command)


@PAGES
def test_the_options_are_the_constructor_s(name: str) -> None:
    rows = table(DOCS / "methods" / f"{name}.md", "option")
    parameters = inspect.signature(METHODS[name]).parameters
    assert list(rows)[2:] == list(parameters)
    for option, parameter in parameters.items():
        documented, default = rows[option][0], parameter.default
        assert default is None or documented == (str(default).lower() if isinstance(default, bool) else str(default))


@PAGES
def test_the_presets_are_the_method_s(name: str) -> None:
    rows = table(DOCS / "methods" / f"{name}.md", "setting")
    presets = [preset.strip("`") for preset in rows.pop("setting")]
    documented = {preset: {} for preset in presets}
    for key, values in rows.items():
        for preset, value in zip(presets, values, strict=True):
            if value and "---" not in value:
                documented[preset][key] = value
    assert documented == {
        preset: {key: str(value) for key, value in own.items() if key != "source"}
        for preset, own in METHODS[name].presets.items()
    }


@pytest.fixture
def spectral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """Write the method of the page on adding a method to a file and register it as the page describes."""
    page = DOCS / "add-a-method.md"
    (code,) = blocks(page, "python")
    file = tmp_path / "spectral.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("spectral", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "spectral", module.Spectral)
    monkeypatch.setitem(small.VARIANTS, "spectral", ("spectral", {"out_dim": 8}))
    return module.Spectral


@pytest.mark.parametrize("groups", [1, 2])
def test_the_method_of_the_page_trains(spectral: type[Method], groups: int) -> None:
    result = small.train("spectral", 16, groups)
    assert_same(result, small.literal("spectral", 16, groups))
    assert result["loss"][0] != result["loss"][1]


def test_method_of_the_page_passes_the_tests_of_all_methods(
    spectral: type[Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    promises = [
        promise for name, promise in vars(test_methods).items()
        if name.startswith("test_") and "variant" in inspect.signature(promise).parameters
    ]  # fmt: skip
    assert len(promises) >= 8
    for promise in promises:
        parameters = inspect.signature(promise).parameters
        if "kind" in parameters:
            for kind in test_methods.KINDS:
                promise("spectral", kind, torch.float16)
        else:
            with monkeypatch.context() as patch:
                promise("spectral", patch) if "monkeypatch" in parameters else promise("spectral")


def test_the_method_of_the_page_is_known_to_recipes(spectral: type[Method]) -> None:
    for command in blocks(DOCS / "add-a-method.md", "bash"):
        recipe(command.strip())
    with pytest.raises(ConfigError, match="weight"):
        make({"data": "digits-canvas", "method.name": "spectral", "method.wieght": 0.5})


def test_the_number_of_methods_is_counted() -> None:
    """MoCo v1 to v3 are two methods."""
    for page in (DOCS.parent / "README.md", DOCS.parent / "llms.txt", DOCS / "index.md"):
        assert re.findall(r"(\w+) methods\b", page.read_text())[0] == str(len(METHODS)), page
    pages = {page.stem for page in (DOCS / "methods").glob("*.md")} - {"README"}
    listed = set(re.findall(r"\]\((\w+)\.md\) \|", (DOCS / "methods" / "README.md").read_text()))
    assert pages == listed == set(METHODS)


def test_line_counts_are_counted() -> None:
    page, methods = DOCS / "add-a-method.md", DOCS.parent / "src" / "inbatch" / "methods"
    stated = {name: int(lines) for name, (lines,) in list(table(page, "file").items())[2:]}
    assert stated == {f"{name}.py": len((methods / f"{name}.py").read_text().splitlines()) for name in METHODS}
    assert max(stated.values()) < 100, "a method is one small file"
    (smallest,) = [code for code in blocks(page, "python") if "class Spectral" in code]
    assert f"of {len(smallest.splitlines())} lines" in page.read_text()


def test_files_that_pages_name_exist() -> None:
    root = DOCS.parent
    pages = [*root.glob("*.md"), root / "llms.txt", *DOCS.rglob("*.md"), root / "examples" / "README.md"]
    named = re.compile(r"(?<![\w/.-])(?:tests|scripts|src/inbatch|benchmarks)/[\w/]+\.(?:py|md|json)\b")
    missing = {
        f"{page.relative_to(root)}: {file}"
        for page in pages
        for file in named.findall(page.read_text())
        if not (root / file).is_file() and page.name != "CHANGELOG.md"
    }
    assert not missing - {"docs/add-a-method.md: src/inbatch/methods/spectral.py"}  # the reader writes it


KEPT = re.compile(r"^(?:```.*?^```|~~~.*?^~~~|\$\$.*?\$\$ *$|<!-- (?!end).*?<!-- end -->)", re.M | re.S)
"""Code, formulas and generated parts of a page."""
UNBROKEN = re.compile(r"(?:!?\[[^\]]*\]\([^)]*\)|`[^`]*`|\$[^$]*\$|\S)+")
"""Words, links, code and formulas: a line with one of them cannot be broken."""
GENERATED = {"settings.md", "fault-injection.md", "mutations.md", "cli.md"}


def test_lines_of_pages_are_at_most_100_characters_long() -> None:
    root = DOCS.parent
    pages = [*root.glob("*.md"), *DOCS.rglob("*.md"), *root.glob("examples/*.md"), *root.glob("tests/golden/*.md")]
    pages = [page for page in pages if page.name not in GENERATED and not {"results", "_build"} & {*page.parts}]
    long = [
        f"{page.relative_to(root)}: {line}"
        for page in pages
        for line in KEPT.sub("", page.read_text()).splitlines()
        if len(line) > 100 and not line.startswith(("|", "#", ">")) and len(UNBROKEN.findall(line)) > 1
    ]
    assert len(pages) > 80 and not long


def test_the_long_description_of_the_package_has_absolute_links_only() -> None:
    root = DOCS.parent
    hooks = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    (change,) = hooks["fancy-pypi-readme"]["substitutions"]
    text = re.sub(change["pattern"], change["replacement"], readme := (root / "README.md").read_text())
    assert all(target.startswith(("https://", "#")) for target in re.findall(r"\]\(([^)]+)\)", text))
    assert len(readme) / 2 < len(text) < len(readme)
    assert text.index("pip install inbatch") < text.index("pip install .")
