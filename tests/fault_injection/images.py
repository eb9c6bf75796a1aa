"""Faults 11 to 13, 19, 21 and 22: unreadable images, too few images, deleted images, and hostile names."""

import json
import os
import struct
import tarfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .stage import MAIN, TORCHRUN, Ended, Injection, end, going, images, pictures, pretrain, run, script

MANY = 300


def bomb() -> bytes:
    """Return a PNG file of a few bytes whose header declares 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def bad(folder: Path, kinds: int) -> None:
    """Write files that are not images, of as many kinds as requested."""
    whole = next(iter(sorted(folder.glob("*.png")))).read_bytes()
    files = {"truncated.png": whole[: len(whole) // 2], "bomb.png": bomb(), "empty.png": b"", "text.jpg": b"no image"}
    for name, data in list(files.items())[:kinds]:
        (folder / name).write_bytes(data)


def odd(folder: Path) -> None:
    """Write images that some readers do not support."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "sixteen.png")
    image.crop((0, 0, 1, 1)).save(folder / "one pixel.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "moving.gif", save_all=True, append_images=[image.rotate(90)])
    image.save(folder / "a new\nline.png")
    with open(os.fsencode(folder) + b"/not \xff text.png", "wb") as file:
        image.save(file, "PNG")


def unreadable(kinds: int, words: list[str], folder: Path) -> dict[str, Any]:
    out, data = folder / "run", pictures(folder / "images", MANY)
    odd(data)
    bad(data, kinds)
    ended = run(pretrain(out, data=images(data, *words), quiet=False))
    return ended.seen | {"listed": listed(out)}


def listed(out: Path) -> int:
    """Return the number of lines of bad_images.txt."""
    file = out / "bad_images.txt"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def too_few(count: int, alike: bool, folder: Path) -> dict[str, Any]:
    data = folder / "images"
    data.mkdir()
    for i in range(count):
        Image.new("RGB", (24, 24), (7 if alike else i, 0, 0)).save(data / f"{i}.png")
    ended = run(pretrain(folder / "run", data=images(data)))
    return ended.seen | {"left": sorted(path.name for path in folder.iterdir())}


def vanishes(folder: Path) -> dict[str, Any]:
    """Delete one image and corrupt another while the run reads them repeatedly."""
    out, data = folder / "run", pictures(folder / "images", MANY)
    words = images(data, "--workers", "1", "--set", "cache_on_device=false")
    with going(out, data=words, epochs=20, lines=3) as process:
        (data / "0007.png").unlink()
        (data / "0008.png").write_text("no image")
        ended = end(process)
    return ended.seen | {"listed": listed(out)}


def uneven(folder: Path) -> dict[str, Any]:
    """Train on 211 images in batches of 40 on 2 ranks; return the samples of each rank at each step."""
    text = f"""
import os, json
from inbatch.data.loader import Loader
real = Loader.epoch
def epoch(self, *given, **more):
    for batch in real(self, *given, **more):
        with open({str(folder)!r} + "/seen-" + os.environ["RANK"], "a") as file:
            print(json.dumps(batch.index.tolist()), file=file)
        yield batch
Loader.epoch = epoch
{MAIN}"""
    data = ["--data", "digits-canvas", "--set", "subset=211", "--batch", "40", "--context", "20"]
    ended = run(pretrain(folder / "run", data=data), by=[*TORCHRUN, *script(folder, "sees", text)])
    if ended.code:
        return ended.seen
    ranks = [(folder / f"seen-{rank}").read_text().splitlines() for rank in range(2)]
    batches = [json.loads(a) + json.loads(b) for a, b in zip(*ranks, strict=True)]
    twice = sum(len(batch) - len(set(batch)) for batch in batches)
    return {"exit": 0, "batches": len(batches), "samples twice in a batch": twice}


def hostile_names(folder: Path) -> dict[str, Any]:
    """Write images whose names a browser, a terminal or a renderer of markup would interpret."""
    data, names = folder / "images", ("<script>alert(1)<", "a\x1b[2J\x1b]0;b\x07", "[red]c[/red] \u202e", "=1+1")
    for i, name in enumerate(names):
        pictures(data / name, 30, 24 + i)
    out = folder / "run"
    results = [run(pretrain(out, data=[*images(data), "--set", "knn_k=5"])), run(["evaluate", str(out)])]
    results += [run(["inspect", str(out)]), run(["pretrain", "--resume", str(out), "--json"])]
    results += [run(["embed", str(out), str(data), "-o", str(folder / "f.npz")])]
    text = "".join(result.out + result.err for result in results)
    return {
        "exits": [result.code for result in results],
        "escapes in the messages": text.count("\x1b") + text.count("\u202e"),
    }


def listed_outside(folder: Path) -> dict[str, Any]:
    pictures(folder / "images", 40)
    Image.new("RGB", (24, 24)).save(folder / "secret.png")
    names = [f"{i:04d}.png" for i in range(40)] + ["../secret.png"]
    (folder / "images" / "list.csv").write_text("path\n" + "\n".join(names) + "\n")
    return run(pretrain(folder / "run", data=images(folder / "images" / "list.csv"))).seen


def packed_outside(folder: Path) -> dict[str, Any]:
    file = folder / "images.tar"
    data = pictures(folder / "images", 40)
    with tarfile.open(file, "w") as tar:
        for path in sorted(data.iterdir()):
            tar.add(path, path.name)
        tar.add(data / "0000.png", "../../outside.png")
    ended: Ended = run(pretrain(folder / "in" / "run", data=images(file)))
    return ended.seen | {"written outside": (folder.parent / "outside.png").exists()}


STREAMED = ["--workers", "1", "--set", "cache_on_device=false"]
LISTED = {"exit": 0, "listed": 2}
ODD = "2 bad ones among 307; CMYK, 16 bit, 1x1, turned, moving, odd names"

INJECTIONS = [
    Injection(
        11, "unreadable images, resident", ODD, LISTED | {"says": ("cannot be read",)}, partial(unreadable, 2, []),
    ),
    Injection(
        11, "unreadable images, streamed", ODD, LISTED | {"says": ("truncated.png", "bomb.png")},
        partial(unreadable, 2, STREAMED),
    ),
    *(
        Injection(
            11, f"too many unreadable images, {kind}", "4 of 311: over 1 %",
            {"exit": 3, "says": ("cannot be read", "1%")}, partial(unreadable, 4, words),
        )
        for kind, words in (("resident", []), ("streamed", STREAMED))
    ),
    *(
        Injection(
            12, fault, "a folder of them", {"exit": 3, "left": ["images"], "says": says},
            partial(too_few, count, alike), quick=True,
        )
        for fault, count, alike, says in (
            ("no image", 0, False, ("No image under",)),
            ("one image", 1, False, ("has 1 image", "give two or more")),
            ("fewer images than a batch", 19, False, ("fewer than one batch", "use a batch of at most 19")),
            ("images all alike", 40, True, ("are identical", "at least two different images")),
        )
    ),
    Injection(13, "images deleted and overwritten during a run", "streamed, 2 of 300", LISTED, vanishes),
    Injection(
        19, "an uneven last batch", "211 images, batches of 40, 2 ranks",
        {"exit": 0, "batches": 10, "samples twice in a batch": 0}, uneven,
    ),
    Injection(
        21, "hostile names", "classes called <script>, ESC[2J, [red], =1+1; five commands",
        {"exits": [0] * 5, "escapes in the messages": 0}, hostile_names,
    ),
    Injection(22, "a path out of the folder, CSV", "../secret.png", {"exit": 3, "says": ("..",)}, listed_outside),
    Injection(
        22, "a path out of the folder, tar", "../../outside.png",
        {"exit": 3, "written outside": False, "says": ("..",)}, packed_outside,
    ),
]  # fmt: skip
