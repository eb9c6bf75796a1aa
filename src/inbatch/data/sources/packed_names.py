"""Compact storage of many names."""

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice


class Names:
    """Byte strings of any lengths in one block of memory: 8 bytes per name plus its own.

    A list takes 40 bytes more per name, and is copied into every data worker as references are counted (pytorch#13246).
    A NumPy array of bytes takes the size of the longest name for each.
    """

    def __init__(self, names: Iterable[bytes] = ()):
        self._text, self._ends = bytearray(), array("q", [0])
        for name in names:
            self.append(name)

    def append(self, name: bytes) -> None:
        """Append a name."""
        self._text += name
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:
        i = range(len(self))[i]
        return bytes(self._text[self._ends[i] : self._ends[i + 1]])

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in islice(self._ends, 1, None):
            yield bytes(self._text[start:end])
            start = end

    def tolist(self) -> list[bytes]:
        """Return all names as a Python list; only suitable for few names."""
        return list(self)
