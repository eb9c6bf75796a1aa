"""Error of the gradient if every process passes only its own rows to a loss: python benchmarks/local_rows.py

The processes are simulated: DistributedDataParallel averages their gradients, which is what this script does.
Prints the table of docs/parts-alone.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from inbatch import losses
from inbatch.nn.functional import normalize

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "nt_xent": lambda z, y: losses.nt_xent(z, 0.2),
    "dcl": lambda z, y: losses.dcl(z, 0.2),
    "ctr (MoCo v3)": lambda z, y: losses.ctr(z[0], z[1], 0.2),
    "nnclr": lambda z, y: losses.nnclr(z[0], z[1], 0.2),
    "supcon, 8 classes": lambda z, y: losses.supcon(z, y, 0.2),
    "barlow_twins": lambda z, y: losses.barlow_twins(z)["loss"],
    "vicreg": lambda z, y: losses.vicreg(z)["loss"],
    "swapped_prediction of sinkhorn": lambda z, y: losses.swapped_prediction(normalize(z), losses.sinkhorn(z)),
    "byol": lambda z, y: losses.byol(z, z.detach().roll(1, 2)),
}
CASES = [(64, 2), (64, 8), (256, 2), (256, 8)]


def error(loss: Loss, samples: int, processes: int) -> float:
    """Return the relative error of the gradient of the weights."""
    torch.manual_seed(0)
    images = torch.randn(samples, 32) + 0.5 * torch.randn(2, samples, 32)
    label = torch.arange(samples) % 8
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss(network(x), y), list(network.parameters()))
        return torch.cat([part.flatten() for part in parts])

    whole = gradient(images, label)
    shares = zip(images.chunk(processes, 1), label.chunk(processes), strict=True)
    local = torch.stack([gradient(*share) for share in shares]).mean(0)
    return float((local - whole).norm() / whole.norm())


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    print("| loss |", " | ".join(f"{n} samples, {w} processes" for n, w in CASES), "|")
    print("| --- |" + " --- |" * len(CASES))
    for name, loss in LOSSES.items():
        print(f"| {name} |", " | ".join(f"{error(loss, *case):.1%}" for case in CASES), "|")
