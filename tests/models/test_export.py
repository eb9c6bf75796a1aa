"""Export to other libraries: each target opens there with the same features, or is refused with the reason."""

import json
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from torch import Tensor

import inbatch
from inbatch.errors import ConfigError, DataError, InbatchError
from inbatch.models import Encoder, create_encoder, save_encoder
from inbatch.models.export import TARGETS, export_model, folder, push
from inbatch.models.export.graph import traced
from inbatch.models.export.model_card import model_card
from inbatch.models.export.target import compare
from inbatch.training.run_facts import run_facts


def pictures(count: int, encoder: Encoder) -> Tensor:
    shape = count, encoder.channels, encoder.size, encoder.size
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def settled(name: str, size: int, channels: int = 3, **options: Any) -> Encoder:
    """Return an encoder whose norms and whitening are not those of the first moment."""
    encoder = create_encoder(name, size=size, channels=channels, check=False, **options)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    if encoder.readout is not None:
        encoder.readout.fit(torch.rand(4 * encoder.readout.width, encoder.readout.width))
    return encoder.eval()


@pytest.fixture
def small() -> Encoder:
    return settled("tiny", 12, channels=1)


def inside(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


# one folder


@pytest.mark.slow
def test_a_program_of_torch(small: Encoder, tmp_path: Path) -> None:
    assert not any("stack_trace" in node.meta for node in traced(small).graph.nodes), "paths of this machine"
    result = export_model(small, tmp_path / "out", "torch", {"recipe": {"seed": 1}})
    assert inside(tmp_path / "out") == {"encoder.pt2", "export.json"} and inside(tmp_path) == {"out"}
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == result
    assert result["check"]["max_difference"] <= 1e-5 and result["files"]["encoder.pt2"]["bytes"] > 300_000
    assert result["input"]["shape"] == ["N", 1, 12, 12] and result["input"]["normalisation"] == "included"
    more = {"inbatch.json": ""}
    module = torch.export.load(tmp_path / "out" / "encoder.pt2", extra_files=more).module()
    assert json.loads(more["inbatch.json"]) == {"recipe": {"seed": 1}}
    for count in (1, 4):
        images = pictures(count, small)
        np.testing.assert_allclose(module(images).numpy(), small.embed(images), atol=1e-6)
    assert not small.training and all(p.requires_grad for p in small.parameters())
    before = (tmp_path / "out").stat().st_ino
    assert export_model(small, tmp_path / "out", "torch") and (tmp_path / "out").stat().st_ino != before


def test_encoders_that_a_target_cannot_build_are_refused(small: Encoder, tmp_path: Path) -> None:
    own = Encoder(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)), name="mine", size=2)
    cifar = create_encoder("resnet10", size=16, check=False)
    two = create_encoder("vit_tiny_patch16_224", size=16, channels=2, depth=1, check=False)
    for encoder, target, why in (
        (small, "timm", "it is an encoder of inbatch"), (small, "torchvision", "it is an encoder of inbatch"),
        (small, "hf", "cannot be exported to hf: it is an encoder of inbatch"), (own, "timm", "custom backbone"),
        (cifar, "timm", r"CIFAR stem .*--set encoder.stem=imagenet"),
        (two, "coreml-ready", "images of 1 or 3 channels"), (small, "onx", "did you mean onnx"),
        (small, "keras", "choose timm, torchvision, hf, onnx"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            export_model(encoder, tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


def test_the_line_that_opens_the_files_names_any_folder(small: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "OUT" / "OUTPUT"
    script = export_model(small, out, "coreml-ready")["load"]
    assert script == f"python {out}/convert_to_coreml.py"
    load = export_model(small, tmp_path / "OUT files", "torch")["load"]
    assert str(tmp_path / "OUT files") in load and callable(eval(load.removesuffix("(images)")))


def test_differing_features_are_an_error(small: Encoder) -> None:
    right = lambda images: torch.from_numpy(small.embed(images))  # noqa: E731
    assert compare(small, right, "it")[0] <= 1e-6
    for run_, why in (
        (lambda images: right(images) + 2e-4, "differ by up to 0.0002"),
        (lambda images: right(images)[:, 1:], r"shape \(2, 95\) instead of \(2, 96\)"),
        (lambda images: right(images) * torch.nan, "differ by up to inf"),
    ):
        with pytest.raises(InbatchError, match=why):
            compare(small, run_, "it")
    with torch.no_grad():
        next(small.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="features that are not finite"):
        compare(small, right, "it")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the target torch write a small file without a program."""

    def write(encoder: Encoder, to: Path, facts: Any) -> Any:
        (to / "encoder.pt2").write_bytes(b"program")
        return real(encoder, to, facts)

    from inbatch.models.export import target

    def real(encoder: Encoder, to: Path, facts: Any) -> Any:
        return target.Written("nothing", 0.0, 1.0, "open(OUT)")

    monkeypatch.setitem(TARGETS, "torch", target.Target(write, ""))


@pytest.mark.usefixtures("quick")
def test_foreign_folders_are_not_replaced(small: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = export_model(small, out, "torch")  # empty
    assert first["load"] == f"open({str(out)!r})" and oct(out.stat().st_mode)[-3:] == "755"
    save_encoder(small, tmp_path / "encoder")
    export_model(small, tmp_path / "encoder", "torch")  # a folder of save_encoder
    assert inside(tmp_path / "encoder") == {"encoder.pt2", "export.json"}
    (out / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "encoder")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "export.json").write_text('{"files": {}}')
    for path in (out, tmp_path / "file", tmp_path / "link", tmp_path / "theirs"):
        with pytest.raises(ConfigError, match="is not an exported encoder: choose another folder"):
            export_model(small, path, "torch")
    assert inside(out) == {"encoder.pt2", "export.json", "notes.txt"}
    for name in (".txt", "export.json"):
        assert not (out / name).exists() or (out / name).read_text()
    with pytest.raises(InbatchError, match=r"Cannot write .*/file/out"):
        export_model(small, tmp_path / "file" / "out", "torch")


def test_kept_features_do_not_protect_an_export(small: Encoder, tmp_path: Path) -> None:
    save_encoder(small, tmp_path)
    (tmp_path / "features").mkdir()
    for end in (".npz", ".json", ".index.safetensors"):
        (tmp_path / "features" / ("0" * 24 + end)).write_text("{}")
    for files in (folder.ENCODER_FILES, None):
        folder.check_free(tmp_path, files)
    (tmp_path / "features" / "mine.npz").write_text("")
    for files in (folder.ENCODER_FILES, None):
        with pytest.raises(ConfigError, match="is not an exported encoder"):
            folder.check_free(tmp_path, files)


@pytest.mark.usefixtures("quick")
def test_a_failure_leaves_the_previous_export(small: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_model(small, tmp_path / "out", "torch")
    before = {file: (tmp_path / "out" / file).read_bytes() for file in inside(tmp_path / "out")}
    real = os.rename

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    def fails(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(16, "Device or resource busy")
        real(source, target)

    for name, function, why in (("_flush", full, "No space left"), (None, fails, "busy")):
        with monkeypatch.context() as patch:
            patch.setattr(folder, name, function) if name else patch.setattr(os, "rename", fails)
            with pytest.raises(InbatchError, match=f"Cannot write .*{why}"):
                export_model(small, tmp_path / "out", "torch")
        assert {file: (tmp_path / "out" / file).read_bytes() for file in inside(tmp_path / "out")} == before
        assert inside(tmp_path) == {"out"}


# the command


@pytest.mark.usefixtures("quick")
def test_the_command(small: Encoder, tmp_path: Path) -> None:
    save_encoder(small, tmp_path / "encoder")
    done = run(f"export {tmp_path / 'encoder'} --to torch -o {tmp_path / 'out'}")
    assert done.exit_code == 0 and "Checked by: nothing: features differ by at most 0.0e+00" in done.stdout
    done = run(f"export {tmp_path / 'encoder'} --to torch -o {tmp_path / 'out'} --json")
    result = json.loads(done.stdout)
    assert result["files"]["encoder.pt2"]["bytes"] == 7 and result["encoder"] == "tiny" and result["width"] == 96
    for words, code, why in (
        ("--to onx -o new", 2, "did you mean onnx"), ("--to timm -o new", 2, "encoder of inbatch"),
        ("--push a/b -o new", 2, "--push and --license belong to --to hf"),
        ("--to onnx --license mit -o new", 2, "--push and --license belong to --to hf"),
        (f"--to torch -o {tmp_path}", 2, "choose another folder"),
        (f"--to torch -o {tmp_path / 'encoder' / 'config.json' / 'x'}", 1, "Cannot write"),
        (f"-o {tmp_path / 'encoder' / 'config.json' / 'x'}", 1, "Cannot write"),
    ):  # fmt: skip
        done = run(f"export {tmp_path / 'encoder'} {words}")
        assert done.exit_code == code and why in done.stderr.replace("\n", " "), words
        assert "Traceback" not in done.output and not (tmp_path / "new").exists()


class Hub:
    """A hub without a network."""

    failure: Exception | None = None
    calls: list[tuple[str, Any]] = []

    def create_repo(self, name: str, **options: Any) -> Any:
        self.calls.append((name, options))
        if self.failure is not None:
            raise self.failure
        return type("RepoUrl", (str,), {"repo_id": name})(f"https://hub/{name}")

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", sorted(path.name for path in Path(options["folder_path"]).iterdir())))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    yield Hub


def test_hf_export_has_a_card_and_is_pushed_only_on_request(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder(settled("vit_tiny_patch16_224", 16, depth=1), tmp_path / "encoder")
    command = f"export {tmp_path / 'encoder'} --to hf -o {tmp_path / 'out'}"
    assert run(command).exit_code == 0 and not hub.calls
    assert inside(tmp_path / "out") == {"README.md", "config.json", "model.safetensors", "export.json"}
    done = run(f"{command} --license mit --push me/encoder")
    assert done.exit_code == 0 and "https://hub/me/encoder" in done.stdout
    assert hub.calls[0] == ("me/encoder", {"private": True, "exist_ok": True})
    assert hub.calls[1] == ("upload", ["README.md", "config.json", "export.json", "model.safetensors"])
    digest = json.loads((tmp_path / "out" / "export.json").read_text())["files"]["model.safetensors"]["sha256"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and digest in card and "not been evaluated" in card
    monkeypatch.setattr(hub, "failure", OSError("no network"))
    done = run(f"{command} --push me/encoder --json")
    assert done.exit_code == 1 and "not pushed to me/encoder" in json.loads(done.stdout)["error"]
    assert inside(tmp_path / "out") == {"README.md", "config.json", "model.safetensors", "export.json"}
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="not a name of a repository"):
        push(tmp_path / "out", "two//names")


def test_a_card_states_figures_and_nothing_personal(tmp_path: Path) -> None:
    encoder = settled("tiny", 12, channels=1)
    method = {"name": "simclr", "temperature": 0.2}
    recipe = {"data": "someone/holiday", "method": method, "optimizer": {"name": "adamw", "lr": 0.003}, "seed": 3}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"test": "someone/test"}))
    facts = run_facts(tmp_path)
    assert facts["data"] == "images of the user's own collection" and "figures" not in facts
    measured = {"knn": {"top1": 0.512}, "linear": {"top1": 0.25}}
    result = {"images": 50, "evaluation": measured, "untrained": {"knn": {"top1": 0.1}}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    facts = run_facts(tmp_path)
    card = model_card(encoder, "vit", facts | {"weights_sha256": "a" * 64, "step": 5, "steps": 10})
    assert "someone" not in card + json.dumps(facts) and "50 images of the user's own collection" in card
    assert "| k-NN, top-1 accuracy | 0.512 | 0.100 |\n| linear probe, top-1 accuracy | 0.250 | not measured |" in card
    assert "whitened" not in card
    encoder = settled("tiny", 12, channels=1, whiten=True)
    assert "measured on the whitened features" in model_card(encoder, "vit", facts | {"weights_sha256": "a" * 64})
    assert "`optimizer.lr`: 0.003" in card and "- Step: 5 of 10" in card and "license: unknown" in card
    (tmp_path / "result.json").write_text("{")
    assert "figures" not in run_facts(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"data": "torchvision/STL10"}))
    assert run_facts(tmp_path)["data"] == "torchvision/STL10 (images)"
    assert run_facts(tmp_path / "none") == {}


def test_the_lines_of_a_card_take_any_number_of_channels(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder = settled("resnet10", 32, channels=5, stem="imagenet")
    export_model(encoder, tmp_path / "out", "hf")
    text = (tmp_path / "out" / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0].replace("FOLDER", str(tmp_path / "out")), names)
    assert names["features"].shape == (1, 512)
    with torch.no_grad():
        assert torch.allclose(names["features"], encoder((names["images"] - names["mean"]) / names["std"]), atol=1e-5)


def test_the_model_is_named_as_in_timm(tmp_path: Path) -> None:
    result = export_model(settled("resnet10", 72), tmp_path / "out", "timm")
    assert result["model"] == "resnet18" and result["check"]["max_difference"] == 0


def test_timm_opens_a_small_vit(tmp_path: Path) -> None:
    import timm

    encoder = settled("vit_tiny_patch16_224", 32, depth=1)
    result = export_model(encoder, tmp_path / "out", "timm")
    assert result["check"]["max_difference"] == 0 and result["model"] == "vit_tiny_patch16_224"
    images = pictures(3, encoder)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        np.testing.assert_array_equal(model(encoder.preprocess(images)).numpy(), encoder.embed(images))
    np.testing.assert_array_equal(inbatch.load(tmp_path / "out").embed(images), encoder.embed(images))


# every target with every kind of encoder

KINDS: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18", "size": 96},
    "resnet50": {"name": "resnet50", "size": 72},
    "resnet10": {"name": "resnet10", "size": 72},
    "torchvision": {"name": "torchvision/resnet18", "size": 72},
    "grey": {"name": "resnet18", "size": 72, "channels": 1},
    "vit": {"name": "vit_tiny_patch16_224", "size": 32, "depth": 3},
    "ba2m": {"name": "resnet10", "size": 72, "attend": "ba2m"},
    "se": {"name": "resnet10", "size": 72, "attend": "se"},
    "whitened": {"name": "resnet10", "size": 72, "whiten": True},
    "cifar": {"name": "resnet18", "size": 32},
    "fast": {"name": "fast", "size": 56, "width": 8, "whiten": True, "whiten_patches": True},
    "tiny": {"name": "tiny", "size": 20, "channels": 1},
}
REFUSED = {
    "timm": {"cifar", "fast", "tiny"}, "hf": {"cifar", "fast", "tiny"},
    "torchvision": {"resnet10", "vit", "ba2m", "se", "whitened", "cifar", "fast", "tiny"},
}  # fmt: skip


def opened(target: str, out: Path, encoder: Encoder, result: dict[str, Any], images: Tensor) -> np.ndarray:
    """Return the features that the other library computes, with its own functions only."""
    prepared = (images / 255 - torch.tensor(encoder.mean).view(-1, 1, 1)) / torch.tensor(encoder.std).view(-1, 1, 1)
    if target == "timm":
        import timm

        module: Any = timm.create_model(
            result["model"], checkpoint_path=str(out / "model.safetensors"),
            **json.loads((out / "config.json").read_text())["model_args"], num_classes=0,
        ).eval()  # fmt: skip
        return module(prepared).numpy()
    if target == "hf":
        transformers = pytest.importorskip("transformers")
        return transformers.AutoModel.from_pretrained(out).eval()(pixel_values=prepared).pooler_output.numpy()
    if target == "torchvision":
        import torchvision

        module = eval(result["model"], {"torchvision": torchvision})
        keys = module.load_state_dict(torch.load(out / "backbone.pth", weights_only=True), strict=False)
        assert not keys.unexpected_keys and keys.missing_keys == ["fc.weight", "fc.bias"]
        module.fc = torch.nn.Identity()
        return module.eval()(prepared.expand(-1, 3, -1, -1)).numpy()
    if target == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(out / "encoder.onnx")
        return session.run(None, {"images": images.numpy()})[0]
    module = torch.export.load(out / "encoder.pt2").module()
    return module(images).numpy() if target == "torch" else torch.cat([module(i[None].float()) for i in images]).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_targets_open_with_the_same_features(target: str, kind: str, tmp_path: Path) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    encoder = settled(**KINDS[kind])
    if kind in REFUSED.get(target, ()):
        with pytest.raises(ConfigError, match="--to onnx and --to torch take every encoder"):
            export_model(encoder, tmp_path / "out", target)
        return
    result = export_model(encoder, tmp_path / "out", target)
    images = pictures(3, encoder)
    with torch.no_grad():
        features = opened(target, tmp_path / "out", encoder, result, images)
        plain = encoder(encoder.preprocess(images)).numpy()
    expected = encoder.embed(images) if result["features"]["as"] == "embed" else plain
    assert features.shape == (3, result["features"]["number"])
    difference = np.abs(features - expected).max()
    print(target, kind, f"largest difference {difference:.1e} of {np.abs(expected).max():.2g}")
    assert difference <= 1e-4 * max(1, np.abs(expected).max())
    if target in ("timm", "hf"):
        np.testing.assert_array_equal(inbatch.load(tmp_path / "out").embed(images), encoder.embed(images))


@pytest.mark.slow
def test_detection_and_segmentation_models_train_on_the_torchvision_weights(tmp_path: Path) -> None:
    import torchvision
    from torchvision.models import detection, segmentation
    from torchvision.models._utils import IntermediateLayerGetter

    encoder = settled("resnet18", 96)
    export_model(encoder, tmp_path / "out", "torchvision")
    weights = torch.load(tmp_path / "out" / "backbone.pth", weights_only=True)

    def backbone() -> Any:
        model = torchvision.models.resnet18()
        model.load_state_dict(weights, strict=False)
        return model

    images = torch.rand(2, 3, 96, 96)
    pyramid = detection.backbone_utils._resnet_fpn_extractor(backbone(), trainable_layers=5)
    detector = detection.FasterRCNN(pyramid, num_classes=2, min_size=96, max_size=96)
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}] * 2
    maps = IntermediateLayerGetter(backbone(), {"layer4": "out"})
    heads = segmentation.fcn.FCNHead(512, 2), segmentation.deeplabv3.DeepLabHead(512, 2)
    masks = torch.randint(0, 2, (2, 96, 96))
    cases = [(detector, lambda: sum(detector(list(images), targets).values()))]
    for kind, head in zip((segmentation.FCN, segmentation.DeepLabV3), heads, strict=True):
        model = kind(maps, head)
        cases.append((model, lambda m=model: torch.nn.functional.cross_entropy(m(images)["out"], masks)))
    for model, loss in cases:
        model.train()
        first = next(p for n, p in model.named_parameters() if n.endswith("conv1.weight"))
        before = first.detach().clone()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
        for _ in range(2):
            optimizer.zero_grad()
            value = loss()
            assert value.isfinite()
            value.backward()
            optimizer.step()
        assert not torch.equal(first, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whitened", "vit", "tiny"])
def test_coremltools_converts_the_program(kind: str, tmp_path: Path) -> None:
    """It runs on Linux up to the saved model; only macOS can compute with it."""
    coremltools = pytest.importorskip("coremltools")
    encoder = settled(**KINDS[kind])
    export_model(encoder, tmp_path / "out", "coreml-ready")
    runpy.run_path(str(tmp_path / "out" / "convert_to_coreml.py"))
    spec = coremltools.utils.load_spec(str(tmp_path / "out" / "encoder.mlpackage"))
    image, features = spec.description.input[0], spec.description.output[0]
    sides = image.type.imageType.width, image.type.imageType.height
    assert image.name == "images" and sides == (encoder.size, encoder.size)
    assert (features.name, list(features.type.multiArrayType.shape)) == ("features", [1, encoder.feature_width])


@pytest.mark.slow
def test_transformers_prepares_images_as_the_encoder_does(tmp_path: Path) -> None:
    """Up to the rounding of resized pixels to whole numbers, which Pillow does and the encoder does not."""
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    encoder = settled("resnet10", 72)
    export_model(encoder, tmp_path / "out", "hf")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)).resize((150, 120))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    prepared = processor(picture, return_tensors="pt")["pixel_values"]
    assert float((prepared - encoder.preprocess([picture])).abs().max()) <= 1.01 / 255 / min(encoder.std)
