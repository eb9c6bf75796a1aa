"""Evaluation: features of clean images, and metrics that agree with slow or well-known versions."""

import builtins
import importlib
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from feature_sets import Pictures, clouds, encoder, pictures
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from timm.optim import Lars
from torch.nn import functional as F

from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import (
    PROBES,
    Embeddings,
    Kept,
    Lbfgs,
    Sgd,
    ari,
    assigned,
    clustering,
    embed,
    embed_stream,
    evaluate,
    feature_std,
    hold_in_memory,
    hungarian_accuracy,
    knn,
    knn_scores,
    linear_probe,
    nmi,
    rankme,
    raw_pixels,
    write_embeddings,
)
from inbatch.evaluation.linear_probe import _lbfgs, _sgd
from inbatch.nn.clustering import Clusterings, k_means

knn_module = importlib.import_module("inbatch.evaluation.knn")


# Embedding


def test_one_image_alone_equals_the_same_in_a_batch():
    source, net = pictures(), encoder()
    together = embed(net, source, batch=21)
    for batch in (1, 4):
        assert torch.allclose(embed(net, source, batch=batch).vectors, together.vectors, atol=1e-5)
    assert torch.equal(together.labels, source.labels)
    assert together.identities[20] == "folder/20.png"
    assert together.vectors.std(0).mean() > 0.01


