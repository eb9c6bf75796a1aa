"""Settings, weights, runs and names from other people are treated as data: read or refused, never executed."""

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import source_trees
import torch
from PIL import Image
from small_runs import leave_out_comparison
from typer.testing import CliRunner, Result

import inbatch
from inbatch.apps.cli import app
from inbatch.data import write_folder
from inbatch.data.sources.arrays import ArraySource
from inbatch.errors import DataError
from inbatch.training.monitors.neighbour_grid import save_neighbour_grid

TINY = "--data digits-canvas --set subset=200 --batch 40 --epochs 1"


def run(line: str) -> Result:
    """Run one command line in this process; exceptions propagate."""
    return CliRunner().invoke(app, shlex.split(line), catch_exceptions=False, env={"COLUMNS": "200", "NO_COLOR": "1"})


def refused(line: str, code: int, words: str = "") -> str:
    """Return the error message with which a command line is refused."""
    result = run(line)
    error = result.stderr
    assert result.exit_code == code and words in error, result.output
    assert error.startswith("error: ") and len(error) < 3000, result.output
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run that has a head to evaluate."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_comparison(patch)
        assert run(f"pretrain cc {TINY} --set method.num_clusters=5 --out {out} --quiet").exit_code == 0
    return out


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty working directory in which no file called `executed` may ever appear."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob("executed")), "somebody was let in"


