"""Runs with parts of the user: passed as objects or typed, stored by name, version and source, resumed exactly."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import own_code
import pytest
import torch
from command_line import run as run_line
from own_code import Momentum, OwnMethod, OwnNet, OwnViews
from rank_pool import on_ranks
from small_runs import assert_same_state, leave_out_evaluation, saved, stop_after, tiny, use_few_images
from torchvision.transforms import v2

import inbatch
from inbatch.api import prepare
from inbatch.errors import ConfigError, Preempted
from inbatch.methods import METHODS
from inbatch.methods.simclr import SimCLR
from inbatch.models import create_encoder, save_encoder
from inbatch.nn.heads import Head
from inbatch.runtime import own_parts
from inbatch.runtime.own_parts import OwnPart
from inbatch.runtime.source_hash import source_hash
from inbatch.training.recipe import make
from inbatch.training.settings_file import read_settings

NO_WARMUP = {"schedule.warmup_epochs": 0}
OWN: dict[str, Any] = {"encoder": OwnNet, "views": OwnViews, "optimizer": Momentum, "settings": {"encoder.width": 4}}


def command(*words: str) -> Any:
    return run_line(shlex.join(words))


def own_run(out: Path, **fields: Any) -> inbatch.Run:
    return tiny(OwnMethod(t=0.3), out, **(OWN | fields))


def test_own_parts_resume_bit_for_bit(brief: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the recipe, the command and the log name them."""
    before = set(METHODS)
    run = own_run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 7)
        own_run(tmp_path / "parts")
    with pytest.raises(ConfigError, match="type --method own_code:OwnMethod on the command line"):
        inbatch.pretrain(resume=tmp_path / "parts")
    own_run(tmp_path / "parts", resume=True)
    assert_same_state(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    recipe = json.loads((tmp_path / "parts" / "recipe.json").read_text())
    assert recipe["method"] == {"name": "own_code:OwnMethod", "t": 0.3}
    assert recipe["encoder"] == {"name": "own_code:OwnNet", "width": 4}
    assert recipe["views"] == {"name": "own_code:OwnViews", "noise": 0.05, "size": 20, "sizes": [20, 20]}
    assert recipe["optimizer"] == {"name": "own_code:Momentum", "lr": 0.03}
    text = (Path(own_code.__file__)).read_text()
    for part, name in {
        "method": "OwnMethod",
        "encoder": "OwnNet",
        "views": "OwnViews",
        "optimizer": "Momentum",
    }.items():
        assert recipe["own"][part] == {"version": None, "sha256": source_hash(text, name)}
    assert set(METHODS) == before
    assert "own_code:OwnMethod" in run.result["command"] and "--encoder own_code:OwnNet" in run.result["command"]
    assert run.result["width"] == run.encoder.width == 4
    run_weights = run.encoder.backbone.conv.weight
    assert torch.equal(inbatch.load(tmp_path / "whole", encoder=OwnNet(1, 4)).backbone.conv.weight,
                       run.encoder.backbone.conv.weight)  # fmt: skip
    with pytest.raises(ConfigError, match="type --encoder own_code:OwnNet"):
        inbatch.load(tmp_path / "whole")
    with pytest.raises(ConfigError, match="do not fit"):
        inbatch.load(tmp_path / "whole", encoder=OwnNet(1, 5))
    monkeypatch.setattr(own_parts, "hash_in", lambda *_: "0" * 64)
    for part, call in {
        "encoder": lambda: inbatch.load(tmp_path / "whole", encoder=OwnNet),
        "method": lambda: own_run(tmp_path / "whole", resume=True),
    }.items():
        then = recipe["own"][part]["sha256"]
        with pytest.raises(ConfigError, match=f"has changed since the run began: SHA-256 {then} then, 0000.*Restore"):
            call()
    built = prepare("digits-canvas", encoder=OwnNet, settings={"encoder.init": tmp_path / "whole", "encoder.width": 4})
    assert torch.equal(built.encoder.backbone.conv.weight.cpu(), run_weights)


def test_an_encoder_of_ours_is_passed_as_a_folder(tmp_path):
    encoder = create_encoder("tiny", size=20, channels=1)
    with pytest.raises(ConfigError, match=r"'encoder.init': FOLDER}, the run or the folder of .*save_encoder"):
        prepare("digits-canvas", encoder=encoder)
    save_encoder(encoder, tmp_path / "encoder")
    built = prepare("digits-canvas", settings={"encoder.init": tmp_path / "encoder"}, epochs=1)
    assert built.encoder.name == "tiny"
    theirs = built.encoder.backbone.state_dict()
    assert all(torch.equal(x, theirs[name].cpu()) for name, x in encoder.backbone.state_dict().items())


def test_recipe_with_the_preset_of_an_own_method_is_read_without_it() -> None:
    class Subclass(SimCLR):
        pass

    with inbatch.use_parts(method=Subclass):
        name = own_parts.current()["method"].name
        written = make({"data": "x", "image_size": 32, "method.name": name})
        with pytest.raises(ConfigError, match="preset = 'cifra' is unknown"):
            make({"data": "x", "method.name": name, "preset": "cifra"})
    assert written.preset == "cifar"
    with inbatch.use_parts(method=OwnMethod):  # it has no presets
        short = make({"data": "x", "method.name": own_parts.current()["method"].name, "epochs": 2})
    assert short.preset == "none" and short.schedule.warmup_epochs == 0.2, "a short run must not be all warm-up"
    assert make(read_settings(written.nested())).nested() == written.nested()


def test_options_of_an_inherited_preset_must_be_arguments_of_the_constructor() -> None:
    class OneOption(SimCLR):
        def __init__(self, temperature: float = 0.3) -> None:
            super().__init__(temperature)

    class WithoutPresets(OneOption):
        presets = {}

    for kind, preset, fits in ((OneOption, "cifar", True), (OneOption, "fast", False), (OneOption, "none", True),
                               (WithoutPresets, "fast", True)):  # fmt: skip
        with inbatch.use_parts(method=kind):
            settings = {"data": "x", "method.name": own_parts.current()["method"].name, "preset": preset}
            if fits:
                make(settings)
                continue
            with pytest.raises(ConfigError, match=r"preset fast, which .* inherits, sets method.hidden_dim"):
                make(settings)


def run_on_rank(out: str, world: int) -> None:
    patch = pytest.MonkeyPatch()
    use_few_images(patch)
    leave_out_evaluation(patch)
    try:
        own_run(Path(out), precision="float32", context=8, callbacks=[own_code.Count], epochs=1)
    finally:
        patch.undo()


@pytest.mark.slow
def test_own_method_and_views_do_not_depend_on_ranks(tmp_path: Path) -> None:
    for world in (1, 2):
        on_ranks(world, run_on_rank, str(tmp_path / str(world)), world)
    one, two = (saved(tmp_path / str(world)) for world in (1, 2))
    assert one["callback Count"] == two["callback Count"] == {"steps": 5}
    for part in ("network", "method"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_source_hash_covers_what_a_definition_uses() -> None:
    text = (
        "import math\nK = 2\ndef used(x):\n    return K * x\n@mark\nclass A(Base):\n    def f(self): return used(1)\n"
    )
    whole = source_hash(text + "print(1)\n", "A")
    assert whole == source_hash(text + "def other(): pass\nif __name__ == '__main__':\n    K = 3\n", "A")
    for change in (("K = 2", "K = 3"), ("K * x", "K - x"), ("@mark", "@other"), ("used(1)", "used(2)")):
        assert source_hash(text.replace(*change), "A") != whole, change
    assert source_hash(text.replace("import math", "import cmath"), "A") == whole  # not used
    assert source_hash("%cell magic\n", "A") == source_hash("%cell magic\n", "B")
    for more in ("A.f = min\n", "K.options['depth'] = 3\n"):
        assert source_hash(text + more, "A") != whole, more


def test_source_is_that_of_the_user_not_of_a_decorator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\nclass Net:\n    @torch.no_grad()\n    def __init__(self): pass\n@torch.no_grad()\ndef build(): pass\n"
    code += "@dataclasses.dataclass\nclass Crop:\n    size: int = 3\n"
    (tmp_path / "decorated.py").write_text("import dataclasses\nimport torch\n" + code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("Net", "build", "Crop"):
        own = own_parts.imported("encoder", f"decorated:{name}")
        assert own.file == str(tmp_path / "decorated.py"), name
        assert own.sha256 == source_hash("import dataclasses\nimport torch\n" + code, name)


def test_a_typed_script_that_exits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exiting.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"exiting:build: .* when it is imported \(3\); .* if __name__"):
        own_parts.imported("encoder", "exiting:build")


def test_objects_that_cannot_be_parts_are_refused(tmp_path: Path) -> None:
    class Takes(OwnMethod):
        def __init__(self, *layers: int) -> None:
            super().__init__()

    class Returning(torch.nn.Module):
        def __init__(self, forward: Any) -> None:
            super().__init__()
            self.forward = forward

    class Bare(OwnMethod):
        def heads(self, width: int) -> Any:
            return {"projection": torch.nn.Identity()}

    class Adrift(OwnMethod):
        def heads(self, width: int) -> Any:
            return {"projection": Head(torch.nn.Identity(), "x")}

    class Misnamed(OwnMethod):
        def heads(self, width: int) -> Any:
            return {"mlp": Head(torch.nn.Identity())}

    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": OwnMethod(act=torch.nn.GELU)}, "holds only numbers, texts"),
        ({"method": Takes(1, 2)}, "give its arguments names"),
        ({"method": "own_code:OwnMethod"}, "type --method own_code:OwnMethod"),
        ({"settings": {"method.name": "own_code:OwnMethod"}}, "never imported because a file or a setting names it"),
        ({"method": OwnNet}, "pass a name, or a Method"),
        ({"method": run_on_rank}, "method = <function run_on_rank>: pass a name"),
        ({"method": OwnMethod, "settings": {"method.s": 1}}, "has no setting 's'"),
        ({"method": OwnMethod, "settings": {"method.t": "x"}}, "method.t = 'x'"),
        ({"method": Bare}, "returns Identity for 'projection': wrap networks in inbatch.nn.heads.Head"),
        ({"method": Adrift}, "reads 'x', which is neither 'features' nor an earlier head"),
        ({"method": Misnamed}, r"online = \('projection',\) must name heads .* returns \['mlp'\]"),
        ({"encoder": 3}, "pass a name, an nn.Module"),
        ({"encoder": lambda: 3}, "must make an nn.Module, not int"),
        ({"encoder": OwnNet, "settings": {"encoder.widt": 3}}, "no setting 'widt': did you mean 'width'"),
        ({"encoder": OwnNet(1), "settings": {"encoder.width": 3}}, "an existing module, which has no settings"),
        ({"encoder": torch.nn.Identity()}, "instead of one row of pooled features"),
        ({"encoder": Returning(lambda x: (x, x))}, "gives tuple for one image"),
        ({"encoder": Returning(lambda x: x.flatten(1).long())}, "of torch.int64 for one image"),
        ({"optimizer": lambda params: torch.optim.LBFGS(params[:1])}, "needs a closure in its step"),
        ({"optimizer": lambda params: params}, "must make a torch.optim.Optimizer"),
        ({"views": v2.Resize((12, 10))}, "not a square"),
        ({"views": lambda image: image.float()}, "leave out Normalize"),
        ({"views": lambda image: (image, image)}, r"return tuple for an image, not one image: .*\[A, B\]"),
        ({"views": lambda image: None}, "return NoneType for an image"),
        ({"views": lambda image: image[0]}, "not uint8 or float"),
        ({"views": lambda image: image * float("nan")}, "from nan to nan, not from 0 to 1"),
        ({"views": lambda image: 1 / 0}, "ZeroDivisionError.*Leave out steps for Pillow images"),
        ({"views": [v2.CenterCrop(12), 3]}, "pass a name, a View or several"),
        ({"views": v2.CenterCrop(12), "crops": "adjacent"}, "need views that are cut at random"),
        ({"callbacks": [OwnMethod]}, "is not an inbatch.Callback"),
        ({"callbacks": own_code.Count()}, "callbacks must be a list"),
    ]  # fmt: skip
    for fields, message in cases:
        with pytest.raises(ConfigError, match=message):
            inbatch.pretrain("digits-canvas", out=tmp_path / "run", subset=40, quiet=True, epochs=1,
                             **({"encoder": "tiny", "batch_size": 20} | fields))  # fmt: skip
        assert not (tmp_path / "run").exists(), message


def test_a_hook_of_the_wrong_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: object, **named: object) -> None:
        raise KeyError("dim")

    for hook, wrong, message in (
        ("heads", raises, r"OwnMethod cannot be made .*: heads\(96\) raises KeyError: 'dim'"),
        ("prepare", raises, r"prepare\(images=40, classes=10, batch=8, views=2\) raises KeyError"),
        ("heads", lambda self, width: {"projection": Head(torch.nn.Linear(width + 1, 8))},
         r"heads\(96\): the head 'projection' cannot read 'features', rows of 96 numbers: RuntimeError: .*97x8"),
        ("heads", lambda self, width: {"projector": Head(len)}, "'projector' holds builtin_function_or_method"),
        ("online_views", lambda self, views: views, r"online_views\(2\) returns 2: return numbers of views"),
        ("online_views", raises, r"online_views\(2\) raises KeyError: 'dim'"),
        ("constant_lr", lambda self: 3, r"constant_lr\(\) returns 3: return names of heads, of \['projection'\]"),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=message):
            patch.setattr(OwnMethod, hook, wrong)
            prepare("digits-canvas", OwnMethod, encoder="tiny", subset=40, batch_size=8, epochs=1)


