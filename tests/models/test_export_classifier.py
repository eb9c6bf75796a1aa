"""Export of classifiers: probabilities elsewhere, with the names of the classes, or a refusal with the reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import one_object, run
from torch import Tensor, nn

import inbatch
from inbatch.errors import ConfigError, InbatchError
from inbatch.models import Classifier, Encoder, create_encoder, load_classifier, save_classifier
from inbatch.models.export import TARGETS, export_model
from inbatch.models.export.graph import Graph
from inbatch.models.export.target import Target, Written, compare, file_of

CLASSES = ("ash", "Bär", "o'ak, red")


def trained(name: str, size: int, channels: int = 3, **options: Any) -> Classifier:
    """Return a classifier with fitted whitening, if any, whose probabilities are far from equal."""
    encoder = create_encoder(name, size=size, channels=channels, check=False, **options).eval()
    if encoder.readout is not None:
        encoder.readout.fit(torch.rand(4 * encoder.readout.width, encoder.readout.width))
    head = nn.Linear(encoder.feature_width, len(CLASSES)).requires_grad_(False)
    head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():  # logits of about 1: certain predictions would hide differences
        head.weight /= head(encoder.represent(encoder.preprocess(pictures(8, encoder)))).std()
    return Classifier(encoder, head, CLASSES, temperature=1.5).eval()


def pictures(count: int, model: Classifier | Encoder) -> Tensor:
    """Return random images of different brightness and contrast."""
    draw = torch.Generator().manual_seed(7)
    noise = torch.rand(count, model.channels, model.size, model.size, generator=draw)
    return (noise * torch.linspace(20, 255, count)[:, None, None, None]).byte()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return the folder of a classifier of grey images."""
    save_classifier(trained("tiny", 12, channels=1), tmp_path / "classifier")
    return tmp_path / "classifier"


