"""What every notebook begins with, how it trains, and how its exercises are checked.

``start`` turns the parameters cell into a frozen ``Session``, which reads the data and runs methods on them;
``show_source`` prints a definition from the library; ``check`` compares an exercise's answer with a reference.
"""

import copy
import hashlib
import inspect
import json
import os
import shlex
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython.display import Markdown

from medlib import data, experiment
from medlib.data.batches import TrainingData
from medlib.data.splits import split_cases
from medlib.methods import Method
from medlib.paths import DATA, make_folder, resolve
from medlib.results.records import SUFFIX
from medlib.runner import unknown_parameters
from medlib.train import Callback

SCALES = ("ci", "laptop", "paper")
DEVICES = ("auto", "cpu", "cuda", "mps")
PHANTOM = "phantom"
PHANTOM_PATIENTS = {"ci": 15, "laptop": 60, "paper": 100}
"""How many phantom patients a scale draws: enough to run, to tell methods apart, and as many as ACDC has."""


@dataclass(frozen=True)
class Rule:
    """What one fixed parameter may be."""

    kinds: tuple[type, ...]
    holds: Callable[[Any], bool]
    wanted: str

    def validate(self, name: str, value: object) -> None:
        """ValueError unless ``value`` is of the right type and in range."""
        if type(value) not in self.kinds or not self.holds(value):
            raise ValueError(f"{name} must be {self.wanted}, got {value!r}")


FIXED: Mapping[str, Rule] = {
    "dataset": Rule((str,), lambda v: v in data.DATASETS, f"one of {', '.join(data.DATASETS)}"),
    "data_root": Rule((str,), bool, f"a data set's folder, or {PHANTOM!r}"),
    "ratio": Rule((int, float), lambda v: 0 < v <= 1, "the labelled share of the training patients, in (0, 1]"),
    "scale": Rule((str,), lambda v: v in SCALES, f"one of {', '.join(SCALES)}"),
    "seed": Rule((int,), lambda v: v >= 0, "a whole number from 0"),
    "device": Rule((str,), lambda v: v in DEVICES, f"one of {', '.join(DEVICES)}"),
    "output_dir": Rule((str,), bool, "a folder to write to"),
}
"""The parameters every notebook has."""


@dataclass(frozen=True)
class Session:
    """The parameters of a notebook, validated: paths absolute, device chosen, scale as the environment wants it.

    ``data_root`` is None for phantoms; ``own`` holds the notebook's own switches by name; ``notebook`` is its name.
    """

    dataset: str
    data_root: Path | None
    ratio: float
    scale: str
    seed: int
    device: str
    output_dir: Path
    own: Mapping[str, object]
    notebook: str = ""

    @property
    def phantom(self) -> bool:
        """Whether the patients are drawn rather than read."""
        return self.data_root is None

    @property
    def source(self) -> str:
        """What the pictures show, for their titles: "phantom", or the name of the data set."""
        return PHANTOM if self.phantom else self.dataset.upper()

    def root(self) -> Path:
        """The scans' folder; phantoms are drawn on first use into ``data/phantoms/`` and found there afterwards."""
        if self.data_root is not None:
            return self.data_root
        patients = PHANTOM_PATIENTS[self.scale]
        return data.write_phantoms(self.dataset, DATA / "phantoms" / f"{self.dataset}-{patients}", patients, seed=0)

    def cases(self) -> list[data.Case]:
        """The scans on disk."""
        return data.read_dataset(self.dataset, self.root())

    def data(self, method: Method) -> TrainingData:
        """The scans prepared for ``method`` and split by patient; the split does not depend on ``seed``."""
        cases = self.cases()
        return experiment.load(cases, split_cases(self.dataset, cases, self.ratio, seed=0), method, progress=False)

    def run(
        self, method: Method, data: TrainingData, callback: Callback | None = None, keep: Collection[int] = ()
    ) -> experiment.Outcome:
        """Train ``method``, measure it on validation and test, and leave a record in ``output_dir/records``.

        A stage that was trained before with the same inputs is taken from its checkpoint; the same run writes the same
        file. ``keep``: steps after which the weights are kept, see `medlib.train.train`.
        """
        outcome = experiment.run(
            method,
            data,
            seed=self.seed,
            output_dir=self.output_dir,
            device=self.device,
            open_test=True,
            progress=False,
            callback=callback,
            keep=keep,
        )
        record = outcome.record(scale=self.scale, root=self.data_root, command=self.command())
        facts = json.dumps([record.to_dict()[name] for name in ("settings", "split", "data")], sort_keys=True)
        digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
        name = f"{method.name}-{self.scale}-{len(data.split.labelled)}p-s{self.seed}-{digest}{SUFFIX}"
        record.save(self.output_dir / "records" / name)
        return outcome

    def command(self) -> str:
        """The command that repeats the notebook."""
        values = {name: getattr(self, name) for name in FIXED if name not in ("data_root", "output_dir", "device")}
        values |= {"data_root": self.data_root or PHANTOM, **self.own}
        pairs = [word for name, value in values.items() for word in ("-p", name, str(value))]
        return shlex.join(["python", "-m", "medlib", "run", self.notebook, *pairs])

    def __repr__(self) -> str:
        """The same text on every machine and at every scale, so that it may stand in a committed notebook."""
        source = "phantom patients" if self.phantom else "real patients"
        own = "".join(f", {name}={value!r}" for name, value in self.own.items())
        return f"Session({self.dataset}, {source}, ratio={self.ratio:g}, seed={self.seed}{own})"