def test_a_loss_of_the_wrong_kind_is_named_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    built = prepare("digits-canvas", OwnMethod, encoder="tiny", subset=40, batch_size=8, epochs=1)
    batch = next(iter(built.loader.epoch(0)))
    for wrong, message in (
        (torch.tensor(1.0), "OwnMethod: loss returns Tensor: return a dict with the scalar 'loss'"),
        ({"los": torch.tensor(1.0)}, "loss returns a dict of 'los': the scalar 'loss' is missing"),
        (
            {"loss": torch.tensor(1.0), "state.x": torch.tensor(1.0)},
            "'state.x', which is not the next value of a buffer",
        ),
        ({"loss": torch.ones(8)}, r"loss returns \(8,\) for 'loss': return scalar tensors"),
        ({"loss": torch.tensor(1.0, requires_grad=True), 3: torch.tensor(1.0)}, "a value under 3: names"),
        ({"loss": 1.0}, "loss returns float for 'loss': return scalar tensors"),
        ({"loss": torch.tensor(1.0)}, r"the loss carries no gradient: .* \(inbatch check-method tests all of a method"),
    ):
        monkeypatch.setattr(built.method, "loss", lambda *rows, wrong=wrong: wrong)
        with pytest.raises(ConfigError, match=message):
            built.step(batch, 0)


