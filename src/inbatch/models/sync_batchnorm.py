"""Batch normalisation over all ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from inbatch.errors import ConfigError
from inbatch.runtime.distributed import sum_over_ranks, world


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of all ranks, on any device.

    torch's SyncBatchNorm does not support the CPU; this class replaces it there, for tests and CPU clusters.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least (N, C), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * world()
        mean = sum_over_ranks(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = sum_over_ranks(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None:
            assert self.running_var is not None and self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), rate)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def synchronise_norm(module: nn.Module) -> nn.Module:
    """Return the module with every batch normalisation over all ranks: torch's on CUDA, `GlobalBatchNorm` elsewhere."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and type(layer) not in _PLAIN_NORMS:
            raise ConfigError(f"sync_norm does not support {type(layer).__name__} at {name}: use torch.nn.BatchNorm")
    if any(p.is_cuda for p in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, old in children:
            if type(old) in _PLAIN_NORMS:
                new = GlobalBatchNorm(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
                new._parameters, new._buffers = old._parameters, old._buffers  # the same tensors, frozen or not
                setattr(parent, name, new.train(old.training))
    return module


_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
