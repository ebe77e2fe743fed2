"""From two label maps to numbers: Dice, Jaccard and surface distances per volume, and how they are averaged.

A segmentation paper's "Dice" or "ASD" is one of several quantities. Each one here is defined in `volume_metrics`; those
that other papers' code computes stand beside ours under names of their own.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast, get_args

import numpy as np
import pandas as pd
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medlib.data import load_volume
from medlib.data.prepare import Prepared

Predict = Callable[[Tensor], Tensor]
"""A network at work, in evaluation mode: (B, 1, ...) images to (B, C, ...) class probabilities that sum to 1 over C."""

Metric = Literal["dice", "jaccard", "assd", "hd95", "asd_directed_voxels", "hd95_pooled"]
METRICS: tuple[Metric, ...] = get_args(Metric)
"""The numbers in a `ClassMetrics`; the first two need no distances."""


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
    counts = np.zeros(count * count, dtype=np.intp)
    for predicted, true in zip(prediction, label, strict=True):  # by slices: a count needs 8 bytes a voxel
        counts += np.bincount((predicted.astype(np.intp) * count + true).ravel(), minlength=count * count)
    return counts.reshape(count, count)


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

    Raises ValueError for shapes that differ or are not 3D, fractional or negative labels, labels beyond the classes,
    and a spacing that is not three positive numbers.
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


def pooled_dice(pairs: Iterable[tuple[ArrayLike, ArrayLike]], classes: int | Sequence[str]) -> dict[str, float]:
    """The "Dice" of the code that PCL and CORAL released: one figure per foreground class for all volumes at once.

    pairs: (prediction, label) per volume, each (Z, H, W). Voxels are counted over all volumes before the ratio is
    taken, so large hearts weigh more than small ones and a missed apex is hardly felt; a class that neither side ever
    shows counts as 0, as it does there. That code counts on its resampled and padded grid; here it is whatever grid the
    pairs are on. Not comparable with the mean of per-volume Dice. Raises ValueError as `volume_metrics`.
    """
    names = class_names(classes)
    return _pooled(sum((_confusion(prediction, label, names) for prediction, label in pairs), _no_counts(names)), names)


def _no_counts(names: tuple[str, ...]) -> NDArray[np.integer]:
    return np.zeros((len(names), len(names)), dtype=int)


def _pooled(counts: NDArray[np.integer], names: tuple[str, ...]) -> dict[str, float]:
    sizes = counts.sum(axis=0) + counts.sum(axis=1)
    return {name: float(2 * counts[i, i] / sizes[i]) if sizes[i] else 0.0 for i, name in enumerate(names) if i}


class Summary(TypedDict):
    """What `summarise` says about a set of volumes. ``mean`` averages the six metrics over the classes.

    Per class (``classes``) and for all of them together stand the six means and these counts:

    - ``volumes``       volumes whose label has the class (at the top level: all volumes)
    - ``missed``        of these, where the prediction has none of it: Dice 0, distances undefined and in no mean
    - ``absent``        volumes whose label lacks the class; they are in no mean
    - ``false_alarms``  of those, where the prediction shows the class all the same
    """

    classes: dict[str, dict[str, float]]
    mean: dict[str, float]
    volumes: int
    missed: int
    absent: int
    false_alarms: int
    unit: str


def _mean(values: Iterable[float]) -> float:
    """The mean of the values that are not NaN; NaN when there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def summarise(per_volume: Sequence[Mapping[str, ClassMetrics]]) -> Summary:
    """Averages what `volume_metrics` found: over the volumes whose label has the class, then over foreground classes.

    A missed class (empty prediction) enters the Dice and Jaccard means as 0. It cannot enter the distance means, so
    these flatter a method that misses often: read them beside ``missed``. A class that no label has is left out of the
    mean over classes; a class that is always missed makes the mean distances NaN rather than dropping out of them.

    Raises ValueError when there is no volume, or when volumes differ in their classes or in the unit of distance.
    """
    names = list(per_volume[0]) if per_volume else []
    units = {metrics["unit"] for volume in per_volume for metrics in volume.values()}
    if not names or any(list(volume) != names for volume in per_volume):
        raise ValueError(f"need at least one volume, all with the same classes; got {[list(v) for v in per_volume]}")
    if len(units) > 1:
        raise ValueError("some distances are in mm and some in voxels (no spacing): summarise the two groups apart")
    classes: dict[str, dict[str, float]] = {}
    for name in names:
        present = [volume[name] for volume in per_volume if not volume[name]["empty_label"]]
        absent = [volume[name] for volume in per_volume if volume[name]["empty_label"]]
        classes[name] = {metric: _mean(found[metric] for found in present) for metric in METRICS} | {
            "volumes": len(present),
            "missed": sum(found["empty_prediction"] for found in present),
            "absent": len(absent),
            "false_alarms": sum(not found["empty_prediction"] for found in absent),
        }
    shown = [found for found in classes.values() if found["volumes"]]
    return Summary(
        classes=classes,
        mean={metric: sum(found[metric] for found in shown) / len(shown) if shown else math.nan for metric in METRICS},
        volumes=len(per_volume),
        missed=sum(int(found["missed"]) for found in classes.values()),
        absent=sum(int(found["absent"]) for found in classes.values()),
        false_alarms=sum(int(found["false_alarms"]) for found in classes.values()),
        unit=units.pop(),
    )


