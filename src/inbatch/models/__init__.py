"""Encoders (a backbone with pooled features), and the online and target networks that train them."""

from inbatch.models.attention_slots import ATTENDS, added, install, without
from inbatch.models.classifier import Classifier, load_classifier, save_classifier
from inbatch.models.encoder import MAX_SIDE, Encoder
from inbatch.models.factory import create_encoder, load_encoder
from inbatch.models.input_sizes import check_side
from inbatch.models.prepare import Prepare
from inbatch.models.transform import Transform
from inbatch.models.weights import save_encoder

__all__ = [
    "ATTENDS",
    "MAX_SIDE",
    "Classifier",
    "Encoder",
    "Prepare",
    "Transform",
    "added",
    "check_side",
    "create_encoder",
    "install",
    "load_classifier",
    "load_encoder",
    "save_classifier",
    "save_encoder",
    "without",
]