class Bomb:
    """Object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


# Calls that the source must not contain

FORBIDDEN = {
    "eval": "runs text", "exec": "runs text", "compile": "runs text", "__import__": "runs a module that data names",
    "os.system": "a shell", "os.popen": "a shell", "pickle.load": "runs pickles", "pickle.loads": "runs pickles",
    "pickle.Unpickler": "runs pickles", "joblib.load": "runs pickles", "dill.load": "runs pickles",
    "shelve.open": "runs pickles", "marshal.loads": "crashes on hostile bytes", "yaml.load": "builds any object",
    "yaml.unsafe_load": "builds any object", "yaml.full_load": "builds objects", "torch.hub.load": "runs a repository",
    "torch.jit.load": "runs a program", "torch.package.PackageImporter": "runs a package",
    "importlib.import_module": "runs a module that data names", "importlib.util.spec_from_file_location": "runs a file",
    "urllib.request.urlopen": "a network", "urllib.request.urlretrieve": "a network", "requests.get": "a network",
    "socket.socket": "a network", "socket.create_connection": "a network",
    "tempfile.mktemp": "somebody else may make the file first", "shutil.unpack_archive": "writes outside of its folder",
}  # fmt: skip
"""Forbidden calls and the reason for each."""
ALLOWED = {
    ("apps/bench/worker.py", "importlib.import_module"): "implementations of the benchmark, named by the command line",
    ("apps/bench/worker.py", "importlib.util.spec_from_file_location"): "files of the same run",
    ("apps/bench/peer_workloads.py", "importlib.import_module"): "a file of the same run",
    ("apps/bench/peer_workloads.py", "importlib.util.spec_from_file_location"): "files of the installed solo-learn",
    ("training/settings_file.py", "yaml.load"): "a safe loader, compiled where PyYAML has it",
    ("runtime/own_parts.py", "importlib.import_module"): "code that the user types on the command line",
    ("testing/ranks.py", "importlib.import_module"): "the class that is checked, in another process",
    ("models/backbones.py", "socket.create_connection"): "if the hub answers when weights are requested",
    ("__init__.py", "import_module"): "names written in that file",
}
"""Exceptions to FORBIDDEN and the reason for each."""
LAST_WORDS = ("extract", "extractall")  # of tarfile and zipfile, for any name of the archive variable
TEXTS = {"shell": "True", "allow_pickle": "True"}
GUARDED = (*TEXTS, "weights_only")


def test_the_source_names_no_way_in() -> None:
    violations, used = [], set()
    for file in source_trees.FILES:
        name, nodes = str(file.relative_to(source_trees.ROOT)), source_trees.nodes(file)
        # A name from `from ... import` counts as the same call.
        full = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
        }  # fmt: skip
        for node in nodes:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "pickle.Unpickler" for base in node.bases):
                # Allowed only if the class restricts the names that a pickle may use and has no other way of reading.
                own = {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
                assert "find_class" in own, f"{name}: {node.name} lets pickles name anything"
            if not isinstance(node, ast.Call):
                continue
            written = source_trees.written(node.func)
            call = full.get(written, written)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg in GUARDED}
            wrong = call in FORBIDDEN or call.split(".")[-1] in LAST_WORDS
            wrong |= any(words.get(key) == value for key, value in TEXTS.items())
            wrong |= call == "torch.load" and words.get("weights_only") != "True"
            wrong |= call == "numpy.load" and words.get("allow_pickle", "False") != "False"
            if wrong and {(name, call), (name, written)} & ALLOWED.keys():
                used |= {(name, call), (name, written)} & ALLOWED.keys()
            elif wrong:
                violations.append(f"{name}:{node.lineno}: {ast.unparse(node)[:80]} ({FORBIDDEN.get(call, 'not so')})")
    assert not violations
    assert not [where for where in ALLOWED if where not in used and where[0] != "__init__.py"], "allowed, and not there"


# Settings

HOSTILE_TEXT = {
    "python": "!!python/object/apply:os.system ['touch executed']",
    "python in a key": "method: {name: simclr, temperature: !!python/object/apply:os.system ['touch executed']}",
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    "itself": "a: &a [*a]",
    "deep": "data: " + "[" * 100_000,
    "deep maps": "".join(" " * i + "a:\n" for i in range(3000)),
    "deep JSON": '{"a":' * 50_000,
    "an impossible day": "data: 2020-99-99",
    "an impossible number": "seed: !!int x",
    "an impossible truth": "seed: !!bool maybe",
    "an impossible time": "seed: !!timestamp x",
    "a number of many digits": "seed: " + "9" * 10_000,
    "a key that is a list": "[1, 2]: 3",
    "two documents": "a: 1\n---\nb: 2",
    "not UTF-8": "data: \udcff",
    "control characters": "data: \x00\x1b[2J",
    "large": "data: " + "x" * 1_000_000,
    "nothing": "",
    "a word": "recipe",
}


@pytest.mark.grid(10)
@pytest.mark.parametrize("name", HOSTILE_TEXT)
def test_a_hostile_recipe_is_refused(name: str, elsewhere: Path) -> None:
    (elsewhere / "recipe.yaml").write_bytes(HOSTILE_TEXT[name].encode(errors="surrogateescape"))
    refused("pretrain --data digits-canvas --config recipe.yaml --dry-run", 2)


def test_a_recipe_that_never_ends_is_refused(elsewhere: Path) -> None:
    refused("pretrain --data digits-canvas --config /dev/zero --dry-run", 2)


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system ['touch executed']", "&a [*a]", "[" * 9000])
def test_a_hostile_assignment_is_refused(value: str, elsewhere: Path) -> None:
    refused(f"pretrain --data digits-canvas --dry-run --set {shlex.quote(f'method.temperature={value}')}", 2)


HUGE = [
    f"batch_size={10**30}", "epochs=1.0e+400", f"epochs={10**12}", f"image_size={10**9}", "seed=-1",
    f"seed={10**30}", "knn_k=.inf",
    f"subset={10**30}", "subset=.inf", "channels=.inf", f"context={10**30}", "levels=[-.inf, .inf]", "classes=[1, 2]",
    "preset=[1, 2]", "method.name=[simclr]", f"method.hidden_dim={10**15}", "schedule.warmup_epochs=.nan",
    "encoder.stem=[1]",
    f"checkpoint_every={10**400}", "precision=[float32]", "crops={a: 1}", "test=[1]",
]  # fmt: skip


@pytest.mark.grid(12)
@pytest.mark.parametrize("setting", HUGE)
def test_an_absurd_number_is_refused(setting: str, elsewhere: Path) -> None:
    result = run(f"pretrain {TINY.replace('--set subset=200', '')} --dry-run --set {shlex.quote(setting)}")
    assert result.exit_code in (2, 3) and len(result.stderr) < 3000, result.output
    assert result.exit_code == 2 or setting.split("=")[0] in ("subset", "classes", "batch", "channels", "test")


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["evaluate RUN --seed 4294967296", f"inspect RUN --seed {10**22}", "views digits-canvas --seed -1"]
)
def test_seeds_out_of_range_are_refused(line: str, finished: Path) -> None:
    assert run(line.replace("RUN", str(finished))).exit_code == 2


# Weights

PICKLES = ["evil.pt", "evil.pth", "evil.safetensors", "legacy.pt", "list.pt", "words.pt", "empty.pt", "script.pt"]


@pytest.fixture
def weights(elsewhere: Path) -> Path:
    """Write files that have the names of weight files."""
    torch.save({"conv1.weight": Bomb()}, elsewhere / "evil.pt")
    shutil.copy("evil.pt", "evil.pth")
    shutil.copy("evil.pt", "evil.safetensors")
    torch.save({"conv1.weight": Bomb()}, elsewhere / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save([torch.ones(2)], elsewhere / "list.pt")
    torch.save({"conv1.weight": "a word", 3: 4}, elsewhere / "words.pt")
    (elsewhere / "empty.pt").touch()
    (elsewhere / "script.pt").write_text("import os")
    return elsewhere


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_weights_are_refused(name: str, weights: Path) -> None:
    refused(f"pretrain {TINY} --init {name} --dry-run", 3, f"{name} cannot be read as weights")


@pytest.mark.parametrize("key", ["pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "pretrained"])
def test_settings_of_timm_for_files_are_refused(key: str, weights: Path) -> None:
    refused(f"pretrain {TINY} --encoder resnet18 --set encoder.{key}=evil.pth --dry-run", 2, "init")


def header(text: bytes, size: int | None = None) -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text


SAFETENSORS = {
    "over-long header": header(b"{}", 2**62),
    "header of zeros": header(b"\0" * 100),
    "deep header": header(b'{"a":' * 20_000),
    "huge shape": header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}') + b"\0" * 16,
    "offsets beyond": header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4000000]}}') + b"\0" * 16,
    "negative": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,16]}}') + b"\0" * 16,
    "empty": b"",
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_crafted_safetensors_are_refused(name: str, elsewhere: Path) -> None:
    (elsewhere / "w.safetensors").write_bytes(SAFETENSORS[name])
    refused(f"pretrain {TINY} --init w.safetensors --dry-run", 3, "cannot be read as weights")


# Directories from other people: an encoder, heads, a run


def crafted(folder: Path, change: Callable[[dict], object]) -> None:
    """Write a changed config.json whose checksum of the weights is valid."""
    config = json.loads((folder / "config.json").read_text())
    changed = change(config["inbatch"])
    config["inbatch"] = config["inbatch"] if changed is None else changed
    (folder / "config.json").write_text(json.dumps(config))


ENCODERS: dict[str, Callable[[dict], object]] = {
    "no checksum": lambda c: c.pop("sha256") and None,
    "not an object": lambda c: [1, 2],
    "only arguments": lambda c: {"sha256": c["sha256"], "arguments": {}},
    "huge": lambda c: c.update(size=10**9),
    "no size": lambda c: c.update(size="large"),
    "negative": lambda c: c.update(size=-1),
    "channels": lambda c: c.update(channels=10**12),
    "mean": lambda c: c.update(mean=[[1]]),
    "arguments": lambda c: c.update(name="resnet18", arguments={"checkpoint_path": "evil.pt"}),
    "a list of arguments": lambda c: c.update(arguments=["a"]),
    "size as an argument": lambda c: c.update(arguments={"size": 3}),
    "a path as a name": lambda c: c.update(name="../../evil.pt"),
    "a hub's name": lambda c: c.update(name="hf-hub:somebody/something"),
    "a folder's name": lambda c: c.update(name="local-dir:/tmp"),
    "a number as a name": lambda c: c.update(name=3),
    "attention": lambda c: c.update(attend={"name": "nosuch", "options": {}}),
    "attention's options": lambda c: c.update(attend=[1]),
}


@pytest.mark.grid(9)
@pytest.mark.parametrize("name", ENCODERS)
def test_a_crafted_encoder_is_refused(name: str, finished: Path, elsewhere: Path) -> None:
    shutil.copytree(finished / "encoder", "encoder")
    torch.save({"conv1.weight": Bomb()}, "evil.pt")
    crafted(elsewhere / "encoder", ENCODERS[name])
    result = run("embed encoder digits-canvas -o f.npz --split test --quiet")
    assert result.exit_code in (2, 3) and result.stderr.startswith("error: "), result.output
    assert not Path("f.npz").exists(), result.output


def test_encoder_folder_of_pickles_is_refused(finished: Path, elsewhere: Path) -> None:
    """Other libraries fall back to pytorch_model.bin; inbatch does not."""
    shutil.copytree(finished / "encoder", "encoder")
    os.remove("encoder/model.safetensors")
    torch.save({"conv1.weight": Bomb()}, "encoder/pytorch_model.bin")
    refused("embed encoder digits-canvas -o f.npz", 3, "cannot be read as weights")
    os.symlink(elsewhere / "encoder" / "pytorch_model.bin", "encoder/model.safetensors")
    refused("embed encoder digits-canvas -o f.npz", 3, "damaged")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":' * 20_000, "null", "\x00", '{"inbatch": 3}'])
def test_a_config_that_is_none(text: str, finished: Path, elsewhere: Path) -> None:
    shutil.copytree(finished / "encoder", "encoder")
    (elsewhere / "encoder" / "config.json").write_text(text)
    refused("embed encoder digits-canvas -o f.npz", 3)


HEADS: dict[str, Callable[[dict], object]] = {
    "no method": lambda c: c.pop("method") and None,
    "another method": lambda c: c.update(method="os.system"),
    "a list": lambda c: c.update(method=["cc"]),
    "options": lambda c: c.update(options={"nosuch": 1}),
    "huge": lambda c: c.update(options={"num_clusters": 10**15}),
    "told": lambda c: c.update(told=3),
    "told words": lambda c: c.update(told={"images": "many", "classes": None}),
}


@pytest.mark.parametrize("name", HEADS)
def test_crafted_heads_are_refused(name: str, finished: Path, elsewhere: Path) -> None:
    shutil.copytree(finished, "run")
    crafted(elsewhere / "run" / "heads", HEADS[name])
    refused("evaluate run --protocol clustering --from head", 3, "describes no heads")


RUNS = {
    "recipe.json": HOSTILE_TEXT["python"], "result.json": '{"a":' * 20_000,
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_crafted_run_is_refused(name: str, finished: Path, elsewhere: Path) -> None:
    shutil.copytree(finished, "run")
    (elsewhere / "run" / name).write_text(RUNS[name])
    if name == "result.json":  # no command reads result.json of its own run
        with pytest.raises(DataError, match="cannot be read"):
            inbatch.load_run("run")
        name = "as a reference"
    line = {"recipe.json": "evaluate run --protocol knn"}
    result = run(line.get(name, "pretrain --data digits-canvas --compare run --out new"))
    assert result.exit_code in (2, 3) and result.stderr.startswith("error: "), result.output


def signed(path: Path) -> None:
    """Write a valid checkpoint checksum, which an attacker can compute as well."""
    import hashlib

    data = path.read_bytes()
    path.write_bytes(data[:-2] + (64).to_bytes(2, "little") + hashlib.sha256(data).hexdigest().encode())


@pytest.mark.parametrize("what", [Bomb(), [1], {"step": 1}, {"step": 1, "state": 3}, {"step": "x", "state": {}}])
def test_a_crafted_checkpoint_is_refused(what: object, finished: Path, elsewhere: Path) -> None:
    shutil.copytree(finished, "run")
    for name in ("last.pt", "previous.pt", "best.pt"):
        path = elsewhere / "run" / "checkpoints" / name
        torch.save(what, path)
        signed(path)
    for line in ("pretrain --resume run", "inspect run"):
        result = run(line)
        assert result.exit_code == 1 and result.stderr.startswith("error: "), result.output


def test_crafted_cache_is_replaced(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INBATCH_CACHE", str(elsewhere / "cache"))
    monkeypatch.setattr("inbatch.data.decoded_cache.WORTH", 0)
    for i in range(12):
        Image.new("RGB", (20, 20 + i), (20 * i, 0, 0)).save(elsewhere / f"{i}.png")
    line = f"pretrain --data {elsewhere} --encoder tiny --set image_size=16 --dry-run --json"
    assert run(line).exit_code == 0
    entry = next((elsewhere / "cache").iterdir())
    metadata = json.loads((entry / "entry.json").read_text())
    crafts: list[object] = [Bomb(), *({**metadata, key: value} for key, value in (
        ("shape", [-1, -3, 20, 31]), ("shape", [float("inf")] * 4), ("missing", [[10**30, 3]]), ("scaled", 1e400),
    ))]  # fmt: skip
    for craft in crafts:
        if isinstance(craft, Bomb):
            torch.save(craft, entry / "entry.json")
        else:
            (entry / "entry.json").write_text(json.dumps(craft))
        assert run(line).exit_code == 0


def test_a_list_of_classes_is_text(elsewhere: Path) -> None:
    torch.save(Bomb(), "classes.txt")
    refused(f"pretrain {TINY} --dry-run --set classes=classes.txt", 3, "classes.txt")


def test_labels_that_would_fill_memory(elsewhere: Path) -> None:
    source = inbatch.data.open_data((np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 2**60])))
    assert source.classes == ("0", str(2**60)) and source.labels.tolist() == [0, 1]


# Names

CLASSES = [
    b"<script>alert(1)", b"[bold red]x[blink]", rb"$\frac{", b"\x1b[2J\x1b]0;owned\x07", b"|pipe|", b"`tick`", b"%s{0}",
    b"\xe2\x80\xae\xd7\x9agnp", b"a" * 255, b"new\nerror: it is broken", b"\rover", b"=cmd|' '!A0", b"\xf0\x9f\x98\x80",
    b"\xff\xfe",
]  # fmt: skip
"""Directory names that would be commands in a shell, a browser, a terminal or a template."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return labelled images whose names would be commands in other programs."""
    root = tmp_path_factory.mktemp("hostile") / "data"
    rng = np.random.default_rng(0)
    for name in CLASSES:
        folder = os.path.join(os.fsencode(root), name)
        os.makedirs(folder)
        for i in range(4):
            pixels = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            pixels.save(os.path.join(folder, b"%d" % i + name[:200] + b".png"))
    return root