def start(
    namespace: dict[str, object], own: Sequence[str] = (), notebook: str = "", datasets: Sequence[str] = ()
) -> Session:
    """The session that the parameters in ``namespace`` (a notebook's ``globals()``) describe.

    ``own`` names the notebook's parameters beyond ``FIXED``; ``notebook`` is its name, for the records of its runs;
    ``datasets`` are those it can show, where its text is about one anatomy (default: all).
    The environment variable MEDLIB_SCALE overrides ``scale``.
    Raises KeyError for a parameter that is missing and for one that nobody knows: any other public variable that is
    there when a kernel calls this for the first time (later there are many, and they are results). ValueError for a
    value out of range or a device that this machine lacks.
    """
    known = [*FIXED, *own]
    if missing := [name for name in known if name not in namespace]:
        raise KeyError(f"the parameters cell lacks {', '.join(missing)}")
    if "_medlib_started" not in namespace and (unknown := sorted(public_variables(namespace) - set(known))):
        raise KeyError(unknown_parameters(unknown, known, "this notebook"))
    values: dict[str, Any] = {name: namespace[name] for name in FIXED}
    values["scale"] = os.environ.get("MEDLIB_SCALE") or values["scale"]
    for name, rule in FIXED.items():
        rule.validate(name, values[name])
    if datasets and values["dataset"] not in datasets:
        look = f"python -m medlib check {values['dataset']} FOLDER --figure page.png"
        raise ValueError(f"this notebook shows {' and '.join(datasets)}, not {values['dataset']!r}: for that `{look}`")
    session = Session(
        dataset=values["dataset"],
        data_root=None if values["data_root"] == PHANTOM else resolve(values["data_root"]),
        ratio=float(values["ratio"]),
        scale=values["scale"],
        seed=values["seed"],
        device=pick_device(values["device"]),
        output_dir=resolve(values["output_dir"]),
        own={name: namespace[name] for name in own},
        notebook=notebook,
    )
    make_folder(session.output_dir, "output_dir")
    for part in (session.output_dir / "stages", session.output_dir / "records"):  # what a run fills
        if part.exists():
            make_folder(part, "output_dir")
    namespace["_medlib_started"] = True
    return session


def public_variables(namespace: Mapping[str, object]) -> set[str]:
    """The variables someone assigned: not modules, functions or classes, not IPython's own, no leading underscore."""
    return {
        name
        for name, value in namespace.items()
        if not (name.startswith("_") or name in ("In", "Out") or isinstance(value, types.ModuleType) or callable(value))
    }


def pick_device(name: str) -> str:
    """``name`` itself where this machine has it (else ValueError); for "auto" the fastest there is."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in available.items() if there)
    if not available[name]:
        there = ", ".join(device for device, usable in available.items() if usable)
        raise ValueError(f"device {name!r} is not available here (there is: {there}); 'auto' takes the best there is")
    return name


def show_source(function: Callable[..., Any]) -> Markdown:
    """The library's text of ``function``, to read where it is explained."""
    return Markdown(f"```python\n{inspect.getsource(function).rstrip()}\n```")


