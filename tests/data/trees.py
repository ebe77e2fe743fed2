"""Tiny data sets on disk, drawn by hand: a ball in a noisy box in both layouts of ACDC, boxes in all the others."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform

LPS = np.diag([-1.0, -1.0, 1.0])


def anatomy(depth: int = 6, height: int = 24, width: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Image (Z, H, W) float32 and label: slice 0 is the apex, RV (1) left of MYO (2) around LV (3)."""
    z, y, x = np.mgrid[:depth, :height, :width].astype(np.float32)
    label = np.zeros((depth, height, width), np.uint8)
    distance = np.hypot(y - height * 0.45, x - width * 0.6)
    label[np.hypot(y - height * 0.5, x - width * 0.3) < 2 + z * 0.5] = 1
    label[distance < 5] = 2
    label[distance < 3] = 3
    noise = np.random.default_rng(seed).normal(0, 5, label.shape)
    return (100.0 * label + 50 + y + noise).astype(np.float32), label


def save_nifti(path: Path, array: np.ndarray, axes: np.ndarray = LPS, spacing=(1.5, 1.4, 8.0)) -> None:
    """Write a (Z, H, W) or (T, Z, H, W) array with the world directions `axes` of x, y, z; spacing (x, y, z)."""
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(spacing)
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array.T), affine), path)


def write_patient(
    folder: Path, ed: int = 1, es: int = 4, frames: int = 5, seed: int = 0, axes: np.ndarray = LPS
) -> None:
    """One patient in ACDC's official layout; slices are stored base first."""
    folder.mkdir(parents=True)
    name = folder.name
    image, label = anatomy(seed=seed)
    image, label = image[::-1].astype(np.int16), label[::-1]
    cine = np.stack([image + 3 * frame for frame in range(frames)])
    save_nifti(folder / f"{name}_4d.nii.gz", cine, axes)
    for frame in (ed, es):
        save_nifti(folder / f"{name}_frame{frame:02d}.nii.gz", cine[frame - 1], axes)
        save_nifti(folder / f"{name}_frame{frame:02d}_gt.nii.gz", label, axes)
    (folder / "Info.cfg").write_text(
        f"ED: {ed}\nES: {es}\nGroup: DCM\nHeight: 170.0\nNbFrame: {frames}\nWeight: 70.0\n"
    )


def write_official(root: Path, training: int = 3, testing: int = 0) -> Path:
    """ACDC's official layout with patients 1.. under training/ and 101.. under testing/."""
    for number in range(1, training + 1):
        write_patient(root / "training" / f"patient{number:03d}", seed=number)
    for number in range(101, 101 + testing):
        write_patient(root / "testing" / f"patient{number:03d}", seed=number)
    return root


def save_h5(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label


def write_ssl4mis(root: Path, train: int = 3, val: int = 1, test: int = 1) -> Path:
    """SSL4MIS's layout: train slices, val volumes; test volumes are listed but not there, as in the published files."""
    (root / "data").mkdir(parents=True)
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": [], "train_slices": []}
    for number, part in enumerate(["train"] * train + ["val"] * val + ["test"] * test, start=1):
        for frame in (1, 2):
            name = f"patient{number:03d}_frame{frame:02d}"
            lists[part].append(name)
            image, label = anatomy(depth=12, seed=10 * number + frame)
            image, label = image[::-1] / 400, label[::-1]
            if part == "val":
                save_h5(root / "data" / f"{name}.h5", image, label)
            elif part == "train":
                for z in range(len(image)):
                    lists["train_slices"].append(f"{name}_slice_{z + 1}")
                    save_h5(root / "data" / f"{name}_slice_{z + 1}.h5", image[z], label[z])
    for part, names in lists.items():
        (root / f"{part}.list").write_text("\n".join(names) + "\n")
    return root


# ------------------------------------------------------------------------------- scans of the body, one file each


@dataclass(frozen=True)
class Tree:
    """How to write a release's layout small, and where one of its labelled scans lies in it."""

    write: Callable[[Path], None]
    case: str
    image: str
    label: str
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()
    values: tuple[int, ...] = (0, 1, 2)  # what the files hold for classes 0, 1, 2


SHAPE = (6, 9, 8)  # (Z, H, W), all different


def body(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Image (Z, H, W) int16 and label of classes 0, 1, 2, alike in no two directions, in the readers' frame."""
    z, y, x = np.mgrid[: shape[0], : shape[1], : shape[2]]
    image = 100 * z + 10 * y + x + np.random.default_rng(seed).integers(0, 5, shape) - 500
    label = np.zeros(shape, np.uint8)
    label[1:3, 2:6, 1:4] = 1
    label[3:5, 1:3, 3:7] = 2
    return image.astype(np.int16), label


def save_scan(
    path: Path, array: np.ndarray, codes: str = "LPS", spacing=(3.0, 2.0, 1.0), tilt: np.ndarray | None = None
) -> None:
    """Write (Z, H, W) of the readers' frame with the file's axes in the order `codes`; `spacing` is that of (z, y, x).

    `tilt` is a rotation of the whole scan in world space. The voxel (0, 0, 0) of the frame stays at one place.
    """
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])  # of the array as (x, y, z) in LPS
    affine[:3, 3] = (40, -30, 20)
    if tilt is not None:
        affine[:3] = tilt @ affine[:3]
    image = nibabel.Nifti1Image(np.ascontiguousarray(array.T), affine)
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.as_reoriented(turn), path)


