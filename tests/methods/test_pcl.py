"""PCL: the authors' vectors, its random draws, and its clustering of the whole data set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor

from inbatch.batch import Batch
from inbatch.losses import info_nce, proto_nce
from inbatch.methods.pcl import PCL
from inbatch.nn.clustering import Clustering, Clusterings, concentration, k_means
from inbatch.nn.functional import normalize


def alone(task, n):
    return [task(i) for i in range(n)]


@DTYPES
@pytest.mark.parametrize("name", ["pcl_protonce__1", "pcl_protonce__2"])
def test_proto_nce(golden: Path, name: str, dtype: torch.dtype) -> None:
    """With the negatives that the reference has drawn: each clustering, both parts, the sum, and all gradients."""
    case = Case(golden, name, dtype)
    o, q, index = case.options, case.leaf("q"), case["index"]
    each = []
    for m in range(len(o["num_clusters"])):
        columns = torch.cat([case[f"im2cluster_{m}"][index], case[f"neg_ids_{m}"]])
        centroids, density = case[f"centroids_{m}"], case[f"density_{m}"]
        logits = normalize(q) @ centroids[columns].T / density[columns]
        case.check(logits, f"proto_logits_{m}")
        each.append(proto_nce(q, centroids[columns], density[columns]))
    case.check(torch.stack(each), "loss_proto_each")
    prototypes, instance = torch.stack(each).mean(), info_nce(q, case["k"], case["queue"].T, o["temperature"])
    case.check(prototypes, "loss_proto")
    case.check(instance, "loss_instance")
    for loss, expected in ((prototypes, "grad_q_proto"), (instance, "grad_q_instance")):
        case.check(torch.autograd.grad(loss, q, retain_graph=True)[0], expected)
    case.check(prototypes + instance, "loss")
    (prototypes + instance).backward()
    case.check(q.grad, "grad_q")


@DTYPES
@pytest.mark.parametrize("name", ["pcl_protonce__1", "pcl_protonce__2"])
def test_proto_nce_through_the_method(golden: Path, name: str, dtype: torch.dtype) -> None:
    """The same with only the prototypes in the reference's columns: all remaining ones are negatives."""
    case = Case(golden, name, dtype)
    o, q, index = case.options, case.leaf("q"), case["index"]
    method = PCL(o["temperature"], o["queue_size"], num_clusters=tuple(o["num_clusters"]), out_dim=o["dim"])
    method.prepare(images=o["dataset_size"], classes=0, batch=o["batch"], views=2)
    method = method.to(dtype)
    for m, clustering in enumerate(method.clusterings.every):
        assignment, negatives = case[f"im2cluster_{m}"], case[f"neg_ids_{m}"]
        kept = torch.cat([assignment[index].unique(), negatives])
        number = torch.zeros(len(case[f"density_{m}"]), dtype=torch.int64)
        number[kept] = torch.arange(len(kept))
        clustering.centroids, clustering.density = case[f"centroids_{m}"][kept], case[f"density_{m}"][kept]
        clustering.assignment = number[assignment]
        clustering.made.fill_(1)
    method.queue.rows = case["queue"].T
    rows = {"projection": q[None]}, {"projection": case["k"][None]}, Batch(index, torch.full_like(index, -1))
    losses = method.loss(*rows)
    case.check(losses["instance"], "loss_instance")
    case.check(losses["prototypes"], "loss_proto")
    case.check(losses["loss"], "loss")
    losses["loss"].backward()
    case.check(q.grad, "grad_q")


@DTYPES
def test_concentration(golden: Path, dtype: torch.dtype) -> None:
    case = Case(golden, "pcl_density__1", dtype)
    o, assignment, features = case.options, case["im2cluster"], case["features"]
    distance = (features - case["centroids_raw"][assignment]).norm(dim=1)
    torch.testing.assert_close(distance.square(), case["distances_sq"], **case.tolerance)
    assert torch.equal(torch.bincount(assignment, minlength=o["clusters"]), case["cluster_sizes"])
    case.check(concentration(distance, assignment, o["clusters"], o["temperature"], float(o["alpha"])), "density")
    case.check(normalize(case["centroids_raw"]), "centroids")


