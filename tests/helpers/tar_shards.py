"""Small tar and Parquet shards of images, of uneven sizes, and the order in which they must be read."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from inbatch.data.streams import StreamPlan

SIZES = (7, 23, 1, 40, 12, 30)
"""Images of the shards: 113 in all."""


def encoded(value: int) -> bytes:
    """Return a PNG of 12x10 pixels that holds a number below 65,536."""
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value // 256, value % 256, 9)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_tar(path: Path, first: int, count: int, damaged: Sequence[int] = ()) -> None:
    """Write a shard of images with the numbers from `first`; `damaged` ones are not images."""
    with tarfile.open(path, "w") as file:
        for number in range(first, first + count):
            data = b"no image" if number in damaged else encoded(number)
            member = tarfile.TarInfo(f"{number:05d}.png")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, sizes: Sequence[int] = SIZES, damaged: Sequence[int] = ()) -> Path:
    """Write tar shards t-000.tar, t-001.tar, ...; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, size in enumerate(sizes):
        write_tar(folder / f"t-{number:03d}.tar", first, size, damaged)
        first += size
    return folder


def literal_batches(plan: StreamPlan, epoch: int) -> np.ndarray:
    """Return the samples of all batches (steps, batch), each stream with a buffer that is filled one by one."""
    batches = np.full((plan.steps, plan.batch), -1)
    for stream in range(plan.streams):
        waiting, order = list(plan.numbers(epoch, stream)), plan.shuffled(epoch, stream)
        numbers, buffer, left = list(waiting), [], []
        for place in order:
            while waiting and len(buffer) < plan.buffer:
                buffer.append(waiting.pop(0))
            buffer.remove(numbers[place])  # ValueError if it is not there
            left.append(numbers[place])
        columns = slice(plan.start(stream), plan.start(stream + 1))
        batches[:, columns] = np.array(left).reshape(plan.steps, -1)
    return batches
