"""Workloads of other libraries as they ship: lightly, and the parts of solo-learn that can be imported alone.

Tested with lightly 1.5 and 1.6 and solo-learn 1.0.2. This file does not import inbatch.
"""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Work = tuple[Callable[[], int], dict[str, Any]]


def plain() -> Any:
    """Import reference_workloads.py under its name in this process."""
    import importlib

    return importlib.import_module("reference_workloads")


def follow(worker: int) -> None:
    """End a data worker when its parent process ends."""
    import importlib

    importlib.import_module("child_processes").follow(worker)


def lightly_transform(size: int) -> Any:
    """Create lightly's transform of its CIFAR-10 benchmark (half the jitter, no blur); its default for photographs."""
    from lightly.transforms import SimCLRTransform

    small: dict[str, Any] = {"cj_strength": 0.5, "gaussian_blur": 0.0} if size <= 64 else {}
    return SimCLRTransform(input_size=size, **small)


def solo_file(*path: str) -> Any:
    """Import one file of solo-learn; the package itself requires a framework and an old torch."""
    spec = importlib.util.find_spec("solo")
    (folder,) = spec.submodule_search_locations if spec and spec.submodule_search_locations else [""]
    file = Path(folder).joinpath(*path)
    file_spec = importlib.util.spec_from_file_location("solo_" + file.stem, file)
    if not file.is_file() or file_spec is None or file_spec.loader is None:
        raise ImportError(f"this solo-learn has no {'/'.join(path)}")
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    return module


def solo_transform(size: int) -> Any:
    """Create two views with the settings of its SimCLR scripts (bash_files/pretrain)."""
    module = solo_file("utils", "pretrain_dataloader.py")
    name, options = ("cifar10", {"gaussian_prob": 0.0}) if size <= 64 else ("imagenet", {})
    jitter = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    one = module.prepare_transform(name, **jitter, **options, crop_size=size)
    return module.prepare_n_crop_transform([one], [2])


TRANSFORMS = {"lightly": lightly_transform, "solo-learn": solo_transform}


def views(job: dict[str, Any]) -> Work:
    """Draw two views of decoded images."""
    transform = TRANSFORMS[job["library"]](job["size"])
    return plain().in_turn(plain().pictures(job), job["per_call"], transform, units=2), {}


def criterion(library: str, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Create NT-Xent of two views."""
    if library == "lightly":
        from lightly.loss import NTXentLoss

        return NTXentLoss(temperature)  # type: ignore[no-any-return]
    equation = solo_file("losses", "simclr.py").simclr_loss_func
    if "indexes" not in equation.__code__.co_varnames:
        return lambda a, b: equation(a, b, temperature)

    def later(a: Tensor, b: Tensor) -> Tensor:  # from 1.0.4 on: rows of all views, and the index of their image
        return equation(torch.cat([a, b]), torch.arange(len(a), device=a.device).repeat(2), temperature)  # type: ignore

    return later


def loss(job: dict[str, Any]) -> Work:
    """Run forward and backward of NT-Xent."""
    z = plain().normalised(job)
    compute = criterion(job["library"], 0.1)
    properties = {"of": "float32", "needs": 4 * job["rows"] ** 2 * job["dim"]}
    return plain().learning(z, lambda: compute(z[0], z[1])), properties


def loader(job: dict[str, Any]) -> Any:
    """Create a torch DataLoader of batches of two views with the library's transforms."""
    data = plain().Encoded(plain().files(job), TRANSFORMS[job["library"]](job["size"]))
    if len(data) < job["batch"]:
        data.encoded = data.encoded * (job["batch"] // len(data) + 1)
    cuda = job["device"].startswith("cuda")
    return torch.utils.data.DataLoader(
        data, job["batch"], shuffle=True, drop_last=True, num_workers=job["workers"],
        pin_memory=cuda, persistent_workers=job["workers"] > 0, worker_init_fn=follow,
    )  # fmt: skip


def batches(job: dict[str, Any]) -> Any:
    """Iterate over the batches of all epochs."""
    data_loader = loader(job)
    return itertools.chain.from_iterable(data_loader for _ in itertools.count())


def stream(job: dict[str, Any]) -> Work:
    """Load two views of every image of an epoch through worker processes."""
    endless = batches(job)

    def call() -> int:
        next(endless)
        return int(job["batch"])

    return call, {"workers": job["workers"]}


def network(job: dict[str, Any]) -> nn.Module:
    """Create ResNet-18 with the projection head: lightly's CIFAR-10 benchmark, or solo-learn's methods.

    With the ImageNet stem, both use torchvision's ResNet-18.
    """
    from torchvision.models import resnet18

    small = job.get("stem", "cifar") == "cifar"
    if job["library"] == "lightly":
        from lightly.models import ResNetGenerator
        from lightly.models.modules.heads import SimCLRProjectionHead

        layers = list((ResNetGenerator("resnet-18") if small else resnet18()).children())[:-1]
        pool = [nn.AdaptiveAvgPool2d(1)] if small else []
        return nn.Sequential(*layers, *pool, nn.Flatten(), SimCLRProjectionHead(512, 512, 128))
    backbone = resnet18()
    backbone.fc = nn.Identity()
    backbone = plain().cifar_stem(backbone, padding=2) if small else backbone
    return nn.Sequential(backbone, nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 256))


def loop(job: dict[str, Any]) -> Work:
    """Train from JPEG files in eager float32: workers, transforms, forward of each view, loss, backward, SGD."""
    torch.manual_seed(0)
    device = torch.device(job["device"])
    model = network(job).to(device)
    compute, endless = criterion(job["library"], 0.5), batches(job)
    optimiser = torch.optim.SGD(model.parameters(), 0.06 * job["batch"] / 128, momentum=0.9, weight_decay=5e-4)

    def call() -> int:
        (first, second), _ = next(endless)
        total = compute(model(first.to(device)), model(second.to(device)))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        return len(first)

    return call, {"precision": "float32", "workers": job["workers"]}


def neighbours(job: dict[str, Any]) -> Work:
    """Run lightly's k-NN batch by batch, as its benchmarks do."""
    from lightly.utils.benchmarking import knn_predict

    bank, labels, queries, true = (x.to(job["device"]) for x in plain().embeddings(job))
    properties = {"top1": 0.0}

    def call() -> int:
        keys, right = nn.functional.normalize(bank).T.contiguous(), 0
        for block, label in zip(nn.functional.normalize(queries).split(512), true.split(512), strict=True):
            predictions = knn_predict(block, keys, labels, job["classes"], job["k"], 0.1)
            right += int((predictions[:, 0] == label).sum())
        properties["top1"] = right / len(true)
        return 1

    return call, properties