def test_embedding_changes_nothing_in_the_encoder():
    net = encoder()
    frozen = net.backbone[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    stream = embed_stream(net, pictures(), batch=8)
    chunk = next(stream)
    assert net.training and torch.is_grad_enabled() and not chunk.vectors.requires_grad
    list(stream)
    assert not frozen.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_workers_and_sizes_make_no_difference():
    source, net = pictures(9, sizes=((20, 20), (31, 40), (64, 23))), encoder()
    here, there = embed(net, source, batch=4), embed(net, source, batch=4, workers=1)
    assert torch.equal(here.vectors, there.vectors)
    alone = torch.cat([net.prepare(i[None]) for i in source.images])
    with net.evaluating():
        assert torch.allclose(here.vectors, net(alone), atol=1e-6)


def test_bfloat16_is_close():
    source, net = pictures(), encoder()
    full, half = embed(net, source), embed(net, source, precision=torch.bfloat16)
    assert half.vectors.dtype == torch.float32
    assert 0 < (full.vectors - half.vectors).norm() / full.vectors.norm() < 0.02


def test_stream_is_lazy():
    """Only the images of the requested chunks have been decoded."""
    source = pictures(40)
    seen = []
    image = source.image
    source.image = lambda i: seen.append(i) or image(i)
    next(embed_stream(encoder(), source, batch=5))
    assert seen == list(range(5))


def test_raw_pixels():
    source = pictures(5)
    raw = raw_pixels(source)
    assert torch.equal(raw.vectors, torch.stack(source.images).flatten(1).float() / 255)
    large = pictures(4, sizes=((40, 64), (50, 33)), channels=3)
    assert raw_pixels(large).vectors.shape == (4, 3 * 32 * 32)
    assert raw_pixels(large, size=8).feature == "raw pixels, 8x8"
    flat = Pictures([torch.full((1, 50, 70), 51, dtype=torch.uint8)], [0])
    assert torch.allclose(raw_pixels(flat).vectors, torch.tensor(0.2))
    with pytest.raises(DataError, match="no images"):
        raw_pixels(Pictures([], [], "empty"))


def test_raw_pixels_of_unreadable_images_are_refused(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff\xe0junk")
    with pytest.raises(DataError, match="none of 2 images can be read"):
        raw_pixels(tmp_path)


@pytest.mark.parametrize("sizes", [((20, 20),), ((20, 20), (31, 40))])
def test_kept_images_are_decoded_once_and_give_the_same(sizes):
    source, net, seen = pictures(21, sizes), encoder(), []
    plain = embed(net, source, batch=8)
    image = source.image
    source.image = lambda i: seen.append(i) or image(i)
    kept = Kept(source)
    for workers in (0, 2):
        again = embed(net, kept, batch=8, workers=workers)
        assert torch.equal(again.vectors, plain.vectors) and again.identities == plain.identities
        assert torch.equal(again.labels, plain.labels)
    assert sorted(seen) == list(range(21))


def test_only_what_fits_is_kept():
    source = pictures(30)
    assert isinstance(hold_in_memory(source, 30 * 400), Kept)
    assert hold_in_memory(source, 30 * 400 - 1) is source


def test_batch_of_one_size_is_prepared_as_single_images(monkeypatch):
    source, net = pictures(9, sizes=((31, 40),)), encoder()
    together = embed(net, source, batch=9)
    monkeypatch.setattr(importlib.import_module("inbatch.evaluation.embed"), "_TOGETHER", 0)
    assert torch.allclose(embed(net, source, batch=9).vectors, together.vectors, atol=1e-6)


def test_empty_source_is_refused():
    with pytest.raises(DataError, match="no images"):
        embed(encoder(), Pictures([], [], "empty"))


# Files


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_written_features_are_the_features(tmp_path, ending):
    source, net = pictures(11), encoder()
    source.labels[3] = -1
    source.identity = lambda i: ["a\nb.png", "größe.png", "bad\udcff.png", "x"][i % 4]
    path = tmp_path / "new" / f"features{ending}"
    assert write_embeddings(path, embed_stream(net, source, batch=4)) == 11
    if ending == ".npz":
        with np.load(path, allow_pickle=False) as file:
            table = dict(file)
    else:
        assert pq.ParquetFile(path).num_row_groups == 3
        table = {k: np.array(v) for k, v in pq.read_table(path).to_pydict().items()}
    assert set(table) == {"path", "index", "label", "vector", "split", "class"}
    assert np.allclose(table["vector"], embed(net, source).vectors.numpy(), atol=1e-6)
    assert table["label"].tolist() == source.labels.tolist()
    assert table["index"].tolist() == list(range(11))
    assert table["path"].tolist()[:4] == ["a\nb.png", "größe.png", "bad�.png", "x"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_a_stream_that_breaks_leaves_the_old_file(tmp_path, ending):
    def broken():
        yield clouds(5)
        raise DataError("image 5 cannot be read")

    path = tmp_path / f"features{ending}"
    path.write_bytes(b"old")
    with pytest.raises(DataError, match="image 5"):
        write_embeddings(path, broken())
    with pytest.raises(DataError, match="no images"):
        write_embeddings(path, [])
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unsupported_endings_and_missing_pyarrow_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"\.parquet or \.npz"):
        write_embeddings(tmp_path / "features.csv", [clouds(5)])
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'inbatch\[parquet\]'"):
        write_embeddings(tmp_path / "features.parquet", [clouds(5)])


def test_large_features_are_finite_and_nan_is_detected():
    large = Embeddings(torch.full((4, 3), 3e38), torch.tensor([0, 1, 0, 1]), tuple("abcd"), "large", "f")
    assert len(large.labelled()) == 4
    for bad in (torch.nan, torch.inf):
        vectors = large.vectors.clone()
        vectors[2, 1] = bad
        with pytest.raises(DataError, match="diverged"):
            replace(large, vectors=vectors).labelled()


# k-NN


def slow_knn(query, bank, labels, classes, k, temperature, distance):
    scores = torch.zeros(len(query), classes, dtype=torch.float64)
    for q, row in zip(query, scores, strict=True):
        if distance == "cosine":
            near = [F.cosine_similarity(q, b, dim=0).item() for b in bank]
        else:
            near = [-(q - b).square().sum().item() for b in bank]
        for i in sorted(range(len(bank)), key=lambda i: -near[i])[:k]:
            row[labels[i]] += np.exp(near[i] / temperature) if distance == "cosine" else 1
    return scores


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 40])
def test_knn_scores_literally(distance, k):
    bank, query = clouds(40, spread=2, seed=1), clouds(13, spread=2, seed=2)
    arguments = query.vectors.double() + 5, bank.vectors.double() + 5, bank.labels, 4
    options = {"k": k, "temperature": 0.2, "distance": distance}
    expected = slow_knn(*arguments, **options).log()
    for chunk in (None, 1, 5, 13, 100):
        torch.testing.assert_close(knn_scores(*arguments, **options, chunk=chunk), expected)


