"""Nearest neighbours: python benchmarks/neighbours.py [--rows N] [--width F] [--features FILE.npy] [--only NAME,...]

Compares exact search, the index of `inbatch.evaluation.neighbour_index` and indexes of faiss, hnswlib and usearch on
one thread: processor seconds to build, peak memory of the process, processor time of a query alone and in a batch of
1,000, and recall@10 of 1,000 rows of the data, themselves left out. --all-pairs also times the neighbours of all rows.
Processor time, unlike wall time, can also be compared while other programs run. The data are a mixture of Gaussians
whose standard deviations decay with the number of the dimension, or an array (N, F) in a .npy file. Each candidate runs
in its own process. Needs: pip install faiss-cpu hnswlib usearch. Writes results/neighbours.json. Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inbatch.apps.console import print_table, say
from inbatch.evaluation.exact_search import search, unit_rows
from inbatch.evaluation.neighbours import NeighbourIndex
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.runtime.memory import peak

OUT = Path(__file__).parents[1] / "results" / "neighbours.json"
K, QUERIES, ALONE = 10, 1000, 50
Search = Callable[[np.ndarray, int], np.ndarray]


def mixture(rows: int, width: int) -> np.ndarray:
    """Return rows of N / 500 clusters; the standard deviation of dimension i is i^(-1/2)."""
    draw = torch.Generator().manual_seed(0)
    clusters, scale = max(10, rows // 500), torch.arange(1, width + 1).float().rsqrt()
    centres = torch.randn(clusters, width, generator=draw) * scale
    spread = 0.4 + 0.6 * torch.rand(clusters, generator=draw)
    chosen = torch.multinomial(torch.rand(clusters, generator=draw).square(), rows, replacement=True, generator=draw)
    parts = []
    for part in chosen.split(1 << 16):
        noise = torch.randn(len(part), width, generator=draw) * scale
        parts.append(centres[part] + noise * spread[part, None])
    return torch.cat(parts).numpy()


def candidates(name: str, rows: torch.Tensor) -> Iterator[tuple[str, Search]]:
    """Build an index; yield it with each setting of the search."""
    count, width = rows.shape
    if name == "exact":
        yield "", lambda query, k: search(torch.from_numpy(query), rows, k)[1].numpy()
    elif name == "inbatch":
        from inbatch.evaluation import neighbour_index

        index = NeighbourIndex.build(rows)
        for probes in (8, 16, 32, 64):
            neighbour_index.PROBES = probes
            yield f"{probes} lists", lambda query, k: index.nearest(torch.from_numpy(query), k)[1].numpy()
    elif name == "hnswlib":
        import hnswlib

        graph = hnswlib.Index("ip", width)
        graph.init_index(count, ef_construction=100, M=16, random_seed=0)
        graph.add_items(unit_rows(rows).numpy(), num_threads=1)
        for ef in (32, 64, 128, 256):
            graph.set_ef(ef)
            yield f"ef {ef}", lambda query, k: graph.knn_query(query, k, num_threads=1)[0].astype(np.int64)
    elif name == "usearch":
        from usearch.index import Index

        graph = Index(ndim=width, metric="ip", dtype="f32", connectivity=16, expansion_add=100)
        graph.add(np.arange(count), unit_rows(rows).numpy(), threads=1)
        for ef in (32, 64, 128, 256):
            graph.expansion_search = ef
            yield f"ef {ef}", lambda query, k: graph.search(query, k, threads=1).keys.reshape(len(query), -1)
    else:
        yield from of_faiss(name, rows)


def of_faiss(name: str, rows: torch.Tensor) -> Iterator[tuple[str, Search]]:
    import faiss

    count, width = rows.shape
    lists = round(2 * count**0.5)
    key = {"faiss-ivf": f"IVF{lists},Flat", "faiss-pq": f"IVF{lists},PQ64", "faiss-hnsw": "HNSW16,Flat"}[name]
    index = faiss.index_factory(width, key, faiss.METRIC_INNER_PRODUCT)
    if name == "faiss-hnsw":
        index.hnsw.efConstruction = 100
    else:
        index.cp.niter, index.cp.max_points_per_centroid = 8, 64
    unit = unit_rows(rows).numpy()
    index.train(unit)
    index.add(unit)
    for effort in (32, 64, 128, 256) if name == "faiss-hnsw" else (8, 16, 32, 64):
        if name == "faiss-hnsw":
            index.hnsw.efSearch = effort
        else:
            index.nprobe = effort
        yield f"{'ef' if name == 'faiss-hnsw' else 'nprobe'} {effort}", lambda query, k: index.search(query, k)[1]


def measure(name: str, file: str, places: np.ndarray, truth: np.ndarray, all_pairs: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = torch.from_numpy(np.load(file, mmap_mode="c"))
    query = unit_rows(rows[places]).numpy()
    before, searches = time.process_time(), []
    for setting, find in candidates(name, rows):
        if not searches:
            result: dict[str, Any] = {"build_seconds": time.process_time() - before}
        began = time.process_time()
        near = find(query, K + 1)
        batch = (time.process_time() - began) / len(query)
        began = time.process_time()
        for one in query[:ALONE]:
            find(one[None], K + 1)
        alone = (time.process_time() - began) / min(ALONE, len(query))
        searches.append({"setting": setting, "recall": recall(near, places, truth), "batch": batch, "alone": alone})
    result |= {"searches": searches, "peak_bytes": peak(torch.device("cpu"))}
    if all_pairs and name == "inbatch":
        from inbatch.evaluation import neighbour_index

        neighbour_index.PROBES = 32
        index, began, wall = NeighbourIndex.build(rows), time.process_time(), time.perf_counter()
        index.nearest_others(K)
        seconds = {"processor": time.process_time() - began, "wall": time.perf_counter() - wall}
        result["all_pairs"] = seconds | {"peak_bytes": peak(torch.device("cpu"))}
    return result


def recall(near: np.ndarray, own: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of the true neighbours that are among the first K without the query itself."""
    kept = ([i for i in row if i != me][:K] for row, me in zip(near.tolist(), own.tolist(), strict=True))
    return sum(len(set(a) & set(b)) for a, b in zip(kept, truth.tolist(), strict=True)) / truth.size


