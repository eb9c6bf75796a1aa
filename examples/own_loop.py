"""Train with the parts of a run in a loop of your own: you decide when to step, evaluate, save and stop.

    python examples/own_loop.py

`prepare` builds what `pretrain` would train with: data, views, networks, method, optimiser and schedule. A call of
`parts.step` is one complete training step, with the learning rate of the schedule.
"""

import torch

import inbatch
from inbatch.data import open_data
from inbatch.evaluation import embed, knn
from inbatch.models import save_encoder

EPOCHS = 2


def main() -> None:
    parts = inbatch.prepare("digits-canvas", "simclr", epochs=EPOCHS, batch_size=128, encoder="tiny")
    print(f"{parts.total} steps, {len(parts.source)} images, {sorted(inbatch.OPTIMIZERS)} are the optimisers")
    test = open_data("digits-canvas", "test")
    step = 0
    for epoch in range(EPOCHS):
        losses = []
        for batch in parts.loader.epoch(epoch):
            terms = parts.step(batch, step)  # {"loss": ..., "grad_norm": ..., and the terms of the method}
            losses.append(terms["loss"])
            step += 1
        accuracy = knn(embed(parts.encoder, parts.source), embed(parts.encoder, test), k=20)["top1"]
        print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}, k-NN accuracy {accuracy:.3f}")
    save_encoder(parts.encoder, "own-loop-encoder")
    rows = inbatch.load("own-loop-encoder").embed([test.image(i) for i in range(4)])
    print(f"saved and loaded: features {rows.shape}")


if __name__ == "__main__":
    main()
