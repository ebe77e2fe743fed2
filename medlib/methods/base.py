"""What a method is: a frozen dataclass of a paper's hyper-parameters that builds networks and yields training stages.

Adding a paper means adding one module to this package: a `Method` with ``@register("name")`` and the stages it needs.
Nothing here, and nothing in the training loop, knows any method's name.
"""

import dataclasses
import difflib
import importlib
import json
import math
import pkgutil
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from medlib.data.batches import ShuffledRows, TrainingData
from medlib.data.cases import DatasetInfo
from medlib.data.prepare import Preparation, Protocol
from medlib.rng import generator

SCALES = ("ci", "laptop", "paper")


class Streams:
    """The named random streams of one stage on one device; their states travel with the checkpoint.

    Args:
        rank, world: number of this process and of all processes that train together.
    """

    def __init__(self, seed: int, stage: str, device: torch.device | str, rank: int = 0, world: int = 1):
        self.seed = seed
        self.stage = stage
        self.device = device
        self.rank = rank
        self.world = world
        self._generators: dict[str, torch.Generator] = {}

    def own(self, name: str) -> torch.Generator:
        """A stream that differs between the processes: for augmentation."""
        return self[name if self.rank == 0 else f"{name} of rank {self.rank}"]

    def __getitem__(self, name: str) -> torch.Generator:
        """A stream that is the same in all processes: for choosing a batch, of which each takes its share."""
        if name not in self._generators:
            self._generators[name] = generator(self.seed, self.stage, name, device=self.device)
        return self._generators[name]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: stream.get_state() for name, stream in self._generators.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, stream in state.items():
            self[name].set_state(stream)


