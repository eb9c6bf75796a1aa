"""A run under Ray Train: Ray starts the workers, and starts them again from the last checkpoint if one is lost.

    python examples/ray_train.py

It needs `pip install "ray[train]"`. On a cluster: --data ~/photos --out /shared/runs/photos --workers 4 --gpu. All
workers must see the data and the run directory. `resume="auto"` continues from its last checkpoint after a restart,
also with another number of workers.
"""

import argparse
from pathlib import Path
from typing import Any


def train(settings: dict[str, Any]) -> None:
    """Train on each worker; Ray has joined the workers in a process group, which inbatch uses."""
    from ray.train import get_context

    import inbatch

    run = inbatch.pretrain(resume="auto", **settings)
    if get_context().get_world_rank() == 0:
        print(f"{run.directory}: {run.result['steps']} steps on {run.result['world']} workers")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits-canvas")
    parser.add_argument("--out", type=Path, default=Path("runs/ray"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU per worker")
    parser.add_argument("--shard", action="store_true", help="divide the encoder over the workers")
    options = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    out = options.out.resolve()
    settings = {"data": options.data, "method": "simclr", "out": str(out), "epochs": options.epochs}
    settings |= {"shard": options.shard, "device": "cuda" if options.gpu else "cpu"}
    trainer = TorchTrainer(
        train,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpu),
        run_config=RunConfig(storage_path=str(out.parent / "ray"), failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
