"""From two label maps to numbers: Dice, Jaccard and surface distances per volume, and how they are averaged.

A segmentation paper's "Dice" or "ASD" is one of several quantities. Each one here is defined in `volume_metrics`; those
that other papers' code computes stand beside ours under names of their own.
"""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from monai.metrics.utils import get_mask_edges, get_surface_distance
from numpy.typing import ArrayLike, NDArray

Spacing = tuple[float, float, float]


class ClassMetrics(TypedDict):
    """What `volume_metrics` says about one class of one volume. An undefined number is NaN."""

    dice: float
    jaccard: float
    assd: float
    hd95: float
    asd_directed_voxels: float
    hd95_pooled: float
    unit: str
    empty_prediction: bool
    empty_label: bool


def class_names(classes: int | Sequence[str]) -> tuple[str, ...]:
    """The names of all classes, background first: those given, or "0", "1", ... for a count.

    Raises ValueError for fewer than two classes or for a name that stands twice.
    """
    names = tuple(str(i) for i in range(classes)) if isinstance(classes, int) else tuple(classes)
    if isinstance(classes, str) or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"classes must be a count or distinct names, at least 2 with the background; got {classes!r}")
    return names


def _label_map(array: ArrayLike, argument: str, names: tuple[str, ...]) -> NDArray[np.integer]:
    """`array` as a checked integer map (Z, H, W)."""
    array = np.asarray(array)
    if array.ndim != 3 or not array.size:
        raise ValueError(f"{argument} must be a label map (Z, H, W), got shape {array.shape}")
    if array.dtype != bool and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{argument} must hold whole numbers, got {array.dtype}; take the argmax of probabilities")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= len(names):
        raise ValueError(f"{argument} holds labels {low} to {high}, but the classes are 0 to {len(names) - 1}: {names}")
    return array


def _confusion(prediction: ArrayLike, label: ArrayLike, names: tuple[str, ...]) -> NDArray[np.integer]:
    """Voxel counts (C, C) of one volume: rows are the predicted class, columns the label's."""
    prediction, label = _label_map(prediction, "prediction", names), _label_map(label, "label", names)
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} must have the same shape (Z, H, W)")
    count = len(names)
    pairs = prediction.astype(np.intp).ravel() * count + label.ravel()
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def _crop(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box that holds both masks. Cropping to it moves no edge: outside an array counts as background."""
    union = first | second
    box = []
    for axis in range(union.ndim):
        hit = np.flatnonzero(union.any(axis=tuple(a for a in range(union.ndim) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def volume_metrics(
    prediction: ArrayLike,
    label: ArrayLike,
    classes: int | Sequence[str],
    spacing: Sequence[float] | None,
    *,
    distances: bool = True,
) -> dict[str, ClassMetrics]:
    """Overlap and surface distance of every foreground class of one volume.

    prediction, label: (Z, H, W) whole numbers in 0..C-1, 0 = background, on the same grid (the scan's own, for a number
    to report). classes: their count or their names, background included. spacing: (z, y, x) in mm, or None where it is
    not known; distances are then in voxels, and ``unit`` says which it is, "mm" or "voxel".

    Returns ``{class name: ClassMetrics}`` without the background. With P and G the voxels of a class in prediction and
    label, and their surfaces dP and dG the voxels with a face neighbour outside (outside the array counts as outside),
    a directed distance set D(P, G) holds for each voxel of dP the Euclidean distance to the nearest voxel of dG:

    - ``dice``                 2 |P & G| / (|P| + |G|), in [0, 1]
    - ``jaccard``              |P & G| / |P | G|, in [0, 1]; equals dice / (2 - dice)
    - ``assd``                 pooled: the mean over all of D(P, G) and D(G, P) together, not the mean of the two means
      (MONAI ``symmetric=True``, medpy >= 0.5 ``assd``)
    - ``hd95``                 the larger of the 95th percentiles of D(P, G) and of D(G, P) (MONAI ``percentile=95``)
    - ``hd95_pooled``          the 95th percentile of both sets together (medpy ``hd95``)
    - ``asd_directed_voxels``  the mean of D(P, G) alone, in voxels whatever the spacing: medpy's ``asd`` as the
      semi-supervised papers call it; blind to parts of G that P misses

    Empty masks. The label lacks the class: everything is NaN, for there is nothing to find, and ``empty_label`` is set
    (a prediction there is a false alarm: ``empty_label and not empty_prediction``). Only the prediction lacks it: dice
    and jaccard are 0, the distances are NaN, and ``empty_prediction`` is set. `summarise` counts all three.

    ``distances=False`` leaves all four distances NaN, which makes it about 20 times faster: enough for the choice of a
    checkpoint by Dice.

    Raises ValueError for shapes that differ or are not 3D, fractional or negative labels, labels beyond the classes, and
    a spacing that is not three positive numbers.
    """
    names = class_names(classes)
    counts = _confusion(prediction, label, names)
    prediction, label = np.asarray(prediction), np.asarray(label)
    if spacing is not None:
        spacing = tuple(float(s) for s in spacing)
        if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
            raise ValueError(f"spacing must be three positive numbers (z, y, x) in mm, or None; got {spacing}")
    metrics = {}
    for index, name in enumerate(names[1:], start=1):
        both, predicted, present = (int(n) for n in (counts[index, index], counts[index].sum(), counts[:, index].sum()))
        found = ClassMetrics(
            dice=2 * both / (predicted + present) if present else math.nan,
            jaccard=both / (predicted + present - both) if present else math.nan,
            assd=math.nan,
            hd95=math.nan,
            asd_directed_voxels=math.nan,
            hd95_pooled=math.nan,
            unit="voxel" if spacing is None else "mm",
            empty_prediction=not predicted,
            empty_label=not present,
        )
        if predicted and present and distances:
            first, second = prediction == index, label == index
            box = _crop(first, second)
            edges = get_mask_edges(first[box], second[box], crop=False)
            forth = np.asarray(get_surface_distance(edges[0], edges[1], spacing=spacing), dtype=float)  # D(P, G)
            back = np.asarray(get_surface_distance(edges[1], edges[0], spacing=spacing), dtype=float)  # D(G, P)
            voxels = forth if spacing is None else np.asarray(get_surface_distance(edges[0], edges[1]), dtype=float)
            pooled = np.concatenate([forth, back])
            found["assd"] = float(pooled.mean())
            found["hd95"] = float(max(np.percentile(forth, 95), np.percentile(back, 95)))
            found["hd95_pooled"] = float(np.percentile(pooled, 95))
            found["asd_directed_voxels"] = float(voxels.mean())
        metrics[name] = found
    return metrics
