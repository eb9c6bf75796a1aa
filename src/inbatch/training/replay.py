"""Capture a step with a non-finite loss or gradient, and repeat it: `inbatch replay`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from inbatch.batch import BankGroups, Batch
from inbatch.data import Source
from inbatch.data.sources.arrays import Pixels
from inbatch.errors import ConfigError, DataError
from inbatch.runtime import distributed
from inbatch.runtime.environment import environment
from inbatch.runtime.files import read_json, replacing, write_json
from inbatch.training import checkpoint
from inbatch.training.build import RunComponents, build
from inbatch.training.checkpoint_recipe import check_recipe
from inbatch.training.recipe import make
from inbatch.training.run_encoder import kept_initial
from inbatch.training.settings_file import read_file
from inbatch.training.step import NonFiniteError
from inbatch.training.teacher import kept_teacher

FOLDER = "nan_capture"
_OPTIONAL = ("size", "attempt", "boxes", "group", "same")


def capture(out: Path, built: RunComponents, failed: NonFiniteError) -> Path:
    """Save a failed step in the run directory: the state of every part, and each rank's samples with their pixels.

    No weight has changed since the step began; running norm statistics have, but they do not affect it. Every rank must
    call it, and writes its own samples.

    Returns:
        The directory of the capture.

    Raises:
        InbatchError: If it cannot be written.
    """
    folder, batch = out / FOLDER, failed.batch
    folder.mkdir(parents=True, exist_ok=True)
    share = {"index": batch.index, "label": batch.label}
    share |= {name: x for name in _OPTIONAL if (x := getattr(batch, name)) is not None}
    if (images := batch.pictures()) is not None:
        share["images"] = images
    share |= {f"crops.{v}": crop for v, crop in enumerate(batch.crops or ())}
    if batch.bank is not None:  # equal on all ranks
        share |= {"bank.same": batch.bank.same, "bank.tags": batch.bank.tags}
    with replacing(folder / f"share-{distributed.rank()}.safetensors") as file:
        file.write(safetensors.torch.save({name: x.cpu().contiguous() for name, x in share.items()}))
    source = built.loader.source
    if distributed.rank() == 0 or built.whole is not None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in built.parts().items()}
        checkpoint.save(folder, {"parts": state, "labels": source.labels.cpu()}, step=failed.step, run=built.facts())
    if distributed.rank():
        return folder
    (folder / checkpoint.PREVIOUS).unlink(missing_ok=True)
    record = {"step": failed.step, "epoch": batch.epoch, "seed": batch.seed, "reason": str(failed)}
    record |= {
        "context": built.context,
        "world": distributed.world(),
        "classes": list(source.classes),
        "data": source.name,
    }
    record |= {"images": [source.identity(i) for i in batch.index.tolist()]}  # of this rank, for the user
    record |= {"environment": environment(built.loader.device)}
    write_json(folder / "recipe.json", built.recipe.nested())
    write_json(folder / "capture.json", record)
    return folder


def replay(path: Path, device: torch.device) -> dict[str, Any]:
    """Repeat a captured step without the run's data, and find where numbers stop being finite.

    The samples of all ranks run in this process, in their original context groups. A step computed in bf16 is repeated
    in float32 as well. Nothing is written.

    Args:
        path: Run directory, or the capture in it.
        device: Device of the networks.

    Raises:
        ConfigError: If there is no capture, or a part of it is missing.
    """
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if not (folder / "capture.json").is_file():
        raise ConfigError(f"{path} holds no captured step: one is written where a loss or gradient is not finite")
    record, saved = _read_capture(folder / "capture.json"), checkpoint.load(folder)
    check_recipe(saved, make(read_file(folder / "recipe.json")), folder / "recipe.json")
    repeated = _repeat_step(folder, record, saved.state, device, None)
    result = {
        "capture": str(folder),
        "step": record["step"],
        "data": record["data"],
        "captured": record["reason"],
        **repeated,
    }
    if repeated["precision"] == "bfloat16":
        result["float32"] = _repeat_step(folder, record, saved.state, device, "float32")
    return result


_CAPTURED = {"step": int, "epoch": int, "seed": int, "context": int, "world": int, "reason": str, "data": str}
_CAPTURED |= {"classes": list}


def _read_capture(path: Path) -> dict[str, Any]:
    """Return the description of a captured step; raise DataError if an entry is missing or of another type."""
    record = read_json(path)
    wrong = [name for name, kind in _CAPTURED.items() if not isinstance(record.get(name), kind)]
    if wrong:
        raise DataError(
            f"{path} describes no captured step: {', '.join(wrong)} missing or of another type; restore the file"
        )
    return record


def _repeat_step(
    folder: Path, record: dict[str, Any], saved: dict[str, Any], device: torch.device, precision: str | None
) -> dict[str, Any]:
    """Repeat the step; return whether it fails again, and the places of non-finite values, in order."""
    recipe = make(read_file(folder / "recipe.json"))
    synced = recipe.sync_norm
    recipe = replace(recipe, context=record["context"], sync_norm=False, compile=False, cache_on_device=False,
                     read="random")  # fmt: skip
    if precision is not None:
        recipe = replace(recipe, precision=precision)  # type: ignore[arg-type] # a precision's name
    source, run = _Empty(record, saved["labels"], recipe.channels), folder.parent
    if recipe.group_column is not None:  # those of the step are stored in the batch
        source.groups = torch.full_like(source.labels, -1)
    built = build(recipe, source, device=device, workers=0, init=kept_initial(run), teacher=kept_teacher(run))
    checkpoint.restore(built.parts(), saved["parts"])
    step, batch = built.step, _batch(folder, record, synced).to(device)
    step.curator = step.similar = None  # what they have done is stored in the batch
    places = [f"the weight {name}" for name, p in built.network.named_parameters() if not p.isfinite().all()]
    step.views = _checked(step.views, places)
    with _watched(built.network, places):
        try:
            losses = step(batch, record["step"])
            return {"reproduced": False, "loss": float(losses["loss"]), "grad_norm": float(losses["grad_norm"]),
                    "places": places, "precision": _name(built)}  # fmt: skip
        except NonFiniteError as failed:
            again = failed
    places += [f"the loss's part {name}" for name, value in again.losses.items() if not torch.isfinite(value)]
    # From the loss down: the first entry is where the gradient became non-finite.
    grads = [name for name, p in built.network.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    places += [f"the gradient of {name}" for name in reversed(grads)]
    return {"reproduced": True, "loss": float(again.losses["loss"]), "grad_norm": float(again.norm), "places": places,
            "precision": _name(built)}  # fmt: skip


def _name(built: RunComponents) -> str:
    return str(built.network.precision).removeprefix("torch.")


class _Empty(Source):
    """A source with the number of images and the labels of the run's data, but no pixels; the step supplies its own."""

    def __init__(self, record: dict[str, Any], labels: Tensor, channels: int):
        super().__init__(record["data"], channels, labels, tuple(record["classes"]))

    def open(self, i: int) -> Pixels:
        return Pixels(torch.zeros(self.channels, 1, 1, dtype=torch.uint8))

    def identity(self, i: int) -> str:
        return str(i)


