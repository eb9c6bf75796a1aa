"""One of each unusual file that a folder of images may contain, and the expected result of reading it."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

SIDE = (20, 30)  # height and width of every readable image, unless stated
RAMP = np.indices(SIDE).sum(0).astype(np.uint8) * 5  # each orientation gives different pixels
COLOUR = np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1]])


class Animal(NamedTuple):
    """One unusual file and the expected result of reading it.

    file: its contents. pixels: expected (h, w, 3); None if it must be refused. near: largest allowed pixel difference.
    why: part of the error message.
    """

    name: str
    file: bytes
    pixels: np.ndarray | None
    near: int = 0
    why: str = ""


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, 2)


def raw_png(
    bits: int, colour: int, lines: list[bytes], size: tuple[int, int] = SIDE, *chunks: tuple[bytes, bytes]
) -> bytes:
    """Encode a PNG of unfiltered lines, of kinds that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", size[1], size[0], bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line for line in lines), 1)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def interlaced() -> bytes:
    """Encode an Adam7 interlaced PNG: seven smaller images."""
    lines = []
    passes = "0088 0488 4084 0244 2042 0122 1021"  # of each pass: first row and column, row and column step
    for top, left, down, right in (map(int, one) for one in passes.split()):
        lines += [row.tobytes() for row in COLOUR[top::down, left::right]]
    data = bytearray(raw_png(8, 2, lines))
    data[28] = 1  # last byte of the header, and its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def bomb(side: int = 30_000) -> bytes:
    """Encode an image of 900 million pixels in 490 kB."""
    return raw_png(1, 0, [bytes(side // 8)] * side, (side, side))


def turned(kind: str, orientation: int, **options) -> bytes:
    """Store the ramp as a camera held in that orientation does."""
    ways = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    upright = Image.fromarray(grey(RAMP))
    stored = upright.transpose(Image.Transpose[ways[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(stored, "PNG", exif=exif)))).size == SIDE[::-1]
    return encoded(stored, kind, exif=exif, **options)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'


def turned_by_xmp(kind: str) -> bytes:
    """Store the ramp turned, with the orientation in XMP only."""
    stored, options = Image.fromarray(grey(RAMP)).transpose(Image.Transpose.ROTATE_90), {}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    elif kind == "TIFF":
        options["tiffinfo"] = TiffImagePlugin.ImageFileDirectory_v2()
        options["tiffinfo"][700] = XMP
    else:
        options |= {"xmp": XMP, "lossless": True}
    return encoded(stored, kind, **options)


def exif_behind_pixels() -> bytes:
    """Encode a PNG whose orientation follows its pixels, so that it is not known when the file is opened."""
    exif, plain = Image.Exif(), encoded(COLOUR, "PNG")
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return plain[:-12] + chunk + plain[-12:]  # the last 12 bytes are IEND


def transparent_colours() -> list[Animal]:
    """Yield PNG files with a transparent colour, of each depth, grey and RGB."""
    files = []
    for bits in (1, 2, 4, 8, 16):
        values = np.resize(np.arange(2 ** min(bits, 8)), SIDE).astype(np.uint16) * (1 if bits < 16 else 251)
        clear = int(values[0, 1])
        lines = [pack(row, bits) for row in values]
        eight = (values >> 8 if bits == 16 else values * (255 // (2**bits - 1))).astype(np.uint8)
        expected = np.where(values == clear, np.uint8(255), eight)
        trns = b"tRNS", struct.pack(">H", clear)
        files.append(Animal(f"{bits} bits, one transparent.png", raw_png(bits, 0, lines, SIDE, trns), grey(expected)))
    colours = np.dstack([values, values[::-1], values[:, ::-1]])
    trns = b"tRNS", struct.pack(">HHH", *colours[0, 1].tolist())
    expected = np.where((colours == colours[0, 1]).all(2, keepdims=True), 255, colours >> 8).astype(np.uint8)
    lines = [row.astype(">u2").tobytes() for row in colours]
    files.append(Animal("16 bits, one colour transparent.png", raw_png(16, 2, lines, SIDE, trns), expected))
    return files


def pack(row: np.ndarray, bits: int) -> bytes:
    """Return the bytes of a line of a PNG."""
    if bits >= 8:
        return row.astype(f">u{bits // 8}").tobytes()
    ones = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, -bits:]
    return np.packbits(ones.reshape(-1)).tobytes()


def animals() -> list[Animal]:
    """Yield the files that can be written on every system."""
    rgb, other = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    alpha = np.tile(np.linspace(0, 255, SIDE[1]).astype(np.uint8), (SIDE[0], 1))
    veiled, tall = np.dstack([COLOUR, alpha]), np.full((5000, 1, 3), 90, np.uint8)
    both = [np.array([[0, 40_000, 65_535]] * 2, np.uint16), np.array([[[0, 40_000, 65_535]] * 4] * 3, np.uint16)]
    jpeg = encoded(rgb, "JPEG", quality=95)
    palette = rgb.quantize(16)
    see_through = bytes([0, 128, *[255] * 14])
    entries = np.array(palette.getpalette()[: 3 * 16]).reshape(16, 3)
    index = np.asarray(palette)
    frames = {"save_all": True, "append_images": [other, other]}
    cmyk = rgb.convert("CMYK")
    photo = Image.fromarray(grey(RAMP))
    files = [
        Animal("truncated.jpg", jpeg[: len(jpeg) // 2], None, why="truncated"),
        Animal("truncated.png", encoded(rgb, "PNG")[:-80], None, why="truncated"),
        Animal("truncated.webp", encoded(rgb, "WEBP", lossless=True)[:-9], None, why="cannot be read"),
        Animal("truncated.tif", encoded(rgb, "TIFF")[:900], None, why="cannot be read"),
        Animal("truncated.bmp", encoded(rgb, "BMP")[:900], None, why="truncated"),
        Animal("empty.jpg", b"", None, why="it is empty"),
        Animal("text.jpg", b"this is not an image at all\n" * 9, None, why="not one of"),
        Animal("page.png", b"<html><script>alert(1)</script></html>", None, why="not one of"),
        Animal("script.bmp", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None, why="not one of"),
        Animal("bomb.png", bomb(), None, why="cannot be read"),
        Animal("no size.png", raw_png(8, 2, [], (0, 0)), None, why="cannot be read"),
        Animal("a gif in disguise.png", encoded(rgb, "GIF"), None, why="not one of"),
        Animal("a png in disguise.jpg", encoded(rgb, "PNG"), COLOUR),
        Animal("1x1.png", encoded(COLOUR[:1, :1], "PNG"), COLOUR[:1, :1]),
        Animal("1x1.jpg", encoded(COLOUR[:1, :1], "JPEG", quality=95), COLOUR[:1, :1], 4),
        Animal("wide.png", encoded(np.resize(COLOUR, (1, 5000, 3)), "PNG"), np.resize(COLOUR, (1, 5000, 3))),
        Animal("tall.jpg", encoded(tall, "JPEG"), tall, 2),
        Animal("animated.webp", encoded(rgb, "WEBP", lossless=True, **frames), COLOUR),
        Animal("animated.png", encoded(rgb, "PNG", **frames), COLOUR),
        Animal("pages.tiff", encoded(rgb, "TIFF", **frames), COLOUR),
        Animal("cmyk.jpg", encoded(cmyk, "JPEG", quality=98), np.asarray(cmyk.convert("RGB")), 9),
        Animal("cmyk.tif", encoded(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
        Animal("ycck.jpg", ycck(cmyk), np.asarray(cmyk.convert("RGB")), 9),
        Animal("palette.png", encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        Animal("palette and transparent.png", encoded(palette, "PNG", transparency=see_through),
               on_white(entries[index], np.frombuffer(see_through, np.uint8)[index]), 1),
        Animal("transparent.png", encoded(veiled, "PNG"), on_white(COLOUR, alpha), 1),
        Animal("transparent.webp", encoded(veiled, "WEBP", lossless=True, exact=True),
               on_white(COLOUR, alpha), 1),
        Animal("transparent.tif", encoded(veiled, "TIFF"), on_white(COLOUR, alpha), 1),
        Animal("opaque.png", encoded(np.dstack([COLOUR, np.full_like(alpha, 255)]), "PNG"), COLOUR),
        Animal("grey and transparent.png", encoded(Image.merge("LA", list(map(Image.fromarray, (RAMP, alpha)))), "PNG"),
               on_white(grey(RAMP), alpha), 1),
        Animal("one colour is transparent.png", encoded(photo, "PNG", transparency=(5, 5, 5)),
               np.where(grey(RAMP) == 5, np.uint8(255), grey(RAMP))),
        Animal("two levels.png", encoded(Image.fromarray(RAMP > 99), "PNG"), grey(255 * (RAMP > 99).astype(np.uint8))),
        Animal("two levels.tif", encoded(Image.fromarray(RAMP > 99), "TIFF"), grey(255 * (RAMP > 99).astype(np.uint8))),
        Animal("grey.jpg", encoded(RAMP, "JPEG", quality=98), grey(RAMP), 3),
        Animal("sixteen.png", encoded(both[0], "PNG"), grey((both[0] >> 8).astype(np.uint8))),
        Animal("sixteen.tif", encoded(both[0], "TIFF"), grey((both[0] >> 8).astype(np.uint8))),
        Animal("sixteen colours.png", raw_png(16, 2, [row.astype(">u2").tobytes() for row in both[1]], (3, 4)),
               (both[1] >> 8).astype(np.uint8)),
        Animal("float.tif", encoded(RAMP.astype(np.float32), "TIFF"), None, why="float32 values have no known range"),
        Animal("progressive.jpg", encoded(rgb, "JPEG", quality=98, progressive=True, subsampling=0), COLOUR, 12),
        Animal("interlaced.png", interlaced(), COLOUR),
        Animal("lower.TIFF", encoded(rgb, "TIFF"), COLOUR),
        Animal("bit map.bmp", encoded(rgb, "BMP"), COLOUR),
    ]  # fmt: skip
    files += transparent_colours()
    files.append(Animal("exif behind the pixels.png", exif_behind_pixels(), COLOUR))
    for kind in ("PNG", "WEBP", "TIFF"):
        files.append(Animal(f"turned by xmp.{kind.lower()}", turned_by_xmp(kind), grey(RAMP)))
    for orientation in range(1, 9):
        for kind, near in (("JPEG", 12), ("PNG", 0), ("WEBP", 0), ("TIFF", 0)):
            options = {"quality": 98} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
            files.append(
                Animal(f"turned {orientation}.{kind.lower()}", turned(kind, orientation, **options), grey(RAMP), near)
            )
    return files


def ycck(image: Image.Image) -> bytes:
    """Encode a JPEG of four channels, the first three marked as YCbCr, as Adobe's programs write it."""
    ink = np.asarray(image).astype(np.uint8)
    ycc = np.asarray(Image.fromarray(ink[..., :3]).convert("YCbCr"))
    # Pillow stores four channels inverted (255 - value).
    data = encoded(Image.fromarray(np.dstack([255 - ycc, ink[..., 3]]), "CMYK"), "JPEG", quality=98)
    place = data.index(b"Adobe")
    return data[: place + 11] + b"\x02" + data[place + 12 :]  # last byte of the segment: 2 is YCCK


STRANGE = [b"with space.png", b"new\nline.png", b"quote'\".png", "emoji \U0001f600.png".encode(),
           b"not utf-8 \xff\xfe.png", b"<script>alert(1)<&.png", b"-rf.png", b"%s {0} $HOME.png",
           ("x" * 240 + ".png").encode()]  # fmt: skip
"""Names that a file system accepts and a user may not expect."""


def fill(root: Path, files: list[Animal]) -> list[Animal]:
    for animal in files:
        (root / animal.name).write_bytes(animal.file)
    return files


def name_strangely(root: Path) -> list[bytes]:
    """Write a file of each unusual name that this file system accepts; red of its first pixel is its number."""
    names = []
    for number, name in enumerate(STRANGE):
        try:
            with open(os.path.join(os.fsencode(root), name), "wb") as file:
                file.write(encoded(np.full((8, 8, 3), number, np.uint8), "PNG"))
        except OSError:
            continue
        names.append(name)
    return names


def no_files(root: Path) -> dict[str, Callable[[], None]]:
    """Return the names of images that are not regular files, each with the function that makes it."""

    def listen() -> None:
        before = os.getcwd()
        os.chdir(root)  # a socket's path must be short
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind("socket.png")
        finally:
            os.chdir(before)

    return {
        "folder.jpg": lambda: (root / "folder.jpg").mkdir(),
        "pipe.jpg": lambda: os.mkfifo(root / "pipe.jpg"),
        "socket.png": listen,
        "dangling.png": lambda: (root / "dangling.png").symlink_to("nothing"),
        "loop.png": lambda: (root / "loop.png").symlink_to("loop.png"),
        "first.png": lambda: (root / "first.png").symlink_to("second.png"),
        "second.png": lambda: (root / "second.png").symlink_to("first.png"),
        "device.png": lambda: (root / "device.png").symlink_to("/dev/zero"),
    }
