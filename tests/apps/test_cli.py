"""Command line: what it prints to which stream, its exit codes, and the files that it writes."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import one_object, run
from PIL import Image
from small_runs import evaluate_on_few_images, leave_out_comparison

import inbatch
from inbatch import api
from inbatch.apps.cli.app import Program, app, with_values
from inbatch.apps.cli.part_output import explain
from inbatch.errors import InbatchError, Preempted, TrainingError
from inbatch.methods import METHODS
from inbatch.runtime.text import printable
from inbatch.training import checkpoint
from inbatch.training.recipe import Recipe, make

COMMANDS = tuple(Program.ORDER)
WORK = (
    "api:pretrain", "api:dry_run", "api:evaluate_run", "api:embed_run", "api:export_run", "api:replay_run",
    "api:train_classifier", "api:predict", "apps.cli.checking:_import_method", "apps.adaptation.adapt:adapt",
    "apps.bench.benchmark:bench", "apps.collection.duplicates:find_duplicates",
    "apps.collection.labels:find_label_errors", "apps.collection.outliers:find_outliers",
    "apps.collection.search:search_images",
    "apps.collection.select:select_images", "apps.comparisons.compare:compare", "apps.doctor:examine",
    "apps.papers.command:run_table_command", "apps.quickstart:quickstart", "apps.reports.batch_context:inspect_run",
    "apps.reports.choose:choose_run", "apps.reports.crop_statistics:count_configurations",
    "apps.reports.dataset:survey_data", "apps.reports.explorer.explore:explore_features",
    "apps.reports.runs_page.page:write_runs_page", "apps.reports.view_grid:draw_views",
)  # fmt: skip
"""Functions that do the work of the commands."""
TINY = "--data digits-canvas --set subset=200 --batch 40 --epochs 1"  # 5 steps
NEEDED = {"relation": "--teacher inbatch/cifar10-fast"}


def process(*args: str, **options: Any) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *args], **(pipes | options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_comparison(patch)
        assert run(f"pretrain {TINY} --out {out} --quiet").exit_code == 0
    return out


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write twelve random unlabelled images to a folder whose name contains terminal control characters."""
    folder = tmp_path / "my\x1b[31m[bold]\nphotos"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 24, 30, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


# Help


def test_help_imports_nothing_heavy() -> None:
    """Help imports no large library and so starts fast; measure it with `python -X importtime -m inbatch --help`."""
    code = (
        "import sys; sys.argv = ['inbatch', *sys.argv[1:]]\n"
        "from inbatch.apps.cli import main\n"
        "try: main()\n"
        "finally: print('heavy:', *{'torch', 'numpy', 'sklearn', 'yaml', 'timm'} & sys.modules.keys(), file=sys.stderr)"
    )
    for line in (["--help"], ["pretrain", "--help"]):
        child = process("-c", code, *line)
        _, err = child.communicate(timeout=60)
        assert child.returncode == 0 and err.strip() == "heavy:", err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_stays_short(command: str) -> None:
    shown = run(f"{command} --help").stdout
    examples = shown.partition("Examples:")[2]
    assert examples.count(f"inbatch {command}") >= (1 if command == "slurm" else 2)
    flags = set(re.findall(r"^\W*(--[a-z-]+)", shown, re.MULTILINE)) - {"--help"}
    second = {"--out", "--backbone", "--model", "--size", "--batch", "--learning-rate", "--num-workers", "--share"}
    second |= {"--draws", "--most", "--on", "--work", "--again", "--amp"}  # further names of an option
    assert ("--json" in flags or command == "slurm") and len(flags - second) <= {"pretrain": 47, "adapt": 21}.get(
        command, 20
    ), sorted(flags)
    shows = ("quickstart", "pretrain", "adapt", "embed", "table", "compare", "explore", "search", "predict")
    assert ("--quiet" in flags) == (command in shows), "--quiet only applies to commands that show progress"


def test_the_overview_names_every_command_and_exit_code() -> None:
    shown = run("--help").stdout
    names = {info.name or info.callback.__name__.replace("_", "-") for info in app.registered_commands}
    assert set(Program.ORDER) == names
    places = [re.search(rf"^\W*{command} ", shown, re.MULTILINE).start() for command in Program.ORDER]  # type: ignore[union-attr]
    assert places == sorted(places) and "75 stopped by a signal" in shown
    assert run("--version").stdout.strip()


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("pretrain --resume", "pretrain --resume auto"),
        ("pretrain --resume --epochs 3", "pretrain --resume auto --epochs 3"),
        ("pretrain --resume RUN", "pretrain --resume RUN"),
        ("pretrain --amp", "pretrain --amp bf16"),
        ("pretrain --amp float32", "pretrain --amp float32"),
        ("pretrain", "pretrain"),
        ("", ""),
    ],
)
def test_options_without_a_value_get_their_usual_one(typed: str, read: str) -> None:
    assert with_values(typed.split()) == read.split()


