"""Where things are: the project's folders, and what a relative path means."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOKS = PROJECT / "notebooks"
DATA = PROJECT / "data"
SPLITS = DATA / "splits"
RESULTS = DATA / "results"


def resolve(path: str | os.PathLike[str]) -> Path:
    """An absolute path. Relative ones start at the working directory, or at the project's root inside ``notebooks/``.

    JupyterLab and nbval run a notebook in its own folder, papermill in the folder of its caller: with this rule
    ``runs`` means the same folder for all three.
    """
    expanded = Path(path).expanduser()
    base = Path.cwd()
    if base == NOTEBOOKS or NOTEBOOKS in base.parents:
        base = PROJECT
    return expanded if expanded.is_absolute() else base / expanded


def shorten(path: str | os.PathLike[str]) -> str:
    """``path`` as text for a reader: relative to the project's root where it lies inside, else with ``~`` for home."""
    absolute = Path(path).absolute()
    if absolute.is_relative_to(PROJECT):
        return str(absolute.relative_to(PROJECT))
    if absolute.is_relative_to(Path.home()):
        return str(Path("~") / absolute.relative_to(Path.home()))
    return str(absolute)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new name beside ``path`` to write to, with its suffix; the file then takes the place of ``path`` in one step.

    Where the block raises, or is killed, ``path`` is what it was: nobody ever reads half a file. What a killed process
    leaves begins with ``.unfinished-`` and can be deleted.
    """
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def make_folder(folder: Path, name: str) -> None:
    """Make ``folder`` and write to it: ValueError that says ``name`` now, not after a training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{name} {str(folder)!r} cannot be written to ({error.strerror}: {error.filename}): choose another"
        ) from error
