"""Image sources, decoding, the data loader and augmented views."""

from inbatch.data.loader import Loader
from inbatch.data.open import OPENERS, open_data, splits
from inbatch.data.resident import Resident, decode_all
from inbatch.data.source import SKIPPED, Reading, Source, Subset
from inbatch.data.sources.arrays import GreyAsRGB
from inbatch.data.sources.folder import write_folder
from inbatch.data.sources.labels import NO_LABELS
from inbatch.data.sources.split_names import find_split
from inbatch.data.workers import lost_workers

__all__ = [
    "NO_LABELS",
    "OPENERS",
    "SKIPPED",
    "GreyAsRGB",
    "Loader",
    "Reading",
    "Resident",
    "Source",
    "Subset",
    "decode_all",
    "find_split",
    "lost_workers",
    "open_data",
    "splits",
    "write_folder",
]
