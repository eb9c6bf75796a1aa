#!/usr/bin/env bash
# Pillow compares the transparent colour of a PNG (tRNS) with pixels of 8 bits, whatever the depth of the file.
#
# Expected: the chunk holds one colour in the depth of the file, so exactly the pixels of that stored colour become
# transparent when an image is converted to RGBA. For 1 and 8 bits they do.
# Seen (Pillow 13.0.0): in grey images of 2 and 4 bits the pixels are scaled to 0 to 255 and the transparent value is not,
# so that no pixel is transparent unless the value is 0. In RGB images of 16 bits the upper bytes of the pixels are
# compared with the 16-bit value: a transparent black also removes every colour darker than 256 of 65,535, and any other
# colour with small values removes nothing. Grey images of 16 bits have the right alpha, but their values are clipped at
# 255 by the same conversion, so that nearly all pixels become white.
#
# Exits with 0 if the behaviour is as described, with 1 if it has changed. Installs about 20 MB in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import sys
import zlib

import PIL
from PIL import Image


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth, colour, samples, clear):
    """One line of pixels: `samples` are its values one after the other, `clear` those of the transparent colour."""
    bits = "".join(format(value, f"0{depth}b") for value in samples)
    bits += "0" * (-len(bits) % 8)
    line = b"\0" + bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    width = len(samples) // (3 if colour == 2 else 1)
    head = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))]
    parts += [chunk(b"IDAT", zlib.compress(line)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def converted(*args):
    return list(Image.open(io.BytesIO(png(*args))).convert("RGBA").get_flattened_data())


print("Pillow", PIL.__version__)
expected = True
for depth in (1, 2, 4, 8):
    samples = [0, 1, 2**depth - 1]
    alpha = [pixel[3] for pixel in converted(depth, 0, samples, [1])]
    right = [0 if value == 1 else 255 for value in samples]
    print(f"grey, {depth} bits: values {samples}, 1 is transparent: alpha {alpha}, right is {right}")
    expected &= (alpha == right) == (depth in (1, 8))
colours = [0, 0, 0, 200, 3, 7, 300, 300, 300]
for clear in ([0, 0, 0], [200, 3, 7]):
    alpha = [pixel[3] for pixel in converted(16, 2, colours, clear)]
    right = [0 if colours[at : at + 3] == clear else 255 for at in (0, 3, 6)]
    print(f"RGB, 16 bits: {clear} is transparent: alpha {alpha}, right is {right}")
    expected &= alpha != right
values = [pixel[0] for pixel in converted(16, 0, [0, 1000, 32000, 65535], [0])]
print(f"grey, 16 bits: values 0, 1000, 32000 and 65535 become {values}")
expected &= values == [0, 255, 255, 255]
print("as described" if expected else "CHANGED")
sys.exit(0 if expected else 1)
PYTHON
