"""Contrastive Clustering: the authors' vectors, a version written as loops, and its options."""

import math
from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor

from inbatch.losses import cluster_contrast
from inbatch.methods import METHODS
from inbatch.methods.cc import CC, contrast
from inbatch.training.resolve import resolve_recipe


@DTYPES
@pytest.mark.parametrize("name", ["cc_instance__1", "cc_instance__2"])
def test_instances(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = Case(golden, name, dtype)
    z0, z1, t = case.leaf("z0"), case.leaf("z1"), case.options["instance_temperature"]
    z = torch.stack([z0, z1])
    loss = contrast(z, t)
    clusters = torch.randn(2, len(z0), 3, dtype=dtype)
    method = CC(3, temperature=t)
    assert torch.equal(method.loss({"projection": z, "clusters": clusters}, {}, unlabelled(len(z0)))["instance"], loss)
    case.check(loss, "loss")
    loss.backward()
    case.check(z0.grad, "grad_z0")
    case.check(z1.grad, "grad_z1")


@DTYPES
@pytest.mark.parametrize("name", ["cc_instance__1", "cc_instance__2"])
def test_instances_that_are_unit_rows(
    golden: Path, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors normalise outside the loss: without the loss's normalisation the gradient is that of free rows."""
    case = Case(golden, name, dtype)
    monkeypatch.setattr("inbatch.methods.cc.normalize", lambda rows: rows)
    z0, z1 = case.leaf("z0n"), case.leaf("z1n")
    loss = contrast(torch.stack([z0, z1]), case.options["instance_temperature"])
    case.check(loss, "loss")
    loss.backward()
    case.check(z0.grad, "grad_z0n")
    case.check(z1.grad, "grad_z1n")


@DTYPES
@pytest.mark.parametrize("name", ["cc_cluster__1", "cc_cluster__2"])
def test_clusters(golden: Path, name: str, dtype: torch.dtype) -> None:
    """Both terms and the gradient, from soft assignments and through the method from logits."""
    case = Case(golden, name, dtype)
    t = case.options["cluster_temperature"]
    c0, c1 = case.leaf("c0"), case.leaf("c1")
    cluster, entropy = cluster_contrast(torch.stack([c0, c1]), t)
    case.check(cluster, "contrastive_term")
    case.check(entropy, "entropy_term")
    case.check(cluster + entropy, "loss")
    (cluster + entropy).backward()
    case.check(c0.grad, "grad_c0")
    case.check(c1.grad, "grad_c1")

    x0, x1 = case.leaf("logits0"), case.leaf("logits1")
    method = CC(case.options["clusters"], cluster_temperature=t)
    rows = {"projection": torch.randn(2, len(x0), 4, dtype=dtype), "clusters": torch.stack([x0, x1])}
    losses = method.loss(rows, {}, unlabelled(len(x0)))
    case.check(losses["cluster"], "contrastive_term")
    case.check(losses["entropy"], "entropy_term")
    torch.testing.assert_close(losses["loss"], sum(losses[part] for part in ("instance", "cluster", "entropy")))
    losses["loss"].backward()
    case.check(x0.grad, "grad_logits0")
    case.check(x1.grad, "grad_logits1")


def literal(x: Tensor, t: float) -> Tensor:
    """Compute the loss of V sets of vectors: every one against all others."""
    vectors = {(v, i): x[v, i] / x[v, i].norm() for v in range(len(x)) for i in range(x.shape[1])}
    terms = []
    for (v, i), u in vectors.items():
        everyone = sum((u @ w / t).exp() for key, w in vectors.items() if key != (v, i))
        others = [vectors[w, i] for w in range(len(x)) if w != v]
        terms.append(sum(-((u @ p / t).exp() / everyone).log() for p in others) / len(others))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 3])
