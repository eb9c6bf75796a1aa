"""Measure what a few labels are worth on learned features.

    python examples/few_labels.py [RUN]

RUN is a run directory; without it a short run is trained in runs/digits. The same labels train a classifier on the
features, on those of the encoder before training, and on the pixels.
"""

import sys

import inbatch
from inbatch.data import open_data
from inbatch.evaluation import evaluate, raw_pixels

SHARES = [0.01, 0.05]  # of the labels, drawn with the same share of every class


def main() -> None:
    if len(sys.argv) > 1:
        directory = sys.argv[1]
    else:
        run = inbatch.pretrain(
            "digits-canvas", "simclr", out="runs/digits", overwrite=True, epochs=2, evaluate_every=2, quiet=True
        )
        directory = str(run.directory)

    learned = inbatch.evaluate_run(directory, protocols=["few"], shares=SHARES)
    train, test = (raw_pixels(open_data("digits-canvas", split)) for split in ("train", "test"))
    pixels = evaluate(None, train, test, protocols=["few"], shares=SHARES)

    print("features            labels   k-NN  linear")
    for name, result in (("pixels", pixels), ("untrained encoder", learned["untrained"]), ("trained encoder", learned)):
        for share in result["few"]["shares"].values():
            knn, linear = share["knn"]["top1"], share["linear"]["top1"]
            print(f"{name:18} {share['images']:7}  {knn:5.3f}   {linear:5.3f}")


if __name__ == "__main__":
    main()