@dataclass(frozen=True)
class CaseMetrics:
    """The metrics of one scan: its id, its patient, what the release says about it, and one entry per class."""

    case: str
    patient: str
    info: Mapping[str, str]
    classes: dict[str, ClassMetrics]


@dataclass(frozen=True)
class Evaluation:
    """A set of scans, each measured on its own grid; ``pooled`` is their `pooled_dice`."""

    cases: tuple[CaseMetrics, ...]
    pooled: dict[str, float]

    @property
    def summary(self) -> Summary:
        """Means and counts, see `summarise`."""
        return summarise([case.classes for case in self.cases])

    def frame(self, metric: Metric = "dice") -> pd.DataFrame:
        """One metric as a table: a row per scan, indexed by (patient, case), and a column per foreground class.

        Raises ValueError for a name that is not in `METRICS`.
        """
        if metric not in METRICS:
            raise ValueError(f"there is no metric {metric!r}; choose from {METRICS}")
        index = pd.MultiIndex.from_tuples([(c.patient, c.case) for c in self.cases], names=["patient", "case"])
        rows = [{name: metrics[metric] for name, metrics in c.classes.items()} for c in self.cases]
        return pd.DataFrame(rows, index=index, dtype=float)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with null for what is undefined. The summary is added for the reader's eye."""
        cases = [{"case": c.case, "patient": c.patient, "info": dict(c.info), "classes": c.classes} for c in self.cases]
        return _nan_to_none({"summary": self.summary, "pooled_dice": self.pooled, "cases": cases})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        """What `to_dict` wrote; the summary is computed anew. Raises ValueError that names the entry that is wrong."""
        cases = []
        for number, case in enumerate(_entry(values, "cases", list, "")):
            where = f"cases[{number}]."
            classes = {}
            for name in _entry(case, "classes", dict, where):
                place = f"{where}classes.{name}."
                metrics = _entry(case["classes"], name, dict, f"{where}classes.")
                kept: dict[str, Any] = {
                    key: _entry(metrics, key, bool, place) for key in ("empty_prediction", "empty_label")
                }
                kept["unit"] = _entry(metrics, "unit", str, place)
                for key in METRICS:
                    value = _entry(metrics, key, (float, int, type(None)), place)
                    kept[key] = math.nan if value is None else float(value)
                classes[name] = cast(ClassMetrics, kept)
            info = _entry(case, "info", dict, where)
            cases.append(
                CaseMetrics(_entry(case, "case", str, where), _entry(case, "patient", str, where), info, classes)
            )
        return cls(tuple(cases), _entry(values, "pooled_dice", dict, ""))


