"""Embed images and find the nearest neighbours of a few of them.

    python examples/embed_and_search.py [RUN]

RUN is a run directory; without it a short run is trained in runs/digits.
"""

import sys

import numpy as np

import inbatch
from inbatch.data import open_data

NEIGHBOURS = 5


def main() -> None:
    if len(sys.argv) > 1:
        directory = sys.argv[1]
    else:
        run = inbatch.pretrain(
            "digits-canvas", "simclr", out="runs/digits", overwrite=True, epochs=2, evaluate_every=2, quiet=True
        )
        directory = str(run.directory)
    encoder = inbatch.load(directory)

    bank, queries = open_data("digits-canvas", "train"), open_data("digits-canvas", "test")
    vectors = {}
    for source in (bank, queries):
        rows = encoder.embed([source.image(i) for i in range(len(source))])
        vectors[source] = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    similarity = vectors[queries] @ vectors[bank].T  # cosine, (queries, bank)
    nearest = np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]
    bank_labels, query_labels = bank.labels.numpy(), queries.labels.numpy()
    for query in range(8):
        matches = ", ".join(f"{bank.identity(i)} (a {bank_labels[i]})" for i in nearest[query])
        print(f"{queries.identity(query)} (a {query_labels[query]}): {matches}")
    same = (bank_labels[nearest] == query_labels[:, None]).mean()
    print(f"neighbours of the same class: {same:.3f}; by chance {1 / len(bank.classes):.3f}")


if __name__ == "__main__":
    main()
