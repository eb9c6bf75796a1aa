"""Evaluation of an encoder on two data sets: figures with their protocol, independent of the method."""

from inbatch.evaluation.clustering import ari, assigned, clustering, hungarian_accuracy, nmi
from inbatch.evaluation.collapse_metrics import alpha_req, feature_std, lidar, rankme, sigreg_distance
from inbatch.evaluation.corruptions import CORRUPTIONS, Chance, corruptions
from inbatch.evaluation.embed import Kept, embed, embed_stream, hold_in_memory, readable
from inbatch.evaluation.embeddings import Embeddings
from inbatch.evaluation.evaluate import PROTOCOL_VERSION, PROTOCOLS, evaluate
from inbatch.evaluation.export import Tokens, write_embeddings
from inbatch.evaluation.few_labels import SHARES, evaluate_few_labels, few_labels
from inbatch.evaluation.finetune import TUNINGS, Finetune, Tuned, finetune, tune
from inbatch.evaluation.knn import knn, knn_scores
from inbatch.evaluation.linear_probe import linear_probe
from inbatch.evaluation.probe_presets import PROBES, Lbfgs, Sgd
from inbatch.evaluation.raw_pixels import raw_pixels
from inbatch.evaluation.retrieval import retrieval

__all__ = [
    "CORRUPTIONS",
    "PROBES",
    "PROTOCOLS",
    "PROTOCOL_VERSION",
    "SHARES",
    "TUNINGS",
    "Chance",
    "Embeddings",
    "Finetune",
    "Kept",
    "Lbfgs",
    "Sgd",
    "Tokens",
    "Tuned",
    "alpha_req",
    "ari",
    "assigned",
    "clustering",
    "corruptions",
    "embed",
    "embed_stream",
    "evaluate",
    "evaluate_few_labels",
    "feature_std",
    "few_labels",
    "finetune",
    "hold_in_memory",
    "hungarian_accuracy",
    "knn",
    "knn_scores",
    "lidar",
    "linear_probe",
    "nmi",
    "rankme",
    "raw_pixels",
    "readable",
    "retrieval",
    "sigreg_distance",
    "tune",
    "write_embeddings",
]
