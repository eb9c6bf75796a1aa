"""Nearest neighbours: python benchmarks/neighbours.py [--rows N] [--width F] [--features FILE.npy] [--only NAME,...]

Compares exact search, the index of `inbatch.evaluation.neighbour_index` and indexes of faiss (IVF with full rows, with
8 bits per number, and with product quantisation; HNSW), hnswlib and usearch: processor seconds to build, peak memory of
the process, processor time of a query alone and in a batch of 1,000, and recall@10 of 1,000 rows of the data,
themselves left out. --all-pairs also times the neighbours of all rows. Processor time, unlike wall time, can also be
compared while other programs run. The data are a mixture of Gaussians whose standard deviations decay with the number
of the dimension, or an array (N, F) in a .npy file. Each candidate runs in its own process, with --threads; one that
takes more than --limit seconds of processor time is stopped, and what it had measured until then is kept. Writes
results/neighbours.json after each. Needs: pip install faiss-cpu hnswlib usearch. Linux.

    python benchmarks/neighbours.py --rows 1000000 --width 512 --limit 1800 --threads 2 --all-pairs
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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
BLOCK, POINTS = 1 << 15, 64  # rows that are added at a time, and rows per list for k-means
EFFORTS = (32, 64, 128, 256)
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


def candidates(name: str, rows: torch.Tensor, threads: int) -> Iterator[tuple[str, Search | None]]:
    """Build an index; yield the progress without a search, then each setting of the search with it."""
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

        graph = hnswlib.Index("ip", rows.shape[1])
        graph.init_index(len(rows), ef_construction=100, M=16, random_seed=0)
        for _, unit in blocks(rows):
            graph.add_items(unit, num_threads=threads)
            yield f"{graph.element_count:,} rows", None
        for ef in EFFORTS:
            graph.set_ef(ef)
            yield f"ef {ef}", lambda query, k: graph.knn_query(query, k, num_threads=threads)[0].astype(np.int64)
    elif name == "usearch":
        from usearch.index import Index

        graph = Index(ndim=rows.shape[1], metric="ip", dtype="f32", connectivity=16, expansion_add=100)
        for start, unit in blocks(rows):
            graph.add(np.arange(start, start + len(unit)), unit, threads=threads)
            yield f"{len(graph):,} rows", None
        for ef in EFFORTS:
            graph.expansion_search = ef
            yield f"ef {ef}", lambda query, k: graph.search(query, k, threads=threads).keys.reshape(len(query), -1)
    else:
        yield from of_faiss(name, rows, threads)


def of_faiss(name: str, rows: torch.Tensor, threads: int) -> Iterator[tuple[str, Search | None]]:
    import faiss

    faiss.omp_set_num_threads(threads)
    lists = round(2 * len(rows) ** 0.5)
    keys = {"ivf": f"IVF{lists},Flat", "sq": f"IVF{lists},SQ8", "pq": f"IVF{lists},PQ64", "hnsw": "HNSW16,Flat"}
    index = faiss.index_factory(rows.shape[1], keys[name.removeprefix("faiss-")], faiss.METRIC_INNER_PRODUCT)
    graph = name == "faiss-hnsw"
    if graph:
        index.hnsw.efConstruction = 100
    else:
        index.cp.niter, index.cp.max_points_per_centroid = 8, POINTS
        sample = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: POINTS * lists]
        index.train(unit_rows(rows[sample.sort().values]).numpy())
    for _, unit in blocks(rows):
        index.add(unit)
        yield f"{index.ntotal:,} rows", None
    for effort in EFFORTS if graph else (8, 16, 32, 64):
        setattr(index.hnsw if graph else index, "efSearch" if graph else "nprobe", effort)
        yield f"{'ef' if graph else 'nprobe'} {effort}", lambda query, k: index.search(query, k)[1]


def blocks(rows: torch.Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first position and the unit rows of each part: no index gets a copy of all rows."""
    for start in range(0, len(rows), BLOCK):
        yield start, unit_rows(rows[start : start + BLOCK]).numpy()