def test_usual_names_of_options_are_accepted_or_get_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def dry_run(data: Any, method: Any, **options: Any) -> None:
        asked.update(options)
        raise Preempted("parsed")

    monkeypatch.setattr(api, "dry_run", dry_run)
    usual = "--batch-size 8 --backbone tiny --num-workers 0 --image-size 20 --optimizer sgd --lr 0.5 --precision bf16"
    assert run(f"pretrain --data x --dry-run {usual}").exit_code == Preempted.exit_code
    keys = ("batch_size", "encoder", "workers", "image_size", "optimizer", "precision")
    assert {key: asked[key] for key in keys} == {
        "batch_size": 8, "encoder": "tiny", "workers": 0, "image_size": 20, "optimizer": "sgd", "precision": "bf16",
    }  # fmt: skip
    assert asked["settings"] == {"optimizer.lr": 0.5}
    answers = {"--fp16": "--precision", "--max-epochs 3": "--epochs", "--gpus 1": "--device", "--bs 8": "--batch-size"}
    answers |= {"--warmup-epochs 1": "--set", "--img-size 32": "(Possible options: --image-size)"}
    for option, answer in answers.items():
        result = run(f"pretrain --data x {option}")
        assert result.exit_code == 2 and answer in result.stderr
    assert "Possible" not in run("crops --fp16").stderr, "no option of this command"
    monkeypatch.undo()
    result = run("pretrain --data digits-canvas --set lr=0.1 --dry-run")
    assert result.exit_code == 2 and "did you mean 'optimizer.lr'?" in result.stderr
    assert run("-V").stdout == run("--version").stdout