def test_our_own_objects_keep_their_names() -> None:
    dry = inbatch.dry_run("digits-canvas", SimCLR(temperature=0.3), optimizer=torch.optim.AdamW, epochs=1)
    assert dry["recipe"]["method"]["name"] == "simclr" and dry["recipe"]["method"]["temperature"] == 0.3
    assert dry["recipe"]["optimizer"]["name"] == "adamw" and "own" not in dry["recipe"]


def test_optimizer_function_sets_its_own_rate() -> None:
    built = prepare(
        "digits-canvas", optimizer=lambda params: torch.optim.Adagrad(params, lr=0.5), epochs=1, encoder=OwnNet(1)
    )
    assert built.recipe.optimizer.options == {}
    assert built.lr == 0.5 and all(group["base_lr"] == 0.5 for group in built.optimizer.param_groups)
    assert isinstance(built.optimizer, torch.optim.Adagrad)


@pytest.mark.slow
def test_typed_parts_are_imported_from_the_current_folder(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_parts.py").write_text(
        "from torchvision.transforms import v2\nfrom own_code import Ends, OwnMethod, OwnNet\n"
        "transform = v2.RandomResizedCrop(12)\nclass Mine(OwnMethod): pass\nclass Net(OwnNet): pass\n"
        "class Stop(Ends): pass\n"
    )
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    start = [
        "pretrain",
        "--data",
        "digits-canvas",
        "--set",
        "subset=40",
        "--batch",
        "8",
        "--epochs",
        "2",
        "--out",
        "run",
    ]
    parts = ["--method", "my_parts:Mine", "--encoder", "my_parts:Net", "--views", "my_parts:transform"]
    done = command(*start, *parts, "--callback", "my_parts:Stop", "--optimizer", "own_code:Momentum")
    assert done.exit_code == 0, done.output
    assert f"The method my_parts:Mine runs your code from {tmp_path / 'my_parts.py'}" in done.stderr
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (
        recipe["views"]["name"] == "my_parts:transform" and recipe["image_size"] == 12 and recipe["replans"] == [[3, 0]]
    )
    assert set(recipe["own"]) == {"method", "encoder", "views", "optimizer"}
    assert "features.parquet --encoder my_parts:Net\n" in done.stdout, "the next commands must work as printed"
    for words, message in (
        (["evaluate", "run", "--protocol", "knn"], "type --encoder my_parts:Net"),
        (["pretrain", "--config", "run/recipe.json", "--out", "other"], "type --"),
        (["pretrain", "--data", "digits-canvas", "--set", "method.name=my_parts:Mine"], "type --method my_parts:Mine"),
        (["pretrain", "my_parts:Nine", "--data", "digits-canvas"], "my_parts has no 'Nine': did you mean 'Mine'?"),
        (["pretrain", "--method", "my_absent:A", "--data", "digits-canvas"], "there is no module 'my_absent'"),
        (["pretrain", "--method", "my_broken:A", "--data", "digits-canvas"], "ZeroDivisionError"),
        (["pretrain", "moco", "--method", "my_parts:Mine", "--data", "digits-canvas"], "two methods"),
        (["evaluate", "run", "--encoder", "Net"], "write your own code as MODULE:NAME"),
        (["pretrain", "--callback", "my_parts:Net", "--data", "digits-canvas"], "callback"),
    ):
        result = command(*words)
        assert result.exit_code == 2 and message in result.stderr, (words, result.output)
    assert command("evaluate", "run", "--protocol", "knn", "--encoder", "my_parts:Net").exit_code == 0
    assert not own_parts.current()