def assert_harmless(text: str) -> None:
    """Check that the text has no control characters and no line that looks like an error message of inbatch."""
    assert all(c == "\n" or (c.isprintable() and unicodedata.category(c) != "Cf") for c in text), ascii(text)
    assert not any(line.startswith("error: it is broken") for line in text.splitlines())


@pytest.mark.slow
def test_hostile_names_do_no_harm(hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command that handles the names; check all of its output streams and files."""
    monkeypatch.chdir(tmp_path)
    data = shlex.quote(str(hostile))
    for line in (
        f"pretrain --data {data} --encoder tiny --set image_size=16 --epochs 1 --batch 8 --fuse conv --out run",
        "evaluate run", f"embed run {data} -o f.parquet", f"embed run {data} -o f.npz", "inspect run",
        f"views {data} -o views.png", f"pretrain --data {data} --encoder tiny --set image_size=16 --dry-run",
        f"pretrain --data {data} --encoder tiny --set image_size=16 --dry-run --json",
    ):  # fmt: skip
        result = run(line)
        assert result.exit_code == 0, result.output
        assert_harmless(result.stdout)
        assert_harmless(result.stderr)
    source = inbatch.data.open_data(hostile)
    features = inbatch.load("run").embed([source.image(i) for i in range(len(source))])
    with warnings.catch_warnings(action="error"):  # ignore the warning about glyphs that the font lacks
        save_neighbour_grid(source, torch.from_numpy(features), tmp_path / "neighbours.png", queries=14)

    import pyarrow.parquet as parquet

    table = parquet.read_table("f.parquet")
    assert len(set(table["path"].to_pylist())) == len(source)
    assert np.load("f.npz", allow_pickle=False)["vector"].shape[0] == len(source)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in left if path.suffix == ".png"]) >= 4
    for path in left:
        assert_harmless(str(path.relative_to(tmp_path)))
        if path.suffix in (".json", ".jsonl", ".yaml", ".txt"):
            assert_harmless(path.read_text("utf-8"))
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
                assert picture.info.keys() <= {"Software", "dpi"}


def test_a_class_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    names = (
        "../../x",
        "/etc/x",
        "con",
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        "nul.txt",
        "\x00",
        ".hidden",
        "é" * 300,
        "é" * 301,
    )
    images = torch.zeros(len(names), 3, 4, 4, dtype=torch.uint8)
    source = ArraySource(images, torch.arange(len(names)), names)
    root = write_folder(source, tmp_path / "deep" / "down" / "out")
    paths = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    assert len(paths) == len(names) and all(len(path.parts) == 2 for path in paths)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    again = inbatch.data.open_data(root)
    assert len(again) == len(again.classes) == len(names)


# Output files


WRITERS = ["evaluate RUN --protocol knn --out OUT", "embed RUN digits-canvas --split test -o OUT"]
WRITERS += ["crops --pairs 100 -o OUT", "views digits-canvas -o OUT"]


@pytest.mark.grid(2)
@pytest.mark.parametrize("line", WRITERS)
def test_outputs_are_whole_or_not_there(line: str, finished: Path, elsewhere: Path) -> None:
    ending = "npz" if "embed" in line else "png"
    line = line.replace("RUN", str(finished))
    Path("file").write_text("in the way")
    Path(f"folder.{ending}").mkdir()
    for out in (f"file/x.{ending}", f"folder.{ending}"):
        result = run(line.replace("OUT", out))
        assert result.exit_code in (1, 2) and "annot write" in result.stderr, result.output
    target = elsewhere / "kept" / f"target.{ending}"
    target.parent.mkdir()
    target.write_text("old")
    os.symlink(target, f"link.{ending}")
    for out in (f"new/folder/x.{ending}", f"link.{ending}"):
        assert run(line.replace("OUT", out)).exit_code == 0
        assert Path(out).stat().st_size > 100
    assert Path(f"link.{ending}").is_symlink() and target.read_bytes() != b"old"  # the target of the link
    assert not [path for path in elsewhere.rglob("*") if path.name.endswith(".tmp")]


def test_devices_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # like /dev/null, not a regular file
    refused(f"crops --pairs 100 -o {tmp_path / 'pipe'}", 1, "not a regular file")
    assert (tmp_path / "pipe").is_fifo()


def test_link_at_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".out.json.{os.getpid()}.tmp").symlink_to(victim)
    inbatch.runtime.files.write_json(tmp_path / "out.json", {})
    assert victim.read_text() == "mine" and (tmp_path / "out.json").read_text() == "{}\n"


def bound_by_permissions() -> None:
    """Drop the capability with which root ignores permissions; called in the child process before exec."""
    if os.getuid() == 0:
        import ctypes

        if ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
            os._exit(77)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="permissions bind a superuser elsewhere in other ways")
@pytest.mark.parametrize("line", ["crops --pairs 100 -o c.png", f"pretrain {TINY} --out run", f"pretrain {TINY}"])
def test_a_folder_that_is_read_only_is_a_sentence(line: str, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    done = subprocess.run(
        [sys.executable, "-m", "inbatch", *shlex.split(line)], capture_output=True, text=True, cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=bound_by_permissions,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("this superuser may not give up its power")
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert done.stderr.startswith("error: Cannot write ") and "Permission denied" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(folder.iterdir())
