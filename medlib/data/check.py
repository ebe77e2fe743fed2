"""A look at a data set before anything is trained on it: what is there, what is odd, what would stop a training."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..paths import resolve, shorten
from .cases import Case, DataError, DatasetInfo, Volume, labelled_cases
from .readers import dataset_info, find_reader, load_volume, read_dataset


@dataclass
class Summary:
    """What is kept of one scan: a volume is looked at and let go."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    low: float
    median: float
    high: float
    voxels: np.ndarray | None  # (C,) label voxels per class

    @classmethod
    def of(cls, volume: Volume, classes: int) -> "Summary":
        """Summarise a loaded volume; intensities are its 1st, 50th and 99th percentile."""
        low, median, high = np.percentile(volume.image, (1, 50, 99))
        voxels = None if volume.label is None else np.bincount(volume.label.ravel(), minlength=classes)
        depth, height, width = volume.image.shape
        return cls((depth, height, width), volume.spacing, float(low), float(median), float(high), voxels)


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

    @property
    def ok(self) -> bool:
        """Whether a training can start."""
        return not self.problems

    def text(self) -> str:
        """The report as plain text."""
        lines = [f"{self.info.title} in {shorten(self.root)}"]
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
            for index, name in enumerate(self.info.classes):
                share, scans = total[index] / total.sum(), sum(bool(count[index]) for count in counts)
                lines.append(f"  class {index}   {name:<10} {share:7.3%} of voxels, {scans}/{len(counts)} scans")
        return lines


def _range(values: np.ndarray | list[float], unit: str = "") -> str:
    low, high = float(np.min(values)), float(np.max(values))
    text = f"{low:.4g}" if np.isclose(low, high) else f"{low:.4g}..{high:.4g}"
    return f"{text} {unit}".rstrip()


def check_dataset(name: str, root: str | Path, workers: int = 2, progress: bool = False) -> Report:
    """Look at every scan of the data set `name` under `root`: the labelled ones and one unlabelled frame of each file.

    What is wrong with the data is in the report's `problems`, not raised. Raises `ValueError` for an unknown name only.
    """
    info, folder = dataset_info(name), resolve(root)
    report = Report(info, folder)
    try:
        report.cases = read_dataset(name, folder)
        report.notes = find_reader(name, folder).notes(folder)
    except (DataError, FileNotFoundError) as error:
        report.problems.append(str(error))
        return report
    once = {(case.images[0], bool(case.labels)): case for case in report.cases}

    def look(case: Case) -> tuple[Case, Summary | str]:
        try:
            return case, Summary.of(load_volume(case), len(info.classes))
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
    if not labelled_cases(report.cases):
        report.problems.append(
            f"none of the {len(report.cases)} scans in {folder} has a label: nothing can be learnt or measured"
        )
    return report


def _anomalies(report: Report) -> list[str]:
    """Scans that can be used and yet deserve a look: a class is absent, or the shape or intensities are far off."""
    found: list[str] = []
    for name, summary in report.summaries.items():
        if summary.voxels is not None:
            absent = [report.info.classes[i] for i in np.flatnonzero(summary.voxels == 0)]
            if absent:
                found.append(f"{name} has no {', no '.join(absent)}")
        if summary.shape[0] < 3:
            found.append(f"{name} has only {summary.shape[0]} slices")
    widths = {name: summary.high - summary.low for name, summary in report.summaries.items()}
    middle = float(np.median(list(widths.values()))) if widths else 0.0
    for name, width in widths.items():
        if not middle / 10 <= width <= middle * 10:
            found.append(f"{name} has intensities over {width:.4g}, the median scan over {middle:.4g}")
    return found
