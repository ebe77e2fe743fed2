"""The layout of the ACDC release (training/patientNNN with Info.cfg, 4D cine, ED and ES with labels) for drawn hearts.

Orientation: in the world (RAS+, mm) the slice axis runs along superior, tilted by up to 20 degrees, apex below base;
pictures grow to the patient's left and to the back. About a third of the patients are stored with the slices in the
opposite order and an affine that says so: a reader that turns z towards superior finds slice 0 at the apex in all.
"""

from pathlib import Path

import numpy as np

from medlib.data.phantoms.acquisition import write_nifti
from medlib.data.phantoms.short_axis import GROUPS, Difficulty, Patient, draw_patient
from medlib.rng import numpy_generator

FLIPPED = 0.35  # share of patients whose slices are stored from base to apex


def patient_group(seed: int, number: int) -> str:
    """Group of patient `number` (1, 2, ...): every five patients in a row hold each group once, in random order."""
    block, place = divmod(number - 1, len(GROUPS))
    order = numpy_generator(seed, "phantom", "acdc", "groups", block).permutation(len(GROUPS))
    return GROUPS[order[place]]


def stack_affine(rng: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """Voxel (x, y, z) to world (4, 4) of a stack of `shape` and `spacing` (both z, y, x) centred near the origin."""
    a, b, c = np.radians(rng.uniform(-14, 14, 3))
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_y @ about_x @ np.diag((-1, -1, 1)) * spacing[::-1]
    affine[:3, 3] = rng.normal(0, 20, 3) - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return affine


def flip_slices(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same volume (X, Y, Z[, T]) with its slices in the opposite order, and the affine that says so."""
    flipped = affine.copy()
    flipped[:, 2] *= -1
    flipped[:, 3] = affine @ (0, 0, array.shape[2] - 1, 1)
    return array[:, :, ::-1], flipped


def write_patient(root: Path, number: int, seed: int, cine_frames: int, difficulty: Difficulty) -> None:
    """Draw patient `number` (1, 2, ...) and write its folder under `root`/training."""
    rng = numpy_generator(seed, "phantom", "acdc", number)
    patient = draw_patient(rng, patient_group(seed, number), cine_frames + 2, difficulty)
    rng = numpy_generator(seed, "phantom", "acdc", number, "orientation")
    affine = stack_affine(rng, patient.labels.shape[1:], patient.spacing)
    save_patient(root / "training" / f"patient{number:03d}", patient, affine, flipped=rng.random() < FLIPPED)


def save_patient(folder: Path, patient: Patient, affine: np.ndarray, *, flipped: bool) -> None:
    """Write one patient's files into the new `folder`; `affine` is that of the stack from apex to base."""
    folder.mkdir(parents=True)
    name = folder.name

    def save(suffix: str, array: np.ndarray) -> None:  # array (..., Z, H, W)
        array = array.T  # NIfTI wants x first
        placed = flip_slices(array, affine) if flipped else (array, affine)
        write_nifti(folder / f"{name}_{suffix}.nii.gz", *placed)

    save("4d", patient.images)
    for frame in (0, patient.end_systole):
        save(f"frame{frame + 1:02d}", patient.images[frame])
        save(f"frame{frame + 1:02d}_gt", patient.labels[frame])
    info = {
        "ED": 1,
        "ES": patient.end_systole + 1,
        "Group": patient.group,
        "Height": patient.height,
        "NbFrame": len(patient.images),
        "Weight": patient.weight,
    }
    (folder / "Info.cfg").write_text("".join(f"{key}: {value}\n" for key, value in info.items()))
