"""Model card of an exported encoder: what it is, how it was trained, its figures, and how to use it."""

from collections.abc import Mapping
from typing import Any

from inbatch.models.encoder import Encoder

_USE = """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("FOLDER"), AutoModel.from_pretrained("FOLDER").eval()
inputs = processor(Image.open("photo.jpg").convert("{mode}"), return_tensors="pt")
with torch.no_grad():
    features = model(**inputs).pooler_output  # (1, {width})
```

"""
_USE_TENSORS = """```python
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("FOLDER").eval()
images = torch.rand(1, {channels}, {size}, {size})  # from 0 to 1; a processor takes at most 4 channels
mean, std = (torch.tensor(x).view(-1, 1, 1) for x in ({mean}, {std}))
with torch.no_grad():
    features = model((images - mean) / std).pooler_output  # (1, {width})
```

"""
_TIMM = """With timm alone: `timm.create_model("local-dir:FOLDER", pretrained=True)`. `FOLDER` is this folder or the
name of the repository (with timm: `hf-hub:NAME`)."""

_WHITENED = (
    "k-NN and linear probe were measured on the whitened features of `inbatch.load(FOLDER).embed`; the features of "
    "timm and transformers, before whitening, can have other figures."
)


def model_card(encoder: Encoder, architecture: str, facts: Mapping[str, Any]) -> str:
    """Return README.md of a repository.

    Args:
        encoder: the encoder.
        architecture: its name in timm.
        facts: "licence" of the weights, if stated, and, of the run, as far as known: "data", "recipe" (name: value),
            "figures" (rows of a table: name, value, value before training), "step", "steps"; and "weights_sha256".
    """
    head = ["---", f"license: {facts.get('licence') or 'unknown'}", "library_name: timm"]
    head += ["pipeline_tag: image-feature-extraction", "tags:", "- timm", "- transformers", "- inbatch", "---", ""]
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(encoder.channels)
    use = _USE if mode is not None else _USE_TENSORS
    use = use.format(mode=mode, width=encoder.width, channels=encoder.channels, size=encoder.size,
                     mean=list(encoder.mean), std=list(encoder.std))  # fmt: skip
    text = [
        f"# {architecture} for image features",
        "",
        f"An encoder trained with [inbatch](https://pypi.org/project/inbatch/): {encoder.channels} x {encoder.size} x "
        f"{encoder.size} pixels -> {encoder.width} features. It has no classifier.",
    ]
    if encoder.readout is not None:
        text += [
            "",
            f"`inbatch.load(FOLDER)` also whitens the features (`readout.safetensors`, {encoder.readout.width} numbers "
            "per image). timm and transformers return the features before whitening.",
        ]
    text += ["", "## Use", "", use + _TIMM, "", "## Training", ""]
    text += [f"- Data: {facts.get('data') or 'not stated'}"]
    if facts.get("steps"):
        text += [f"- Step: {facts.get('step')} of {facts['steps']}"]
    text += [f"- `{key}`: {value}" for key, value in facts.get("recipe", {}).items()]
    text += ["", "## Figures", "", *_figures(facts.get("figures", []))]
    if facts.get("figures") and encoder.readout is not None:
        text += ["", _WHITENED]
    text += ["", "## Licence and files", "", f"- Licence of the weights: {facts.get('licence') or 'not stated'}"]
    text += [f"- SHA-256 of model.safetensors: `{facts['weights_sha256']}`"]
    return "\n".join([*head, *text]) + "\n"


def _figures(rows: list[tuple[str, str, str]]) -> list[str]:
    if not rows:
        return ["None: the run has not been evaluated."]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return ["| measure | this encoder | before training |", "| --- | --- | --- |", *lines]