def _entry(values: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``values[key]`` if it is of that kind (a bool is no number), else a ValueError that says where."""
    if not isinstance(values, Mapping) or key not in values:
        raise ValueError(f"'{where}{key}' is missing")
    value = values[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"'{where}{key}' must be {kinds}, got {value!r}")
    return value


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def predict_volume(predict: Predict, image: Tensor, *, batch_size: int = 16) -> Tensor:
    """Class probabilities (C, Z, H, W), float32, of one prepared scan as `Prepared.inputs` gives it.

    A 2D network sees ``batch_size`` slices of (Z, 1, H, W) at a time, a 3D network the volume (1, 1, Z, H, W); see
    `medlib.train.predictor` for how it goes through it by windows.

    Raises ValueError for an image of another shape, and when ``predict`` returns anything but finite probabilities.
    """
    if image.ndim not in (4, 5) or image.shape[1] != 1 or not len(image) or (image.ndim == 5 and len(image) > 1):
        raise ValueError(f"image must be one scan, (Z, 1, H, W) or (1, 1, Z, H, W); got {tuple(image.shape)}")
    with torch.inference_mode():
        batches = [predict(images).float() for images in image.split(batch_size)]
        predicted = batches[0] if len(batches) == 1 else torch.cat(batches)
        if predicted.ndim != image.ndim or predicted[:, 0].shape != image[:, 0].shape:
            shape = tuple(predicted.shape)
            raise ValueError(f"predict must keep the image grid: got {shape} (B, C, ...) for {tuple(image.shape)}")
        # of slices (Z, C, H, W) or of one volume (1, C, Z, H, W)
        probabilities = predicted.transpose(0, 1).flatten(1, -3)  # (C, Z, H, W)
        # 0.05: half-precision probabilities need not sum to exactly 1; logits are further off, and NaN compares False.
        if not bool(((probabilities.sum(0) - 1).abs() < 0.05).all()):
            raise ValueError("predict must return finite probabilities that sum to 1 over classes (softmax the logits)")
    return probabilities


def segment(
    predict: Predict,
    prepared: Prepared,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
) -> NDArray[np.uint8]:
    """The label map (Z, H, W) of one scan on its own grid: `predict_volume` on ``device``, then its ``restore``."""
    return prepared.restore(predict_volume(predict, prepared.inputs().to(device), batch_size=batch_size))


def evaluate(
    predict: Predict,
    prepared: Sequence[Prepared],
    classes: int | Sequence[str],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    distances: bool = True,
) -> Evaluation:
    """Segments every scan and measures it against its own label on its own grid, with its own spacing.

    One scan is in memory at a time: its image and label as they are, and C float32 probabilities of every voxel of the
    prepared grid, on ``device``.

    See `predict_volume` for ``batch_size``, `volume_metrics` for ``distances``. Raises ValueError when there is no scan
    or one of them has no label.
    """
    names = class_names(classes)
    unlabelled = [scan.case.case for scan in prepared if not scan.case.labels]
    if unlabelled or not prepared:
        raise ValueError(f"evaluation needs at least one scan and all with labels; without a label: {unlabelled}")
    cases = []
    counts = _no_counts(names)
    for scan in prepared:
        prediction = segment(predict, scan, device=device, batch_size=batch_size)
        volume = load_volume(scan.case)
        metrics = volume_metrics(prediction, cast(NDArray, volume.label), names, volume.spacing, distances=distances)
        counts += _confusion(prediction, cast(NDArray, volume.label), names)
        cases.append(CaseMetrics(scan.case.case, scan.case.patient, dict(scan.case.info), metrics))
    return Evaluation(tuple(cases), _pooled(counts, names))
