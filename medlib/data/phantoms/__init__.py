"""Phantoms: anatomies drawn from random parameters and written in the layout of a public release.

They stand in for data that cannot be shipped. One module per anatomy (`short_axis`, `whole_heart`, `abdomen`,
`hippocampus`), one per release layout (`acdc`, `btcv`, ...). They share `shapes` (drawing a slice), `solids` (drawing a
volume), `acquisition` (what a scanner adds) and `volumes` (from an anatomy to a scan on disk); `abdominal` and
`cardiac` are what several releases do alike. Made for learning and for tests; no conclusion about patients follows.
"""

import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from medlib.data.phantoms import acdc, amos22, btcv, chd, flare22, lits, mmwhs, msd
from medlib.data.phantoms.short_axis import DIFFICULTY, Difficulty
from medlib.data.phantoms.volumes import SIZES
from medlib.paths import resolve

__all__ = ["DIFFICULTY", "PHANTOMS", "SIZES", "Difficulty", "Release", "write_phantoms"]

GENERATOR = 1  # raise it when the same seed draws something else: phantoms on disk are then drawn again
STAMP = "phantoms.json"  # written last; a folder without it is not ours


@dataclass(frozen=True)
class Release:
    """How the phantoms of one data set are drawn.

    `write` (root, patient number, seed, options) writes one patient; `options` are the keyword arguments of
    `write_phantoms` that it takes. `finish` (root) writes what lists all patients. `limit` is the largest number.
    """

    write: Callable[..., None]
    options: tuple[str, ...] = ("size",)
    finish: Callable[[Path], None] | None = None
    limit: int = 999


PHANTOMS: dict[str, Release] = {
    "acdc": Release(acdc.write_patient, options=("cine_frames", "difficulty")),
    "amos22": Release(amos22.write_patient, finish=amos22.finish, limit=amos22.LIMIT),
    "btcv": Release(btcv.write_patient),
    "chd": Release(chd.write_patient),
    "flare22": Release(flare22.write_patient),
    "lits": Release(lits.write_patient),
    "mmwhs": Release(mmwhs.write_patient),
    "msd": Release(msd.write_patient, finish=msd.finish),
}
"""Data set name -> how its phantoms are drawn."""


def write_phantoms(
    name: str,
    root: Path | str,
    patients: int,
    seed: int,
    *,
    size: str = "small",
    cine_frames: int = 4,
    difficulty: Difficulty = DIFFICULTY,
    workers: int | None = None,
) -> Path:
    """Draw `patients` phantoms in the layout of data set `name` under `root`; returns `root`.

    name: one of `PHANTOMS`. patients: 1-999 (598 for "amos22"); patient k is the same whatever their number.
    size: "small" (about 96 pixels a side, half a second of processor time) or "full" (the release's, up to a minute);
    "acdc" and "msd" have one size, the release's. For "acdc" only: cine_frames, the frames between end diastole and
    end systole and after, in the 4D file (0 or more), and difficulty. workers: threads, all cores when None.

    Returns at once when the same phantoms already stand there, as the stamp `phantoms.json` tells. Other phantoms at
    `root` are replaced, in one step and only when the new ones are complete. The same arguments give the same bytes.

    Raises ValueError for an unknown name or an argument out of range, FileExistsError when `root` holds something
    that is not a phantom: a folder with real data is never touched.
    """
    if name not in PHANTOMS:
        raise ValueError(f"no phantoms for data set {name!r}; there are phantoms for: {', '.join(sorted(PHANTOMS))}")
    release = PHANTOMS[name]
    if type(patients) is not int or not 1 <= patients <= release.limit:
        raise ValueError(f"patients must be between 1 and {release.limit} for {name!r}, got {patients}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if cine_frames < 0:
        raise ValueError(f"cine_frames must be 0 or more, got {cine_frames}")
    root = resolve(root)
    given = {"size": size, "cine_frames": cine_frames, "difficulty": difficulty}
    options = {option: given[option] for option in release.options}
    recipe = {
        "about": "Drawn by medlib, not measured on patients.",
        "generator": GENERATOR,
        "name": name,
        "patients": patients,
        "seed": seed,
        **{option: asdict(value) if isinstance(value, Difficulty) else value for option, value in options.items()},
    }
    if _complete(root, recipe):
        return root
    if root.exists() and not (root / STAMP).is_file() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} exists and holds no {STAMP}, so its content is not a phantom's; choose another folder or empty it"
        )
    if strangers := _strangers(root):
        raise FileExistsError(f"{strangers[0]} is no phantom's, and drawing anew would remove it: move it away")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.drawing.", dir=root.parent) as scratch:
        fresh = Path(scratch) / "new"
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            drawn = [pool.submit(release.write, fresh, k + 1, seed, **options) for k in range(patients)]
            try:
                for patient in drawn:
                    patient.result()
            except BaseException:  # Ctrl-C, a full disk: the others would be drawn for nothing
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if release.finish is not None:
            release.finish(fresh)
        (fresh / STAMP).write_text(json.dumps({**recipe, "files": _sizes(fresh)}, indent=1) + "\n")
        _replace(fresh, root, Path(scratch) / "old")
    return root


def is_phantom(root: Path) -> bool:
    """Whether a folder is one of drawn patients, or lies within one."""
    return any((place / STAMP).is_file() for place in (root, *root.parents))


def _sizes(root: Path) -> dict[str, int]:
    return {
        path.relative_to(root).as_posix(): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()
    }


def _strangers(root: Path) -> list[Path]:
    """Files under `root` that no phantom was drawn into."""
    try:
        drawn = {*json.loads((root / STAMP).read_text())["files"], STAMP}
    except (OSError, ValueError, KeyError):  # no stamp, or one that was cut off
        return []
    return [root / name for name in _sizes(root) if name not in drawn and not Path(name).name.startswith(".")]


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
