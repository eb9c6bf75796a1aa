"""Train a model of your own on batches that do not fit in memory, with the gradient of the whole batch.

    torchrun --nproc-per-node 2 examples/grad_cache.py

`inbatch.grad_cache` runs the model on one chunk of samples at a time, twice; the loss sees all of them. It also works
in one process, without torchrun. Under DistributedDataParallel, the loss gathers the rows of all processes.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import inbatch
from inbatch.data import open_data
from inbatch.distributed import gather_rows
from inbatch.losses import nt_xent

STEPS, BATCH, CHUNKS = 12, 128, 4  # BATCH: samples of all processes; CHUNKS: of each process


def loss_of(rows: Tensor) -> Tensor:
    """Return the loss of the rows (views, samples, width) of this process and all others."""
    return nt_xent(gather_rows(rows), temperature=0.2)


def main() -> None:
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    source = open_data("digits-canvas")
    images = torch.stack([source.image(i) for i in range(len(source))])
    transform = inbatch.views("digits", size=20, channels=1, mean=[0.0], std=[1.0])
    torch.manual_seed(0)  # equal weights on all processes
    layers = [nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
    model: nn.Module = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 64))
    if world > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with inbatch.grad_cache(model, chunks=CHUNKS) as step:
        for number in range(STEPS):
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(number))[:BATCH]
            own = chosen.chunk(world)[rank]
            optimizer.zero_grad()
            loss = step(transform(images[own], key=number, index=own), loss_of)
            optimizer.step()
            if rank == 0:
                print(f"step {number} of {STEPS}, {world} x {CHUNKS} chunks: loss {loss.item():.5f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
