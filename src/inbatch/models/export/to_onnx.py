"""Target `onnx`: a graph for onnxruntime and other runtimes, from uint8 images to features or probabilities."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inbatch.errors import ConfigError, reason
from inbatch.models.classifier import Classifier
from inbatch.models.encoder import Encoder
from inbatch.models.export.graph import traced
from inbatch.models.export.target import Written, compare, file_of, library, rows_of

OPSET = 18
"""Version of the operators: that of torch's exporter, which every onnxruntime since 1.14 (2023) reads."""
_ONE_FILE = 1_900_000_000
"""Bytes of weights up to which they are in the same file: a file of protobuf ends at 2 GiB."""


def write(model: Encoder | Classifier, folder: Path, facts: Mapping[str, Any]) -> Written:
    """Write encoder.onnx (uint8 images of any number -> features), and compare the features of onnxruntime.

    Of a classifier, classifier.onnx, with probabilities. The facts are metadata: JSON texts under "inbatch.NAME".
    """
    try:
        import onnx  # noqa: F401 - the exporter needs both, and says so only after tracing
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'this export needs more libraries ({reason(error)}): pip install "inbatch[onnx]"') from None
    program, file = traced(model), file_of(model, ".onnx")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own dependencies
            graph = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=[rows_of(model)],
                verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises any exception for an operator without translation
        raise ConfigError(
            f"torch.onnx cannot export {model.name} ({reason(error)[:300]}): choose the target torch"
        ) from error
    assert graph is not None
    graph.model.metadata_props.update({f"inbatch.{key}": json.dumps(value) for key, value in facts.items()})
    size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    graph.save(folder / file, external_data=size > _ONE_FILE)
    session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
    difference, largest = compare(
        model, lambda images: session.run(None, {"images": images.numpy()})[0], f"the ONNX file of {model.name}"
    )
    load = f"onnxruntime.InferenceSession(OUT + '/{file}').run(None, {{'images': images}})"
    return Written(library("onnxruntime"), difference, largest, load, more={"opset": OPSET})
