"""Arrays in NumPy files: where they are stored, so that rows are read or mapped without the rest of the file."""

import math
import zipfile
from dataclasses import dataclass
from typing import IO, Any

import numpy as np


@dataclass(frozen=True)
class StoredArray:
    """Array in a file, row by row and without compression.

    Attributes:
        file: The file.
        offset: Position of the first number in it, in bytes.
        shape: Shape of the array.
        dtype: Type of its numbers, of any byte order.
    """

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def mapped(self) -> np.ndarray:
        """Return the array as a view of the file; changes are not written."""
        return np.memmap(self.file, self.dtype, "c", self.offset, self.shape)

    def row(self, i: int) -> np.ndarray:
        """Return a copy of row i, in the byte order of this machine; OSError if the file has become shorter.

        Pages of a mapped file would count as memory of the process.
        """
        shape = self.shape[1:]
        count = math.prod(shape)
        values = np.fromfile(self.file, self.dtype, count, offset=self.offset + i * count * self.dtype.itemsize)
        if len(values) < count:
            raise OSError(f"it has become shorter and holds no row {i:,}")
        return values.reshape(shape).astype(self.dtype.newbyteorder("="), copy=False)


def stored_member(file: str, opened: IO[bytes], archive: zipfile.ZipFile, name: str) -> StoredArray | None:
    """Return an array of a .npz file; None if it is compressed, column by column, or not of plain numbers.

    Args:
        file: The file.
        opened: The same, opened.
        archive: The same, as an archive.
        name: Name of the array.

    Raises:
        KeyError: If there is no such array.
        ValueError: If it is not an array.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header: Any = getattr(np.lib.format, f"read_array_header_{version[0]}_0", None)
        if read_header is None:  # version 3: names of fields, not of plain numbers
            return None
        shape, fortran, dtype = read_header(member)
        start = member.tell()
    fits = min(shape, default=0) >= 0 and start + math.prod(shape) * dtype.itemsize == info.file_size
    if fortran or dtype.hasobject or not dtype.itemsize or not fits:
        return None
    return StoredArray(file, _content(opened, info) + start, shape, dtype)


def _content(opened: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return the position of a member's content: its local header has 30 bytes, its name and extra fields."""
    opened.seek(info.header_offset + 26)
    name, extra = (int.from_bytes(opened.read(2), "little") for _ in range(2))
    return info.header_offset + 30 + name + extra
