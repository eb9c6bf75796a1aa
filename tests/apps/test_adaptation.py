"""inbatch adapt: the interval of the gain, the verdict, and the weights that it recommends."""

import copy
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import one_object, run
from scipy.stats import t as student
from small_runs import evaluate_on_few_images, stop_after

import inbatch
from inbatch.apps.adaptation import adapt as adaptation
from inbatch.apps.adaptation import share
from inbatch.apps.adaptation.gain import Gain, accuracy_gain, measure_gain
from inbatch.apps.adaptation.verdict import HELPED, NO_HELP, NOT_SHOWN, Verdict
from inbatch.data import open_data
from inbatch.errors import ConfigError, Preempted
from inbatch.evaluation import evaluate
from inbatch.models import create_encoder, load_encoder, save_encoder
from inbatch.runtime import tuning
from inbatch.runtime.files import write_json
from inbatch.training.holdout import evaluation_split
from inbatch.training.monitors.online_evaluation import limited
from inbatch.training.recipe import make

UNLABELLED = {"rankme": {"untrained": 2.0, "trained": 3.0, "better": "higher"}}


def test_the_interval_counts_seeds_and_images() -> None:
    """Student's interval if only the seeds differ or only the images do; wider if both do; none for one seed."""
    images = torch.ones(3, 50)
    seeds = accuracy_gain(0 * images, images * torch.tensor([[0.1], [0.2], [0.3]]))
    assert (seeds.mean, seeds.spread) == (pytest.approx(0.2), pytest.approx(0.1))
    half = 4.302653 * 0.1 / 3**0.5
    assert (seeds.low, seeds.high) == (pytest.approx(0.2 - half, rel=1e-5), pytest.approx(0.2 + half, rel=1e-5))
    scalars = measure_gain([0.0] * 3, [0.1, 0.2, 0.3], "higher")
    assert (scalars.low, scalars.high) == (pytest.approx(seeds.low), pytest.approx(seeds.high))
    close = measure_gain([0.0] * 3, [0.5, 0.5 + 1e-9, 0.5 + 2e-9], "higher")  # equal in float32
    assert close.spread == pytest.approx(1e-9) and close.high - close.mean == pytest.approx(4.302653e-9 / 3**0.5)
    hits = (torch.arange(50) < 10).double().expand(3, -1)
    alone = accuracy_gain(0 * hits, hits)
    assert alone.high - alone.mean == pytest.approx(2.009575 * float(hits[0].std()) / 50**0.5, rel=1e-5)
    both = accuracy_gain(0 * hits, hits + images * torch.tensor([[0.1], [0.2], [0.3]]))
    parts = 0.01 / 3, float(hits[0].var()) / 50
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 49)
    assert both.high - both.mean == pytest.approx(sum(parts) ** 0.5 * student.ppf(0.975, freedom), rel=1e-5)
    one = accuracy_gain(0 * hits[:1], hits[:1])
    assert (one.low, one.high, one.spread, one.shows(1)) == (None, None, None, False)
    assert measure_gain([1.0], [2.0], "lower").low is None
    unknown = measure_gain([None, 1.0], [float("nan"), 2.0], "higher")  # a file holds null for nan
    assert unknown.low is None and unknown.mean != unknown.mean
    equal = accuracy_gain(hits, hits)
    assert (equal.mean, equal.low, equal.high) == (0, 0, 0)


