"""File formats by their first bytes, for reports and for errors that state what a file is."""

from functools import cache
from importlib.util import find_spec

from inbatch.data.decoding import jpeg

READ = ("JPEG", "PNG", "WebP", "TIFF", "BMP", "PPM", "AVIF")
"""Formats that are read; HEIF needs pillow-heif."""
HEIF = 'HEIF files need pillow-heif: python -m pip install "inbatch[heif]"'

_STARTS = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF",
    b"II+\0": "TIFF", b"MM\0+": "TIFF", b"RIFF": "WebP", b"P1": "PPM", b"P2": "PPM", b"P3": "PPM", b"P4": "PPM",
    b"P5": "PPM", b"P6": "PPM", b"Pf": "PPM", b"\0\0\0\x0cjP": "JPEG 2000", b"\xffO\xffQ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL": "JPEG XL", b"8BPS": "Photoshop", b"%PDF": "PDF", b"%!PS": "PostScript",
    b"v/1\x01": "OpenEXR", b"SIMPLE  =": "FITS", b"\x93NUMPY": "NumPy", b"\x89HDF": "HDF5", b"PK\x03\x04": "ZIP",
    b"\x1f\x8b": "gzip",
}  # fmt: skip
_POINTER = b"version https://git-lfs"
_INSIDE = ((4, b"ftypavif", "AVIF"), (4, b"ftyphei", "HEIF"), (4, b"ftypmif1", "HEIF"), (128, b"DICM", "DICOM"))


@cache
def reads_heif() -> bool:
    """Return whether HEIF files can be read, which needs pillow-heif."""
    return find_spec("pillow_heif") is not None


def kind(head: bytes) -> str | None:
    """Return the name of the format of a file that starts with `head`; None if it is not known."""
    inside = (name for at, text, name in _INSIDE if head.startswith(text, at))
    return next((name for start, name in _STARTS.items() if head.startswith(start)), next(inside, None))


def unreadable_reason(head: bytes) -> str:
    """Return the reason why a file that starts with `head` is not read, for an error."""
    if not head:
        return "it is empty (0 bytes)"
    if head.startswith(_POINTER):
        return "it is a pointer of Git LFS in place of the file: fetch the files with git lfs pull"
    name = kind(head)
    if name == "JPEG" and (unusual := jpeg.unusual(head)):
        return f"it is {unusual}, which is not supported: save it as an 8-bit JPEG, or as a PNG or TIFF of 16 bits"
    if name == "HEIF" and not reads_heif():
        return HEIF
    if name in (*READ, "HEIF"):
        return f"its {name} header is damaged, or of a kind that is not supported"
    return f"{'' if name is None else f'a {name} file, '}not one of {', '.join(READ)}"
