"""Tiny data sets on disk, drawn by hand: a ball in a noisy box, in both layouts of ACDC."""

from pathlib import Path

import h5py
import nibabel
import numpy as np

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
