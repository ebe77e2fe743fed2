"""Files that are written whole or not at all."""

import os

import pytest

from medlib.paths import written_whole


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "record.json"
    with written_whole(path) as unfinished:
        unfinished.write_text("new")
        assert unfinished.suffix == ".json"
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_what_stops_the_writing_leaves_the_old_file(tmp_path, stop):
    path = tmp_path / ("x" * 250 + ".npz")  # as long as a name may be
    path.write_text("old")
    with pytest.raises(stop), written_whole(path) as unfinished:
        unfinished.write_text("ha")
        raise stop
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "a.json"):
        pass
    assert not os.listdir(tmp_path)


def test_others_may_read_it(tmp_path):
    """As any file that this user makes, not for its owner alone as those of `tempfile`."""
    (tmp_path / "any").touch()
    with written_whole(tmp_path / "a.json") as unfinished:
        unfinished.touch()
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "any").stat().st_mode