def test_the_graph_has_the_head(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tracing, which takes seconds: see the slow test below."""

    def write(model: Classifier, folder: Path, facts: dict[str, Any]) -> Written:
        (folder / file_of(model, ".pt2")).write_text(json.dumps(facts))
        return Written("nothing", *compare(model, Graph(model).eval(), "it"), "open(OUT)")

    monkeypatch.setitem(TARGETS, "torch", Target(write, ""))
    text = run(f"export {small} --to torch -o {tmp_path / 'out'}")
    assert text.exit_code == 0 and "Classifier: tiny, 1x12x12 -> 3 classes" in text.stdout
    assert "nothing: probabilities differ by at most" in text.stdout and "the largest is" in text.stdout
    facts = json.loads((tmp_path / "out" / "classifier.pt2").read_text())
    assert facts == {"classes": list(CLASSES), "temperature": 1.5}
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["classes"] == list(CLASSES) and manifest["temperature"] == 1.5 and "features" not in manifest
    assert manifest["input"]["shape"] == ["N", 1, 12, 12] and manifest["check"]["max_difference"] <= 1e-5
    assert list(manifest["files"]) == ["classifier.pt2"]
    classifier = load_classifier(small)
    assert np.ptp(classifier.predict_proba(pictures(4, classifier)), axis=1).min() > 0.1


@pytest.mark.slow
def test_a_program_of_torch_computes_the_probabilities(small: Path, tmp_path: Path) -> None:
    assert inbatch.export_run(small, tmp_path / "out", "torch")["classes"] == list(CLASSES)
    more = {"inbatch.json": ""}
    module = torch.export.load(tmp_path / "out" / "classifier.pt2", extra_files=more).module()
    assert json.loads(more["inbatch.json"])["classes"] == list(CLASSES)
    classifier = load_classifier(small)
    for count in (1, 4):
        images = pictures(count, classifier)
        np.testing.assert_allclose(module(images).numpy(), classifier.predict_proba(images), atol=1e-6)


def test_unsupported_targets_are_refused_and_the_folder_is_kept(small: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in small.iterdir()}
    shutil.copytree(small, tmp_path / "other")
    for words, why in (
        ("--to torchvision -o new", "weights of a backbone. Choose --to onnx, torch or timm"),
        ("--to hf -o new", "model card describes an encoder"), ("--to coreml-ready -o new", "script converts features"),
        ("--to timm -o new", "it is an encoder of inbatch"),
        (f"--to torch -o {small}", "is the model to export"),
        (f"-o {small}/../classifier", "is the model to export"),
        (f"--to torch -o {tmp_path / 'other'}", "choose another folder"),
        (f"-o {tmp_path / 'other'}", "choose another folder"),
    ):  # fmt: skip
        refusal = run(f"export {small} {words}")
        assert refusal.exit_code == 2 and why in refusal.stderr.replace("\n", " "), (words, refusal.stderr)
        for folder in (small, tmp_path / "other"):
            assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not Path("new").exists()
    report = one_object(run(f"export {small} -o {tmp_path / 'encoder'} --json").stdout)
    assert report["width"] == 96 and "classes" not in report
    images = pictures(2, load_classifier(small))
    assert np.array_equal(inbatch.load(tmp_path / "encoder").embed(images), inbatch.load(small).embed(images))


def test_differing_probabilities_are_an_error() -> None:
    classifier = trained("tiny", 12, channels=1)
    right = lambda images: torch.from_numpy(classifier.predict_proba(images))  # noqa: E731
    assert compare(classifier, right, "it")[0] == 0
    for wrong, why in (
        (lambda images: right(images) + 2e-4, "other probabilities: they differ by up to 0.0002"),
        (lambda images: right(images)[:, :2], r"probabilities of shape \(2, 2\) instead of \(2, 3\)"),
    ):
        with pytest.raises(InbatchError, match=why):
            compare(classifier, wrong, "it")


def test_timm_opens_a_classifier(tmp_path: Path) -> None:
    import timm

    classifier = trained("vit_tiny_patch16_224", 32, depth=1)
    export_model(classifier, tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = pictures(3, classifier)
    with torch.no_grad():
        probabilities = model(classifier.encoder.preprocess(images)).softmax(1)
    np.testing.assert_allclose(probabilities.numpy(), classifier.predict_proba(images), atol=1e-6)
    assert model.pretrained_cfg["label_names"] == list(CLASSES)
    again = load_classifier(tmp_path / "out")
    assert np.array_equal(again.predict_proba(images), classifier.predict_proba(images)) and again.temperature == 1.5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 1}),
        pytest.param("caformer_s18", {}, marks=pytest.mark.slow),
    ],
)
def test_timm_refuses_a_classifier_if_its_own_has_other_layers(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    classifier = trained(name, 32, **options)
    with pytest.raises(ConfigError, match="cannot be exported to timm: its model in timm has other layers"):
        export_model(classifier, tmp_path / "out", "timm")
    save_classifier(classifier, tmp_path / "own")
    assert list(json.loads((tmp_path / "own" / "config.json").read_text())) == ["inbatch"]
    images = pictures(2, classifier)
    assert np.array_equal(load_classifier(tmp_path / "own").predict_proba(images), classifier.predict_proba(images))


# every kind of encoder

KINDS: dict[str, dict[str, Any]] = {
    "fast": {"name": "fast", "size": 64, "width": 16, "whiten": True, "whiten_patches": True},
    "whitened": {"name": "resnet10", "size": 72, "whiten": True},
    "cifar": {"name": "resnet18", "size": 32},
    "resnet18": {"name": "resnet18", "size": 72},
    "vit": {"name": "vit_tiny_patch16_224", "size": 32, "depth": 3},
    "se": {"name": "resnet10", "size": 72, "attend": "se"},
}
REFUSED = {"fast": "encoder of inbatch", "whitened": "linear layer takes whitened features", "cifar": "CIFAR stem"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_computes_the_probabilities(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    classifier = trained(**KINDS[kind])
    export_model(classifier, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "classifier.onnx")
    assert [output.name for output in session.get_outputs()] == ["probabilities"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["inbatch.classes"]) == list(CLASSES)
    images = pictures(5, classifier)
    expected = classifier.predict_proba(images)
    probabilities = session.run(["probabilities"], {"images": images.numpy()})[0]
    print(kind, f"onnx: largest difference {np.abs(probabilities - expected).max():.1e}")
    assert np.abs(probabilities - expected).max() <= 1e-4 and np.ptp(expected, axis=1).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_torch_and_timm_compute_the_probabilities(kind: str, tmp_path: Path) -> None:
    classifier = trained(**KINDS[kind])
    result = export_model(classifier, tmp_path / "torch", "torch")
    print(kind, f"torch: largest difference {result['check']['max_difference']:.1e}")
    if kind in REFUSED:
        with pytest.raises(InbatchError, match=f"{REFUSED[kind]}.*--to onnx and --to torch take every encoder"):
            export_model(classifier, tmp_path / "timm", "timm")
        return
    result = export_model(classifier, tmp_path / "timm", "timm")
    print(kind, f"timm: largest difference {result['check']['max_difference']:.1e}")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "timm").eval()
    images = pictures(3, classifier)
    with torch.no_grad():
        probabilities = model(pixel_values=classifier.encoder.preprocess(images)).logits.softmax(1).numpy()
    np.testing.assert_allclose(probabilities, classifier.predict_proba(images), atol=1e-5)
    assert tuple(model.config.id2label[i] for i in range(3)) == CLASSES
