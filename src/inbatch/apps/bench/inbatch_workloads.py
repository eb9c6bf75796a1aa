"""Workloads of inbatch for the benchmark worker, built from the components of a run."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inbatch.api import prepare
from inbatch.batch import Batch
from inbatch.data import decode_all, open_data
from inbatch.evaluation import Embeddings, clustering, knn, linear_probe
from inbatch.losses import nt_xent
from inbatch.runtime.device import device_for
from inbatch.training.build import RunComponents
from inbatch.training.metric_logger import Log

Work = tuple[Callable[[], int], dict[str, Any]]


def built(job: dict[str, Any], data: Any = None, settings: Any = None, **fields: Any) -> RunComponents:
    """Build a run as a user would; settings that the job does not set keep their defaults."""
    overrides = {
        "image_size": job["size"],
        "batch_size": job["batch"],
        "encoder.name": job["encoder"],
        "compile": job["compile"],
    }
    overrides |= job.get("settings", {}) | (settings or {}) | fields
    data = images(job) if data is None else data
    return prepare(data, job["method"], settings=overrides, device=job["device"], workers=job.get("workers"))


def images(job: dict[str, Any]) -> Tensor:
    """Load (N, C, H, W) uint8 images, at least one batch."""
    few = torch.from_numpy(np.load(Path(job["folder"]) / "images.npy")).permute(0, 3, 1, 2)
    return few[torch.arange(max(job["batch"], len(few))) % len(few)].contiguous()


def endless(run: RunComponents) -> Iterator[Batch]:
    """Iterate over the batches of all epochs."""
    for epoch in itertools.count():
        yield from run.loader.epoch(epoch)


def work_of(run: RunComponents, batch: Batch) -> int:
    """Count the operations of the networks for a batch, forward and backward, with torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    drawn = run.views(batch.to(run.loader.device)).images
    online, taught = (list(pick(len(drawn))) for pick in (run.method.online_views, run.method.target_views))
    with FlopCounterMode(display=False) as counter:
        # forward() is called directly, because compiled modules show no operations
        rows = run.network.forward([drawn[v] for v in online], online)
        sum((x.float().square().mean() for x in rows.values()), torch.zeros(())).backward()
        if run.target is not None:
            with torch.no_grad():
                run.target.forward([drawn[v] for v in taught], taught)
    run.network.zero_grad()
    return int(counter.get_total_flops())


def precision(run: RunComponents) -> str:
    """Return the precision of a run's network: "bf16" or "float32"."""
    return "bf16" if run.network.precision == torch.bfloat16 else "float32"


def views(job: dict[str, Any]) -> Work:
    """Draw views of a batch that is decoded on the device."""
    size = job["size"]
    preset = {"views.name": "simclr_cifar" if size <= 64 else "simclr"}
    held = images(job | {"batch": 1})
    run = built(job | {"encoder": "tiny", "method": "simclr"}, held[:2], batch_size=2, preset="none", settings=preset)
    # A run would hold photographs at twice the size of a view; here, views are cut from full-size images.
    held = held.to(run.loader.device)
    where, batches = torch.arange(job["batch"], device=held.device) % len(held), itertools.count()

    def call() -> int:
        drawn = run.views(Batch(where, where, seed=0, epoch=next(batches), images=held, at=where))
        return sum(len(x) for x in drawn.images)

    # Lower bound of memory traffic: each pixel of a view is read as a byte and written as a float.
    return call, {"of": "copy", "needs": 3 * size**2 * (1 + 4)}


def network(job: dict[str, Any]) -> Work:
    """Run forward and backward of the networks alone on views drawn beforehand."""
    run = built(job, cache_on_device=True)
    drawn = run.views(next(run.loader.epoch(0))).images
    online = list(run.method.online_views(len(drawn)))
    operations = work_of(run, next(run.loader.epoch(0)))
    count = sum(len(drawn[v]) for v in online)

    def call() -> int:
        rows = run.network([drawn[v] for v in online], online)
        run.network.zero_grad()
        torch.autograd.backward(list(rows.values()), [torch.ones_like(x) for x in rows.values()])
        if run.target is not None:
            taught = list(run.method.target_views(len(drawn)))
            with torch.no_grad():
                run.target([drawn[v] for v in taught], taught)
        return job["batch"] if job["unit"] == "images" else count

    per_unit = operations / (job["batch"] if job["unit"] == "images" else count)
    return call, {"of": precision(run), "needs": per_unit, "precision": precision(run)}