@pytest.mark.parametrize("m", [0, 1])
def test_k_means(golden: Path, m: int) -> None:
    """phi of the reference's clusters; the clustering of inbatch is as good within 1 %."""
    case = Case(golden, "pcl_kmeans__1", torch.float32)
    o, assignment, distance = case.options, case[f"im2cluster_{m}"], case[f"distances_sq_{m}"].sqrt()
    case.check(concentration(distance, assignment, o["clusters"][m], o["temperature"]), f"density_{m}")
    centroids, members, distance = k_means(case["features"], o["clusters"][m], o["nredo"], o["niter"], seed=m)
    assert distance.square().sum() < 1.01 * case[f"inertia_{m}"]
    nearest = torch.cdist(case["features"], centroids).min(1)
    assert torch.equal(nearest.indices, members) and members.unique().numel() == o["clusters"][m]
    torch.testing.assert_close(nearest.values, distance, rtol=1e-4, atol=1e-4)


def test_k_means_repeats_itself_on_one_thread() -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    rows = normalize(torch.randn(3000, 16))
    with threadpool_limits(4):
        first, second = (k_means(rows, 20, 2, 10, seed=7) for _ in range(2))
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"} == {4}, "restored"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(k_means(rows, 20, 2, 10, seed=8)[0], first[0])
    with pytest.raises(ValueError, match="21 clusters"):
        k_means(rows[:20], 21, 1, 10, seed=0)


def test_clusters_of_identical_rows_have_a_finite_concentration() -> None:
    zero = concentration(torch.zeros(6), torch.tensor([0, 0, 1, 1, 2, 2]), 3, 0.2)
    assert torch.equal(zero, torch.full((3,), 0.2))
    single = concentration(torch.zeros(3), torch.arange(3), 3, 0.2)
    assert torch.equal(single, zero)
    half = concentration(torch.tensor([0.0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 2]), 3, 0.2)
    assert half.min() == pytest.approx(0.002) and half.argmax() == 2


def test_agreement_leaves_unknown_labels_out() -> None:
    label, group = torch.tensor([0, 0, 1, 1, -1, -1]), torch.tensor([1, 1, 0, 0, 0, 1])
    clusterings = Clusterings((2,), 2, 1, 0.2, 10.0, 3, 10)
    clusterings.allocate(6)
    figures = clusterings.survey(torch.eye(2)[group], label, 0, lambda task, n: [task(i) for i in range(n)])
    assert figures["nmi_2"] == pytest.approx(1)


def literal(q: Tensor, c: Clustering, index: list[int], negatives: list[int]) -> Tensor:
    own = [int(c.assignment[i]) for i in index]
    terms = []
    for row, mine in zip(normalize(q), own, strict=True):
        terms.append(sum((row @ c.centroids[j] / c.density[j]).exp() for j in own + negatives))
        terms[-1] = -((row @ c.centroids[mine] / c.density[mine]).exp() / terms[-1]).log()
    return sum(terms) / len(terms)


def clustering(count: int, images: int) -> Clustering:
    clusters = Clustering(count, 4, images)
    clusters.remember(normalize(torch.randn(count, 4)), torch.rand(count) + 0.1, torch.arange(images) % count)
    return clusters


def test_negatives_are_the_prototypes_of_no_sample() -> None:
    """Samples 3 and 10 share a prototype: its second column is a negative of the first, and vice versa."""
    clusters, index, q = clustering(7, 30), [3, 10, 4], torch.randn(3, 4)
    batch = Batch(torch.tensor(index), torch.full((3,), -1))
    for most in (4, 100):
        columns, density, counts = clusters.columns(batch, most)
        left = [0, 1, 2, 5, 6]
        drawn = [int((clusters.centroids == column).all(1).nonzero()) for column in columns[3:][counts[3:]]]
        assert len(drawn) == min(most, 5) and set(drawn) <= set(left) and counts[:3].all()
        torch.testing.assert_close(proto_nce(q, columns, density, counts), literal(q, clusters, index, drawn))


