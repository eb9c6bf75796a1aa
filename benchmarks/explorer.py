"""Measure the page of `inbatch explore` in Chromium without a GPU: time to open it, and frames per second.

    python benchmarks/explorer.py --images photos --count 10000 100000
    python benchmarks/explorer.py --images photos --count 10000 --renderer webgl    # also without a GPU

The frames are those that the browser shows while the map is dragged and zoomed on every frame. `busy` is the time that
the browser's processes compute per frame, in milliseconds of processor time, which does not depend on other load.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from chromium import SOFTWARE_GL, Page, chromium

from inbatch.apps.reports.explorer.explore import explore_features

MOVE = """new Promise((done) => {
  const map = explorer.views[0].map;
  const canvas = document.querySelector('canvas.map');
  const box = canvas.getBoundingClientRect();
  const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
  const at = { bubbles: true, cancelable: true, clientX: x, clientY: y, button: 0, buttons: 1 };
  const [Event, prefix, mover] = map.plot ? [MouseEvent, 'mouse', window] : [PointerEvent, 'pointer', canvas];
  const times = [];
  let drawn = 0;
  map.plot?.subscribe('draw', () => drawn++);
  const paint = map.paint;
  if (paint) map.paint = () => { drawn++; paint.call(map); };
  if (KIND === 'pan') canvas.dispatchEvent(new Event(prefix + 'down', at));
  const began = performance.now();
  const step = (now) => {
    times.push(now);
    const t = (now - began) / 1000;
    if (t > SECONDS) {
      if (paint) delete map.paint;
      if (KIND === 'pan') mover.dispatchEvent(new Event(prefix + 'up', { ...at, buttons: 0 }));
      const gaps = times.slice(1).map((time, i) => time - times[i]).sort((a, b) => a - b);
      const [median, p95] = [gaps[gaps.length >> 1], gaps[Math.floor(gaps.length * 0.95)]];
      return done({ frames: (times.length - 1) / t, drawn: drawn / t, median, p95 });
    }
    const moved = { ...at, clientX: x + 150 * Math.sin(3 * t), clientY: y + 100 * Math.cos(4 * t) };
    if (KIND === 'pan') mover.dispatchEvent(new Event(prefix + 'move', moved));
    else canvas.dispatchEvent(new WheelEvent('wheel', { ...at, deltaY: Math.sin(2 * t) > 0 ? -12 : 12 }));
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})"""
REDUCED = "explorer.thumbnails.copies.size && [...explorer.thumbnails.copies.values()].every((copy) => copy.picture)"


def write_page(folder: Path, images: Path | None, count: int) -> Path:
    """Write a map of features around 40 centres, with these photographs, repeated, as images."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randint(0, 40, (count,), generator=generator)
    vectors = torch.randn(40, 64, generator=generator)[centre] + 0.6 * torch.randn(count, 64, generator=generator)
    photos = [] if images is None else sorted(str(file.resolve()) for file in images.rglob("*.jpg"))
    names = [photos[i % len(photos)] if photos else f"/photos/image {i:06}.jpg" for i in range(count)]
    np.savez(
        folder / "features.npz", path=np.array(names), vector=vectors.numpy(), label=centre.numpy(),
        index=np.arange(count), split=np.array(["train"] * count),
    )  # fmt: skip
    (folder / "images.csv").write_text("path\n" + "".join(f"{name}\n" for name in names))
    page = folder / f"map-{count}.html"
    explore_features(folder / "features.npz", folder / "images.csv" if photos else None, out=page, projection="pca")
    return page


def busy(page: Page) -> float:
    """Return the seconds that the browser and its children have computed."""
    ticks, parents = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(entry.name)], ticks[int(entry.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    family, grown = {page.process.pid}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        family |= more
        grown = bool(more)
    return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")


def measure(address: str, size: tuple[int, int], seconds: float) -> dict[str, object]:
    with chromium(*SOFTWARE_GL) as page:
        page.size(*size)
        before, began = busy(page), time.perf_counter()
        page.open(address)
        result: dict[str, object] = {"open_seconds": round(time.perf_counter() - began, 2)}
        result["open_busy_seconds"] = round(busy(page) - before, 2)
        result["renderer"] = page.run("document.documentElement.dataset.renderer")
        for pictures in (False, True):
            page.run(f"explorer.setPictures({json.dumps(pictures)})")
            if pictures:
                page.wait(REDUCED)
            time.sleep(0.5)
            for kind in ("pan", "zoom"):
                before = busy(page)
                figures = page.run(MOVE.replace("KIND", repr(kind)).replace("SECONDS", str(seconds)))
                figures["busy"] = 1000 * (busy(page) - before) / max(1.0, figures["frames"] * seconds)
                result[kind + " with images" * pictures] = {key: round(value, 1) for key, value in figures.items()}
                page.run("explorer.views[0].map.reset()")
                time.sleep(0.5)
        result["errors"], result["requests"] = page.errors, len(page.requests)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of photographs, which are repeated as thumbnails")
    parser.add_argument("--count", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--size", type=int, nargs=2, default=[1400, 900], help="of the window in pixels")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--renderer", choices=["webgl", "canvas"], help="by default what the page chooses")
    parser.add_argument("--keep", type=Path, help="folder for the pages, which are used again if they exist")
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        for count in args.count:
            page = folder / f"map-{count}.html"
            if not page.exists():
                write_page(folder, args.images, count)
            address = page.resolve().as_uri() + (f"#{args.renderer}" if args.renderer else "")
            result = measure(address, tuple(args.size), args.seconds)
            size = page.stat().st_size / 1e6
            print(
                json.dumps(
                    {"points": count, "megabytes": round(size, 1), "load": os.getloadavg()[0]} | result, indent=1
                )
            )


if __name__ == "__main__":
    main()
