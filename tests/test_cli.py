"""The command line, and the three ways to run a notebook that the README offers."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medlib import paths, runner
from medlib.__main__ import main, read_value
from medlib.sweep import Sweep
from medlib.train import NonFiniteLoss

PARAMETERS = """ratio = 0.1  # labelled share
scale = "ci"  # how long
seed = 0  # of every stream
soft = True
limit = None  # none, or a number
colour = "#e69f00"  # of the ventricle
output_dir = "runs"  # for records
"""


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny notebook in a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDLIB_SCALE", raising=False)
    return write(tmp_path / "tiny.ipynb", "print('ratio is', ratio)\nassert ratio < 1, 'too much'")


def write(path: Path, *codes: str, tag: str = "parameters", last: str = "last") -> Path:
    """A notebook with a parameters cell and these code cells, the first and the last of them tagged."""
    cells = [
        {"cell_type": "code", "source": text, "metadata": {"tags": tags}, "outputs": [], "execution_count": None}
        for text, tags in [(PARAMETERS, [tag]), *((text, [last] if text == codes[-1] else []) for text in codes)]
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


Finished = subprocess.CompletedProcess[str]


def digest(path: Path) -> str:
    """What a file holds, to see that nothing touched it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def printed(notebook: Path) -> str:
    """All that the cells of an executed notebook printed."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


def call(*command: str, folder: Path, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE) -> Finished:
    """A command as a scheduler would run it: no terminal, nothing on stdin."""
    environment = os.environ | {"PYTHONPATH": str(paths.PROJECT)}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE,
        text=True, timeout=120, env=environment,
    )  # fmt: skip


def test_papermill_with_an_output_path(notebook: Path) -> None:
    before = digest(notebook)
    result = call("papermill", "tiny.ipynb", "runs.ipynb", "-p", "ratio", "0.2", folder=notebook.parent)
    assert result.returncode == 0, result.stderr
    assert printed(notebook.parent / "runs.ipynb") == "ratio is 0.2\n"
    assert digest(notebook) == before


@pytest.mark.skipif(os.name != "posix", reason="opens a pseudo-terminal")
def test_papermill_from_a_terminal_into_a_redirected_output(notebook: Path) -> None:
    before = digest(notebook)
    output = notebook.parent / "out.ipynb"
    terminal, keyboard = os.openpty()
    with output.open("w") as file:
        command = ("papermill", "tiny.ipynb", "-p", "ratio", "0.2")
        result = call(*command, folder=notebook.parent, stdin=keyboard, stdout=file.fileno())
    os.close(terminal)
    os.close(keyboard)
    assert result.returncode == 0, result.stderr
    assert printed(output) == "ratio is 0.2\n"
    assert digest(notebook) == before


def test_medlib_run(notebook: Path) -> None:
    before = digest(notebook)
    result = call("medlib", "run", "tiny.ipynb", "-p", "ratio", "0.2", folder=notebook.parent)
    assert result.returncode == 0, result.stderr
    assert printed(notebook.parent / "runs" / "tiny-ratio=0.2.ipynb") == "ratio is 0.2\n"
    assert "runs/tiny-ratio=0.2.ipynb" in result.stdout
    assert digest(notebook) == before


def test_a_run_names_the_records_it_wrote(tmp_path: Path, notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    old = tmp_path / "runs" / "old.record.json"
    old.write_text("{}")
    os.utime(old, (1, 1))
    write(notebook, "import pathlib\n_ = pathlib.Path(output_dir, 'new.record.json').write_text('{}')")
    assert main(["run", str(notebook), "-o", "result.ipynb"]) == 0
    shown = capsys.readouterr().out
    assert "result.ipynb" in shown and "new.record.json" in shown and "old.record.json" not in shown


def test_a_run_ends_with_the_table_of_the_notebook(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(notebook, "print('much else')", "print('Dice 0.7')\n'LV 0.8'", last="summary")
    assert main(["run", str(notebook)]) == 0
    assert main(["summary", "runs/tiny.ipynb"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[3:5] == ["Dice 0.7", "'LV 0.8'"]
    assert [line.split(":")[0] for line in (lines[2], lines[5])] == ["Executed notebook"] * 2 and len(lines) == 6


def test_a_failing_cell_is_exit_1_and_leaves_the_notebook(notebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(notebook), "-p", "ratio", "5"]) == 1
    error = capfd.readouterr().err
    assert "AssertionError: too much" in error and "tiny-ratio=5.0.ipynb" in error
    assert "ratio is 5.0" in printed(notebook.parent / "runs" / "tiny-ratio=5.0.ipynb")


@pytest.mark.parametrize("error", ["ValueError('tau must be positive, got 0')", "FileNotFoundError(2, 'absent', 'x')"])
def test_what_the_set_up_refuses_is_one_line_and_exit_2(
    notebook: Path, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(notebook, f"raise {error}")
    assert main(["run", str(notebook), "-p", "ratio", "0.5"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in ("medlib: tau must be positive, got 0", "medlib: [Errno 2] absent: 'x'")
    assert not list((notebook.parent / "runs").glob("*.ipynb"))


def test_the_same_error_later_is_a_failure(notebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(notebook, "1", "2", "3", "raise ValueError('late')")
    assert main(["run", str(notebook), "-p", "ratio", "0.5"]) == 1
    assert "Traceback" in capfd.readouterr().err and (notebook.parent / "runs" / "tiny-ratio=0.5.ipynb").exists()


def test_a_cell_that_hangs_is_ended(notebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(notebook, "print('before')", "import time\ntime.sleep(90)")
    assert main(["run", str(notebook), "--timeout", "5"]) == 1
    assert "timed out" in capfd.readouterr().err.lower()
    assert "before" in printed(notebook.parent / "runs" / "tiny.ipynb")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "rato", "0.2"], "unknown parameter 'rato' (did you mean 'ratio'?); known: ratio, scale, seed"),
        (["-p", "ratio", "abc"], "ratio must be a float like its default 0.1, got 'abc'"),
        (["-p", "ratio", "True"], "ratio must be a float"),
        (["-p", "seed", "0.5"], "seed must be a int"),
        (["-p", "soft", "1"], "soft must be a bool"),
        (["-p", "soft", "true"], "soft must be a bool"),
        (["-o", "tiny.ipynb"], "tiny.ipynb is a source"),
        (["-o", "."], "is a folder: name a file in it"),
        (["--timeout", "0"], "timeout must be at least 1 second, got 0"),
        (["-o", str(paths.NOTEBOOKS / "out.ipynb")], "notebooks/out.ipynb is a source"),
    ],
)
def test_a_wrong_call_is_exit_2_and_runs_nothing(
    arguments: list[str], message: str, notebook: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(notebook)
    assert main(["run", str(notebook), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert digest(notebook) == before and [path.name for path in notebook.parent.iterdir()] == ["tiny.ipynb"]


def test_an_unknown_notebook_is_exit_2(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere"]) == 2
    assert "no notebook 'nowhere'" in capsys.readouterr().err


def test_values_are_read_as_papermill_reads_them(notebook: Path) -> None:
    overrides = [("ratio", "1"), ("seed", "3"), ("soft", "False"), ("limit", "2"), ("colour", "007")]
    values = runner.parse_overrides(notebook, overrides)
    assert values == {"ratio": 1.0, "seed": 3, "soft": False, "limit": 2, "colour": "007"}
    assert [type(value) for value in values.values()] == [float, int, bool, int, str]
    assert runner.parse_overrides(notebook, [("limit", "None")]) == {"limit": None}


def test_parameters_are_read_without_running(notebook: Path) -> None:
    parameters = runner.notebook_parameters(notebook)
    assert parameters["colour"] == runner.Parameter("colour", "#e69f00", "of the ventricle")
    assert parameters["soft"].help == "" and parameters["limit"].default is None


def test_a_notebook_without_parameters_is_refused(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(notebook, tag="parametres")
    assert main(["run", str(notebook)]) == 2
    assert "no cell tagged 'parameters'" in capsys.readouterr().err
    notebook.write_text("not a notebook")
    assert main(["run", str(notebook)]) == 2
    assert "tiny.ipynb is not a notebook" in capsys.readouterr().err
    for content in ("[]", "3", '{"cells": null}', '{"cells": [1]}', '{"cells": [{}]}'):
        notebook.write_text(content)
        assert main(["summary", str(notebook)]) == 2
        assert "tiny.ipynb is not a notebook" in capsys.readouterr().err


def test_the_output_tells_overrides_apart(notebook: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    assert runner.default_output(notebook, {}) == folder / "tiny.ipynb"
    assert runner.default_output(notebook, {"ratio": 0.1, "seed": 1}) == folder / "tiny-ratio=0.1-seed=1.ipynb"
    assert runner.default_output(notebook, {"output_dir": "elsewhere"}) == tmp_path / "elsewhere" / "tiny.ipynb"
    one, two = (runner.default_output(notebook, {"data_root": f"/{'long' * 50}/{end}"}) for end in "ab")
    assert one != two and one.parent == folder and len(one.name) < 200
    letters = runner.default_output(notebook, {"data_root": "é" * 200})  # two bytes each
    assert len(letters.name.encode()) < 200


def test_the_time_limit_follows_the_scale(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **options: seen.append(options["execution_timeout"]))
    runner.run_notebook(notebook, {})
    runner.run_notebook(notebook, {"scale": "paper"})
    monkeypatch.setenv("MEDLIB_SCALE", "laptop")
    runner.run_notebook(notebook, {"scale": "paper"})
    runner.run_notebook(notebook, {}, timeout=5)
    assert seen == [600, 3 * 24 * 3600, 3600, 5]


def test_the_list_of_notebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "07_other.ipynb")
    monkeypatch.setattr("medlib.__main__.NOTEBOOKS", tmp_path)
    assert main(["notebooks"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["07_other", "    ratio = 0.1".ljust(32) + "  labelled share"]


def test_phantoms_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "hearts"
    assert main(["phantoms", "acdc", str(root), "--patients", "2", "--seed", "3"]) == 0
    assert "2 phantom patients" in capsys.readouterr().out
    assert main(["check", "acdc", str(root)]) == 0
    assert re.search(r"patients +2\b", capsys.readouterr().out)
    assert main(["check", "acdc", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().out
    assert main(["check", "acdcc", str(root)]) == 2
    assert "acdcc" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from medlib.__main__ import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.PROJECT).returncode == 0


def test_settings_are_read_as_python_reads_them_and_none_is_a_choice():
    read = {
        text: read_value(text) for text in ("0.1", "3", "true", "False", "None", "none", "(8, 16)", "dense", "{[]: 1}")
    }
    assert list(read.values()) == [0.1, 3, True, False, None, "none", (8, 16), "dense", "{[]: 1}"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(NonFiniteLoss("loss term x became infinite"), 1), (RuntimeError("the checkpoint y cannot be read"), 1),
     (KeyboardInterrupt("stopped at step 3"), 130)],
)  # fmt: skip
def test_a_run_that_stops_says_why_in_one_line(tmp_path, monkeypatch, capsys, error, code):
    def stop(sweep):
        raise error

    monkeypatch.setattr(Sweep, "run", stop)
    arguments = ["sweep", "acdc", str(tmp_path), "--methods", "coral", "--labelled", "1", "--records", str(tmp_path)]
    assert main(arguments) == code
    assert capsys.readouterr().err == f"medlib: {error}\n"


def test_a_fault_of_the_program_is_not_hidden(tmp_path, monkeypatch):
    def fail(sweep):
        raise RecursionError("too deep")

    monkeypatch.setattr(Sweep, "run", fail)
    with pytest.raises(RecursionError):
        main(["sweep", "acdc", str(tmp_path), "--methods", "coral", "--labelled", "1", "--records", str(tmp_path)])
