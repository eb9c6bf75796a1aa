"""Synthetic benchmark data: images with structure and noise, whose JPEG files are as large as those of photographs."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inbatch.errors import ConfigError, DataError

LAYERS = ((1 / 40, 50.0), (1 / 10, 25.0), (1 / 3, 10.0), (1.0, 8.0))
"""Fraction of the resolution at which noise is drawn, and its standard deviation."""
QUALITY = {32: 75, 224: 90}
"""JPEG quality by view size, as in CIFAR-10's JPEG copy and ImageNet: about 1 kB and 100 kB per file."""
SIDES = {32: (32, 32), 224: (375, 500)}
"""Size of the views -> height and width of the images that they are cut from."""


def draw_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Draw images (N, H, W, 3) uint8 for views of this size."""
    height, width = SIDES[size]
    rng, out = np.random.default_rng(seed), np.empty((count, height, width, 3), np.uint8)
    for image in out:
        x = np.full((height, width, 3), 120.0, np.float32)
        for share, deviation in LAYERS:
            small = (max(2, round(height * share)), max(2, round(width * share)))
            # Channels are correlated, as in photographs.
            noise = rng.normal(0, deviation, (*small, 1)) + rng.normal(0, deviation / 3, (*small, 3))
            for c in range(3):
                layer = Image.fromarray(noise[..., c].astype(np.float32))
                x[..., c] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
        image[:] = x.clip(0, 255).astype(np.uint8)
    return out


def write_folder(files: Sequence[bytes], folder: Path, classes: int = 2) -> Path:
    """Write JPEG files in one sub-folder per class."""
    for i, file in enumerate(files):
        place = folder / f"class{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:05d}.jpg").write_bytes(file)
    return folder


def encoded(data: str, count: int) -> list[bytes]:
    """Read up to `count` encoded images of a folder or a Parquet file; raise DataError if there are none."""
    path = Path(data)
    if path.is_dir() and not (inside := sorted(path.glob("train*.parquet"))):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
        images = [file.read_bytes() for file in files[:count]]
    elif path.exists():
        images = parquet(inside[0] if path.is_dir() else path, count)
    else:
        raise DataError(f"{data} does not exist: give --data a folder of JPEG files or a Parquet file")
    images = [file for file in images if file.startswith(b"\xff\xd8")]
    if not images:
        raise DataError(f"{data} holds no JPEG file: decoding is measured on a folder of them or a Parquet file")
    return images


def parquet(file: Path, count: int) -> list[bytes]:
    """Read up to `count` encoded images of a Parquet file; raise DataError if it cannot be read."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError('Parquet files need pyarrow: python -m pip install "inbatch[parquet]"') from error
    out: list[bytes] = []
    try:
        for batch in ParquetFile(file).iter_batches(columns=["image"]):
            out += (row["bytes"] for row in batch["image"].to_pylist() if row and row["bytes"])
            if len(out) >= count:
                break
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} cannot be read as a Parquet file of images: {error}; pass another") from error
    return out[:count]


def labelled(file: Path) -> tuple[list[bytes], torch.Tensor]:
    """Read the encoded images of a Parquet file and their labels (N,); raise DataError unless every image has one."""
    files = parquet(file, sys.maxsize)
    from pyarrow.parquet import read_schema, read_table

    labels = read_table(file, columns=["label"])["label"].to_pylist() if "label" in read_schema(file).names else []
    if len(labels) != len(files) or None in labels or not files:
        raise DataError(f"{file} holds {len(files):,} images and {len(labels):,} labels: give a file with one for each")
    return files, torch.tensor(labels)


def pack(files: Sequence[bytes], folder: Path) -> None:
    """Write encoded images to one file, `files.bin`, with their end positions, for libraries without Parquet."""
    (folder / "files.bin").write_bytes(b"".join(files))
    (folder / "files.json").write_text(json.dumps(np.cumsum([len(file) for file in files]).tolist()))


def jpegs(images: np.ndarray, size: int) -> list[bytes]:
    """Encode images as JPEG."""
    out = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY[size])
        out.append(buffer.getvalue())
    return out


def features(samples: int, dim: int, classes: int, seed: int = 0) -> dict[str, Any]:
    """Draw rows around the centres of their classes, similar to embeddings: (N, D) float32 and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    rows = rng.normal(0, 0.3, (classes, dim))[labels] + rng.normal(0, 1, (samples, dim))
    return {"features": rows.astype(np.float32), "labels": labels}