def test_tiles_keep_the_similarities_small_and_change_nothing(monkeypatch):
    """No product is larger than chunk times tile, and the best neighbours over the tiles are the best of all."""
    seen = []
    real = torch.mm
    monkeypatch.setattr(knn_module, "_BANK", 32)
    query, bank = clouds(100, spread=2, seed=1), clouds(90, spread=2, seed=2)
    whole = slow_knn(query.vectors.double(), bank.vectors.double(), bank.labels, 4, 40, 0.1, "cosine")
    monkeypatch.setattr(torch, "mm", lambda x, w, out: seen.append(len(x) * w.shape[1]) or real(x, w, out=out))
    scores = knn_scores(query.vectors.double(), bank.vectors.double(), bank.labels, 4, k=40, chunk=8)
    torch.testing.assert_close(scores, whole.log())
    assert max(seen) == 8 * 32 and sum(seen) == 100 * 90


@pytest.mark.parametrize(("columns", "k"), [(5000, 200), (1003, 3), (257, 1), (64, 4), (40, 40)])
def test_the_largest_are_the_largest(columns, k):
    """For any order of the values and with many equal ones."""
    x = torch.randn(20, columns)
    x[:5] = x[:5].sort(1).values
    x[5:10] = x[5:10].round()
    values, place = knn_module.largest(x, k)
    assert torch.equal(values.sort(1).values, x.topk(k).values.sort(1).values)
    assert torch.equal(x.gather(1, place), values)
    assert all(len(row.unique()) == k for row in place)


def test_unlabelled_images_neither_vote_nor_count():
    bank, query = clouds(60, seed=1), clouds(30, seed=2)
    expected = knn(bank, query, k=9)
    noise = Embeddings(
        torch.cat([bank.vectors, query.vectors]),
        torch.cat([bank.labels, torch.full((30,), -1)]),
        bank.identities + query.identities,
        "half labelled",
        "clouds",
    )
    assert knn(noise, query, k=9) == expected
    assert knn(bank, noise, k=9)["top1"] == knn(bank, bank, k=9)["top1"]


def test_knn_refuses():
    bank, query = clouds(10), clouds(5)
    with pytest.raises(ConfigError, match="from 10 samples"):
        knn(bank, query, k=11)
    with pytest.raises(ConfigError, match="euclidean"):
        knn(bank, query, k=3, distance="manhattan")


# Linear probe


def test_lbfgs_is_scikit_learns_logistic_regression():
    train, test = clouds(200, spread=2, seed=1), clouds(100, spread=2, seed=2)
    result = linear_probe(train, test, Lbfgs(c=0.3, tolerance=1e-7))
    x, query = train.vectors.double(), test.vectors.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    reference = LogisticRegression(C=0.3, tol=1e-8, max_iter=1000).fit((x - mean) / std, train.labels)
    assert result["top1"] == reference.score((query - mean) / std, test.labels)
    # The same minimum, not only the same predictions.
    weight, bias, _ = _lbfgs((train.vectors - mean.float()) / std.float(), train.labels, 4, Lbfgs(0.3, tolerance=1e-7))
    assert np.allclose(weight, reference.coef_, atol=1e-3)
    assert np.allclose(bias - bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=1e-3)


