"""Save the heads of a run, and evaluate the clusters that a head assigns images to."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import assigned, embed
from inbatch.methods import METHODS
from inbatch.models import Encoder
from inbatch.models.network import Network
from inbatch.models.weights import fill, read, write
from inbatch.runtime import own_parts
from inbatch.training.build import RunComponents
from inbatch.training.holdout import Images
from inbatch.training.presets import method_named


class HeadRows:
    """The outputs of one head of a network, with the interface of an encoder."""

    def __init__(self, network: Network, encoder: Encoder, head: str) -> None:
        self.network, self.head = network, head
        self.device, self.prepare, self.evaluating = encoder.device, encoder.prepare, network.evaluating

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rows (N, D) of the head for images."""
        return self.network([x])[self.head][0]


def save_heads(built: RunComponents, directory: Path) -> None:
    """Write the trained heads to `model.safetensors`, and the method with its options to `config.json`.

    `config.json` also contains the arguments of the method's `prepare`.
    """
    prepared = {"images": len(built.source), "classes": int(built.source.labels.max()) + 1}
    prepared |= {"batch": built.recipe.batch_size, "views": len(built.views)}
    method = built.recipe.method
    ours = {"method": method.name, "options": method.options, "told": prepared}
    write(directory, built.network.heads.state_dict(), ours, {})


def evaluate_head(run: Path, encoder: Encoder, source: Images, *, workers: int = 0) -> dict[str, Any]:
    """Return NMI, ACC and ARI of the clusters that a run's head assigns clean images to, and the protocol.

    Args:
        run: Run directory.
        encoder: The run's encoder.
        source: Labelled images.
        workers: Number of processes that decode images.

    Raises:
        ConfigError: If the method has no such head, or the run has no saved heads.
        DataError: If `config.json` of the heads is invalid.
    """
    if not (run / "heads").is_dir():
        raise ConfigError(
            f"{run} has no heads: the run has not finished, or an older version made it; use --from features"
        )
    weights, config = read(run / "heads")
    try:
        kind, options, prepared = method_named(config["method"]), dict(config["options"]), dict(config["told"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        if isinstance(error, ConfigError) and own_parts.is_own(config["method"]):
            raise  # it says what to type
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{run / 'heads'}: config.json describes no heads ({problem}); restore the file") from None
    name = kind.assigns
    if name is None:
        which = ", ".join(method for method, kind in METHODS.items() if kind.assigns)
        raise ConfigError(
            f"{config['method']} has no head that assigns clusters; {which} have one; use --from features"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            method = kind(**options)
            method.prepare(**prepared)
            network = Network(encoder, method.heads(encoder.width), (name,))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise DataError(
            f"{run / 'heads'}: config.json describes no heads of {config['method']} ({error}); restore the file"
        ) from None
    fill(network.heads, weights, f"the heads of {config['method']}")
    rows = embed(HeadRows(network.to(encoder.device), encoder, name), source, workers=workers)
    return {"head": name, **assigned(rows), "split": "test"}
