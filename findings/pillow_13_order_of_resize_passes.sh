#!/usr/bin/env bash
# Pillow 13 resizes some images vertically first, which changes bicubic pixels by up to a twelfth of the range.
#
# Expected: Image.resize of one image to one size gives the same pixels in Pillow 12.3 and 13.0, or differs by rounding.
# Libraries rely on it: torch documents that its antialiased interpolate matches Pillow when it reduces images.
# Seen: a resize is two passes, one along the rows and one along the columns, and 8-bit values are limited to 0 to 255
# between them, where bicubic weights overshoot. Pillow 11.3 to 12.3 begin with the rows for every size. Pillow 13.0
# begins with the columns if that is less work, so a quarter of random reductions of 64x64 noise give other pixels than
# before, by up to 20 of 255. Bilinear results differ by at most 1. Whoever needs the earlier pixels calls resize twice,
# first for the width, then for the height, which gives them in both versions to the last bit.
#
# Exits with 0 if the behaviour is as described, with 1 if it has changed. Installs about 60 MB in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/resize.py" <<'PYTHON'
import sys

import numpy as np
import PIL
from PIL import Image

random = np.random.default_rng(0)
orders, largest = {"rows first": 0, "columns first": 0, "neither": 0}, {}
for _ in range(300):
    image = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    height, width = (int(n) for n in random.integers(8, 64, 2))
    for name in ("BICUBIC", "BILINEAR"):
        how = Image.Resampling[name]
        pixels = np.asarray(image.resize((width, height), how)).astype(int)
        rows = np.asarray(image.resize((width, 64), how).resize((width, height), how)).astype(int)
        columns = np.asarray(image.resize((64, height), how).resize((width, height), how)).astype(int)
        largest[name] = max(largest.get(name, 0), int(np.abs(pixels - rows).max()))
        if name == "BICUBIC":
            first = (pixels == rows).all(), (pixels == columns).all()
            orders["rows first" if first[0] else "columns first" if first[1] else "neither"] += 1
print("Pillow", PIL.__version__, orders, "largest difference from rows first:", largest)
earlier = orders["rows first"] == 300 and largest == {"BICUBIC": 0, "BILINEAR": 0}
later = orders["columns first"] > 30 and not orders["neither"] and largest["BICUBIC"] > 8 and largest["BILINEAR"] <= 1
sys.exit(not {"12": earlier, "13": later}[PIL.__version__.split(".")[0]])
PYTHON
for version in 12.3.0 13.0.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check "pillow==$version" numpy==2.4.6
    "$folder/$version/bin/python" "$folder/resize.py"
done
echo "As described."
