"""k-NN and clustering measures against vectors computed by the reference implementations."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from inbatch.evaluate import Embeddings, ari, hungarian_accuracy, knn, knn_scores, nmi

GOLDEN = Path(os.environ.get("INBATCH_GOLDEN", Path(__file__).parent / "golden"))
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def case(name):
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    entry = next(c for c in manifest["cases"] if c["id"] == name)
    with np.load(GOLDEN / entry["file"], allow_pickle=False) as file:
        return {k: torch.from_numpy(np.asarray(file[k])) for k in file.files}, entry


def embeddings(vectors, labels):
    return Embeddings(vectors.float(), labels, tuple(map(str, range(len(labels)))), "golden", "vectors")


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["knn__1", "knn__2", "knn__3"])
def test_knn(name, dtype, chunk):
    x, entry = case(name)
    h = entry["hyperparameters"]
    scores = knn_scores(
        x["query_raw"].to(DTYPES[dtype]),
        x["bank_raw"].to(DTYPES[dtype]),
        x["bank_labels"],
        h["classes"],
        k=h["k"],
        temperature=h["temperature"],
        chunk=chunk,
    )
    torch.testing.assert_close(scores, x["class_scores"], **entry["suggested_tolerance"][dtype])
    assert torch.equal(scores.argmax(1), x["pred"])


@pytest.mark.parametrize("name", ["knn__1", "knn__2", "knn__3"])
def test_knn_accuracy(name):
    x, entry = case(name)
    h = entry["hyperparameters"]
    bank, query = embeddings(x["bank_raw"], x["bank_labels"]), embeddings(x["query_raw"], x["query_labels"])
    result = knn(bank, query, k=h["k"], temperature=h["temperature"])
    assert result["top1"] == pytest.approx(x["top1"].item(), abs=1e-12)
    five = (x["ranking"][:, :5] == x["query_labels"][:, None]) & (x["class_scores"].gather(1, x["ranking"][:, :5]) > 0)
    assert result["top5"] >= five.any(1).double().mean().item()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_knn_euclid(dtype):
    x, entry = case("knn_euclid__1")
    h = entry["hyperparameters"]
    scores = knn_scores(
        x["query"].to(DTYPES[dtype]),
        x["bank"].to(DTYPES[dtype]),
        x["bank_labels"],
        h["classes"],
        k=h["k"],
        distance="euclidean",
    )
    assert torch.equal(scores.argmax(1), x["pred"])
    assert (scores.sum(1) == h["k"]).all()
    result = knn(
        embeddings(x["bank"], x["bank_labels"]),
        embeddings(x["query"], x["query_labels"]),
        k=h["k"],
        distance="euclidean",
    )
    assert result["top1"] == pytest.approx(x["accuracy"].item(), abs=1e-6)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_cluster_metrics(number):
    x, entry = case(f"cluster_metrics__{number}")
    tolerance = entry["suggested_tolerance"]["float64"]
    for name, measure in (("nmi", nmi), ("acc", hungarian_accuracy), ("ari", ari)):
        assert measure(x["labels"], x["pred"]) == pytest.approx(
            x[name].item(), rel=tolerance["rtol"], abs=tolerance["atol"]
        )
