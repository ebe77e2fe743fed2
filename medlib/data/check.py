"""A look at a data set before anything is trained on it: what is there, what is odd, what would stop a training."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..paths import resolve, shorten
from .cases import Case, DataError, DatasetInfo, Volume, labelled_cases
from .nifti import check_whole
from .phantoms import is_phantom
from .readers import dataset_info, find_reader, load_volume, read_dataset
from .scans import UNSTATED

PIXELS = 200  # of the longer side of the slice that is kept of each scan
SAMPLES = 20_000  # voxels of each scan that are kept for histograms
PLAUSIBLE = (0.1, 20.0)  # mm between voxels


@dataclass
class Summary:
    """What is kept of one scan: a volume is looked at and let go.

    `image` and `label` are one slice, the middle one of those that show a structure, every n-th pixel of it; `aspect`
    is the height of its pixels over their width. `sample` and `sample_label` are voxels spread over the volume.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    low: float
    median: float
    high: float
    extent: float  # from the lowest voxel to the highest
    voxels: np.ndarray | None  # (C,) label voxels per class
    image: np.ndarray
    label: np.ndarray | None
    sample: np.ndarray
    sample_label: np.ndarray | None
    digest: str  # equal for equal images
    remarks: tuple[str, ...]

    @property
    def aspect(self) -> float:
        """Height over width of a pixel of the slice, in mm."""
        return 1.0 if self.spacing is None else self.spacing[1] / self.spacing[2]

    @classmethod
    def of(cls, volume: Volume, classes: int) -> "Summary":
        """Summarise a loaded volume; intensities are its 1st, 50th and 99th percentile."""
        low, median, high = np.percentile(volume.image, (1, 50, 99))
        voxels, shown = None, None
        middle = len(volume.image) // 2
        if volume.label is not None:
            voxels = np.bincount(volume.label.ravel(), minlength=classes)
            seen = np.flatnonzero((volume.label > 0).any(axis=(1, 2)))
            middle = int(seen[len(seen) // 2]) if len(seen) else middle
        depth, height, width = volume.image.shape
        step = max(1, -(-max(height, width) // PIXELS))
        cut = (middle, slice(None, None, step), slice(None, None, step))
        spread = slice(None, None, max(1, volume.image.size // SAMPLES) | 1)  # odd, so that no column is always met
        sampled = None
        if volume.label is not None:
            shown, sampled = volume.label[cut].copy(), volume.label.ravel()[spread].copy()
        sample = volume.image.ravel()[spread].copy()
        digest = hashlib.sha256(repr(volume.image.shape).encode() + sample.tobytes()).hexdigest()
        return cls(
            (depth, height, width), volume.spacing, float(low), float(median), float(high),
            float(volume.image.max()) - float(volume.image.min()), voxels,
            volume.image[cut].copy(), shown, sample, sampled, digest, volume.remarks,
        )  # fmt: skip


@dataclass
class Report:
    """What `check_dataset` found. `problems` stop a training; `anomalies` and `notes` are worth knowing."""

    info: DatasetInfo
    root: Path
    cases: list[Case] = field(default_factory=list)
    summaries: dict[str, Summary] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    anomalies: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    phantom: bool = False

    @property
    def title(self) -> str:
        """The data set's title, and that it is a phantom where it is one."""
        return f"PHANTOM, drawn: {self.info.title}" if self.phantom else self.info.title

    @property
    def ok(self) -> bool:
        """Whether a training can start."""
        return not self.problems

    def text(self) -> str:
        """The report as plain text."""
        lines = [f"{self.title} in {shorten(self.root)}"]
        if self.cases:
            lines += self._contents()
        if self.summaries:
            lines += self._measures()
        for title, entries in (("Notes", self.notes), ("Anomalies", self.anomalies), ("Problems", self.problems)):
            lines += [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
        lines.append("Ready to train." if self.ok else "Not usable until the problems are solved.")
        return "\n".join(lines)

    __str__ = text

    def _contents(self) -> list[str]:
        labelled = labelled_cases(self.cases)
        parts: dict[str, set[str]] = {}
        for case in self.cases:
            parts.setdefault(case.part or "no part given", set()).add(case.patient)
        files = {path for case in self.cases for path in (*case.images, *case.labels)}
        lines = [
            f"  read as   {self.cases[0].reader}, {len(files)} files",
            f"  patients  {len({case.patient for case in self.cases})}"
            f" ({', '.join(f'{len(patients)} {part}' for part, patients in parts.items())})",
            f"  scans     {len(self.cases)}, {len(labelled)} with label"
            f" ({len({case.patient for case in labelled})} patients)",
        ]
        for key in sorted({key for case in self.cases for key in case.info}):
            counts = Counter(case.info[key] for case in self.cases if key in case.info)
            lines.append(f"  {key:<9} {', '.join(f'{count} {value}' for value, count in sorted(counts.items()))}")
        return lines

    def _measures(self) -> list[str]:
        found = list(self.summaries.values())
        shapes = np.array([summary.shape for summary in found])
        lines = [f"  slices    {shapes[:, 0].sum()} in {len(found)} scans looked at"]
        for axis, name in enumerate(("depth", "height", "width")):
            lines.append(f"  {name:<9} {_range(shapes[:, axis])}")
        spacings = np.array([summary.spacing for summary in found if summary.spacing])
        if len(spacings):
            lines.append(
                f"  spacing   {_range(spacings[:, 0], 'mm')} between slices, {_range(spacings[:, 1:], 'mm')} in plane"
            )
        else:
            lines.append("  spacing   not stored: distances in voxels only, no resampling")
        lows, highs = [summary.low for summary in found], [summary.high for summary in found]
        lines.append(f"  intensity 1st percentile {_range(lows)}, 99th {_range(highs)}")
        counts = [summary.voxels for summary in found if summary.voxels is not None]
        if counts:
            total = np.sum(counts, axis=0)
            widest = max(10, *map(len, self.info.classes))
            for index, name in enumerate(self.info.classes):
                share, scans = total[index] / total.sum(), sum(bool(count[index]) for count in counts)
                lines.append(f"  class {index:<3} {name:<{widest}} {share:7.3%} of voxels, {scans}/{len(counts)} scans")
        return lines


def _range(values: np.ndarray | list[float], unit: str = "") -> str:
    low, high = float(np.min(values)), float(np.max(values))
    text = f"{low:.4g}" if np.isclose(low, high) else f"{low:.4g}..{high:.4g}"
    return f"{text} {unit}".rstrip()


def check_dataset(name: str, root: str | Path, workers: int = 2, progress: bool = False) -> Report:
    """Look at every scan of the data set `name` under `root`: the labelled ones and one unlabelled frame of each file.

    What is wrong with the data is in the report's `problems`, not raised. Raises `ValueError` for an unknown name only.
    """
    folder = resolve(root)
    report = Report(dataset_info(name), folder)
    report.phantom = is_phantom(folder)
    try:
        report.cases = read_dataset(name, folder)
        report.info = report.cases[0].about
        report.notes = find_reader(name, folder).notes(folder)
    except (DataError, FileNotFoundError) as error:
        report.problems.append(str(error))
        return report
    once = {(case.images[0], bool(case.labels)): case for case in report.cases}

    def look(case: Case) -> tuple[Case, Summary | str]:
        try:
            for path in {*case.images, *case.labels}:
                check_whole(path)
            return case, Summary.of(load_volume(case), len(case.about.classes))
        except (DataError, FileNotFoundError) as error:
            return case, str(error)

    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(look, once.values())
        for case, result in tqdm(results, total=len(once), desc=f"checking {name}", unit="scan", disable=not progress):
            if isinstance(result, str):
                report.problems.append(result)
            else:
                report.summaries[case.case] = result
    report.anomalies = _anomalies(report)
    labelled = labelled_cases(report.cases)
    if not labelled:
        report.problems.append(
            f"none of the {len(report.cases)} scans in {folder} has a label: nothing can be learnt or measured"
        )
    elif len({case.patient for case in labelled}) < 2:
        report.problems.append("only one patient has a label: one to learn from and one to choose on are the least")
    found = [summary.voxels for summary in report.summaries.values() if summary.voxels is not None]
    if found and not any(voxels[1:].any() for voxels in found):
        report.problems.append(f"all {len(found)} labels are background everywhere: nothing can be learnt")
    return report


def _anomalies(report: Report) -> list[str]:
    """Scans that can be used and yet deserve a look."""
    found = _twins(report)
    names = report.info.classes
    modality = {case.case: case.info.get("modality", report.info.modality) for case in report.cases}

    def hounsfield(name: str) -> bool:
        return report.info.window is not None and modality[name] == "CT"

    for name, summary in report.summaries.items():
        found += [f"{name}: {remark}" for remark in summary.remarks]
        if summary.voxels is not None:
            if not summary.voxels[1:].any():
                found.append(f"{name} has a label that is all background")
            elif (summary.voxels == 0).any():
                found.append(f"{name} has no {', no '.join(names[i] for i in np.flatnonzero(summary.voxels == 0))}")
        if summary.extent > 1000 * max(summary.high - summary.low, 1e-12):
            found.append(f"{name} has voxels far beyond all others (over {summary.extent:.4g}): they flatten the rest")
        if hounsfield(name) and (summary.low > -200 or summary.high < 0):
            found.append(
                f"{name} has intensities {summary.low:.4g}..{summary.high:.4g}: are these HU, as the window is?"
            )
        if summary.shape[0] < 3:
            found.append(f"{name} has only {summary.shape[0]} slices")
        if summary.spacing is not None:
            found += _odd_spacing(name, summary.spacing)
    counts = [summary.voxels for summary in report.summaries.values() if summary.voxels is not None]
    if counts:
        absent = np.flatnonzero(np.sum(counts, axis=0) == 0)
        found += [f"no scan at all has {names[i]}: nothing can be learnt about it" for i in absent]
    widths = {name: summary.high - summary.low for name, summary in report.summaries.items()}
    middle = float(np.median(list(widths.values()))) if widths else 0.0
    odd = [name for name, width in widths.items() if not middle / 10 <= width <= middle * 10]
    found += [f"{name} has intensities over {widths[name]:.4g}, the median scan over {middle:.4g}" for name in odd[:3]]
    if len(odd) > 3:
        found.append(f"{len(odd) - 3} more scans have intensities ten times wider or narrower than the median scan")
    unstated = [case.case for case in report.cases if case.info.get("axes") == UNSTATED]
    if unstated:
        found.append(f"{len(unstated)} headers do not say how the scan lies ({unstated[0]}, ...): LAS is assumed")
    return found


def _twins(report: Report) -> list[str]:
    """Scans of different patients whose images are the same: a patient under two names, on two sides of a split."""
    patient = {case.case: case.patient for case in report.cases}
    first: dict[str, str] = {}
    found = []
    for name, summary in report.summaries.items():
        other = first.setdefault(summary.digest, name)
        if patient[other] != patient[name]:
            found.append(f"{name} and {other} are the same image under two patients: remove one before splitting")
    return found


def _odd_spacing(name: str, spacing: tuple[float, float, float]) -> list[str]:
    low, high = min(spacing), max(spacing)
    text = " x ".join(f"{value:.4g}" for value in spacing)
    if low < PLAUSIBLE[0] or high > PLAUSIBLE[1]:
        return [f"{name} has a spacing of {text} mm: are the units right?"]
    if max(spacing[1:]) > 2 * min(spacing[1:]) or high > 20 * low:
        return [f"{name} has voxels of {text} mm, far from square: is the header right?"]
    return []