def measure(name: str, file: str, known: Mapping[str, np.ndarray], args: argparse.Namespace) -> None:
    """Print the result as one line of JSON after each step, so that the last line is what a stopped process has."""
    torch.set_num_threads(args.threads)
    if args.limit:
        resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit))
    rows = torch.from_numpy(np.load(file, mmap_mode="c"))
    query = unit_rows(rows[known["places"]]).numpy()
    result: dict[str, Any] = {"searches": []}
    clock = Clock()
    for setting, find in candidates(name, rows, args.threads):
        if not result["searches"]:
            result |= {"built": setting if find is None else "", "build_seconds": clock.processor()}
            result["build_wall"] = clock.wall()
        if find is not None:
            clock = Clock()
            near = find(query, K + 1)
            one = {"setting": setting, "batch": clock.processor() / len(query)}
            one["recall"] = recall(near, known["places"], known["truth"])
            result["searches"].append(one | {"alone": alone(find, query)})
        print(json.dumps(result | {"peak_bytes": peak(torch.device("cpu"))}), flush=True)
    if args.all_pairs and name == "inbatch":
        from inbatch.evaluation import neighbour_index

        neighbour_index.PROBES = 32
        clock = Clock()
        NeighbourIndex.build(rows).nearest_others(K)
        result["all_pairs"] = {"processor": clock.processor(), "wall": clock.wall()}
        print(json.dumps(result | {"peak_bytes": peak(torch.device("cpu"))}))


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._processor, self._wall = time.process_time(), time.perf_counter()

    def processor(self) -> float:
        return time.process_time() - self._processor

    def wall(self) -> float:
        return time.perf_counter() - self._wall


def alone(find: Search, query: np.ndarray) -> float:
    """Return the seconds of one query; at most ALONE queries and about ten seconds."""
    clock, count = Clock(), 0
    while count < min(ALONE, len(query)) and clock.processor() < 10:
        find(query[count : count + 1], K + 1)
        count += 1
    return clock.processor() / count


def recall(near: np.ndarray, own: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of the true neighbours that are among the first K without the query itself."""
    kept = ([i for i in row if i != me][:K] for row, me in zip(near.tolist(), own.tolist(), strict=True))
    return sum(len(set(a) & set(b)) for a, b in zip(kept, truth.tolist(), strict=True)) / truth.size


def main() -> None:
    names = ("exact", "inbatch", "faiss-ivf", "faiss-sq", "faiss-pq", "faiss-hnsw", "hnswlib", "usearch")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--only", default=",".join(names))
    parser.add_argument("--all-pairs", action="store_true")
    parser.add_argument("--limit", type=int, help="seconds of processor time of each candidate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, file, truth = args.one
        measure(name, file, dict(np.load(truth)), args)
        return
    if unknown := set(args.only.split(",")) - set(names):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(names)}")
    result: dict[str, Any] = {"environment": environment(torch.device("cpu")), "load": os.getloadavg(), "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        file, truth = str(args.features or Path(folder) / "rows.npy"), str(Path(folder) / "truth.npz")
        if args.features is None:
            np.save(file, mixture(args.rows, args.width))
        rows = torch.from_numpy(np.load(file, mmap_mode="c"))
        places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))[:QUERIES].sort().values
        np.savez(truth, places=places, truth=search(rows[places], rows, K, own=places)[1])
        result |= {"data": str(args.features or "mixture"), "shape": list(rows.shape), "threads": args.threads}
        result["limit_seconds"] = args.limit
        for name in args.only.split(","):
            result["results"][name] = one = run(name, file, truth, args)
            show(name, one)
            write_json(args.out, result)


def run(name: str, file: str, truth: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one candidate in its own process; `stopped` says why a result is incomplete."""
    words = [sys.executable, __file__, "--threads", str(args.threads), "--one", name, file, truth]
    words += ["--all-pairs"] * args.all_pairs + ["--limit", str(args.limit)] * bool(args.limit)
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=env, check=False)
    lines = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(lines[-1]) if lines else {"searches": []}
    if args.limit and done.returncode in (-signal.SIGKILL, -signal.SIGXCPU):
        result["stopped"] = f"stopped after {args.limit} s of processor time, or for lack of memory"
    elif done.returncode:
        result["stopped"] = f"ended with exit code {done.returncode}"
    return result


def show(name: str, one: dict[str, Any]) -> None:
    if "build_seconds" in one:
        built = f"{name}: {one['built'] or 'built'} in {one['build_seconds']:.1f} s ({one['build_wall']:.1f} s elapsed)"
        say(f"{built}, at most {one['peak_bytes'] / 1e9:.2f} GB")
    rows = [
        (s["setting"], f"{s['recall']:.1%}", f"{1e3 * s['alone']:.2f}", f"{1e3 * s['batch']:.3f}")
        for s in one["searches"]
    ]
    if rows:
        print_table(("", "recall@10", "ms alone", "ms in a batch"), rows, numbers=True)
    if pairs := one.get("all_pairs"):
        say(f"all pairs: {pairs['processor']:.1f} s of a processor, {pairs['wall']:.1f} s elapsed")
    if "stopped" in one:
        say(f"{name}: {one['stopped']}")


if __name__ == "__main__":
    main()
