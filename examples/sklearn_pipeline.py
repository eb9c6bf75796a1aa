"""Use a trained encoder as a transformer of a scikit-learn pipeline.

    python examples/sklearn_pipeline.py [RUN]

RUN is a run directory; without it a short run is trained in runs/digits. The pipeline can be cloned, searched over
and pickled: it holds the path of the run, and reads the encoder when it is fitted.
"""

import sys

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import inbatch
from inbatch.data import open_data


class InbatchFeatures(TransformerMixin, BaseEstimator):
    """Turn uint8 images (N, H, W) or (N, H, W, C) into features (N, width)."""

    def __init__(self, run: str) -> None:
        self.run = run

    def fit(self, images: np.ndarray, labels: object = None) -> "InbatchFeatures":
        self.encoder_ = inbatch.load(self.run)
        return self

    def transform(self, images: np.ndarray) -> np.ndarray:
        return self.encoder_.embed(images)


def main() -> None:
    if len(sys.argv) > 1:
        directory = sys.argv[1]
    else:
        run = inbatch.pretrain(
            "digits-canvas", "simclr", out="runs/digits", overwrite=True, epochs=2, evaluate_every=2, quiet=True
        )
        directory = str(run.directory)

    sources = [open_data("digits-canvas", split) for split in ("train", "test")]
    images = [np.stack([source.image(i)[0].numpy() for i in range(len(source))]) for source in sources]
    labels = [source.labels.numpy() for source in sources]
    pipeline = make_pipeline(InbatchFeatures(directory), StandardScaler(), LogisticRegression(max_iter=500))
    search = GridSearchCV(pipeline, {"logisticregression__C": [0.01, 0.1, 1.0]}, cv=3)
    search.fit(images[0], labels[0])
    print(f"best C: {search.best_params_['logisticregression__C']}, accuracy {search.score(images[1], labels[1]):.3f}")


if __name__ == "__main__":
    main()