def step(job: dict[str, Any]) -> Work:
    """Run complete training steps: batch, views, networks, loss, optimiser, log."""
    run = built(job, job.get("data"))
    properties: dict[str, Any] = {"precision": precision(run)}
    if job.get("count", True):  # not needed if only the time to the first step is measured
        properties |= {"of": precision(run), "needs": work_of(run, next(run.loader.epoch(0))) / job["batch"]}
    log, batches, numbers = Log(None, total_steps=run.total, quiet=True), endless(run), itertools.count()

    def call() -> int:
        batch, number = next(batches), next(numbers)
        losses = run.step(batch, number % run.total)
        log.step(number + 1, number // run.loader.steps, losses, job["batch"])
        return job["batch"]

    return call, properties


def loss(job: dict[str, Any]) -> Work:
    """Run forward and backward of NT-Xent."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, job["rows"] // 2, job["dim"], generator=g).to(job["device"]).requires_grad_()

    def call() -> int:
        z.grad = None
        nt_xent(z, 0.1).backward()
        return 1

    return call, {"of": "float32", "needs": 4 * job["rows"] ** 2 * job["dim"]}


def decode(job: dict[str, Any]) -> Work:
    """Decode every image of a source to uint8, one at a time."""
    source = open_data(job["data"])
    numbers = itertools.cycle(range(min(len(source), job["files"])))

    def call() -> int:
        for _ in range(job["per_call"]):
            with source.open(next(numbers)) as picture:
                picture.tensor()
        return int(job["per_call"])

    return call, {}


def resident(job: dict[str, Any]) -> Work:
    """Decode an entire source at once with all threads."""
    source = open_data(job["data"])

    def call() -> int:
        return len(decode_all(source, "cpu", canvas=2 * job["size"], threads=job["threads"]).images)

    return call, {}


def stream(job: dict[str, Any]) -> Work:
    """Load two views of every image of an epoch through worker processes."""
    run = built(job | {"encoder": "tiny"}, job["data"], cache_on_device=False)
    batches = endless(run)

    def call() -> int:
        run.views(next(batches).to(run.loader.device))
        return int(job["batch"])

    return call, {"workers": run.loader.workers}


def embeddings(job: dict[str, Any]) -> tuple[Embeddings, Embeddings]:
    """Load the bank and the queries."""
    rows, labels = (torch.from_numpy(np.load(Path(job["folder"]) / f"{x}.npy")) for x in ("features", "labels"))

    def subset(part: slice) -> Embeddings:
        names = tuple(map(str, range(len(labels[part]))))
        return Embeddings(rows[part], labels[part], names, "synthetic", "features")

    return subset(slice(job["queries"], None)), subset(slice(job["queries"]))


def neighbours(job: dict[str, Any]) -> Work:
    """Run k-NN of the queries in the bank."""
    bank, queries = embeddings(job)
    device, operations = device_for(job["device"]), 2 * len(bank) * len(queries) * bank.vectors.shape[1]
    properties: dict[str, Any] = {"of": "float32", "needs": operations}

    def call() -> int:
        properties["top1"] = knn(bank, queries, k=job["k"], device=device)["top1"]
        return 1

    return call, properties


def probe(job: dict[str, Any]) -> Work:
    """Run the linear probe."""
    bank, queries = embeddings(job)
    device, properties = device_for(job["device"]), {"top1": 0.0}

    def call() -> int:
        properties["top1"] = float(linear_probe(bank, queries, device=device)["top1"])  # type: ignore[arg-type]
        return 1

    return call, properties


def clusters(job: dict[str, Any]) -> Work:
    """Run k-means on the queries."""
    _, queries = embeddings(job)
    properties = {"nmi": 0.0}

    def call() -> int:
        properties["nmi"] = float(clustering(queries, job["classes"])["nmi"])  # type: ignore[arg-type]
        return 1

    return call, properties
