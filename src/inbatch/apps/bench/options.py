"""Options of `inbatch bench` and their defaults."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError
from inbatch.runtime import memory

SECTIONS = {
    "views": "augmentation, a core at a time",
    "network": "encoder and head, forward and backward",
    "step": "whole training steps",
    "loss": "NT-Xent, forward and backward",
    "data": "decoding and loading JPEG files",
    "evaluation": "k-NN, linear probe, k-means",
}
PER_CORE = ("views", "data")
"""Sections measured per core if no number of threads is given."""
PEERS = {"lightly": "lightly", "solo-learn": "solo"}
"""Library -> its package."""


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long.

    Attributes:
        sections: Names from `SECTIONS`, all by default.
        size: Size of the views in pixels; 224 are cut from 500 x 375 pixels.
        batch: Batch size, by default 256 at 32 pixels and 64 at 224.
        encoder: Name of the encoder.
        methods: Methods whose networks and steps are measured.
        threads: Threads of every implementation; by default one for views and decoding, and torch's own choice for the
            rest.
        device: Device to measure on.
        data: Images for steps and decoding instead of synthetic ones.
        peers: True also names libraries that are missing; False runs no other library.
        peers_python: Python interpreter that has the other libraries, by default this one.
        rounds: Rounds per implementation.
        quick: Use small workloads, to check that everything works; the figures are meaningless.
        compile: Also measure compiled networks and steps.
        out: JSON file to write.
    """

    sections: tuple[str, ...] = ()
    size: int = 32
    batch: int | None = None
    encoder: str | None = None
    methods: tuple[str, ...] = ("simclr",)
    threads: int | None = None
    device: str = "auto"
    data: str | None = None
    peers: bool | None = None
    peers_python: str | None = None
    rounds: int | None = None
    quick: bool = False
    compile: bool = False
    out: Path | None = None

    def check(self) -> None:
        """Raise ConfigError if the options are invalid."""
        for name in self.sections:
            if name not in SECTIONS:
                raise ConfigError(f"unknown section {name!r}: choose one of {', '.join(SECTIONS)}")
        if self.size not in (32, 224):
            raise ConfigError(f"--size {self.size} is not supported: choose 32 or 224")
        least = {"batch": 4, "threads": 1, "rounds": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"--{name} must be at least {low}, not {value}")
        if self.peers_python is not None and not _runs(self.peers_python):
            raise ConfigError(
                f"--peers-python {self.peers_python} is not a program: pass the path of a Python interpreter"
            )
        if self.out is not None and self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a folder: pass the name of a file")
        if self.out is not None and not self.out.absolute().parent.is_dir():
            raise ConfigError(f"--out {self.out}: the folder {self.out.parent} does not exist; create it")
        if self.data is not None and not {"step", "data"} & set(self.chosen):
            raise ConfigError("--data is used by the sections step and data only: add one of them, or omit --data")
        if self.data is not None and not Path(self.data).exists():
            raise ConfigError(f"--data {self.data} does not exist: pass a folder of images or a Parquet file")

    @property
    def chosen(self) -> tuple[str, ...]:
        """Return the chosen sections in their order."""
        return tuple(name for name in SECTIONS if not self.sections or name in self.sections)

    def threads_of(self, section: str) -> int:
        """Return the number of threads of a section."""
        return self.threads or (1 if section in PER_CORE else memory.threads())

    def settings(self) -> dict[str, Any]:
        """Return the settings with defaults filled in."""
        small = self.size == 32
        return {
            "size": self.size,
            "batch": self.batch or (16 if self.quick else 256 if small else 64),
            "encoder": self.encoder or ("tiny" if self.quick else "resnet18"),
            "rounds": self.rounds or (2 if self.quick else 7),
            "seconds": 0.02 if self.quick else 1.0,
            "compile": self.compile,
            "quick": self.quick,
        }

    def command(self) -> str:
        """Return the command that repeats the measurement, without the folders of this machine."""
        words = ["inbatch bench", *self.sections, f"--size {self.size}"]
        words += [f"--method {name}" for name in self.methods if self.methods != ("simclr",)]
        for name in ("batch", "encoder", "threads", "rounds"):
            words += [f"--{name} {getattr(self, name)}"] if getattr(self, name) is not None else []
        for name in ("data", "peers_python", "out"):
            value = getattr(self, name)
            words += [f"--{name.replace('_', '-')} {Path(value).name}"] if value is not None else []
        words += [] if self.device == "auto" else [f"--device {self.device}"]
        words += [] if self.peers is None else ["--peers" if self.peers else "--no-peers"]
        return " ".join(words + [f"--{name}" for name in ("compile", "quick") if getattr(self, name)])


def _runs(program: str) -> bool:
    return Path(program).is_file() and os.access(program, os.X_OK)
