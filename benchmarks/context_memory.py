"""Context sizes by GPU memory: python benchmarks/context_memory.py [--entries ...] [--cards 8 12 ...] [--batch 16384]

An estimate on any machine, without training. For every entry the script counts the tensors that a forward pass keeps
for the backward pass (`inbatch pretrain --dry-run`). This gives the bytes of one more sample in a context group, and
the bytes that do not depend on its size: weights, gradients, optimiser, target network, and the rows of the whole
batch. The context of a card is the largest power of two whose bytes are at most 80 % of its memory, with one third
added to the kept tensors for the workspace of the backward pass. `--context auto` measures instead. Writes
results/context-memory.json.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from inbatch.api import prepare
from inbatch.apps.console import print_table, say
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.training.auto_context import LIMIT
from inbatch.training.size_estimate import estimate

OUT = Path(__file__).parents[1] / "results" / "context-memory.json"
WORKSPACE = 4 / 3
"""Memory of a group relative to its forward pass: gradients of activations, workspaces, fragmentation."""
GROUPS = (16, 32)
CARDS = (8, 12, 16, 24, 40, 80, 141)

ENTRIES: dict[str, dict[str, Any]] = {
    f"{encoder}, {size} px, {method}, {precision}": {
        "encoder.name": encoder, "image_size": size, "method.name": method, "precision": precision,
    }
    for encoder, size in (("resnet18", 32), ("resnet50", 224))
    for method in ("simclr", "byol")
    for precision in ("float32", "bf16")
}  # fmt: skip
"""Name -> settings. 32 px uses the CIFAR stem."""


def measure(name: str, batch: int) -> dict[str, Any]:
    """Return the bytes of one sample of a group and of everything that does not depend on the group's size."""
    estimates = []
    for group in GROUPS:  # separates the part that does not grow with the group (weights in bfloat16)
        size = ENTRIES[name]["image_size"]
        images = torch.randint(0, 256, (group, 3, size, size), dtype=torch.uint8)
        built = prepare(images, settings=ENTRIES[name] | {"preset": "none", "batch_size": group}, device="cpu")
        estimates.append(estimate(built)["memory_bytes_estimate"])
    small = estimates[0]
    kept = [memory["activations_of_a_group"] + memory["views_of_a_group"] for memory in estimates]
    each = (kept[1] - kept[0]) / (GROUPS[1] - GROUPS[0])
    held = ("weights", "gradients", "optimiser", "target_network", "method")
    return {
        "per_sample": round(WORKSPACE * each),
        "rows": round(small["rows_of_a_batch"] / GROUPS[0] * batch),
        "fixed": sum(small[key] for key in held) + round(kept[0] - GROUPS[0] * each),
        "optimizer": built.recipe.optimizer.name,
    }


def context(row: dict[str, Any], card: float) -> int:
    """Return the largest power of two that fits a card of this many GB; 0 if not even 2 do."""
    room = (LIMIT * card * 1e9 - row["fixed"] - row["rows"]) / row["per_sample"]
    return 1 << int(room).bit_length() - 1 if room >= 2 else 0


def lines(entries: dict[str, dict[str, Any]], cards: Sequence[int]) -> Iterable[Sequence[str]]:
    """Yield the rows of the table."""
    for name, row in entries.items():
        cells = [f"{min(row['contexts'][str(card)], 16384):,}" for card in cards]
        yield name, f"{row['per_sample'] / 1e6:,.1f}", f"{(row['fixed'] + row['rows']) / 1e9:,.2f}", *cells


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="NAME")
    parser.add_argument("--cards", type=int, nargs="+", default=list(CARDS), metavar="GB", help="memory of a GPU")
    parser.add_argument("--batch", type=int, default=16384, help="samples whose rows are held at once")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    torch.manual_seed(0)
    where = environment(torch.device("cpu"))
    entries: dict[str, Any] = {}
    for name in args.entries:
        row = entries[name] = measure(name, args.batch)
        row["contexts"] = {str(card): context(row, card) for card in args.cards}
    result = {
        "environment": where,
        "batch": args.batch,
        "cards": args.cards,
        "workspace": WORKSPACE,
        "entries": entries,
    }
    print_table(
        ("", "MB / sample", "GB beside", *(f"{c} GB" for c in args.cards)), lines(entries, args.cards), numbers=True
    )
    write_json(args.out, result)
    say("", f"An estimate for a batch of {args.batch:,}. Written to {args.out}")
    return result


if __name__ == "__main__":
    main()