@pytest.mark.parametrize("seeds", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_interval_covers_the_true_gain_in_95_percent_of_the_cases(seeds: int) -> None:
    """Seeds and images both random, few of either: at least 95 % of the intervals cover the true gain of 0."""
    g = torch.Generator().manual_seed(0)
    covered, times = 0, 250
    for _ in range(times):
        chance = 0.5 + 0.05 * torch.randn(seeds, 1, generator=g) + 0.2 * torch.randn(1, 60, generator=g)
        before, after = ((torch.rand(seeds, 60, generator=g) < p).double() for p in (torch.full((1, 60), 0.5), chance))
        gain = accuracy_gain(before, after)
        covered += gain.low <= 0 <= gain.high
    assert covered >= 0.94 * times


def gain(mean: float, half: float | None) -> Gain:
    bounds = (None, None) if half is None else (mean - half, mean + half)
    return Gain((0.5, 0.5), (0.5 + mean, 0.5 + mean), *bounds)


@pytest.mark.parametrize(
    ("knn", "linear", "kind", "words"),
    [
        ((0.03, 0.02), (0.01, 0.02), HELPED, "Adaptation helped: k-NN changed from 50.0% to 53.0% (+3.0 points"),
        ((0.03, 0.04), (0.01, 0.02), NOT_SHOWN, "the interval contains 0: more seeds"),
        ((0.03, None), (0.01, None), NOT_SHOWN, "one seed has no spread: more seeds"),
        ((0.03, 0.02), (-0.03, 0.02), NOT_SHOWN, "but the linear probe became worse (-3.0 points"),
        ((0.0, 0.02), (0.05, 0.02), NO_HELP, "Adaptation did not help: k-NN changed from 50.0% to 50.0%"),
        ((-0.03, 0.02), (0.05, 0.02), NO_HELP, "-3.0 points, 95 % interval -5.0 to -1.0; 2 seeds, 60 test images"),
    ],
)
def test_verdicts(knn: tuple, linear: tuple, kind: str, words: str) -> None:
    verdict = Verdict({"knn": gain(*knn), "linear": gain(*linear)}, {}, [], 2, 60)
    assert verdict.kind == kind
    assert words in verdict.sentence()


def test_without_labels_only_a_collapse_is_shown() -> None:
    assert Verdict({}, {"rankme": gain(5.0, 1.0)}, [], 3).kind == NOT_SHOWN
    collapsed = Verdict({"knn": gain(0.03, 0.02), "linear": gain(0.03, 0.02)}, {}, [0, 2], 3, 60)
    assert collapsed.kind == NO_HELP and "the outputs of seed 0, seed 2 collapsed" in collapsed.sentence()


class Training:
    """Takes the place of `pretrain`: a run ends with the encoder of a folder."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.settings: dict[str, Any] = {}
        self.end = Path()

    def __call__(self, data: Any, *, out: Path, settings: dict[str, Any], **options: Any) -> inbatch.Run:
        self.seeds.append(settings["seed"])
        self.settings = settings
        recipe = make(settings | {"data": str(data), "channels": 1, "knn_k": 20, "encoder.name": "tiny"})
        save_encoder(load_encoder(settings["encoder.init"]), out / "initial")
        save_encoder(load_encoder(self.end), out / "encoder")
        sizes = {"train": {"images": 400}, "test": {"images": 300}}
        result = {"evaluation": sizes, "unlabelled": copy.deepcopy(UNLABELLED), "collapsed": []}
        write_json(out / "recipe.json", recipe.nested())
        write_json(out / "result.json", result)
        return inbatch.Run(out, recipe, result)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    training = Training()
    monkeypatch.setattr(adaptation, "pretrain", training)
    return training


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of an encoder of which all features are equal, and of one with random weights, which are better."""
    torch.manual_seed(0)
    useful = create_encoder("tiny", size=20, channels=1)
    useless = copy.deepcopy(useful)
    with torch.no_grad():
        for p in useless.parameters():
            p.zero_()
    place = tmp_path_factory.mktemp("encoders")
    save_encoder(useless, place / "useless")
    save_encoder(useful, place / "useful")
    return place / "useless", place / "useful"


def test_the_hash_of_the_start_is_the_one_in_its_config(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Gigabytes of weights are not read once more."""
    shutil.copytree(folders[1], tmp_path / "initial")
    with open(tmp_path / "initial" / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    (tmp_path / "initial" / "model.safetensors").unlink()
    assert adaptation._hash(tmp_path / "initial") == digest


def weights_of(folder: Path) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(inbatch.load(folder).parameters())


def test_better_weights_are_recommended_and_seeds_can_be_added(
    folders: tuple[Path, Path], training: Training, tmp_path: Path
) -> None:
    useless, training.end = folders
    out = tmp_path / "adapted"
    call = f"adapt digits-canvas --from {useless} -o {out} --set subset=400 --epochs 5 -q --json"
    done = run(f"{call} --seeds 2")
    result = one_object(done.stdout)
    assert (done.exit_code, result["verdict"], result["exit_code"]) == (0, "helped", 0), result["sentence"]
    assert result["recommended"] == {"weights": "adapted", "encoder": str(out / "encoder"), "run": str(out / "seed-0")}
    assert torch.equal(weights_of(out), weights_of(training.end))
    assert len(result["initial_sha256"]) == 2 and "different weights" not in result["sentence"]
    knn = result["accuracy"]["knn"]
    assert knn["low"] > 0 and knn["gain"] == pytest.approx(knn["after"][0] - knn["before"][0])
    assert result["unlabelled"]["rankme"]["gain"] == 1 and result["test_images"] == 300
    expected = {"schedule.freeze_encoder_epochs": 0.5, "schedule.warmup_epochs": 1.0, "optimizer.layer_decay": 0.75}
    assert training.settings.items() >= (expected | {"image_size": 20, "channels": 1, "optimizer.lr": 3e-4}).items()
    assert run(f"{call} --seeds 3").exit_code == 0 and training.seeds == [0, 1, 2]
    other = run(f"{call} --seeds 3 --lr 0.1")
    assert other.exit_code == 2 and "holds another adaptation: optimizer.lr = 0.1 (it has 0.0003)" in other.stderr
    other = run(f"{call} --seeds 3 --test digits-canvas")  # the runs were evaluated on other images
    assert other.exit_code == 2 and "test = 'digits-canvas' (it has None)" in other.stderr
    assert training.seeds == [0, 1, 2]


def test_each_seed_is_compared_with_its_own_start(
    folders: tuple[Path, Path], training: Training, tmp_path: Path
) -> None:
    useless, training.end = folders
    shutil.copytree(useless, tmp_path / "start")
    call = f"adapt digits-canvas --from {tmp_path / 'start'} -o {tmp_path / 'a'} --set subset=400 -q --json"
    assert run(f"{call} --seeds 1").exit_code == 0
    shutil.copytree(training.end, tmp_path / "start", dirs_exist_ok=True)
    both = one_object(run(f"{call} --seeds 2").stdout)
    assert len(set(both["initial_sha256"])) == 2 and "started from different weights" in both["sentence"]
    knn = both["accuracy"]["knn"]
    assert knn["before"][0] < 0.2 < knn["before"][1] == knn["after"][1]


def test_a_stopped_adaptation_names_the_command_that_continues_it(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --output-dir the same command begins another adaptation."""

    def stopped(*arguments: Any, **options: Any) -> None:
        raise Preempted("stopped")

    monkeypatch.setattr(adaptation, "pretrain", stopped)
    monkeypatch.chdir(tmp_path)
    done = run(f"adapt digits-canvas --from {folders[0]} --set subset=400 -q")
    assert done.exit_code == 75 and "with --output-dir runs/adapt-digits-canvas-1 to continue" in done.stderr


def test_own_method_can_be_typed(folders: tuple[Path, Path], training: Training, tmp_path: Path) -> None:
    """It was refused with the advice to type it."""
    start, training.end = folders
    own = "--method own_code:OwnMethod --set method.t=0.3"
    done = run(f"adapt digits-canvas --from {start} -o {tmp_path / 'a'} --set subset=400 --seeds 1 -q {own}")
    assert done.exit_code == 0, done.stderr
    assert training.settings.items() >= {"method.name": "own_code:OwnMethod", "method.t": 0.3}.items()
    assert "own" not in training.settings  # which `pretrain` refuses
    assert one_object((tmp_path / "a" / "adapt.json").read_text())["settings"]["own"]["method"]["sha256"]


def test_worse_weights_are_not_recommended(folders: tuple[Path, Path], training: Training, tmp_path: Path) -> None:
    training.end, useful = folders
    out = tmp_path / "adapted"
    done = run(f"adapt digits-canvas --from {useful} -o {out} --set subset=400 --seeds 2 -q")
    assert done.exit_code == 4
    assert "Adaptation did not help" in done.stdout and "Use those that it started from" in done.stdout
    assert torch.equal(weights_of(out), weights_of(useful))
    result = one_object((out / "verdict.json").read_text())
    assert (result["verdict"], result["recommended"]["weights"]) == ("did not help", "initial")


def test_wrong_use_is_refused_before_training(folders: tuple[Path, Path], training: Training, tmp_path: Path) -> None:
    start = folders[0]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    for more, words in (
        ("--from missing", "there are no such weights"),
        ("--from timm/resnet_unknown", "timm has no such model"),
        (f"--from {start} --budget 2m", "leaves 40 s for each of 3 seeds"),
        (f"--from {start} --budget soon", "is not a time"),
        (f"--from {start} --budget 30m --epochs 2", "both set the length"),
        (f"--from {start} --set seed=3", "leave out seed"),
        (f"--from {start} --method simcrl", "did you mean 'simclr'"),
        (f"--from {start} -o {tmp_path / 'run'}", "holds recipe.json, which an adaptation would replace"),
        (f"--from {start} -o {tmp_path / 'new'} --layer-decay 2", "optimizer.layer_decay"),
    ):
        done = run(f"adapt digits-canvas -q {more}")
        assert done.exit_code == 2 and words in done.stderr, (more, done.stderr)
    assert not training.seeds and not list(tmp_path.glob("*/adapt.json"))
    with pytest.raises(ConfigError, match="seeds must be a whole number"):
        inbatch.adapt("digits-canvas", start, seeds=1.5)


def test_a_budget_counts_start_and_verdict(
    folders: tuple[Path, Path], training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert share.run_seconds(600, 30, 60, 3) == pytest.approx(0.96 * 510 / 3, abs=0.1)
    monkeypatch.setattr(tuning, "_began", None)  # of an earlier command
    monkeypatch.setattr(share, "verdict_seconds", lambda *a: 190.0)
    out = tmp_path / "a"
    done = run(f"adapt digits-canvas --from {folders[0]} -o {out} --set subset=60 --budget 5m --seeds 2 -q")
    assert done.exit_code == 2 and "the verdict takes about 3 min, and each of 2 runs needs" in done.stderr
    assert not training.seeds and not out.exists()


@pytest.mark.slow
def test_the_shares_of_a_budget_are_kept(
    folders: tuple[Path, Path], training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, training.end = folders
    call = f"adapt digits-canvas --from {start} -o {tmp_path / 'a'} --set subset=60 --budget 5m"
    monkeypatch.setattr(tuning, "_began", None)
    monkeypatch.setattr(share, "_TIMED", (20, 10))
    assert run(f"{call} --seeds 1 -q").exit_code == 0
    seconds = training.settings["budget"]
    assert 200 < seconds < 0.96 * 300
    assert one_object((tmp_path / "a" / "adapt.json").read_text())[adaptation.SHARE] == seconds
    monkeypatch.setattr(share, "verdict_seconds", lambda *a: pytest.fail("the share is kept"))
    again = run(f"{call} --seeds 1")
    assert again.exit_code == 0 and "Budget of 5 min: this command took" in again.stderr
    other = run(f"{call} --seeds 2 -q")
    assert other.exit_code == 2 and "another adaptation: seeds = 2 (it has 1)" in other.stderr


@pytest.mark.slow
def test_a_whole_adaptation_continues_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_on_few_images(monkeypatch)
    small: dict[str, Any] = {"subset": 80, "batch_size": 40, "quiet": True, "device": "cpu"}
    inbatch.pretrain("digits-canvas", out=tmp_path / "start", epochs=1, **small)
    options: dict[str, Any] = small | {"epochs": 2, "seeds": 2, "evaluate_every": 2}
    whole = inbatch.adapt("digits-canvas", tmp_path / "start", out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Preempted, match="Repeat the command"):
            inbatch.adapt("digits-canvas", tmp_path / "start", out=tmp_path / "parts", **options)
    parts = inbatch.adapt("digits-canvas", tmp_path / "start", out=tmp_path / "parts", **options)
    assert parts["accuracy"] == whole["accuracy"] and parts["verdict"] == whole["verdict"]
    run = inbatch.load_run(tmp_path / "parts" / "seed-1")
    source = open_data("digits-canvas", subset=80)
    split = limited(evaluation_split(run.recipe, source, "digits-canvas"), 60, 40)
    figures = evaluate(run.encoder, split.bank, split.queries, k=run.recipe.knn_k, protocols=("knn", "linear"))
    for name in ("knn", "linear"):
        assert parts["accuracy"][name]["after"][1] == pytest.approx(figures[name]["top1"])
    assert inbatch.load(tmp_path / "parts").name == "tiny"


def start_of_digits(out: Path) -> Path:
    """Train a small vision transformer for an epoch on digits, to be adapted."""
    own = {"encoder.patch_size": 5, "encoder.embed_dim": 32, "encoder.depth": 2, "encoder.num_heads": 2}
    inbatch.pretrain(
        "digits-canvas", out=out, encoder="vit_tiny_patch16_224", settings=own, subset=80, batch_size=40, epochs=1,
        image_size=20, quiet=True, device="cpu",
    )  # fmt: skip
    return out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_adaptation_with_lora_on_two_ranks_has_one_verdict(tmp_path: Path) -> None:
    """Under torchrun: one verdict with labels, the same command again trains nothing, and no other weights change."""
    start = start_of_digits(tmp_path / "start")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "inbatch"]
    command = [
        *launcher, "adapt", "digits-canvas", "--from", str(start), "-o", str(tmp_path / "a"), "--lora", "2",
        "--seeds", "2", "--epochs", "1", "--set", "subset=80", "--batch-size", "40", "--quiet", "--json",
    ]  # fmt: skip
    results = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode in (0, 1), done.stderr  # torchrun ends with 1 if a rank ends with 4
        results.append(one_object(done.stdout))
    first, again = results
    assert first["verdict"] in ("helped", "not shown", "did not help") and len(first["accuracy"]["knn"]["after"]) == 2
    assert first["accuracy"] == again["accuracy"] and again["seconds"] < first["seconds"]
    report = one_object((tmp_path / "a" / "seed-0" / "result.json").read_text())
    assert report["world"] == 2 and report["recipe"]["encoder"]["lora"] == 2
    assert inbatch.load(tmp_path / "a").name == "vit_tiny_patch16_224"