def save_pair(
    root: Path, image: str, label: str | None, seed: int = 0, values: tuple[int, ...] = (0, 1, 2), **how: Any
) -> None:
    array, mask = body(seed)
    save_scan(root / image, array, **how)
    if label is not None:
        save_scan(root / label, np.array(values, np.int16)[mask], **how)


def _btcv(root: Path) -> None:
    for n in (1, 2):
        base = "RawData/Training"
        save_pair(root, f"{base}/img/img000{n}.nii.gz", f"{base}/label/label000{n}.nii.gz", n)
    save_pair(root, "RawData/Testing/img/img0061.nii.gz", None, 61)


def _lits(root: Path) -> None:
    for n, batch in ((0, 1), (28, 2)):
        base = f"Training Batch {batch}"
        save_pair(root, f"{base}/volume-{n}.nii", f"{base}/segmentation-{n}.nii", n)
    save_pair(root, "Test/test-volume-0.nii", None, 99)


MMWHS_VALUES = (0, 500, 600)


def _mmwhs(root: Path) -> None:
    for n, folder in ((1001, "ct_train1"), (1020, "ct_train2"), (1001, "mr_train")):
        name = f"{folder}/{folder[:8]}_{n}"
        save_pair(root, f"{name}_image.nii.gz", f"{name}_label.nii.gz", n + (folder == "mr_train"), MMWHS_VALUES)
    save_pair(root, "ct_test/ct_test_2001_image.nii.gz", None, 2001)


def _chd(root: Path) -> None:
    for n in (1001, 1128):
        save_pair(root, f"ct_{n}_image.nii.gz", f"ct_{n}_label.nii.gz", n)


def _flare22(root: Path) -> None:
    base = "Training/FLARE22_LabeledCase50"
    for n in (1, 50):
        name = f"FLARE22_Tr_{n:04d}"
        save_pair(root, f"{base}/images/{name}_0000.nii.gz", f"{base}/labels/{name}.nii.gz", n)
    save_pair(root, "Training/FLARE22_UnlabeledCase1-500/Case_00001_0000.nii.gz", None, 3)
    save_pair(root, "Validation/FLARETs_0001_0000.nii.gz", None, 4)


def _amos22(root: Path) -> None:
    for part, n in (("Tr", 1), ("Tr", 507), ("Va", 8)):
        save_pair(root, f"images{part}/amos_{n:04d}.nii.gz", f"labels{part}/amos_{n:04d}.nii.gz", n)
    save_pair(root, "imagesTs/amos_0002.nii.gz", None, 2)
    write_json(root, training=[{"image": "./imagesTr/amos_0001.nii.gz", "label": "./labelsTr/amos_0001.nii.gz"}])


def _msd(root: Path) -> None:
    for n in (1, 3):
        save_pair(root, f"imagesTr/hippocampus_00{n}.nii.gz", f"labelsTr/hippocampus_00{n}.nii.gz", n)
    save_pair(root, "imagesTs/hippocampus_002.nii.gz", None, 2)
    (root / "imagesTr/._hippocampus_001.nii.gz").write_bytes(b"macOS")
    write_json(root)


def write_json(root: Path, **changes: Any) -> None:
    """A Decathlon task's `dataset.json`."""
    content: dict[str, Any] = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [{"image": "./imagesTr/hippocampus_001.nii.gz", "label": "./labelsTr/hippocampus_001.nii.gz"}],
        "test": ["./imagesTs/hippocampus_002.nii.gz"],
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content | changes))


TREES = {
    "btcv": Tree(
        _btcv, "img0002", "RawData/Training/img/img0002.nii.gz", "RawData/Training/label/label0002.nii.gz",
        ("img0001", "img0002"), ("img0061",),
    ),
    "lits": Tree(
        _lits, "volume-28", "Training Batch 2/volume-28.nii", "Training Batch 2/segmentation-28.nii",
        ("volume-0", "volume-28"), ("test-volume-0",),
    ),
    "mmwhs": Tree(
        _mmwhs, "ct_train_1020", "ct_train2/ct_train_1020_image.nii.gz", "ct_train2/ct_train_1020_label.nii.gz",
        ("ct_train_1001", "ct_train_1020", "mr_train_1001"), ("ct_test_2001",), MMWHS_VALUES,
    ),
    "chd": Tree(_chd, "ct_1128", "ct_1128_image.nii.gz", "ct_1128_label.nii.gz", ("ct_1001", "ct_1128")),
    "flare22": Tree(
        _flare22, "FLARE22_Tr_0050", "Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0050_0000.nii.gz",
        "Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0050.nii.gz", ("FLARE22_Tr_0001", "FLARE22_Tr_0050"),
        ("Case_00001", "FLARETs_0001"),
    ),
    "amos22": Tree(
        _amos22, "amos_0507", "imagesTr/amos_0507.nii.gz", "labelsTr/amos_0507.nii.gz",
        ("amos_0001", "amos_0008", "amos_0507"), ("amos_0002",),
    ),
    "msd": Tree(
        _msd, "hippocampus_003", "imagesTr/hippocampus_003.nii.gz", "labelsTr/hippocampus_003.nii.gz",
        ("hippocampus_001", "hippocampus_003"), ("hippocampus_002",),
    ),
}  # fmt: skip
