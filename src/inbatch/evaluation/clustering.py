"""Agreement of clusters and classes: k-means and the three usual measures."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from inbatch.errors import ConfigError, check_whole
from inbatch.evaluation.embeddings import Embeddings
from inbatch.nn.clustering import compared, ignore_missing_clusters, nmi
from inbatch.runtime import shared_work
from inbatch.runtime.isolation import usual_state
from inbatch.runtime.memory import free_bytes
from inbatch.runtime.resources import cores
from inbatch.runtime.thread_map import thread_map


def ari(labels: Int[Tensor, "n"], clusters: Int[Tensor, "n"]) -> float:
    """Return the adjusted Rand index: 0 expected by chance, 1 for equal partitions.

    Samples with a negative (unknown) label are left out; those with a negative cluster (noise) form one cluster.
    """
    from sklearn.metrics import adjusted_rand_score

    labels, clusters = compared(labels, clusters)
    return float(adjusted_rand_score(labels.numpy(), clusters.numpy()))


def hungarian_accuracy(labels: Int[Tensor, "n"], clusters: Int[Tensor, "n"]) -> float:
    """Return the share of samples matched by the best one-to-one map of clusters to classes; counts may differ.

    Samples with a negative (unknown) label are left out; those with a negative cluster (noise) are never matched.
    """
    from scipy.optimize import linear_sum_assignment

    labels, clusters = compared(labels, clusters)
    assigned = clusters >= 0
    rows, columns = (x[assigned].unique(return_inverse=True) for x in (clusters, labels))
    table = np.zeros((len(rows[0]), len(columns[0])), np.int64)
    np.add.at(table, (rows[1].numpy(), columns[1].numpy()), 1)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))


@usual_state()
def clustering(
    embeddings: Embeddings, clusters: int | None = None, *, n_init: int = 10, seed: int = 0
) -> dict[str, object]:
    """Return nmi, acc and ari of k-means (scikit-learn) on L2-normalised features, with the protocol.

    Restarts run in parallel on one thread each: several threads per restart would add their sums in no fixed order.
    Images without a label are left out. Inside `shared_work.sharing`, each rank does a part of the restarts.

    Args:
        embeddings: embeddings to cluster.
        clusters: number of clusters; by default the number of classes. "used" is the number with an image: it is
            smaller if the features have fewer different rows.
        n_init: number of restarts.
        seed: seed of the restarts.

    Raises:
        ConfigError: if there are more clusters than images, or fewer than 1, or no restart.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    known = embeddings.labelled()
    clusters = len(known.labels.unique()) if clusters is None else clusters
    check_whole("clusters", clusters)
    check_whole("n_init", n_init, least=1)
    if not 1 <= clusters <= len(known):
        raise ConfigError(
            f"{clusters} clusters cannot be made of {len(known)} images of {known.name}: choose 1 to {len(known)}."
        )
    rows = F.normalize(known.vectors).numpy()

    def fit(state: int) -> Any:
        with threadpool_limits(1, "openmp"):  # the limit is per thread
            return KMeans(clusters, n_init=1, random_state=state).fit(rows)

    states = np.random.RandomState(seed).randint(2**31 - 1, size=n_init).tolist()
    states = [states[i] for i in shared_work.span(n_init, 1)]
    fit_at_once = free_bytes(torch.device("cpu")) // (2 * rows.nbytes)  # each copies the rows
    with threadpool_limits(1), ignore_missing_clusters():
        fits = thread_map(fit, states, max(1, min(len(states), cores(), fit_at_once)))
        best = min(((means.inertia_, means.labels_) for means in fits), key=_first, default=(np.inf, rows[:0, 0]))
    assignment = torch.from_numpy(min(shared_work.gathered(best), key=_first)[1]).long()
    used = len(assignment.unique())
    protocol = {"clusters": clusters, "used": used, "n_init": n_init, "seed": seed, "normalisation": "l2"}
    return {**_scores(known.labels, assignment), **protocol, "images": len(known)}


def _first(pair: tuple[float, Any]) -> float:
    return pair[0]


def assigned(outputs: Embeddings) -> dict[str, object]:
    """Return nmi, acc and ari with the largest output of an image as its cluster; nothing is fitted.

    used: how many of the `clusters` have an image. Images without a label are left out.
    """
    known = outputs.labelled()
    assignment = known.vectors.argmax(1)
    protocol = {"clusters": known.vectors.shape[1], "used": len(assignment.unique()), "assignment": "largest output"}
    return {**_scores(known.labels, assignment), **protocol, "images": len(known)}


def _scores(labels: Int[Tensor, "n"], clusters: Int[Tensor, "n"]) -> dict[str, float]:
    return {"nmi": nmi(labels, clusters), "acc": hungarian_accuracy(labels, clusters), "ari": ari(labels, clusters)}
