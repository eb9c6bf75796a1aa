"""Reference workloads of torch, torchvision, Pillow and scikit-learn for the benchmark worker.

This file does not import inbatch. It also reads the files in the job's folder (images, encoded files, features) for
the other libraries.
"""

import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Work = tuple[Callable[[], int], dict[str, Any]]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arrays(job: dict[str, Any]) -> np.ndarray:
    """Load images (N, H, W, 3) uint8."""
    return np.load(Path(job["folder"]) / "images.npy")  # type: ignore[no-any-return]


def pictures(job: dict[str, Any]) -> list[Any]:
    """Return the decoded images as Pillow images."""
    from PIL import Image

    return [Image.fromarray(image) for image in arrays(job)]


def files(job: dict[str, Any]) -> list[bytes]:
    """Load the encoded images."""
    folder = Path(job["folder"])
    blob, ends = (folder / "files.bin").read_bytes(), json.loads((folder / "files.json").read_text())
    return [blob[begin:end] for begin, end in itertools.pairwise([0, *ends])]


def in_turn(items: list[Any], count: int, do: Callable[[Any], Any], units: int = 1) -> Callable[[], int]:
    """Return a function that applies `do` to the next `count` items, cyclically."""
    endless: Iterator[Any] = itertools.cycle(items)

    def call() -> int:
        for item in itertools.islice(endless, count):
            do(item)
        return count * units

    return call


def augmentation(module: Any, size: int, to_tensor: list[Any], blur: bool) -> Any:
    """Create SimCLR's augmentation from torchvision's transforms, v1 or v2."""
    s = 1.0 if blur else 0.5
    jitter = module.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    width = int(0.1 * size) // 2 * 2 + 1
    steps = [module.RandomResizedCrop(size, antialias=True), module.RandomHorizontalFlip()]
    steps += [module.RandomApply([jitter], p=0.8), module.RandomGrayscale(p=0.2)]
    steps += [module.RandomApply([module.GaussianBlur(width, (0.1, 2.0))], p=0.5)] if blur else []
    return module.Compose([*steps, *to_tensor, module.Normalize(MEAN, STD)])


def views_pil(job: dict[str, Any]) -> Work:
    """Draw one view of Pillow images with torchvision's transforms v1."""
    from torchvision import transforms

    transform = augmentation(transforms, job["size"], [transforms.ToTensor()], blur=job["size"] > 64)
    return in_turn(pictures(job), job["per_call"], transform), {}


def views_tensor(job: dict[str, Any]) -> Work:
    """Draw one view of uint8 tensors with torchvision's transforms v2."""
    from torchvision.transforms import v2

    transform = augmentation(v2, job["size"], [v2.ToDtype(torch.float32, scale=True)], blur=job["size"] > 64)
    return in_turn([torch.from_numpy(x).permute(2, 0, 1) for x in arrays(job)], job["per_call"], transform), {}


def normalised(job: dict[str, Any]) -> Tensor:
    """Create random rows of two views with gradients: (2, N / 2, D)."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, job["rows"] // 2, job["dim"], generator=g).to(job["device"]).requires_grad_()


def literal_nt_xent(z: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute NT-Xent as written, holding the matrix of all pairs."""
    rows = F.normalize(z.flatten(0, 1), dim=1)
    logits = (rows @ rows.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(rows), device=z.device).roll(z.shape[1]))


def learning(z: Tensor, loss: Callable[[], Tensor]) -> Callable[[], int]:
    """Return a function that runs forward and backward of a loss."""

    def call() -> int:
        z.grad = None
        loss().backward()
        return 1

    return call


def loss(job: dict[str, Any]) -> Work:
    """Run forward and backward of `literal_nt_xent`."""
    z = normalised(job)
    return learning(z, lambda: literal_nt_xent(z)), {"of": "float32", "needs": 4 * job["rows"] ** 2 * job["dim"]}


def decode_pil(job: dict[str, Any]) -> Work:
    """Decode JPEG files with Pillow."""
    from PIL import Image

    return in_turn(files(job), job["per_call"], lambda x: np.asarray(Image.open(io.BytesIO(x)).convert("RGB"))), {}


def decode_torchvision(job: dict[str, Any]) -> Work:
    """Decode JPEG files with torchvision."""
    from torchvision.io import ImageReadMode, decode_jpeg

    data = [torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in files(job)]
    return in_turn(data, job["per_call"], lambda x: decode_jpeg(x, ImageReadMode.RGB)), {}


def decode_simplejpeg(job: dict[str, Any]) -> Work:
    """Decode JPEG files with simplejpeg."""
    from simplejpeg import decode_jpeg

    return in_turn(files(job), job["per_call"], decode_jpeg), {}


def embeddings(job: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load rows and labels of the bank, then of the queries."""
    rows, labels = (torch.from_numpy(np.load(Path(job["folder"]) / f"{x}.npy")) for x in ("features", "labels"))
    n = job["queries"]
    return rows[n:], labels[n:], rows[:n], labels[:n]


def neighbours(job: dict[str, Any]) -> Work:
    """Run k-NN by matrix products and top-k, in blocks of queries."""
    bank, labels, queries, true = (x.to(job["device"]) for x in embeddings(job))
    properties = {"top1": 0.0}

    def call() -> int:
        right = 0
        keys = F.normalize(bank)
        for block, label in zip(F.normalize(queries).split(256), true.split(256), strict=True):
            near = (block @ keys.T).topk(job["k"])
            votes = torch.zeros(len(block), job["classes"], device=block.device)
            votes.scatter_add_(1, labels[near.indices], (near.values / 0.1).exp())
            right += int((votes.argmax(1) == label).sum())
        properties["top1"] = right / len(true)
        return 1

    return call, properties


def probe(job: dict[str, Any]) -> Work:
    """Run a logistic regression of scikit-learn on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    bank, labels, queries, true = (x.numpy() for x in embeddings(job))
    properties = {"top1": 0.0}

    def call() -> int:
        scale = StandardScaler().fit(bank)
        model = LogisticRegression(max_iter=200).fit(scale.transform(bank), labels)
        properties["top1"] = float(model.score(scale.transform(queries), true))
        return 1

    return call, properties


def clusters(job: dict[str, Any]) -> Work:
    """Run k-means of scikit-learn on normalised features."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    _, _, queries, true = embeddings(job)
    rows, properties = F.normalize(queries).numpy(), {"nmi": 0.0}

    def call() -> int:
        assignment = KMeans(job["classes"], n_init=10, random_state=0).fit_predict(rows)
        properties["nmi"] = float(normalized_mutual_info_score(true.numpy(), assignment))
        return 1

    return call, properties


def cifar_stem(backbone: Any, padding: int = 1) -> nn.Module:
    """Change torchvision's ResNet for small images: 3x3 convolution of stride 1, no pooling, no classifier."""
    backbone.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    backbone.maxpool = backbone.fc = nn.Identity()
    return backbone  # type: ignore[no-any-return]


class Encoded(torch.utils.data.Dataset[Any]):
    """JPEG files, decoded by Pillow on access and transformed, as in the data sets of torchvision and lightly."""

    def __init__(self, encoded: list[bytes], transform: Any) -> None:
        self.encoded, self.transform = encoded, transform

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> Any:
        from PIL import Image

        return self.transform(Image.open(io.BytesIO(self.encoded[i])).convert("RGB")), 0