def test_lbfgs_ends_at_the_minimum_of_crooked_features():
    """Features are a thousand times as strongly correlated in one direction as in another."""
    train = clouds(600, width=32, spread=3, seed=1)
    x = train.vectors @ (torch.eye(32) + 3 * torch.randn(32, 1) @ torch.randn(1, 32))
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias, extra = _lbfgs(x, train.labels, 4, Lbfgs(c=10.0))
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
    loss = F.cross_entropy(x.double() @ weight.T + bias, train.labels) + weight.square().sum() / (2 * 10 * 600)
    loss.backward()
    largest = max(weight.grad.abs().max(), bias.grad.abs().max())
    assert largest < 1e-4 and extra["largest_gradient"] == pytest.approx(largest.item(), abs=1e-6)
    assert extra["iterations_used"] < 60


def test_lbfgs_takes_dead_features_and_any_scale():
    train, test = clouds(200, spread=2, seed=1), clouds(100, spread=2, seed=2)

    def widened(e):
        vectors = torch.cat([e.vectors * torch.logspace(-3, 3, 8), torch.ones(len(e), 1)], 1)
        return Embeddings(vectors, e.labels, e.identities, e.name, e.feature)

    plain, wide = linear_probe(train, test), linear_probe(widened(train), widened(test))
    assert wide["top1"] == pytest.approx(plain["top1"], abs=0.02)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4])
def test_lbfgs_takes_collapsed_features(noise):
    """All features have one direction, without a penalty that would bound their curvature from below."""
    train, test = clouds(400, spread=2, seed=1), clouds(100, spread=2, seed=2)
    way = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))

    def collapsed(e):
        vectors = e.vectors[:, :1] @ way
        vectors = vectors + noise * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
        return Embeddings(vectors, e.labels, e.identities, e.name, e.feature)

    result = linear_probe(collapsed(train), collapsed(test), Lbfgs(c=1e12))
    assert 0.2 < result["top1"] <= 1 and math.isfinite(result["largest_gradient"])


@pytest.mark.parametrize("name", sorted(set(PROBES) - {"simsiam"}))
def test_every_preset_learns_and_repeats(name):
    train, test = clouds(400, classes=8, spread=0.5, seed=1), clouds(200, classes=8, spread=0.5, seed=2)
    first = linear_probe(train, test, name, seed=3)
    assert first["top1"] > 0.95 and 1 >= first["top5"] >= first["top1"]
    assert linear_probe(train, test, name, seed=3) == first
    json.dumps(first)


def test_sgd_is_the_textbook_loop():
    """Two epochs of momentum, weight decay and a milestone, computed by hand."""
    probe = Sgd(lr=0.5, batch=64, epochs=2, weight_decay=0.01, scaled=True, milestones=(1,))
    train = clouds(128, seed=1)
    weight, _, extra = _sgd(train.vectors, train.labels, 4, probe, seed=5)
    assert extra == {"batch": 64, "lr_used": 0.125}
    draw = torch.Generator().manual_seed(5)
    w, b = 0.01 * torch.randn(4, 8, generator=draw), torch.zeros(4)
    momentum_w, momentum_b = torch.zeros_like(w), torch.zeros_like(b)
    for rate in (0.125, 0.0125):
        for at in torch.randperm(128, generator=draw).split(64):
            error = (train.vectors[at] @ w.T + b).softmax(1) - F.one_hot(train.labels[at], 4)
            momentum_w = 0.9 * momentum_w + error.T @ train.vectors[at] / 64 + 0.01 * w
            momentum_b = 0.9 * momentum_b + error.mean(0) + 0.01 * b
            w, b = w - rate * momentum_w, b - rate * momentum_b
    assert torch.allclose(weight, w, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(PROBES) - {"lbfgs"}))