def test_more_views_literally(views: int) -> None:
    z, x = torch.randn(views, 5, 4, dtype=torch.float64), torch.randn(views, 5, 3, dtype=torch.float64)
    p = x.softmax(-1)
    losses = CC(3, temperature=0.3, cluster_temperature=0.7).loss({"projection": z, "clusters": x}, {}, unlabelled(5))
    torch.testing.assert_close(losses["instance"], literal(z, 0.3))
    torch.testing.assert_close(losses["cluster"], literal(p.mT, 0.7))
    entropy = [math.log(3) + sum(m * m.log() for m in view.mean(0)) for view in p]
    torch.testing.assert_close(losses["entropy"], 2 * sum(entropy) / views)


def test_even_clusters_cost_nothing_and_one_cluster_the_most() -> None:
    even, one = torch.eye(4).repeat(3, 1).expand(2, 12, 4), torch.eye(4)[[0] * 12].expand(2, 12, 4)
    assert cluster_contrast(even)[1] == pytest.approx(0, abs=1e-6)
    assert cluster_contrast(one)[1] == pytest.approx(2 * math.log(4))


def test_a_cluster_without_samples_has_a_finite_gradient() -> None:
    """Logits so far apart that a column of the assignments is exactly 0."""
    x = (200 * torch.eye(3)[[0, 0, 1, 1]]).expand(2, 4, 3).clone().requires_grad_()
    losses = CC(3).loss({"projection": torch.randn(2, 4, 4), "clusters": x}, {}, unlabelled(4))
    losses["loss"].backward()
    assert losses["loss"].isfinite() and x.grad.isfinite().all()
    assert losses["entropy"].item() == pytest.approx(2 * (math.log(3) - math.log(2)), rel=1e-5)


def test_number_of_clusters_is_given_or_that_of_the_classes() -> None:
    properties = {"images": 50, "batch": 10, "views": 2}
    for requested, classes, clusters in ((None, 7, 7), (4, 7, 4), (4, 0, 4)):
        method = METHODS["cc"](num_clusters=requested)
        method.prepare(classes=classes, **properties)
        assert method.heads(6)["clusters"].network(torch.zeros(2, 6)).shape == (2, clusters)
    method = METHODS["cc"]()
    method.prepare(classes=0, **properties)
    with pytest.raises(ValueError, match="number of clusters"):
        method.heads(6)


def test_invalid_shapes_are_refused() -> None:
    for shape in ((1, 6, 4), (2, 1, 4)):
        with pytest.raises(ValueError, match="2 views of 2"):
            contrast(torch.randn(shape), 0.5)
    with pytest.raises(ValueError, match="2 views of 2"):
        cluster_contrast(torch.ones(2, 6, 1))


def test_the_authors_enlarge_small_images_and_the_natural_preset_does_not() -> None:
    images = torch.randint(0, 255, (20, 3, 32, 32), dtype=torch.uint8)
    large, natural = (resolve_recipe(images, {"method.name": "cc"} | more)[0] for more in ({"preset": "cifar224"}, {}))
    assert (large.image_size, large.views.options["size"], large.encoder.name) == (224, 224, "resnet34")
    assert (natural.preset, natural.image_size, natural.views.options["size"]) == ("cifar", 32, 32)
    assert resolve_recipe(images, {"method.name": "cc", "preset": "cifar224", "image_size": 64})[0].image_size == 64


def test_the_weight_of_the_entropy() -> None:
    rows = {"projection": torch.randn(2, 5, 4), "clusters": torch.randn(2, 5, 3)}
    plain, twice, none = (CC(3, entropy_weight=w).loss(rows, {}, unlabelled(5)) for w in (1.0, 2.0, 0.0))
    assert torch.equal(plain["loss"], CC(3).loss(rows, {}, unlabelled(5))["loss"])
    assert torch.equal(plain["loss"], plain["instance"] + plain["cluster"] + plain["entropy"])
    torch.testing.assert_close(twice["loss"] - plain["loss"], plain["entropy"])
    assert torch.equal(none["loss"], plain["instance"] + plain["cluster"])
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="entropy_weight"):
            CC(3, entropy_weight=wrong)
