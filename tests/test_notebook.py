"""The start of a notebook and the check of an exercise."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from medlib import data, notebook
from medlib.methods import build
from medlib.notebook import check, start
from medlib.results import load_records


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What a kernel holds after the parameters cell, with the names IPython puts there."""
    monkeypatch.delenv("MEDLIB_SCALE", raising=False)
    return {
        "__name__": "__main__", "In": [""], "Out": {}, "exit": exit, "get_ipython": lambda: None, "_i1": "",
        "math": math, "start": start, "dataset": "acdc", "data_root": "phantom", "ratio": 0.1, "scale": "laptop",
        "seed": 0, "device": "cpu", "output_dir": str(tmp_path / "runs"), "variant": "paper",
    }  # fmt: skip


def test_a_session_holds_the_parameters(namespace: dict[str, object], tmp_path: Path) -> None:
    session = start(namespace, own=["variant"])
    assert session.phantom and session.data_root is None
    assert (session.dataset, session.ratio, session.scale) == ("acdc", 0.1, "laptop")
    assert (session.seed, session.device) == (0, "cpu")
    assert session.output_dir == tmp_path / "runs" and session.output_dir.is_dir()
    assert session.own == {"variant": "paper"}
    with pytest.raises(AttributeError):
        session.seed = 1  # type: ignore[misc]


def test_its_text_names_no_machine_and_no_scale(namespace: dict[str, object], tmp_path: Path) -> None:
    text = repr(start(namespace, own=["variant"]))
    assert text == "Session(acdc, phantom patients, ratio=0.1, seed=0, variant='paper')"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dataset", "acdcc", "dataset must be one of acdc"),
        ("data_root", "", "data_root must be"),
        ("ratio", 0.0, "ratio must be .* got 0.0"),
        ("ratio", 1.5, "got 1.5"),
        ("ratio", "abc", "got 'abc'"),
        ("ratio", True, "got True"),
        ("ratio", float("nan"), "got nan"),
        ("scale", "tiny", "scale must be one of ci, laptop, paper, got 'tiny'"),
        ("seed", -1, "seed must be .* got -1"),
        ("seed", 0.5, "got 0.5"),
        ("device", "gpu", "device must be one of auto, cpu, cuda, mps"),
        ("output_dir", None, "output_dir must be"),
    ],
)
def test_a_value_out_of_range_is_refused(namespace: dict[str, object], name: str, value: object, message: str) -> None:
    namespace[name] = value
    with pytest.raises(ValueError, match=message):
        start(namespace, own=["variant"])


@pytest.mark.parametrize("place", ["runs", "runs/stages", "runs/records", "."])
def test_an_output_that_cannot_be_written_is_refused_at_the_start(
    namespace: dict[str, object], tmp_path: Path, place: str
) -> None:
    blocked = tmp_path / place / ("runs" if place == "." else "")
    if place != "." and place != "runs":
        (tmp_path / "runs").mkdir()
    blocked.write_text("a file")
    if place == ".":
        namespace["output_dir"] = str(blocked / "below")
    with pytest.raises(ValueError, match=rf"output_dir .*cannot be written to .*{re.escape(str(blocked))}"):
        start(namespace, own=["variant"])


def test_a_notebook_about_one_anatomy_refuses_others_and_says_what_to_do(namespace: dict[str, object]) -> None:
    namespace["dataset"] = "btcv"
    with pytest.raises(ValueError, match=r"shows acdc, not 'btcv'.*medlib check btcv FOLDER"):
        start(namespace, own=["variant"], datasets=["acdc"])
    assert start(namespace, own=["variant"]).dataset == "btcv"


def test_an_unknown_parameter_is_refused_with_the_closest_name(namespace: dict[str, object]) -> None:
    namespace["rato"] = 0.2
    with pytest.raises(KeyError, match=r"unknown parameter 'rato' \(did you mean 'ratio'\?\)"):
        start(namespace, own=["variant"])
    with pytest.raises(KeyError, match="'variant'"):  # a switch of another notebook
        start({name: value for name, value in namespace.items() if name != "rato"})


def test_a_missing_parameter_is_named(namespace: dict[str, object]) -> None:
    del namespace["seed"]
    with pytest.raises(KeyError, match="lacks seed"):
        start(namespace, own=["variant"])


def test_a_second_run_in_the_same_kernel_knows_that_results_are_no_parameters(namespace: dict[str, object]) -> None:
    start(namespace, own=["variant"])
    namespace |= {"cases": [1], "dice": 0.7, "ratio": 0.2}
    assert start(namespace, own=["variant"]).ratio == 0.2
    namespace["ratio"] = 2.0
    with pytest.raises(ValueError, match="ratio"):
        start(namespace, own=["variant"])