class Work(nn.Module, ABC):
    """A stage under way: everything a checkpoint must hold, and what one step computes.

    A module, so that one state dict covers networks, heads, learnable loss parameters and banks, and so that Fabric can
    wrap it for any number of devices: a step is one call of ``forward`` with the tensors of one batch.
    """

    samplers: dict[str, ShuffledRows]
    gather: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)  # (B, ...) of all processes, with gradient
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    @abstractmethod
    def draw(self) -> dict[str, Tensor]:
        """The tensors of the next batch, augmented, on the device."""

    @abstractmethod
    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Named 0-d loss terms of one batch; ``total`` is the one that is minimised."""

    def after_step(self) -> None:  # noqa: B027  (optional on purpose)
        """What follows an optimiser step: moving averages, banks."""


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """One stretch of training. Its fields are all that determines its outcome besides data, seed and initial weights.

    Attributes:
        name: "pretrain", "finetune", "cotrain".
        steps: optimiser steps.
        uses_labels: False for a stage that sees no label: it is then shared by all label ratios.
        everything: whether it also sees the images of the validation and test patients.
    """

    name: str
    steps: int
    uses_labels: bool
    everything: bool = False

    @abstractmethod
    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        """Set up the work on ``streams.device``; ``networks`` are trained in place."""

    def describe(self) -> dict[str, Any]:
        """The fields as plain data: what a checkpoint is keyed by."""
        return {"stage": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A paper's recipe. Every field is a setting; a row of an ablation table is one setting of one method.

    Attributes:
        image_size: side of the square slices in px.
        spacing: in-plane spacing in mm to resample to, or None to resize the whole field of view.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    scales: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ci": {}, "laptop": {}, "paper": {}}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}}  # what ``variant`` sets, where a method has it

    image_size: int
    spacing: float | None

    @property
    def patch(self) -> tuple[int, int, int] | None:
        """Of a 3D method: the windows (z, y, x) in voxels by which it predicts a volume. None: it predicts slices."""
        return None

    def protocol(self, info: DatasetInfo) -> Preparation:
        """How its data are prepared; a 3D method returns a `VolumeProtocol`.

        `spacing` was chosen for hearts. Where a data set shows less than `image_size` px of it (a cropped hippocampus),
        the spacing is finer, so that the picture is filled; where its papers resize the whole field of view, so do we.
        """
        spacing = self.spacing
        if spacing is not None:
            if not 0 < spacing < math.inf:
                raise ValueError(f"spacing must be above 0 mm and finite, or None, got {spacing}")
            spacing = None if info.spacing is None else min(spacing, info.size * info.spacing / self.image_size)
        return Protocol(self.image_size, spacing, window=info.window)

    def plain(self) -> dict[str, Any]:
        """Its settings as a run record holds them: what JSON makes of the fields."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @abstractmethod
    def networks(self, classes: int) -> nn.ModuleDict:
        """New networks; initial weights come from the surrounding `medlib.nets.seeded_init`."""

    @abstractmethod
    def stages(self, data: TrainingData) -> Sequence[Stage]:
        """The stages in order."""

    @abstractmethod
    def predict(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, C, *space) of images (B, 1, *space), with networks in eval mode."""


_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str, title: str) -> Callable[[M], M]:
    """Class decorator that makes a method known under ``name``; ``title`` is what figures and tables print."""

    def add(cls: M) -> M:
        if name in _METHODS:
            raise ValueError(f"two methods are called {name!r}: {_METHODS[name].__module__} and {cls.__module__}")
        cls.name, cls.title = name, title
        _METHODS[name] = cls
        return cls

    return add


def available() -> dict[str, type[Method]]:
    """All methods by name: those of every module in this package."""
    package = importlib.import_module("medlib.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"medlib.methods.{module.name}")
    return dict(_METHODS)


def build(name: str, *, scale: str = "paper", **settings: Any) -> Method:
    """The method ``name`` at ``scale``, with ``settings`` on top.

    A scale changes sizes, lengths and learning rates, never the algorithm; "paper" is the paper's own, "laptop" takes
    minutes on two CPU cores, "ci" seconds. A setting given here overrules the variant, and the variant the scale.

    Raises:
        ValueError: unknown method, scale or setting; the message lists the known ones.
    """
    methods = available()
    if name not in methods:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(sorted(methods))}")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; there are {', '.join(SCALES)}")
    cls = methods[name]
    known = {field.name for field in dataclasses.fields(cls)}
    for setting in settings:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{name} has no setting {setting!r}{hint} Known: {', '.join(sorted(known))}")
    _check_types(cls, settings)
    variant = settings.get("variant", "paper")
    if variant not in cls.variants:
        raise ValueError(f"{name} has no variant {variant!r}; there are {', '.join(cls.variants)}")
    return cls(**{**cls.scales[scale], **cls.variants[variant], **settings})


def _check_types(cls: type[Method], settings: Mapping[str, Any]) -> None:
    """ValueError for a setting that is not of its field's type: text where a number is due, 2.5 steps, 1 for True."""
    plain = {int: (int,), float: (int, float), bool: (bool,), str: (str,), type(None): (type(None),)}
    hints = typing.get_type_hints(cls)
    for name, value in settings.items():
        options = typing.get_args(hints[name]) or (hints[name],)
        if all(option in plain for option in options):
            accepted = {kind for option in options for kind in plain[option]}
            if not isinstance(value, tuple(accepted)) or (isinstance(value, bool) and bool not in accepted):
                names = " or ".join("None" if option is type(None) else option.__name__ for option in options)
                raise ValueError(f"{cls.name}: {name} must be {names}, got {value!r}")
        elif all(isinstance(option, type) for option in options) and not isinstance(value, tuple(options)):
            names = " or ".join(option.__name__ for option in options)
            raise ValueError(f"{cls.name}: {name} must be of type {names}, got {value!r}")


def check_whole(settings: Any, *names: str, lowest: int = 1) -> None:
    """ValueError unless those fields are whole numbers from ``lowest``."""
    for name in names:
        value = getattr(settings, name)
        if type(value) is not int or value < lowest:
            raise ValueError(f"{name} must be a whole number from {lowest}, got {value!r}")


def check_choices(settings: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """ValueError unless each of those fields is one of its choices."""
    for name, known in choices.items():
        if (value := getattr(settings, name)) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_range(settings: Any, *names: str, lowest: float, highest: float = math.inf, open_ended: bool = False) -> None:
    """ValueError unless those fields are finite, from ``lowest`` (above it, if ``open_ended``) to ``highest``."""
    for name in names:
        value = getattr(settings, name)
        if not (lowest <= value <= highest and value < math.inf) or (open_ended and value == lowest):
            end = "" if highest == math.inf else f" and at most {highest}"
            raise ValueError(f"{name} must be {'above' if open_ended else 'at least'} {lowest}{end}, got {value}")
