"""An estimator in the way of scikit-learn: it learns image features without labels, and computes them.

from inbatch.sklearn import BatchEncoder
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

model = make_pipeline(BatchEncoder(epochs=20), LogisticRegression(max_iter=1000))
model.fit(images, labels)
"""

import filecmp
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from inbatch.api import pretrain
from inbatch.data import Reading, Source
from inbatch.data.pixels import Levels
from inbatch.data.source import unlabelled
from inbatch.data.sources.arrays import open_arrays
from inbatch.data.sources.path_source import PathsSource
from inbatch.errors import ConfigError, Interrupted, Preempted
from inbatch.evaluation import embed_stream
from inbatch.methods import METHODS
from inbatch.models import Encoder
from inbatch.models.factory import restored
from inbatch.models.weights import as_one, packed
from inbatch.runtime.device import device_for
from inbatch.runtime.isolation import usual_state
from inbatch.runtime.paths import path_of
from inbatch.runtime.table_file import Table, write_table


@contextmanager
def _listed(table: Table, run: Path) -> Iterator[Path]:
    """Yield the list of the images of a run, next to its directory; a new list is removed if the run does not begin.

    Raises:
        ConfigError: if the file exists and is another list, or no list.
    """
    paths = run.with_name(f"{run.name}.csv")
    if paths.exists():
        with TemporaryDirectory(prefix="inbatch-") as folder:
            write_table(Path(folder) / paths.name, [table])
            if not filecmp.cmp(Path(folder) / paths.name, paths, shallow=False):
                raise ConfigError(
                    f"{paths} exists and is not the list of these images, which would replace it: choose another "
                    "run_dir, or move the file"
                )
        yield paths
        return
    write_table(paths, [table])
    try:
        yield paths
    except BaseException:
        if not (run / "recipe.json").exists():
            paths.unlink(missing_ok=True)
        raise


class BatchEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Learn features of images with `inbatch.pretrain`, and compute them.

    Images X are an array (N, H, W), (N, H, W, C) or (N, C, H, W); an array (N, F) of flattened images with
    `image_shape`, or of square grey ones; or a list of paths. Pixels are uint8; booleans; integers from 0 to 255;
    floats from 0 to 1; or any numbers, also uint8, with `levels`. They are stored in 8 bits.

    Args:
        method: a name of `inbatch.METHODS`; those that learn from labels use `y`.
        encoder: name of the encoder.
        epochs: passes over the images; not used with a budget.
        batch_size: samples per step, at most the number of images.
        image_size: side of the encoder's images in pixels; None: chosen by the size of the images.
        budget: time of one `fit`, such as "20m"; None: `epochs` is the length.
        init: a run or the folder of an encoder with initial weights; its encoder replaces `encoder`.
        settings: further settings of the recipe, {"method.temperature": 0.2}.
        image_shape: (H, W) or (H, W, C) of flattened images.
        levels: the two values of X that become 0 (black) and 255.
        seed: seed of weights, order and views.
        device: device of training and `transform`, or "auto".
        run_dir: new run directory, which is kept; None: a temporary one. With it, the list
            of paths is written to RUN_DIR.csv, which must not exist with other content.

    Attributes:
        encoder_: the trained encoder.
        channels_: number of channels of the images.
        n_features_in_: number of columns of flattened images.
    """

    def __init__(
        self,
        method: str = "simclr",
        *,
        encoder: str = "fast",
        epochs: int = 20,
        batch_size: int = 128,
        image_size: int | None = None,
        budget: str | None = None,
        init: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        image_shape: Sequence[int] | None = None,
        levels: Levels | None = None,
        seed: int = 0,
        device: str = "auto",
        run_dir: str | Path | None = None,
    ) -> None:
        self.method = method
        self.encoder = encoder
        self.epochs = epochs
        self.batch_size = batch_size
        self.image_size = image_size
        self.budget = budget
        self.init = init
        self.settings = settings
        self.image_shape = image_shape
        self.levels = levels
        self.seed = seed
        self.device = device
        self.run_dir = run_dir

    def fit(self, X: Any, y: Any = None) -> "BatchEncoder":
        """Train an encoder on images, and return the estimator.

        Args:
            X: N images, at least 2.
            y: labels (N,), for methods that learn from labels; other methods do not use them.

        Raises:
            ValueError: if X is of another form.
            ConfigError, DataError, TrainingError: as `inbatch.pretrain`; ConfigError if RUN_DIR.csv is another file.
        """
        learns = self.method in METHODS and METHODS[self.method].labels
        if learns and y is None:
            raise ValueError(f"method={self.method!r} learns from labels: requires y to be passed, but it is None")
        images = self._check_images(X, reset=True)
        if len(images) < 2:
            raise ValueError(f"Found array with {len(images)} sample(s) while a minimum of 2 is required to train.")
        if learns:
            check_consistent_length(images, y)
        with self._run_folder() as run:
            if isinstance(images, list):
                self.channels_ = 3
                table: Table = {"path": images} | ({"label": list(y)} if learns else {})
                with _listed(table, run) as paths:
                    self.encoder_ = self._train(str(paths), run, len(images))
                    self.channels_ = self.encoder_.channels  # those of `settings`
            else:
                source = open_arrays(images, None, Reading(levels=self._levels(images)))
                self.channels_, pixels = source.channels, source.images
                data = (pixels, np.asarray(y)) if learns else pixels
                self.encoder_ = self._train(data, run, len(images))
        return self

    def transform(self, X: Any) -> Float[np.ndarray, "n f"]:
        """Return the features (N, F) float32 of images; DataError if one cannot be read."""
        check_is_fitted(self)
        images = self._check_images(X, reset=False)
        encoder = self.encoder_.to(device_for(self.device))
        if isinstance(images, list):
            reading = Reading(self.channels_, encoder.levels or self.levels)
            source: Source = PathsSource("X", os.getcwd(), images, unlabelled(len(images)), (), reading)
        else:
            source = open_arrays(images, None, Reading(self.channels_, self._levels(images)))
        chunks = embed_stream(encoder, source, batch=256)
        return torch.cat([chunk.vectors for chunk in chunks]).numpy()

    def _train(self, data: Any, run: Path, count: int) -> Encoder:
        """Train in a run directory, and return the encoder."""
        fields: dict[str, Any] = {"channels": self.channels_, "batch_size": min(self.batch_size, count)}
        fields |= {"seed": self.seed, "image_size": self.image_size, "device": self.device, "out": run}
        fields |= {"levels": self.levels} if isinstance(data, str) else {}
        fields |= {"encoder": self.encoder} if self.init is None else {}
        fields |= {"budget": self.budget} if self.budget is not None else {"epochs": self.epochs}
        settings = dict(self.settings or {}) | ({} if self.init is None else {"encoder.init": str(self.init)})
        fields = {key: value for key, value in fields.items() if value is not None}
        try:
            return pretrain(data, self.method, settings=settings, quiet=True, **fields).encoder
        except (Preempted, Interrupted) as error:
            if self.run_dir is not None:
                raise
            raise type(error)("the fit was stopped, and its temporary run directory removed: fit again") from None

    def _check_images(self, X: Any, *, reset: bool) -> np.ndarray | list[str]:
        """Return images as an array of three or four sides, or a list of paths; ValueError for other forms."""
        if isinstance(X, str | os.PathLike):
            raise ValueError(f"X must be images or a list of paths, not one path, {X!r}")
        if isinstance(X, list | tuple) and X and all(isinstance(one, str | os.PathLike) for one in X):
            return [os.path.abspath(path_of(one, "X")) for one in X]
        if isinstance(X, torch.Tensor):
            X = (X.float() if X.dtype == torch.bfloat16 else X).detach().cpu().numpy()
        if (X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim) in (3, 4):
            images = np.asarray(X)
        else:
            rows = validate_data(self, X, reset=reset, dtype="numeric", ensure_min_samples=2 if reset else 1)
            images = rows.reshape(len(rows), *self._shape(rows.shape[1]))
        if images.dtype == bool:
            return images.astype(np.uint8) * 255
        return images.astype(np.uint16) if images.dtype == np.uint8 and self.levels is not None else images

    def _shape(self, features: int) -> tuple[int, ...]:
        """Return the shape of flattened images of so many features."""
        if self.image_shape is not None:
            shape = tuple(self.image_shape)
            if len(shape) not in (2, 3) or np.prod(shape) != features:
                raise ValueError(
                    f"image_shape={shape} does not fit images of {features} features; pass (H, W) or (H, W, C)"
                )
            return shape
        side = round(features**0.5)
        if side**2 != features or side < 2:
            raise ValueError(f"{features} feature(s) cannot form a square image: pass image_shape=(H, W) or (H, W, C)")
        return side, side

    def _levels(self, images: np.ndarray) -> Levels | None:
        """Return the values that become black and white; ValueError if they are not clear."""
        if self.levels is not None or images.dtype == np.uint8:
            return self.levels
        if images.dtype.kind not in "iuf":
            raise ValueError(f"X must hold numbers or paths, not {images.dtype}")
        low, high = float(images.min()), float(images.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("X contains NaN or infinity, which is no pixel: replace these values")
        white = 1.0 if images.dtype.kind == "f" else 255.0
        if not 0 <= low <= high <= white:
            raise ValueError(
                f"X has {images.dtype} values from {low:g} to {high:g}, and pixels are integers from 0 to 255 or "
                f"floats from 0 to 1: pass levels=({low:g}, {high:g}), or those that are black and white"
            )
        return 0.0, white

    @contextmanager
    def _run_folder(self) -> Iterator[Path]:
        """Yield the run directory."""
        if self.run_dir is not None:
            yield path_of(self.run_dir, "run_dir")
            return
        with TemporaryDirectory(prefix="inbatch-") as folder:
            yield Path(folder) / "run"

    @property
    def _n_features_out(self) -> int:
        return self.encoder_.feature_width

    def __sklearn_tags__(self) -> Any:
        """Return what X may be, for scikit-learn."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.target_tags.required = bool(self.method in METHODS and METHODS[self.method].labels)
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Return the parameters and the weights as bytes of a safetensors file, for pickle and joblib."""
        state = dict(super().__getstate__())
        if "encoder_" in state:
            weights, config = as_one(state["encoder_"])
            state["encoder_"] = {"weights": packed(weights), "config": config}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "encoder_" in state:
            saved = state["encoder_"]
            with usual_state():
                encoder = restored(safetensors.torch.load(saved["weights"]), saved["config"], Path("encoder_"))
            state = state | {"encoder_": encoder}
        super().__setstate__(state)
