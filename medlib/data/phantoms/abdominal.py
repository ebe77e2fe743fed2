"""What the abdominal releases (BTCV, FLARE22, AMOS22, LiTS) share: a patient is drawn and scanned."""

from collections.abc import Sequence

import numpy as np

from medlib.data.phantoms.abdomen import ORGANS, draw_abdomen
from medlib.data.phantoms.short_axis import Range
from medlib.data.phantoms.solids import Warp
from medlib.data.phantoms.volumes import Geometry, Scan, draw_size, take

FRONT = -4.0  # mm from the body's origin to the middle of the trunk, forwards
SMALL = Range(3.55, 4.0)  # in-plane voxel of a small scan of 96 x 96, mm


def abdominal_scan(rng: np.random.Generator, geometry: Geometry, modality: str = "CT", tumours: int = 0) -> Scan:
    """A scan of an abdomen that covers what `geometry` says; labels follow `ORGANS`."""
    size = draw_size(rng)
    abdomen = draw_abdomen(rng, modality, tumours)
    stack = geometry.draw(rng, FRONT, size)
    return take(rng, abdomen.solids, ORGANS, stack, Warp.draw(rng, stack, 80.0, 4.0), modality, abdomen.tissues["air"])


def label_values(classes: Sequence[str]) -> np.ndarray:
    """What a release whose label values are the places in `classes` stores for each of `ORGANS`; 0 for the others."""
    return np.array([0, *(classes.index(organ) if organ in classes else 0 for organ in ORGANS)], np.uint8)
