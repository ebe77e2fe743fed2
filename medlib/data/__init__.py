"""Files in, tensors out: `read_dataset` finds scans, `load_volume` reads one, `prepare` makes arrays of all."""

from .cases import Case, DataError, DatasetInfo, Volume, labelled_cases, slice_positions
from .readers import DATASETS, dataset_info, load_volume, read_dataset

__all__ = [
    "DATASETS",
    "Case",
    "DataError",
    "DatasetInfo",
    "Volume",
    "dataset_info",
    "labelled_cases",
    "load_volume",
    "read_dataset",
    "slice_positions",
]
