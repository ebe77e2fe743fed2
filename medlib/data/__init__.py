"""Files in, tensors out: `read_dataset` finds scans, `load_volume` reads one, `prepare` makes arrays of all."""

from .cases import Case, DataError, DatasetInfo, Volume, labelled_cases, slice_positions
from .check import check_dataset
from .phantoms import write_phantoms
from .prepare import Prepared, Protocol, VolumeProtocol, learn_statistics, prepare
from .readers import DATASETS, dataset_info, load_volume, read_dataset
from .splits import Split, split_cases

__all__ = [
    "DATASETS",
    "Case",
    "DataError",
    "DatasetInfo",
    "Prepared",
    "Protocol",
    "Split",
    "Volume",
    "VolumeProtocol",
    "check_dataset",
    "dataset_info",
    "labelled_cases",
    "learn_statistics",
    "load_volume",
    "prepare",
    "read_dataset",
    "slice_positions",
    "split_cases",
    "write_phantoms",
]