def test_entry_points_are_found_after_our_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "pack-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pack\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(
        "[inbatch.methods]\npacked = own_code:OwnMethod\nsimclr = own_code:OwnMethod\nbad = absent_module:X\n"
        "[inbatch.encoders]\npacked_net = own_code:OwnNet\n[inbatch.sources]\npacked = pack_source:find\n"
    )
    (tmp_path / "pack_source.py").write_text(
        "from inbatch.data import open_data\n"
        "def find(data, reading):\n"
        "    return {'train': lambda: open_data('digits-canvas')} if data == 'packed-digits' else None\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    dry = inbatch.dry_run("packed-digits", "packed", encoder="packed_net", epochs=1, settings=NO_WARMUP)
    assert dry["recipe"]["own"]["method"]["version"] == "1.5" and dry["recipe"]["method"]["name"] == "packed"
    assert dry["recipe"]["encoder"] == {"name": "packed_net"}
    listed = command("methods", "--json")
    methods = json.loads(listed.stdout)
    origins = {one["name"]: one["origin"] for one in methods["methods"]}
    assert origins["simclr"] == "inbatch" and origins["packed"].endswith("own_code.py, version 1.5")
    assert {(one["part"], one["name"], one["origin"].split("/")[-1]) for one in methods["parts"]} == {
        ("encoder", "packed_net", "own_code.py, version 1.5"), ("source", "packed", "pack_source.py, version 1.5"),
    }  # fmt: skip
    assert "not used: the name is one of inbatch" in methods["broken"]["simclr"]
    assert "cannot be loaded from absent_module:X" in methods["broken"]["bad"]
    shown = " ".join(command("methods").stdout.split())
    assert "Of installed packages: part name origin" in shown and "source packed" in shown
    with pytest.raises(ConfigError, match="of the package pack cannot be loaded"):
        inbatch.dry_run("digits-canvas", "bad")
    with pytest.raises(ConfigError, match="did you mean 'packed'"):
        inbatch.dry_run("digits-canvas", "packd")
    assert OwnPart("method", "x", None).facts() == {"version": None, "sha256": None}
