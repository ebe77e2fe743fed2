"""Scans of the body in NIfTI, one file for the image and one for the label: finding the pairs, reading them alike.

Frame. A volume is (Z, H, W) as a radiologist looks at axial slices, whatever order the file stores: slice 0 is the most
inferior and Z runs to the head, row 0 is anterior and rows run to the back, column 0 is the patient's right and
columns run to the left. The file's axes are permuted and turned over to the nearest of these directions; nothing is
mirrored and an oblique scan is not resampled. The spacing follows its axis.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import aff2axcodes, apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from .cases import Case, DataError, DatasetInfo, Volume
from .nifti import directions, open_nifti, read_channel, read_voxels

FRAME = axcodes2ornt(("L", "P", "S"))  # where columns, rows and slices of a volume point
UNSTATED = "not stated"  # neither qform nor sform: nibabel then assumes LAS


@dataclass(frozen=True)
class Source:
    """The files of one part of a release. In names, `{}` stands for the scan's number and `.nii[.gz]` is left out.

    `images` and `labels` are glob patterns of folders below the root, all those that exist being taken: a release can
    be given at several levels. `label` is None for scans published without one. Names in `ignored` may lie there too.
    """

    images: tuple[str, ...]
    image: str
    case: str
    labels: tuple[str, ...] = ()
    label: str | None = None
    part: str | None = None
    number: str = r"\d+"
    ignored: str | None = None
    info: Callable[[str], dict[str, str]] = lambda number: {}

    def roles(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        """(folders, name, "image", "label" or "ignored") of everything that may lie there."""
        yield self.images, self.image, "image"
        if self.label is not None:
            yield self.labels or self.images, self.label, "label"
        if self.ignored is not None:
            yield self.images, self.ignored, "ignored"


def _folders(root: Path, patterns: Sequence[str]) -> list[Path]:
    found = [[root] if pattern == "." else sorted(root.glob(pattern)) for pattern in patterns]
    return [path for paths in found for path in paths if path.is_dir()]


def _files(folder: Path) -> list[Path]:
    """NIfTI files of a folder. macOS leaves ._ files beside the real ones."""
    return [path for path in sorted(folder.glob("[!.]*")) if path.name.lower().endswith((".nii", ".nii.gz"))]


def _match(source: Source, name: str, path: Path) -> str | None:
    pattern = re.escape(name).replace(re.escape("{}"), f"({source.number})")
    match = re.fullmatch(rf"{pattern}\.(?i:nii(?:\.gz)?)", path.name)
    return match[1] if match else None


def recognises(root: Path, sources: Sequence[Source]) -> bool:
    """Whether `root` has one of the folders of `sources` or, where that is the root itself, one of the files."""
    for source in sources:
        for patterns, name, _ in source.roles():
            for folder in _folders(root, patterns):
                if folder != root or any(_match(source, name, path) for path in _files(root)):
                    return True
    return False


def find_scans(
    info: DatasetInfo, reader: str, root: Path, sources: Sequence[Source], channels: int | None = None
) -> list[Case]:
    """The scans of all `sources`, headers checked, voxels unread. With `channels` images are 4D; the first is taken.

    Raises `DataError`, naming the file, for a name of another form, two files for one scan, a label without image or an
    image without label, and what `check_headers` refuses.
    """
    wanted: dict[Path, list[tuple[int, str, str]]] = {}
    for index, source in enumerate(sources):
        for patterns, name, role in source.roles():
            for folder in _folders(root, patterns):
                wanted.setdefault(folder, []).append((index, name, role))
    found: dict[tuple[int, str], dict[str, Path]] = {}
    for folder, names in wanted.items():
        for path in _files(folder):
            hits = [
                (index, number, role) for index, name, role in names if (number := _match(sources[index], name, path))
            ]
            if not hits:
                forms = ", ".join(f"{name.format('0001')}.nii.gz" for _, name, _ in names)
                raise DataError(f"{path} is not named like {forms}: rename or remove it")
            index, number, role = hits[0]
            files = found.setdefault((index, number), {})
            if role in files and role != "ignored":
                raise DataError(f"{path} and {files[role]} are both the {role} of one scan: remove one of them")
            files[role] = path
    cases = []
    for (index, number), files in found.items():
        source = sources[index]
        if "image" not in files:
            if "label" in files:
                raise DataError(f"{files['label']} has no image {source.image.format(number)}.nii.gz: unpack it again")
            continue
        labels = (files["label"],) if "label" in files else ()
        if source.label is not None and not labels:
            raise DataError(f"{files['image']} has no label {source.label.format(number)}.nii.gz: unpack it again")
        facts = source.info(number) | {"axes": check_headers(files["image"], files.get("label"), channels)}
        name, frame = source.case.format(number), None if channels is None else 0
        cases.append(Case(info, name, name, (files["image"],), labels, reader, frame, source.part, facts))
    return cases


def check_headers(image: Path, label: Path | None = None, channels: int | None = None) -> str:
    """The orientation of an image as three letters (RAS, ...); its label must lie on the same grid.

    Raises `DataError` for other numbers of axes or channels, for a label of another shape, and for one that lies more
    than half a voxel elsewhere.
    """
    file = open_nifti(image, 3 if channels is None else 4)
    directions(file, image)
    if channels is not None and file.shape[3] != channels:
        raise DataError(f"{image} has {file.shape[3]} channels, dataset.json names {channels}: which is right?")
    if label is not None:
        mask = open_nifti(label, 3)
        directions(mask, label)
        if mask.shape != file.shape[:3]:
            raise DataError(f"{label} has shape {mask.shape}, its image {file.shape[:3]}: they are not of one scan")
        apart = _apart(file, mask)
        if not apart <= 0.5:  # NaN, too
            raise DataError(
                f"{label} lies up to {apart:.3g} voxels away from its image {image} by their headers: are they of one"
                " scan? If the label was drawn on this image, give it the image's affine"
            )
    if not (file.header["qform_code"] or file.header["sform_code"]):
        return UNSTATED
    return "".join(aff2axcodes(file.affine))


def _apart(image: nibabel.Nifti1Image, label: nibabel.Nifti1Image) -> float:
    """The largest distance between the corners of two grids of one shape, in voxels (the smallest side of one)."""
    corners = np.stack([*np.meshgrid(*[(0, size - 1) for size in label.shape], indexing="ij")], axis=-1).reshape(-1, 3)
    corners = np.concatenate([corners, np.ones((8, 1))], axis=1)
    distances = np.linalg.norm((corners @ (image.affine - label.affine).T)[:, :3], axis=1)
    return float(distances.max() / np.linalg.norm(image.affine[:3, :3], axis=0).min())


def load_scan(case: Case, values: Mapping[int, int] | None = None, stray: Mapping[int, int] | None = None) -> Volume:
    """The scan in memory, in the frame above. `values` maps label values of the file to classes (default: as they are).

    Values of `stray` are known mistakes of a release: they are mapped too, and each leaves a remark. Raises `DataError`
    for a label with other values, or with values that are no whole numbers.
    """
    path = case.images[0]
    file = open_nifti(path, 3 if case.frame is None else 4)
    _, spacing = directions(file, path)
    turn = ornt_transform(io_orientation(file.affine), FRAME)
    voxels = read_voxels(file, path) if case.frame is None else read_channel(file, path, case.frame)
    image = np.array(apply_orientation(voxels, turn).T, dtype=np.float32, order="C")
    del voxels
    label: np.ndarray | None = None
    remarks: tuple[str, ...] = ()
    if case.labels:
        source = case.labels[0]
        check_headers(path, source, None if case.frame is None else file.shape[3])  # they may have changed since
        mask = _whole(read_voxels(open_nifti(source, 3), source), source)
        if values is not None:
            mask, remarks = _mapped(mask, source, values, stray or {})
        label = np.array(apply_orientation(mask, turn).T, order="C")
    x, y, z = (spacing[axis] for axis in np.argsort(turn[:, 0]))
    return Volume(case, image, label, (z, y, x), remarks)


def _whole(label: np.ndarray, path: Path) -> np.ndarray:
    """The label as integers."""
    if label.dtype.kind in "iu":
        return label
    whole = label.astype(np.int64, casting="unsafe") if np.abs(label).max() < 2**31 else None  # NaN compares False
    if whole is None or not np.array_equal(whole, label):
        odd = np.unique(label[~np.isfinite(label) | (label != np.rint(label)) | (np.abs(label) >= 2**31)])[:5]
        raise DataError(f"{path} has label values {odd.tolist()}, which are no class numbers: is it a resampled label?")
    return whole


def _mapped(
    label: np.ndarray, path: Path, values: Mapping[int, int], stray: Mapping[int, int]
) -> tuple[np.ndarray, tuple[str, ...]]:
    present = np.unique(label.ravel(order="K")).tolist()
    known = {**values, **stray}
    unknown = [value for value in present if value not in known]
    if unknown:
        raise DataError(f"{path} has label values {unknown[:10]}, expected {', '.join(map(str, sorted(values)))}")
    classes = np.zeros(label.shape, np.uint8)
    for value in present:
        if known[value]:
            classes[label == value] = known[value]
    counts = {value: int((label == value).sum()) for value in present if value in stray}
    return classes, tuple(
        f"{path.name}: {count} voxels have the value {value}, read as class {stray[value]}"
        for value, count in counts.items()
    )


def read_json(root: Path) -> dict[str, Any]:
    """`dataset.json` under `root`. Raises `DataError` where it is missing or no JSON object."""
    path = root / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: it names the classes; unpack the data set again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): unpack it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected names and values: unpack it again")
    return content


def absent_files(root: Path) -> list[str]:
    """A note for each list of `dataset.json` that names images which are not under `root`."""
    content = read_json(root)
    lines = []
    for part in ("training", "validation", "test"):
        entries = content.get(part)
        if not isinstance(entries, list):  # some tasks hold their number here, or nothing
            continue
        names = [str(entry.get("image", "")) if isinstance(entry, dict) else str(entry) for entry in entries]
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            lines.append(
                f"{len(missing)} of {len(names)} {part} images of dataset.json are not here ({missing[0]}, ...)"
            )
    return lines