def test_sgd_is_torchs_and_lars_is_timms(name):
    """Every preset against its optimiser and autograd, with weight decay and a smaller last batch."""
    probe = replace(PROBES[name], epochs=4, batch=48, weight_decay=0.01, milestones=PROBES[name].milestones and (2, 3))
    train = clouds(200, seed=1)
    x, y = train.vectors.double(), train.labels
    draw = torch.Generator().manual_seed(5)
    w = (0.01 * torch.randn(4, 8, generator=draw)).double().requires_grad_()
    b = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    lr = probe.lr * (48 / 256 if probe.scaled else 1)
    common = {"lr": lr, "momentum": probe.momentum, "weight_decay": 0.01, "nesterov": probe.nesterov}
    if probe.lars:
        optimiser = Lars([w, b], **common, trust_coeff=0.001, always_adapt=True)
    else:
        optimiser = torch.optim.SGD([w, b], **common)
    for epoch in range(4):
        optimiser.param_groups[0]["lr"] = lr * probe.rate(epoch)
        for at in torch.randperm(200, generator=draw).split(48):
            optimiser.zero_grad()
            F.cross_entropy(F.linear(x[at], w, b), y[at]).backward()
            optimiser.step()
    weight, bias, _ = _sgd(x, y, 4, probe, seed=5)
    torch.testing.assert_close(weight, w.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(bias, b.detach(), rtol=1e-6, atol=1e-9)


def test_small_steps_leave_the_threads_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        linear_probe(clouds(40), clouds(20), Sgd(lr=0.1, epochs=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_lars_moves_by_a_thousandth_of_the_weights():
    """The first step of SimSiam's preset: lr * 0.001 * |w| / |g| along g; a zero bias uses the plain rate."""
    train = clouds(256, seed=1)
    weight, bias, _ = _sgd(train.vectors, train.labels, 4, replace(PROBES["simsiam"], epochs=1), seed=5)
    w = 0.01 * torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    error = (train.vectors @ w.T).softmax(1) - F.one_hot(train.labels, 4)
    g = error.T @ train.vectors / 256
    assert torch.allclose(weight, w - 0.1 * 0.001 * w.norm() / g.norm() * g, atol=1e-7)
    assert torch.allclose(bias, -0.1 * error.mean(0), atol=1e-7)


def test_rates():
    moco, barlow = PROBES["moco"], PROBES["barlow"]
    assert [round(30 * moco.rate(e), 3) for e in (0, 59, 60, 79, 80, 99)] == [30, 30, 3, 3, 0.3, 0.3]
    assert barlow.rate(0) == 1 and barlow.rate(50) == pytest.approx(0.5) and barlow.rate(99) < 1e-3


def test_unknown_probe():
    with pytest.raises(ConfigError, match="lbfgs, moco"):
        linear_probe(clouds(20), clouds(20), "lgfbs")


# Clusters and collapse


def test_hungarian_accuracy_literally():
    draw = torch.Generator().manual_seed(0)
    for classes, clusters in ((3, 3), (2, 4), (4, 2)):
        labels = torch.randint(classes, (30,), generator=draw)
        assignment = torch.randint(clusters, (30,), generator=draw)
        width = max(classes, clusters)
        best = max(
            sum(p[c] == y for c, y in zip(assignment.tolist(), labels.tolist(), strict=True))
            for p in itertools.permutations(range(width))
        )
        assert hungarian_accuracy(labels, assignment) == pytest.approx(best / 30)


def test_unknown_labels_are_left_out_and_noise_is_wrong():
    """A sample without a label says nothing about clusters; one without a cluster is a miss, as in one big cluster."""
    labels = torch.tensor(5 * [0] + 5 * [1] + 10 * [2])
    noisy = torch.tensor(5 * [0] + 5 * [1] + 4 * [2] + 6 * [-1])
    assert hungarian_accuracy(labels, noisy) == 0.7
    assert hungarian_accuracy(labels, torch.full((20,), -1)) == 0
    assert hungarian_accuracy(1000 * labels, 99 * noisy) == 0.7
    for measure in (nmi, ari):
        assert measure(labels, noisy) == pytest.approx(measure(labels, torch.where(noisy < 0, 9, noisy)))
        assert measure(labels, torch.full((20,), -1)) == pytest.approx(0)
        assert measure(labels, noisy) == measure(labels, torch.where(noisy < 0, -7, noisy)) < 1
    unknown, known = torch.where(torch.arange(20) % 3 == 0, -1, labels), torch.arange(20) % 3 != 0
    for measure in (nmi, ari, hungarian_accuracy):
        for clusters in (noisy, noisy.clamp(min=0)):
            assert measure(unknown, clusters) == measure(labels[known], clusters[known])
        with pytest.raises(DataError, match="none of 20 labels"):
            measure(torch.full((20,), -1), noisy)


def test_clustering_refuses_settings_of_another_type():
    for settings in ({"clusters": "3"}, {"clusters": 2.5}, {"clusters": True}, {"n_init": 0}, {"n_init": 1.5}):
        with pytest.raises(ConfigError, match=r"whole number|at least 1"):
            clustering(clouds(60), **settings)


def test_clusters_that_are_found_are_counted(recwarn):
    """Three different rows cannot form six clusters; the result says so, and no library warns."""
    three = Embeddings(torch.eye(3).repeat(4, 1), torch.arange(12) % 6, tuple(map(str, range(12))), "three", "f")
    result = clustering(three)
    assert (result["clusters"], result["used"]) == (6, 3) and clustering(clouds(60, spread=0.1))["used"] == 4
    k_means(three.vectors, 6, 1, 10, 0)
    clusterings = Clusterings([2, 6], 3, 1, 0.1, 10.0, 1, 10)
    clusterings.allocate(12)
    figures = clusterings.survey(three.vectors, three.labels, 0, lambda task, n: [task(i) for i in range(n)])
    assert figures["used_6"] == 3 and "used_2" not in figures
    with pytest.raises(ConfigError, match=r"0 clusters .* choose 1 to 12"):
        clustering(three, 0)
    assert not recwarn.list


def test_clustering_finds_clouds():
    result = clustering(clouds(120, spread=0.1), seed=1)
    assert result["nmi"] == result["acc"] == result["ari"] == pytest.approx(1)
    assert (result["clusters"], result["images"]) == (4, 120)
    assert clustering(clouds(120, spread=0.1), 8)["acc"] < 1
    with pytest.raises(ConfigError, match="9 clusters"):
        clustering(clouds(8), 9)


def test_clustering_repeats_itself_on_any_number_of_threads():
    from threadpoolctl import threadpool_limits

    hard, results = clouds(1500, classes=12, spread=3), []
    for threads in (1, 4, 4):
        with threadpool_limits(threads):
            results.append(clustering(hard, n_init=4))
    assert results[0] == results[1] == results[2]
    best = KMeans(12, n_init=4, random_state=0).fit(F.normalize(hard.vectors).numpy())
    assert results[0]["nmi"] == pytest.approx(nmi(hard.labels, torch.from_numpy(best.labels_)), abs=0.05)


def test_assigned_clusters_are_the_largest_outputs():
    outputs = Embeddings(torch.eye(5)[[0, 0, 3, 3, 1, 1]], torch.tensor([1, 1, 0, 0, 0, -1]), tuple("abcdef"), "p", "h")
    result = assigned(outputs)
    assignment, labels = torch.tensor([0, 0, 3, 3, 1]), torch.tensor([1, 1, 0, 0, 0])
    assert (result["clusters"], result["used"], result["images"]) == (5, 3, 5)
    assert result["acc"] == hungarian_accuracy(labels, assignment) == 0.8
    assert result["nmi"] == nmi(labels, assignment) < 1 and result["ari"] == ari(labels, assignment) < 1


def test_feature_std_literally():
    rows = torch.randn(50, 6) * torch.arange(1, 7)
    unit = np.array([r / np.linalg.norm(r) for r in rows.double().numpy()])
    expected = np.mean([np.sqrt(np.mean((c - c.mean()) ** 2)) for c in unit.T]) * np.sqrt(6)
    assert feature_std(rows).item() == pytest.approx(expected, rel=1e-5)
    assert feature_std(torch.randn(5000, 64)).item() == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(10, 4) * torch.rand(10, 1)).item() == pytest.approx(0, abs=1e-6)


def test_rankme_literally():
    rows = torch.randn(40, 10) @ torch.randn(10, 12)
    s = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    p = s / s.sum() + 1e-7
    assert rankme(rows).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert rankme(torch.eye(16)).item() == pytest.approx(16, rel=1e-4)
    assert rankme(torch.ones(20, 1) @ torch.randn(1, 8)).item() == pytest.approx(1, rel=1e-3)


# Complete evaluation


def test_evaluate_states_its_protocol():
    train, test = pictures(30), pictures(24)
    net = encoder()
    result = evaluate(net, train, test, k=200)
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(evaluate(net, train, test, k=200)))
    assert result["train"] == {"name": "pictures", "images": 30, "labelled": 30}
    assert result["knn"]["k"] == 30 and result["knn"]["temperature"] == 0.1
    assert result["linear"]["probe"] == "lbfgs" and result["clustering"]["split"] == "test"
    assert result["encoder"]["name"] == "tiny" and result["width"] == 96 and result["protocol_version"] == 3
    features = embed(net, train), embed(net, test)
    precomputed = evaluate(None, *features, protocols=["knn"], k=200)
    assert precomputed["knn"] == result["knn"] and "linear" not in precomputed
    assert result["knn"]["top1"] == knn(*features, k=30)["top1"]


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_written_labels_are_those_of_the_data(tmp_path, ending):
    features = replace(clouds(4), labels=torch.tensor([1, 0, -1, 1]), classes=("7", "181000"), ids=(7, 181_000))
    for one, labels, names in (
        (features, [181_000, 7, -1, 181_000], ["181000", "7", None, "181000"]),
        (replace(features, classes=("cat", "eel"), ids=None), [1, 0, -1, 1], ["eel", "cat", None, "eel"]),
    ):
        write_embeddings(tmp_path / f"f{ending}", [one])
        if ending == ".npz":
            with np.load(tmp_path / f"f{ending}", allow_pickle=False) as file:
                assert file["label"].tolist() == labels and file["class"].tolist() == [name or "" for name in names]
        else:
            table = pq.read_table(tmp_path / f"f{ending}").to_pydict()
            assert table["label"] == labels and table["class"] == names
    with pytest.raises(DataError, match=r"shape \(4, 2\): files of features have one label .* one column"):
        write_embeddings(tmp_path / f"several{ending}", [replace(features, labels=torch.zeros(4, 2).long())])
    assert not (tmp_path / f"several{ending}").exists()


def test_classes_of_two_sources_are_matched_by_name():
    """Numbers depend on the classes that occur in a source; 0 of the one may be 1 of the other."""
    train, test = clouds(60, seed=1), clouds(40, seed=2)
    expected = evaluate(None, train, test, protocols=["knn"], k=5)["knn"]
    names = tuple(str(i) for i in range(int(train.labels.max()) + 1))
    turned = replace(test, labels=len(names) - 1 - test.labels, classes=names[::-1])
    assert evaluate(None, replace(train, classes=names), turned, protocols=["knn"], k=5)["knn"] == expected


def test_evaluate_needs_labels_and_classes_and_numbers():
    train, test, net = pictures(), pictures(), encoder()
    with pytest.raises(ConfigError, match="clusters"):
        evaluate(net, train, test, protocols=["clusters"])
    with pytest.raises(ConfigError, match="no encoder"):
        evaluate(None, train, test)
    with pytest.raises(DataError, match="has no labels"):
        evaluate(net, Pictures(train.images, [-1] * 21, "mine"), test)
    with pytest.raises(DataError, match="one class"):
        evaluate(net, Pictures(train.images, [0] * 21), test)
    net.backbone[0].weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="diverged"):
        evaluate(net, train, test)