def test_the_environment_overrides_the_scale(namespace: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLIB_SCALE", "ci")
    assert start(namespace, own=["variant"]).scale == "ci"
    monkeypatch.setenv("MEDLIB_SCALE", "huge")
    with pytest.raises(ValueError, match="huge"):
        start(namespace, own=["variant"])


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert notebook.pick_device("auto") == "cpu"
    with pytest.raises(ValueError, match="'cuda' is not available here"):
        notebook.pick_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert notebook.pick_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert notebook.pick_device("auto") == "cuda"


def test_a_relative_root_is_resolved_and_a_missing_one_is_an_error_of_the_reader(
    namespace: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace["data_root"] = "nowhere"
    session = start(namespace, own=["variant"])
    assert not session.phantom and session.data_root == tmp_path / "nowhere"
    with pytest.raises((FileNotFoundError, data.DataError), match="nowhere"):
        session.cases()


def test_phantoms_are_drawn_once(namespace: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "DATA", tmp_path)
    monkeypatch.setattr(notebook, "PHANTOM_PATIENTS", {"laptop": 2})
    session = start(namespace, own=["variant"])
    cases = session.cases()
    assert len({case.patient for case in cases}) == 2
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii*")}
    assert written
    assert session.cases() == cases
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii*")}


def test_a_run_leaves_one_record_with_the_command_that_repeats_it(
    namespace: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "DATA", tmp_path)
    monkeypatch.setattr("medlib.experiment.CACHE", tmp_path / "cache")
    monkeypatch.setattr(notebook, "PHANTOM_PATIENTS", {"ci": 4})
    namespace["scale"] = "ci"
    session = start(namespace, own=["variant"], notebook="04_coral")
    method = build("supervised", scale="ci", finetune_steps=1)
    training = session.data(method)
    assert len(training.split.labelled) == 1 and training.test
    for _ in range(2):
        outcome = session.run(method, training)
    (saved,) = load_records(session.output_dir)
    assert saved.method == "supervised" and saved.test is not None and outcome.reported[0] == "test"
    assert saved.command == session.command()
    for word in ("medlib run 04_coral", "-p ratio 0.1", "-p scale ci", "-p data_root phantom", "-p variant paper"):
        assert word in saved.command


def test_a_definition_is_shown_as_it_stands_in_the_library() -> None:
    shown = notebook.show_source(square)._repr_markdown_()
    assert shown.startswith("```python\ndef square(") and shown.endswith("return values**2\n```")


def square(values: torch.Tensor) -> torch.Tensor:
    """The reference of the exercises below."""
    return values**2


CASES = [(torch.tensor([1.0, 2.0]),), (torch.tensor([-3.0, 0.5]),)]


def test_an_exercise_not_attempted_is_no_error() -> None:
    verdict = check(None, square, CASES, name="square")
    assert not verdict and repr(verdict) == "square: not attempted yet"


def test_a_right_answer_is_correct() -> None:
    assert check(lambda values: values * values, square, CASES)
    assert repr(check(square, square, CASES, name="square")) == "square: correct, 2 of 2 cases agree within 1e-05"


def test_a_wrong_answer_shows_its_first_wrong_case_and_element() -> None:
    verdict = check(lambda values: values.abs() * values, square, CASES, name="square")
    assert not verdict
    assert "case 2 of 2" in verdict.text and "at [0]: got -9, expected 9" in verdict.text and "by 18" in verdict.text
    assert "[-3.0, 0.5]" in verdict.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda values: values.sum(), r"got shape \(\), expected \(2,\)"),
        (lambda: 1, "raised TypeError"),
        (lambda values: 1 / 0, "raised ZeroDivisionError"),
        (lambda values: None, "got None"),
        (lambda values: "4", "got '4'"),
        (lambda values: values * math.nan, "2 of 2 elements differ"),
        (3.0, "a function is wanted"),
    ],
)
def test_no_answer_makes_the_check_raise(answer: object, message: str) -> None:
    verdict = check(answer, square, CASES)
    assert not verdict
    assert re.search(message, verdict.text), verdict.text


def test_a_check_without_cases_is_a_mistake_of_the_notebook() -> None:
    with pytest.raises(ValueError, match="square has no cases"):
        check(square, square, [], name="square")


def test_an_answer_that_changes_its_arguments_cannot_pass_by_it() -> None:
    def cheat(values: torch.Tensor) -> torch.Tensor:
        values.zero_()
        return values

    assert not check(cheat, square, CASES)
    assert CASES[0][0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "expected", "agree"),
    [
        (0.5, 0.5000001, True),
        (0.5, 0.6, False),
        (np.array([1, 2]), torch.tensor([1.0, 2.0]), True),
        ((1, torch.ones(2)), [1, torch.ones(2)], True),
        ((1, torch.ones(2)), (1, torch.zeros(2)), False),
        ({"a": 1.0}, {"a": 1.0}, True),
        ({"a": 1.0}, {"a": 2.0}, False),
        ({"b": 1.0}, {"a": 1.0}, False),
        ("paper", "paper", True),
        ("paper", "released", False),
        (math.nan, math.nan, True),
        (1.0, math.inf, False),
        (True, torch.tensor(False), False),
    ],
)
def test_values_are_compared_by_what_they_hold(answer: object, expected: object, agree: bool) -> None:
    assert bool(check(answer, expected)) is agree