@dataclass(frozen=True)
class Verdict:
    """What became of an exercise. True where it is solved; shown in a notebook as ``text``."""

    state: str
    text: str

    def __bool__(self) -> bool:
        return self.state == "correct"

    def __repr__(self) -> str:
        return self.text


def check(
    answer: object, reference: object, cases: Sequence[tuple] = (), name: str = "exercise", tolerance: float = 1e-5
) -> Verdict:
    """Compare an exercise's ``answer`` with ``reference``. No answer makes it raise: an unsolved notebook stays green.

    Where ``reference`` is a function, so should be the answer, and both are called with each tuple of arguments in
    ``cases``; otherwise the two values are compared. Values may be numbers, tensors, arrays, texts, and tuples, lists
    or dicts of them. Two numbers agree within
    ``tolerance * (1 + |reference|)``.
    """
    if callable(reference) and not cases:
        raise ValueError(f"{name} has no cases to compare on")
    if answer is None:
        return Verdict("open", f"{name}: not attempted yet")
    if not callable(reference):
        wrong = difference(answer, reference, tolerance)
        return Verdict("wrong", f"{name}: {wrong}") if wrong else Verdict("correct", f"{name}: correct")
    if not callable(answer):
        return Verdict("wrong", f"{name}: a function is wanted, got {shown(answer)}")
    for number, case in enumerate(cases, start=1):
        expected = reference(*copy.deepcopy(case))
        try:
            wrong = difference(answer(*copy.deepcopy(case)), expected, tolerance)
        except Exception as error:  # whatever a learner's code may raise is a result of the check
            wrong = f"it raised {type(error).__name__}: {error}"
        if wrong:
            arguments = ", ".join(shown(argument) for argument in case)
            return Verdict("wrong", f"{name}: case {number} of {len(cases)} is wrong: {wrong}\nfor ({arguments})")
    return Verdict("correct", f"{name}: correct, {len(cases)} of {len(cases)} cases agree within {tolerance:g}")


def difference(answer: object, expected: object, tolerance: float) -> str:
    """How ``answer`` differs from ``expected``, in words; empty where they agree."""
    if isinstance(expected, str) or expected is None:
        return "" if answer == expected else f"got {shown(answer)}, expected {shown(expected)}"
    if isinstance(expected, Mapping):
        if not isinstance(answer, Mapping) or set(answer) != set(expected):
            return f"got {shown(answer)}, expected a dict with the keys {', '.join(map(str, expected))}"
        parts = {f"[{key!r}]": (answer[key], expected[key]) for key in expected}
    elif isinstance(expected, tuple | list):
        if not isinstance(answer, tuple | list) or len(answer) != len(expected):
            return f"got {shown(answer)}, expected {len(expected)} values"
        parts = {f"[{index}]": pair for index, pair in enumerate(zip(answer, expected, strict=True))}
    else:
        return tensor_difference(answer, expected, tolerance)
    for place, (mine, theirs) in parts.items():
        if wrong := difference(mine, theirs, tolerance):
            return f"at {place}: {wrong}"
    return ""


def tensor_difference(answer: object, expected: object, tolerance: float) -> str:
    """``difference`` for numbers, arrays and tensors: the first wrong element and the largest error."""
    try:
        mine, theirs = (torch.as_tensor(value).detach().cpu().to(torch.float64) for value in (answer, expected))
    except (TypeError, ValueError, RuntimeError):
        return f"got {shown(answer)}, expected {shown(expected)}"
    if mine.shape != theirs.shape:
        return f"got shape {tuple(mine.shape)}, expected {tuple(theirs.shape)}"
    same = torch.isclose(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    if same.all():
        return ""
    error = (mine - theirs)[~same].abs().max()
    if mine.ndim == 0:
        return f"got {mine:.6g}, expected {theirs:.6g}"
    index = tuple((~same).nonzero()[0].tolist())
    return (
        f"{int((~same).sum())} of {same.numel()} elements differ, by {error:.3g} at most; the first at "
        f"{list(index)}: got {mine[index]:.6g}, expected {theirs[index]:.6g}"
    )


def shown(value: object) -> str:
    """``value`` in a few words: small things whole, large tensors by their shape."""
    if isinstance(value, torch.Tensor | np.ndarray) and np.prod(value.shape) > 8:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, torch.Tensor | np.ndarray):
        return str(value.tolist())
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
