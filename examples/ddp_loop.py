"""Train an encoder in your own loop with a loss of inbatch on any number of processes.

    torchrun --nproc-per-node 2 examples/ddp_loop.py

`gather_rows` passes the rows of all processes to the loss, so every number of processes takes the same steps. Two more
conditions make that true: random draws are keyed by the step, not by the process, and the network has no batch norm.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inbatch.data import open_data
from inbatch.distributed import gather_rows
from inbatch.losses import nt_xent

STEPS, BATCH = 12, 128  # BATCH: the global batch, in samples
NOISE, SHIFT = 0.05, 0.3  # of the grey levels, of half a side


def draw_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and move every image by a random amount and add noise."""
    u = torch.rand(len(images), 4, generator=generator) * 2 - 1
    angle, scale = 0.4 * u[:, 0], 1 + 0.2 * u[:, 1]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * scale[:, None, None]
    grid = nn.functional.affine_grid(torch.cat([turn, SHIFT * u[:, 2:, None]], 2), list(images.shape), False)
    view = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return view + NOISE * torch.randn(view.shape, generator=generator)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    source = open_data("digits-canvas")
    images = torch.stack([source.image(i) for i in range(len(source))]).float() / 255
    torch.manual_seed(0)  # equal weights on all processes
    convolutions = [nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
    network = nn.Sequential(*convolutions, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 64))
    model = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        batch = images[torch.randperm(len(images), generator=generator)[:BATCH]]
        views = torch.stack([draw_view(batch, generator) for _ in range(2)])
        local = views.chunk(world, dim=1)[rank]  # this process's samples, in all views
        projections = model(local.flatten(0, 1)).unflatten(0, local.shape[:2])
        loss = nt_xent(gather_rows(projections), temperature=0.2)  # of (views, BATCH, width) on every process
        optimizer.zero_grad()
        loss.backward()  # the sum over processes in gather_rows and the mean in DDP cancel: no factor is needed
        optimizer.step()
        if rank == 0:
            print(f"step {step} of {STEPS}, {world} processes: loss {loss.item():.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