def test_the_draw_follows_the_batch_and_not_its_order() -> None:
    clusters = clustering(200, 1000)

    def drawn(index: list[int], seed: int = 0, epoch: int = 0, key: int = 0) -> Tensor:
        batch = Batch(torch.tensor(index), torch.full((len(index),), -1), seed, epoch)
        return clusters.columns(batch, 20, key)[0][len(index) :]

    first = drawn([5, 9, 14])
    assert torch.equal(drawn([14, 5, 9]), first)
    for other in (drawn([5, 9, 15]), drawn([5, 9, 14], seed=1), drawn([5, 9, 14], epoch=1), drawn([5, 9, 14], key=1)):
        shared = (other[:, None] == first).all(-1).any(1).sum()
        assert shared < 10, "20 of 197 by chance are 2"
    seen = torch.cat([drawn([i, i + 1, i + 2]) for i in range(300)])
    count = (seen[:, None] == clusters.centroids).all(-1).sum(0)
    assert count.min() > 10 and count.max() < 60, "every prototype is drawn about 30 times"


def small(**options: object) -> PCL:
    torch.manual_seed(0)
    method = PCL(
        **{"queue_size": 16, "num_clusters": (4, 6), "warmup_epochs": 2, "restarts": 1, "out_dim": 4} | options
    )
    method.prepare(images=40, classes=3, batch=8, views=2)
    return method


def test_info_nce_alone_before_the_first_clusters() -> None:
    method, (q, k), batch = small(), torch.randn(2, 8, 4), unlabelled(8)
    rows = {"projection": q[None].requires_grad_()}, {"projection": k[None]}, batch
    losses = method.loss(*rows)
    assert losses["prototypes"] == 0 and torch.equal(losses["loss"], losses["instance"])
    torch.testing.assert_close(losses["loss"], info_nce(rows[0]["projection"][0], k, method.queue.rows, 0.2))
    assert [method.surveys(epoch) for epoch in range(4)] == [False, False, True, True]
    figures = method.survey({"projection": torch.randn(40, 4)}, torch.arange(40) % 4 - 1, 2, alone)
    assert figures.keys() == {"nmi_4", "nmi_6"} and all(0 <= value <= 1 for value in figures.values())
    assert method.loss(*rows)["prototypes"] > 0
    assert not method.survey({"projection": torch.randn(40, 4)}, torch.full((40,), -1), 2, alone)


def test_a_survey_makes_prototypes_of_unit_rows_and_repeats_itself() -> None:
    rows, label = {"projection": 3 * torch.randn(40, 4) + 1}, torch.arange(40) % 3
    first, second, later = small(), small(), small()
    for method, epoch in ((first, 2), (second, 2), (later, 3)):
        method.survey(rows, label, epoch, alone)
    states = [method.clusterings.state_dict() for method in (first, second, later)]
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    assert any(not torch.equal(x, states[2][key]) for key, x in states[0].items()), "another epoch starts elsewhere"
    u = normalize(rows["projection"])
    for c, count in zip(first.clusterings.every, (4, 6), strict=True):
        means = torch.stack([u[c.assignment == k].mean(0) for k in range(count)])
        torch.testing.assert_close(c.centroids, normalize(means))
        distance = (u - means[c.assignment]).norm(dim=1)
        torch.testing.assert_close(c.density, concentration(distance, c.assignment, count, 0.2))


def test_images_that_cannot_be_read_have_no_cluster() -> None:
    """The data may contain fewer readable images than announced: the last indices are never requested."""
    method = small()
    method.survey({"projection": torch.randn(38, 4)}, torch.arange(38) % 3, 2, alone)
    np.testing.assert_array_equal(method.clusterings.every[0].assignment[38:], [0, 0])


def test_invalid_options_are_refused() -> None:
    with pytest.raises(ValueError, match="25,000 clusters cannot be made of 40 images"):
        PCL(queue_size=4).prepare(images=40, classes=3, batch=8, views=2)
    with pytest.raises(ValueError, match="a prototype for every query"):
        proto_nce(torch.randn(3, 4), torch.randn(2, 4), torch.ones(2))


def test_v2_has_a_second_layer() -> None:
    one, two = (small(layers=n).heads(6)["projection"].network for n in (1, 2))
    assert [x.out_features for x in one if hasattr(x, "out_features")] == [4]
    assert [x.out_features for x in two if hasattr(x, "out_features")] == [6, 4]
    assert (small().online_views(2), small().target_views(2)) == ((0,), (1,))
