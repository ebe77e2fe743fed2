"""Phantoms: anatomies drawn from random parameters and written in the layout of a public release.

They stand in for data that cannot be shipped. One module per anatomy (`short_axis`), one per release layout (`acdc`);
`shapes` and `acquisition` are what they share. Made for learning and for tests; no conclusion about patients follows.
"""

import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from medlib.data.phantoms import acdc
from medlib.data.phantoms.short_axis import DIFFICULTY, Difficulty

__all__ = ["DIFFICULTY", "PHANTOMS", "Difficulty", "write_phantoms"]

GENERATOR = 1  # raise it when the same seed draws something else: phantoms on disk are then drawn again
STAMP = "phantoms.json"  # written last; a folder without it is not ours

PHANTOMS: dict[str, Callable[[Path, int, int, int, Difficulty], None]] = {"acdc": acdc.write_patient}
"""Data set name -> function (root, patient number, seed, cine frames, difficulty) that writes one patient."""


def write_phantoms(
    name: str,
    root: Path | str,
    patients: int,
    seed: int,
    *,
    cine_frames: int = 4,
    difficulty: Difficulty = DIFFICULTY,
    workers: int | None = None,
) -> Path:
    """Draw `patients` phantoms in the layout of data set `name` under `root`; returns `root`.

    name: one of `PHANTOMS`. patients: 1-999; patient k is the same whatever their number. cine_frames: frames between
    end diastole and end systole and after, in the 4D file only (0 or more). workers: threads, all cores when None.

    Returns at once when the same phantoms already stand there, as the stamp `phantoms.json` tells. Other phantoms at
    `root` are replaced, in one step and only when the new ones are complete. The same arguments give the same bytes.

    Raises ValueError for an unknown name or an argument out of range, FileExistsError when `root` holds something
    that is not a phantom: a folder with real data is never touched.
    """
    if name not in PHANTOMS:
        raise ValueError(f"no phantoms for data set {name!r}; there are phantoms for: {', '.join(sorted(PHANTOMS))}")
    if not 1 <= patients <= 999:
        raise ValueError(f"patients must be between 1 and 999, got {patients}")
    if cine_frames < 0:
        raise ValueError(f"cine_frames must be 0 or more, got {cine_frames}")
    root = Path(root)
    recipe = {
        "about": "Drawn by medlib, not measured on patients.",
        "generator": GENERATOR,
        "name": name,
        "patients": patients,
        "seed": seed,
        "cine_frames": cine_frames,
        "difficulty": asdict(difficulty),
    }
    if _complete(root, recipe):
        return root
    if root.exists() and not (root / STAMP).is_file() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} exists and holds no {STAMP}, so its content is not a phantom's; choose another folder or empty it"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.drawing.", dir=root.parent) as scratch:
        fresh = Path(scratch) / "new"
        draw = PHANTOMS[name]
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            for future in [pool.submit(draw, fresh, k + 1, seed, cine_frames, difficulty) for k in range(patients)]:
                future.result()
        (fresh / STAMP).write_text(json.dumps({**recipe, "files": _sizes(fresh)}, indent=1) + "\n")
        _replace(fresh, root, Path(scratch) / "old")
    return root


def _sizes(root: Path) -> dict[str, int]:
    return {
        path.relative_to(root).as_posix(): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()
    }


def _complete(root: Path, recipe: dict[str, object]) -> bool:
    """Whether `root` holds what `recipe` draws, every file with its size."""
    try:
        stamp = json.loads((root / STAMP).read_text())
        files = stamp.pop("files")
        return stamp == recipe and all((root / path).stat().st_size == size for path, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _replace(fresh: Path, root: Path, old: Path) -> None:
    """Put `fresh` where `root` is; what was there moves to `old`."""
    if root.exists():
        os.replace(root, old)
    os.replace(fresh, root)
