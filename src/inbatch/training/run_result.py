"""Write the files of a finished run: encoder, heads, curves and result."""

from pathlib import Path
from typing import Any

from inbatch.errors import InbatchError, Unwritten
from inbatch.models import save_encoder
from inbatch.models.lora import merge_
from inbatch.runtime import distributed
from inbatch.runtime.files import write_json
from inbatch.runtime.memory import peak_memory
from inbatch.training.build import RunComponents
from inbatch.training.evaluation_plan import RunEvaluations
from inbatch.training.head_evaluation import save_heads
from inbatch.training.monitors.comparison import Comparison
from inbatch.training.monitors.curve_plot import plot_curves
from inbatch.training.monitors.online_evaluation import evaluation
from inbatch.training.run_evaluation import compare_with_initial
from inbatch.training.train_state import TrainState


def finish(
    built: RunComponents, progress: TrainState, plan: RunEvaluations, out: Path, where: dict[str, Any],
    compared: Comparison | None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate by every protocol, all ranks together; rank 0 saves encoder, heads, curves and the result."""
    split, main = plan.final, distributed.rank() == 0
    merge_(built.encoder)  # what is judged is what is saved
    if main:
        save_encoder(built.encoder, out / "encoder")
        save_heads(built, out / "heads")
        plot_curves(out / "metrics.jsonl", out / "curves.png", compared)
    result = {
        "command": built.recipe.command(),
        "recipe": built.recipe.nested(),
        "context": built.context,
        "world": distributed.world(),
        "precision": str(built.network.precision).removeprefix("torch."),
        "environment": where,
        "earlier_environments": progress.machines[:-1],
        "images": len(built.source),
        "width": built.encoder.width,
        "unreadable": len(built.loader.unreadable()),
        "steps": built.total,
        "threads": progress.threads,
        "training_seconds": progress.seconds,
        "training_cpu_seconds": progress.cpu_seconds,
        "images_per_second": progress.images / max(progress.seconds, 1e-9),
        "peak_memory_bytes": peak_memory(built.loader.device),
        "curve": progress.curve,
        "compared": compared and compared.json(),
        "collapsed": list(progress.collapsed.values()),
        "leak": progress.leak or None,
        "held_out": split and split.description,
        "evaluation": None if split is None else evaluation(built, split, out),
    }
    if progress.stopped:
        result["stopped"] = progress.stopped
    if built.source.label_note:
        result["label_note"] = built.source.label_note
    result |= compare_with_initial(built, split, out, plan.compared)
    if progress.calibration:
        result["calibration"] = progress.calibration
    result["wall_seconds"] = progress.wall
    try:
        if main:
            write_json(out / "result.json", result)
    except InbatchError as error:
        raise Unwritten(str(error), {"run": str(out)} | result) from error
    return result
