"""Compute features or classes of images by onnxruntime, NumPy and Pillow alone, as on a server without torch.

    python examples/onnx_inference.py

With arguments, FOLDER IMAGE..., it uses a folder that `inbatch export RUN --to onnx -o FOLDER` wrote, of a run or of a
classifier. Without, it exports an untrained encoder, which needs the extra `onnx`, and embeds two random images.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def outputs(folder: str, files: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return the features (N, F) of image files and no names, or their probabilities and the names of the classes."""
    inputs = json.loads((Path(folder) / "export.json").read_text())["input"]
    short, size, mode = inputs["resize_shorter_side"], inputs["crop_centre"], {1: "L", 3: "RGB"}[inputs["shape"][1]]
    images = []
    for file in files:
        image = ImageOps.exif_transpose(Image.open(file)).convert(mode)
        width, height = (short * side // min(image.size) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
        images.append(np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1))
    session = onnxruntime.InferenceSession(str(next(Path(folder).glob("*.onnx"))))
    names = json.loads(session.get_modelmeta().custom_metadata_map.get("inbatch.classes", "[]"))
    return session.run(None, {"images": np.stack(images)})[0], names


def main() -> None:
    folder, *files = sys.argv[1:] or ["encoder-onnx", "a.png", "b.png"]
    if len(sys.argv) == 1:
        from inbatch.api import export_run
        from inbatch.models import create_encoder, save_encoder

        save_encoder(create_encoder("tiny", size=20), "encoder")
        export_run("encoder", folder, "onnx")
        for file in files:
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)).save(file)
    rows, names = outputs(folder, files)
    print(rows.shape)
    if names:
        for file, row in zip(files, rows, strict=True):
            print(file, *(f"{names[i]} {row[i]:.1%}" for i in row.argsort()[::-1][:3]), sep="\t")


if __name__ == "__main__":
    main()
