"""What MMWHS and CHD share: a chest with a whole heart is drawn and scanned."""

import numpy as np

from medlib.data.phantoms.solids import Warp
from medlib.data.phantoms.volumes import Geometry, Scan, draw_size, take
from medlib.data.phantoms.whole_heart import PARTS, TISSUES, draw_heart

FRONT = 2.0  # mm from the body's origin to the middle of the scan, forwards


def cardiac_scan(
    rng: np.random.Generator, geometry: Geometry, modality: str, kind: str, *, whole_aorta: bool, size: float = 1.0
) -> Scan:
    """A scan of a heart of `kind` in a body of that `size`; labels follow `PARTS`."""
    stretch = draw_size(rng, size)
    solids = draw_heart(rng, modality, kind, whole_aorta=whole_aorta)
    stack = geometry.draw(rng, FRONT, stretch)
    warp = Warp.draw(rng, stack, 65.0 * size, 2.6)
    return take(rng, solids, PARTS, stack, warp, modality, TISSUES[modality]["air"][0])