def _batch(folder: Path, record: dict[str, Any], synced: bool) -> Batch:
    """Return the whole batch, from the samples of all ranks, one context group after the other."""
    shares = []
    for rank in range(record["world"]):
        path = folder / f"share-{rank}.safetensors"
        try:
            shares.append(safetensors.torch.load(path.read_bytes()))
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}): copy it from the machine of rank {rank}"
            ) from None
        except safetensors.SafetensorError as error:
            raise DataError(f"{path} is damaged: {error}") from None

    def joined(name: str, dim: int = 0) -> Tensor | None:
        parts = [share[name] for share in shares if name in share]
        if not parts:
            return None
        if name == "images":  # canvases of different sizes
            height, width = (max(x.shape[side] for x in parts) for side in (2, 3))
            parts = [nn.functional.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x in parts]
        return torch.cat(parts, dim)

    crops = [joined(f"crops.{v}") for v in range(sum(name.startswith("crops.") for name in shares[0]))]
    batch = Batch(
        index=torch.cat([share["index"] for share in shares]),
        label=torch.cat([share["label"] for share in shares]),
        seed=record["seed"],
        epoch=record["epoch"],
        images=joined("images"),
        size=joined("size"),
        crops=tuple(crop for crop in crops if crop is not None) or None,
        boxes=joined("boxes", 1),
        attempt=joined("attempt"),
        group=joined("group"),
        same=joined("same"),
        bank=BankGroups(shares[0]["bank.same"], shares[0]["bank.tags"]) if "bank.same" in shares[0] else None,
    )
    if not synced:
        return batch
    groups = len(batch) // record["context"]  # each extends over all ranks, and was cut from the samples of every one
    return batch.take(torch.arange(len(batch)).view(record["world"], groups, -1).transpose(0, 1).flatten())


def _checked(views: Callable[[Batch], Sequence[Tensor]], places: list[str]) -> Callable[[Batch], Sequence[Tensor]]:
    def checked(batch: Batch) -> Sequence[Tensor]:
        drawn = views(batch)
        for v, view in enumerate(drawn):
            for i in (~view.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist():
                _once(places, f"view {v} of image {int(batch.index[i])}")
        return drawn

    return checked


@contextmanager
def _watched(network: nn.Module, places: list[str]) -> Iterator[None]:
    """Record, in order, the innermost modules with a non-finite output."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                _once(places, f"the output of {name} ({type(module).__name__})")

        return hook

    leaves = [(name, module) for name, module in network.named_modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _once(places: list[str], place: str) -> None:
    if place not in places:
        places.append(place)