def test_every_example_in_the_help_is_a_valid_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command line in the help parses; the work itself is replaced."""

    def cut(*args: Any, **options: Any) -> None:
        raise Preempted("parsed")

    for module, name in (text.split(":") for text in WORK):
        monkeypatch.setattr(importlib.import_module(f"inbatch.{module}"), name, cut)
    for command in COMMANDS:
        examples = [part.strip() for part in run(f"{command} --help").stdout.partition("Examples:")[2].splitlines()]
        lines = [example for example in examples if example.startswith("inbatch ")]
        assert lines
        for line in lines:
            words = line.partition("inbatch ")[2].partition("   ")[0].partition(" > ")[0]
            prints = command in ("methods", "plugins", "slurm") or words == "table"
            assert run(words).exit_code == (0 if prints else Preempted.exit_code), line


# Every command, end to end


def test_pretrain_prints_its_recipe_and_results(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_on_few_images(monkeypatch)
    result = run(f"pretrain moco {TINY} --set method.queue_size=80 --context 20")
    assert result.exit_code == 0
    for words in (
        "200 of 1,297 used",
        "moco, preset digits",
        "74,400 parameters",
        "2 context groups of 20",
        "1 epoch x 5 steps = 5, ",
    ):
        assert words in result.stderr, words
    for words in (
        "k-NN",
        "ARI",
        "untrained encoder",
        "images/s",
        "test split of digits-canvas",
        "runs/moco-digits-canvas-1",
    ):
        assert words in result.stdout, words
    for following in (line.strip() for line in result.stdout.splitlines() if line.strip().startswith("inbatch ")):
        assert run(following.removeprefix("inbatch ").replace(".parquet", ".npz")).exit_code == 0, following
    assert (elsewhere / "runs" / "moco-digits-canvas-1" / "evaluation.json").is_file()


@pytest.mark.slow
def test_pretrain_without_labels(photos: Path, elsewhere: Path) -> None:
    """Given only a folder of photos, batch and preset follow the images, and unusual file names are safe."""
    result = run(f"pretrain --data {shlex.quote(str(photos))} --encoder tiny --epochs 1 --set image_size=24 --out run")
    assert result.exit_code == 0
    assert "No labels" in result.stdout and "batch:   8 = 1 context group" in result.stderr
    assert "\x1b" not in result.stdout + result.stderr and "my\\x1b[31m[bold]" in result.stderr


def test_the_learning_rate_rule_is_spelled_out(photos: Path, elsewhere: Path) -> None:
    data = f"--data {shlex.quote(str(photos))} --encoder tiny --set image_size=24"
    assert "lars, lr 0.03125 = 1 x 8/256" in run(f"pretrain {data} --dry-run --batch 8").stdout


def test_evaluate_writes_figures_and_protocol(finished: Path) -> None:
    result = run(f"evaluate {finished} --protocol knn --protocol clustering --k 7")
    assert result.exit_code == 0 and "NMI" in result.stdout and "linear" not in result.stdout
    written = json.loads((finished / "evaluation.json").read_text())
    assert written["knn"]["k"] == 7 and "linear" not in written and written["held_out"] == "test split of digits-canvas"
    again = run(f"evaluate {finished} --json --protocol knn --out {finished.parent / 'other.json'}")
    assert one_object(again.stdout)["knn"] == json.loads((finished / "result.json").read_text())["evaluation"]["knn"]
    assert (finished.parent / "other.json").is_file() and not again.stderr


@pytest.mark.slow
def test_head_that_assigns_clusters_is_evaluated_in_addition_to_k_means(elsewhere: Path) -> None:
    """The encoder file and the run give the same metrics of the clusters that the head assigns, for any images."""
    assert "head ACC" in run(f"pretrain cc {TINY} --set method.num_clusters=7 --out run").stdout
    completed = run("evaluate run --protocol clustering --from head")
    assert completed.exit_code == 0 and "head NMI" in completed.stdout
    written = json.loads((elsewhere / "run" / "evaluation.json").read_text())
    result = json.loads((elsewhere / "run" / "result.json").read_text())["evaluation"]
    assert written["head"] == result["head"] and written["clustering"]["nmi"] == result["clustering"]["nmi"]
    head = written["head"]
    assert (head["head"], head["clusters"], head["images"], head["split"]) == ("clusters", 7, 500, "test")
    assert 1 <= head["used"] <= 7 and 0 <= head["nmi"] < 1

    built = api.prepare(config="run/recipe.json", data=None, device="cpu")  # the head of the last checkpoint
    built.network.load_state_dict(checkpoint.load(elsewhere / "run" / "checkpoints").state["network"])
    source = inbatch.data.open_data("digits-canvas", "test")
    with built.network.evaluating():
        images = built.encoder.prepare(source.image(i) for i in range(len(source)))
        assignment = built.network([images])["clusters"][0].argmax(1)
    assert head["nmi"] == pytest.approx(inbatch.evaluation.nmi(source.labels, assignment), abs=0.01)
    assert head["used"] == len(assignment.unique())

    plain = torch.zeros(30, 1, 20, 20, dtype=torch.uint8), [0, 1, 2] * 10
    judged = inbatch.evaluate_run("run", plain, protocols=["knn", "clustering"], from_="head", k=1)["head"]
    assert judged["used"] == 1 and judged["nmi"] == 0
    assert "head" not in inbatch.evaluate_run("run", protocols=["clustering"])


def test_clusters_of_a_head_need_a_head_that_assigns_them(finished: Path, elsewhere: Path) -> None:
    for line, words in (
        ("--from head", "simclr has no head that assigns clusters"),
        ("--from head --protocol knn", "need the protocol clustering"),
        ("--from heads", "unknown source of clusters 'heads'"),
    ):
        result = run(f"evaluate {finished} {line}")
        assert result.exit_code == 2 and words in result.stderr, result.stderr
    shutil.copytree(finished, "old")
    shutil.rmtree("old/heads")
    assert "old has no heads" in run("evaluate old --from head").stderr
    weights = finished / "heads" / "model.safetensors"
    shutil.copytree(finished, "hurt")
    (elsewhere / "hurt" / "heads" / "model.safetensors").write_bytes(weights.read_bytes()[:-1] + b"x")
    hurt = run("evaluate hurt --from head")
    assert hurt.exit_code == 3 and "damaged" in hurt.stderr


def test_embed_writes_what_the_encoder_gives(finished: Path, tmp_path: Path) -> None:
    result = run(f"embed {finished} digits-canvas --split test -o {tmp_path / 'f.npz'} --json")
    assert one_object(result.stdout) == {"images": 500, "out": str(tmp_path / "f.npz"), "splits": {"test": 500}}
    vectors = np.load(tmp_path / "f.npz", allow_pickle=False)["vector"]
    source = inbatch.data.open_data("digits-canvas", "test")
    expected = inbatch.load(finished).embed([source.image(i) for i in range(5)])
    np.testing.assert_allclose(vectors[:5], expected, rtol=1e-4, atol=1e-5)


def test_views_draws_a_row_per_image(photos: Path, elsewhere: Path) -> None:
    data = shlex.quote(str(photos))
    result = run(
        f"views {data} --count 3 --views swav_cifar --size 16 --set views.num_small_crops=3 -o new/views.png --json"
    )
    assert one_object(result.stdout)["options"]["num_small_crops"] == 3
    width, height = Image.open(elsewhere / "new" / "views.png").size
    assert (height - 4) // 3 == 100 and (width - 4) // 100 == 1 + 5  # the image, two large views and three small ones
    assert "digits" in run("views digits-canvas").stdout and (elsewhere / "views.png").is_file()


def test_methods_lists_the_registry_and_explains_each() -> None:
    shown = run("methods").stdout
    assert all(name in shown for name in METHODS)
    for name, method in METHODS.items():
        text = run(f"methods {name}").stdout
        assert all(settings["source"] in text for settings in method.presets.values())
        assert one_object(run(f"methods {name} --json").stdout)["name"] == name
    assert len(one_object(run("methods --json").stdout)["methods"]) == len(METHODS)


def test_every_option_of_a_method_is_explained() -> None:
    for name, kind in METHODS.items():
        options = explain(name, kind)["options"]
        bare = [key for key, option in options.items() if not option["what"] or "see `" in option["what"]]
        assert options and not bare, f"{name}: {bare}"


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", METHODS)
def test_every_option_that_methods_shows_can_be_set(name: str) -> None:
    description = explain(name, METHODS[name])
    few = {"pcl": {"num_clusters": [4, 6]}, "wmse": {"w_size": 20, "out_dim": 4}}.get(
        name, {}
    )  # because the images are few
    options = {key: option["default"] for key, option in description["options"].items()} | few
    words = (f"--set {shlex.quote(f'method.{key}={json.dumps(value)}')}" for key, value in options.items())
    result = run(f"pretrain {name} {TINY} {NEEDED.get(name, '')} --dry-run --json {' '.join(words)}")
    assert result.exit_code == 0 and one_object(result.stdout)["recipe"]["method"] == {"name": name} | options
    for preset in description["presets"]:
        assert isinstance(make({"data": "photos", "method.name": name, "preset": preset}), Recipe)


@pytest.mark.slow
def test_quickstart_below_its_margin_exits_with_4(elsewhere: Path) -> None:
    result = run("quickstart --epochs 1 --margin 101 --json")
    assert result.exit_code == TrainingError.exit_code == 4
    report = one_object(result.stdout)
    assert report["exit_code"] == 4 and "and 101 above are required" in report["error"]
    assert report["error"] in result.stderr
    assert list(report["rows"]) == ["raw pixels", "untrained encoder", "trained encoder"]
    assert (
        0.45 < report["rows"]["raw pixels"]["knn"]["top1"] < 0.65
        and report["rows"]["untrained encoder"]["knn"]["top1"] < 0.5
    )
    left = {path.name for path in (elsewhere / "runs" / "quickstart").iterdir()}
    assert {"quickstart.json", "curves.png", "neighbours.png", "encoder", "result.json"} <= left

    again = run("quickstart --epochs 1 --margin=-100 --quiet")  # in a new folder, not the first one's
    assert again.exit_code == 0 and not again.stderr and "runs/quickstart-2/neighbours.png" in again.stdout
    assert "inbatch pretrain --data ~/photos" in again.stdout


# Interface for scripts


@pytest.mark.slow
def test_json_is_one_object_and_quiet_is_silent(elsewhere: Path) -> None:
    result = run(f"pretrain {TINY} --json --quiet --out run")
    assert one_object(result.stdout)["run"] == "run" and result.stderr == ""
    failed = run(f"pretrain {TINY} --json --quiet --out run")
    report = one_object(failed.stdout)
    assert failed.exit_code == report["exit_code"] == 2 and failed.stderr == f"error: {report['error']}\n"


def test_only_rank_0_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("methods").stdout == run("methods --json").stdout == ""
    refused = run("methods nosuch --json")
    assert (refused.exit_code, refused.output) == (2, "")  # every rank refuses, the first prints why
    assert "error (rank 1): 'nowhere'" in run("pretrain --data nowhere").stderr  # this rank's disk may lack it


@pytest.mark.slow
def test_the_module_can_be_run_and_ctrl_c_leaves_a_run_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = f"-m inbatch pretrain {TINY.replace('--epochs 1', '--epochs 5000')} --out {out}"
    child = process(*line.split(), env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert child.stderr is not None
    for text in child.stderr:
        if "step 1/25,000" in text:
            break
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "error: stopped by SIGINT at step " in err
    assert f"inbatch pretrain --resume {out}" in err and "Traceback" not in err
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"


def test_ctrl_c_outside_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "embed_run", interrupted)
    result = run("embed somewhere digits-canvas -o f.npz")
    assert result.exit_code == 130 and result.stderr == "error: interrupted\n"


@pytest.mark.parametrize("kind", [InbatchError, *InbatchError.__subclasses__()])
def test_every_error_has_its_exit_code(kind: type[InbatchError], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise kind("it is\x07 [red]so")

    monkeypatch.setattr(api, "pretrain", fail)
    result = run("pretrain --json")
    assert result.exit_code == kind.exit_code and result.stderr == "error: it is\\x07 [red]so\n"
    assert one_object(result.stdout) == {"error": "it is\x07 [red]so", "exit_code": kind.exit_code}


def test_a_crash_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **options: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(api, "pretrain", crash)
    with pytest.raises(RuntimeError, match="a bug"):
        run("pretrain")


def test_a_full_gpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    monkeypatch.setattr(api, "pretrain", full)
    result = run("pretrain")
    assert result.exit_code == 1 and "--context" in result.stderr and "20 GiB" in result.stderr


# --dry-run


def test_a_dry_run_refuses_what_the_run_would_refuse(elsewhere: Path) -> None:
    Path("file").touch()
    for words, code, message in (
        ("--track nothing", 2, "unknown tracker 'nothing'"),
        ("--callback nowhere:Mine", 2, "nowhere"),
        ("-o file/run", 1, "file/run.lock: Not a directory"),
    ):
        result = run(f"pretrain {TINY} --dry-run {words}")
        assert result.exit_code == code and message in result.stderr, result.stderr


@pytest.mark.grid(3)
@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_writes_nothing_and_prints_a_recipe_that_repeats_itself(method: str, elsewhere: Path) -> None:
    fits = "--set method.w_size=40" if method == "wmse" else ""
    result = run(
        f"pretrain {method} {TINY} {NEEDED.get(method, '')} --context 20 {fits} --set optimizer.lr=0.5 --dry-run"
    )
    assert result.exit_code == 0 and not list(elsewhere.iterdir())
    assert "memory:  an estimate" in result.stdout and "rows:    " in result.stdout
    assert not result.stderr
    (elsewhere / "recipe.yaml").write_text(result.stdout)
    report = one_object(run("pretrain --config recipe.yaml --dry-run --json").stdout)
    assert report["recipe"] == yaml.safe_load(result.stdout)
    assert report["steps"] == 5 and report["context"] == 20


def test_dry_run_is_refused_for_the_same_reasons_as_the_run(elsewhere: Path) -> None:
    assert run(f"pretrain {TINY} --dry-run --context 7").exit_code == 2
    assert run("pretrain --data nowhere --dry-run").exit_code == 3
    assert run(f"pretrain {TINY} --dry-run --resume auto --out run").exit_code == 2


# Refusals: each message names a remedy


@pytest.mark.grid(16)
@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("pretran", 2, "Did you mean 'pretrain'?"),
        ("pretrain", 2, "no images: pass --data"),
        (f"pretrain {TINY} --epoch 3", 2, "Possible options: --epochs"),
        (f"pretrain {TINY} --batch many", 2, "valid integer"),
        (f"pretrain simclrr {TINY}", 2, "did you mean 'simclr'?"),
        (f"pretrain {TINY} --preset digit", 2, "did you mean 'digits'?"),
        (f"pretrain {TINY} --encoder resnet181", 2, "did you mean resnet18"),
        (f"pretrain {TINY} --set method.temprature=1", 2, "did you mean 'temperature'?"),
        (f"pretrain {TINY} --set views.strenght=1", 2, "did you mean 'strength'?"),
        (f"pretrain {TINY} --set foo", 2, "--set takes key=value"),
        (f"pretrain {TINY} --set foo=1", 2, "unknown setting 'foo'; there are attend.name, batch_size,"),
        (f"pretrain {TINY} --set method.temperature=hot", 2, "method.temperature = 'hot'"),
        (f"pretrain {TINY} --set optimizer.lr=-1", 2, "optimizer.lr = -1: input should be greater than or equal to 0"),
        (f"pretrain {TINY} --set method.hidden_dim=-1", 2, "method simclr cannot be made"),
        (f"pretrain {TINY} --batch 1", 2, "batch_size = 1"),
        (f"pretrain {TINY} --context 7", 2, "choose a divisor"),
        (f"pretrain {TINY} --expect-world-size 2", 2, "2 processes were expected, 1 started"),
        (f"pretrain {TINY} --device gpu", 2, "auto, cpu or cuda"),
        (f"pretrain {TINY} --config broken.yaml", 2, "broken.yaml is not valid YAML: line 2"),
        (f"pretrain {TINY} --config typo.yaml", 2, "did you mean 'epochs'?"),
        (f"pretrain {TINY} --config nowhere.yaml", 2, "nowhere.yaml: No such file"),
        (f"pretrain {TINY} --resume nowhere", 2, "nothing to resume in nowhere"),
        (f"pretrain {TINY} --resume auto", 2, "needs --output-dir"),
        (f"pretrain {TINY} --init nowhere.pt", 3, "nowhere.pt cannot be read"),
        (f"pretrain {TINY} --batch 5000", 3, "fewer than one batch of 5,000"),
        ("pretrain --data nowhere", 3, "'nowhere' does not exist"),
        ("pretrain --data typo.yaml", 3, "'typo.yaml' cannot be opened"),
        ("pretrain --data empty", 3, "No image under 'empty'"),
        ("pretrain --data noise", 3, "3 of 3 images of noise cannot be read"),
        ("evaluate nowhere", 2, "nowhere is not the folder of a run"),
        ("evaluate nowhere --protocol knn --probe moco", 2, "--probe has no effect on knn: add --protocol linear or"),
        ("evaluate nowhere --tuning small", 2, "--tuning has no effect on knn, linear, clustering: add"),
        ("embed nowhere digits-canvas -o f.npz", 2, "nowhere is not the folder of a run: there is no such folder"),
        ("inspect nowhere", 2, "nowhere is not the folder of a run: there is no such folder"),
        ("evaluate nowhere", 2, "nowhere is not the folder of a run: there is no such folder"),
        ("views digits-canvas -o views.foo", 2, "unknown file extension '.foo'"),
        ("views digits-canvas --views digit", 2, "did you mean 'digits'?"),
        ("methods simclrr", 2, "did you mean 'simclr'?"),
        ("quickstart --epochs 0", 2, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_invalid_command_lines_are_refused(line: str, code: int, words: str, elsewhere: Path) -> None:
    (elsewhere / "broken.yaml").write_text("a: [1, 2\nb: {")
    (elsewhere / "typo.yaml").write_text("epohcs: 3\n")
    (elsewhere / "empty").mkdir()
    (elsewhere / "noise").mkdir()
    for i in range(3):
        (elsewhere / "noise" / f"{i}.jpg").write_text("no image")
    before = set(elsewhere.rglob("*"))
    result = run(line)
    assert result.exit_code == code and words in result.stderr and "Traceback" not in result.output, result.output
    assert result.stdout == "" and set(elsewhere.rglob("*")) == before


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten_nor_resumed_as_another(finished: Path, tmp_path: Path) -> None:
    refused = run(f"pretrain {TINY} --out {finished}")
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr and "--resume" in refused.stderr
    other = run(f"pretrain --resume {finished} --epochs 3")
    assert other.exit_code == 2 and "epochs = 3 (the run has 1)" in other.stderr
    assert (
        run(f"pretrain {TINY} --resume auto --out {finished} --quiet").exit_code == 0
    )  # the same command again has nothing left to do
    assert run(f"evaluate {finished} --protocol kn").exit_code == 2
    assert run(f"evaluate {finished} --probe nosuch").exit_code == 2
    assert run(f"embed {finished} digits-canvas -o {tmp_path / 'f.csv'}").exit_code == 2
    assert run(f"embed {finished} digits-canvas -o {tmp_path / 'f.npz'} --split valid").exit_code == 3


def test_printed_text_has_no_control_characters() -> None:
    assert printable("a\x1b[2J\x9b\u202eb\udcff\r\nc é 图") == "a\\x1b[2J\\x9b\\u202eb\\udcff\\r\nc é 图"
