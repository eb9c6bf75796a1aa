"""Implementations and workloads of each section."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from inbatch.apps.bench import synthetic_data
from inbatch.apps.bench.options import PEERS, Options
from inbatch.apps.bench.runner import BenchmarkRounds, Implementation
from inbatch.runtime import memory
from inbatch.runtime.resources import cores


class Field:
    """Factory of the implementations of a section, with the shared part of their jobs and the folder that they read."""

    def __init__(self, options: Options, section: str, device: str, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.threads = options.threads_of(section)
        self.shared = options.settings() | {"device": device, "threads": self.threads, "folder": str(folder)}

    def ours(self, who: str, make: str, **more: Any) -> Implementation:
        """Return an implementation of a workload in inbatch."""
        return Implementation(
            who, self.shared | {"module": "inbatch.apps.bench.inbatch_workloads", "make": make, "tune": True} | more
        )

    def plain(self, who: str, make: str, *needs: str, **more: Any) -> Implementation:
        """Return an implementation of a reference workload; `needs` names the packages that it requires."""
        job = self.shared | {"module": "reference_workloads", "make": make, "needs": needs} | more
        return Implementation(who, job, peer=bool(needs))

    def peers(self, make: str, *libraries: str, **more: Any) -> list[Implementation]:
        """Return the implementations of a workload in other libraries; none if they are disabled."""
        if self.options.peers is False:
            return []
        job, python = (
            self.shared | {"module": "peer_workloads", "make": make} | more,
            self.options.peers_python or sys.executable,
        )
        return [
            Implementation(who, job | {"library": who, "needs": [PEERS[who]]}, python, peer=True)
            for who in libraries or PEERS
        ]

    def images(self, few: int) -> None:
        """Write `images.npy` with `few` images, or 16 in quick mode."""
        images = synthetic_data.draw_images(16 if self.options.quick else few, self.options.size)
        np.save(self.folder / "images.npy", images)

    def files(self, few: int) -> int:
        """Write JPEG files: `jpegs/` if no data is given, and `files.bin` for libraries that cannot read Parquet."""
        few, size = 32 if self.options.quick else few, self.options.size
        if self.options.data is not None:
            packed = synthetic_data.encoded(self.options.data, few)
        else:
            images = synthetic_data.draw_images(few, size)
            packed = synthetic_data.jpegs(images, size)
            synthetic_data.write_folder(packed, self.folder / "jpegs")
        synthetic_data.pack(packed, self.folder)
        return len(packed)


def views(field: Field) -> list[BenchmarkRounds]:
    """Return the comparison of augmented views of decoded images."""
    small = field.options.size == 32
    field.images(512 if small else 48)
    cpu, per_call = {"device": "cpu"}, 32 if small else 4
    implementations = [
        field.ours("inbatch", "views"),
        field.plain("torchvision v1, Pillow", "views_pil", "torchvision", per_call=per_call, **cpu),
        field.plain("torchvision v2, tensors", "views_tensor", "torchvision", per_call=per_call, **cpu),
        *field.peers("views", per_call=per_call, **cpu),
    ]
    what = "SimCLR's views of 32 x 32 pixels" if small else "SimCLR's views of 224 x 224 pixels out of 500 x 375"
    return [BenchmarkRounds(f"{what}, decoded images", "views/s", implementations)]


def network(field: Field) -> list[BenchmarkRounds]:
    """Return one comparison per method of its networks, forward and backward."""
    field.images(512 if field.options.size == 32 else 48)
    comparisons = []
    for method in field.options.methods:
        eager = {"precision": "float32", "channels_last": False, "compile": False}
        implementations = [
            *compiled(field, "inbatch", "network", method=method, unit="views"),
            field.ours("eager float32", "network", method=method, unit="views", settings=eager, tune=False),
        ]
        comparisons.append(
            BenchmarkRounds(f"network of {method}, {_size(field)}, forward and backward", "views/s", implementations)
        )
    return comparisons


def step(field: Field) -> list[BenchmarkRounds]:
    """Return one comparison per method of complete training steps."""
    small, options = field.options.size == 32, field.options
    field.images(512 if small else 48)
    data = {} if options.data is None else {"data": options.data}
    comparisons = []
    for method in options.methods:
        implementations = compiled(field, "inbatch", "step", method=method, **data)
        implementations += compiled(field, "inbatch, network alone", "network", method=method, unit="images")
        if method == "simclr" and small and field.shared["encoder"] == "resnet18":
            field.files(4096)
            workers = 2 if field.shared["device"] == "cpu" else min(16, cores())
            implementations += field.peers("loop", workers=workers)
        comparisons.append(BenchmarkRounds(f"step of {method}, {_size(field)}", "images/s", implementations))
    return comparisons


def compiled(field: Field, who: str, make: str, **more: Any) -> list[Implementation]:
    """Return an implementation, followed by its compiled version if requested."""
    plain = field.ours(who, make, **(more | {"compile": False}))
    return [plain, field.ours(f"{who}, compiled", make, **more)] if field.options.compile else [plain]


def loss(field: Field) -> list[BenchmarkRounds]:
    """Return the comparison of NT-Xent, forward and backward."""
    size = {"rows": 256 if field.options.quick else 4096, "dim": 128}
    implementations = [
        field.ours("inbatch", "loss", **size),
        field.plain("literal", "loss", **size),
        *field.peers("loss", **size),
    ]
    return [
        BenchmarkRounds(
            f"NT-Xent of {size['rows']:,} rows of {size['dim']}, forward and backward", "ms", implementations
        )
    ]


def data(field: Field) -> list[BenchmarkRounds]:
    """Return the comparisons of JPEG decoding, resident sources and streamed loading."""
    small, options, cpu = field.options.size == 32, field.options, {"device": "cpu"}
    count = field.files(2048 if small else 256)
    read = {"data": options.data or str(field.folder / "jpegs"), "files": count, "method": "simclr"}
    per_call = {"per_call": (64 if small else 8) if not options.quick else 8}
    decoders = [
        field.ours("inbatch", "decode", **read, **per_call, **cpu),
        field.plain("Pillow", "decode_pil", **per_call, **cpu),
        field.plain("torchvision", "decode_torchvision", "torchvision", **per_call, **cpu),
        field.plain("simplejpeg", "decode_simplejpeg", "simplejpeg", **per_call, **cpu),
    ]
    batch = {"batch": min(field.shared["batch"], count), "workers": options.threads or min(16, cores())}
    batch["at_least"] = 4 * batch["workers"]  # batches arrive in groups of this many
    every: dict[str, Any] = {"threads": options.threads or memory.threads()}
    streams = [
        field.ours("inbatch", "stream", **read, **batch, **every),
        *field.peers("stream", **batch, **every),
    ]
    where = Path(options.data).name if options.data else ("32 x 32" if small else "500 x 375")
    return [
        BenchmarkRounds(f"decoding JPEG, {where}", "images/s", decoders),
        BenchmarkRounds("a whole set at once", "images/s", [field.ours("inbatch", "resident", **read, **every | cpu)]),
        BenchmarkRounds(f"loading, two views, {batch['workers']} workers", "images/s", streams),
    ]


def evaluation(field: Field) -> list[BenchmarkRounds]:
    """Return the comparisons of k-NN, linear probe and k-means."""
    quick = field.options.quick
    bank, queries, dim, classes = (400, 100, 16, 4) if quick else (50_000, 10_000, 512, 10)
    for name, array in synthetic_data.features(bank + queries, dim, classes).items():
        np.save(field.folder / f"{name}.npy", array)
    more = {"queries": queries, "classes": classes, "k": 20 if quick else 200}
    size = f"{queries:,} queries, {bank:,} samples of {dim}"
    return [
        BenchmarkRounds(f"k-NN, {size}", "s", [
            field.ours("inbatch", "neighbours", **more), field.plain("torch, product and top-k", "neighbours", **more),
            *field.peers("neighbours", "lightly", **more),
        ]),
        BenchmarkRounds(f"linear probe, {size}", "s", [
            field.ours("inbatch", "probe", **more), field.plain("scikit-learn", "probe", "sklearn", **more),
        ]),
        BenchmarkRounds(f"k-means, {queries:,} samples of {dim}, 10 restarts", "s", [
            field.ours("inbatch", "clusters", **more), field.plain("scikit-learn", "clusters", "sklearn", **more),
        ]),
    ]  # fmt: skip


def _size(field: Field) -> str:
    s = field.shared
    return f"{s['encoder']}, {s['size']} px, batch {s['batch']}"


MAKERS: dict[str, Callable[[Field], list[BenchmarkRounds]]] = {
    "views": views, "network": network, "step": step, "loss": loss, "data": data, "evaluation": evaluation,
}  # fmt: skip