def main() -> None:
    names = ("exact", "inbatch", "faiss-ivf", "faiss-pq", "faiss-hnsw", "hnswlib", "usearch")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--only", default=",".join(names))
    parser.add_argument("--all-pairs", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, file, truth = args.one.split(":")
        known = np.load(truth)
        print(json.dumps(measure(name, file, known["places"], known["truth"], args.all_pairs)))
        return
    told: dict[str, Any] = {"environment": environment(torch.device("cpu")), "load": os.getloadavg(), "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        file, truth = str(args.features or Path(folder) / "rows.npy"), str(Path(folder) / "truth.npz")
        if args.features is None:
            np.save(file, mixture(args.rows, args.width))
        rows = torch.from_numpy(np.load(file, mmap_mode="c"))
        places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))[:QUERIES].sort().values
        np.savez(truth, places=places, truth=search(rows[places], rows, K, own=places)[1])
        told |= {"data": str(args.features or "mixture"), "shape": list(rows.shape)}
        for name in args.only.split(","):
            words = [sys.executable, __file__, "--one", f"{name}:{file}:{truth}"] + ["--all-pairs"] * args.all_pairs
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=env, check=True)
            told["results"][name] = one = json.loads(done.stdout.splitlines()[-1])
            show(name, one)
    write_json(args.out, told)


def show(name: str, one: dict[str, Any]) -> None:
    say(f"{name}: built in {one['build_seconds']:.1f} s, at most {one['peak_bytes'] / 1e9:.2f} GB")
    rows = [
        (s["setting"], f"{s['recall']:.1%}", f"{1e3 * s['alone']:.2f}", f"{1e3 * s['batch']:.3f}")
        for s in one["searches"]
    ]
    print_table(("", "recall@10", "ms alone", "ms in a batch"), rows, numbers=True)
    if pairs := one.get("all_pairs"):
        say(f"all pairs: {pairs['processor']:.1f} s of a processor, {pairs['peak_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
