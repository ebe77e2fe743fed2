"""Pre-training of MONA and of its rivals (section III-A, Table V): student, averaged teacher, two views, some labels.

All frameworks share the two branches, the views, the heads, the supervised loss on the labelled half and the
optimiser. They differ in how the two views of an image are compared:

- ``glcon``: by their relation to mined views, once for whole images and once for each of 36 windows (eq. 1-2);
- ``isd``: the same for whole images alone (arXiv 2012.09259);
- ``moco``: the view of the teacher is told from the mined views (MoCo v2, arXiv 2003.04297);
- ``knn_moco``: the nearest mined views are positives, too (arXiv 2106.05967);
- ``simclr``: the view is told from the other images of the batch, without a teacher (arXiv 2002.05709);
- ``byol``: the student predicts the teacher's view, each view from the other, without negatives (arXiv 2006.07733).

The mined views are the last embeddings of the teacher, in a queue, as in the released code: the paper draws other
images anew, which would be as many more passes of the teacher a step.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from medlib.augment import StrongAugmentation
from medlib.banks import FeatureBank
from medlib.data.batches import TrainingData
from medlib.losses.contrastive import COLDEST, nt_xent_loss
from medlib.losses.instance import prediction_loss, queue_contrastive_loss
from medlib.losses.mona import instance_discrimination_loss, local_instance_discrimination_loss, local_windows
from medlib.methods.base import Streams, Work, check_choices, check_range, check_whole
from medlib.methods.cotraining import (
    Cotrained,
    Cotraining,
    CotrainingWork,
    Teacher,
)
from medlib.nets import UNet

FRAMEWORKS = ("glcon", "moco", "knn_moco", "simclr", "byol", "isd", "none")
VIEWS = ("weak", "strong")

# ---- settings


@dataclass(frozen=True, kw_only=True)
class TwoBranches(Cotrained):
    """What pre-training depends on. The settings of the floor are those of both stages; ``steps`` is of fine-tuning.

    Attributes:
        batch_size: 6 (section IV-B), half of them labelled.
        framework: one of `FRAMEWORKS`; "none" does not pre-train.
        pretrain_steps: 30,000, as in the released code. The paper's 100 epochs would be 22,000 steps of 6 slices of
            ACDC; its division of the learning rate by 10 every 2,500 steps would leave nothing to learn with, so the
            rate falls as a polynomial, as in the code.
        ema: t = 0.99 of the teacher, in both stages and for all frameworks that have one (section III-A).
        noisy_teacher: False: the teacher is in eval mode; the released code leaves it in training mode, with dropout.
        batch_statistics: in pre-training the teacher in eval mode still normalises by the batch, as in MoCo, BYOL and
            ISD. With False it does so by its running statistics. Those are wrong for hundreds of steps, while weights
            move fast: its embeddings of all slices point one way, and there is nothing to relate (on ACDC at 48 px a
            mean cosine of 1.0000 after 24 steps and 0.9997 after 60; by the batch 0.29 and 0.33).
        projection_dim: 512, length of an embedding of an image (section IV-B).
        queue: mined views, and entries of the bank of the nearest-neighbour loss; 36 (section IV-B). For MoCo, too: its
            own 65,536 would hold each slice of ACDC fifty times.
        student_temperature, teacher_temperature: 0.1 and 0.01 of eq. 1 (section IV-B), for glcon and isd.
        temperature: of moco, knn_moco (0.2 in MoCo v2) and simclr.
        neighbors: k of kNN-MoCo and of the nearest-neighbour loss; 5 (sections IV-B and IV-G).
        local_grid: windows along each side; 6, the paper's 36 (7 in the code).
        window: side of a window in px, 64 (section IV-B); windows overlap by half.
        window_cells: cells along the side of a window; one vector of 2 C numbers each, 512 numbers a window for 4
            classes.
        student_view, teacher_view: "strong" and "weak" are the best row of Table IV.
        strong: the strong view. Pre-training takes brightness, contrast and blur from it.
        teacher_gradient: released: the loss pulls the teacher's heads towards the student.
        scrambled_fragments: released: the local term compares rows of a wrong reshape, once the queue is full.
    """

    batch_size: int = 6
    framework: str = "glcon"
    pretrain_steps: int = 30_000
    ema: float = 0.99
    noisy_teacher: bool = False
    batch_statistics: bool = True
    projection_dim: int = 512
    queue: int = 36
    student_temperature: float = 0.1
    teacher_temperature: float = 0.01
    temperature: float = 0.2
    neighbors: int = 5
    local_grid: int = 6
    window: int = 64
    window_cells: int = 8
    student_view: str = "strong"
    teacher_view: str = "weak"
    strong: StrongAugmentation = field(default_factory=StrongAugmentation)
    teacher_gradient: bool = False
    scrambled_fragments: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"framework": FRAMEWORKS, "student_view": VIEWS, "teacher_view": VIEWS})
        check_whole(self, "pretrain_steps", "projection_dim", "queue", "neighbors", "local_grid")
        check_whole(self, "window", "window_cells", lowest=2)
        check_whole(self, "batch_size", lowest=4)  # batch norm in the heads needs two images, were all labelled
        check_range(self, "student_temperature", "teacher_temperature", "temperature", lowest=COLDEST)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.framework == "glcon":
            self._check_windows()

    def _check_windows(self) -> None:
        stride = self.window // 2
        if self.window % self.window_cells or self.window % 2 or stride % (self.window // self.window_cells):
            raise ValueError(
                f"window must be even, and window and half of it multiples of window / window_cells; "
                f"got window {self.window} and window_cells {self.window_cells}"
            )
        side = (self.local_grid + 1) * stride
        if side > self.image_size:
            raise ValueError(
                f"{self.local_grid} windows of {self.window} px, {stride} px apart, need {side} px: "
                f"take a smaller window than {self.window} for image_size {self.image_size}"
            )
        if self.scrambled_fragments and self.queue % self.batch_size:
            raise ValueError(f"scrambled_fragments needs a queue of whole batches: {self.queue} % {self.batch_size}")

    def networks(self, classes: int) -> nn.ModuleDict:
        dim = self.projection_dim
        parts: dict[str, nn.Module] = {
            "unet": self.new_unet(classes),
            "head": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), _perceptron(16 * self.width, dim)),
            "predictor": _perceptron(dim, dim),
            "local_head": _dense_perceptron(classes, 2 * classes),
            "local_predictor": _dense_perceptron(2 * classes, 2 * classes),
        }
        return nn.ModuleDict(parts)


def _perceptron(inputs: int, outputs: int) -> nn.Module:
    """Heads and predictors of ISD and BYOL: (B, inputs) -> (B, outputs)."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Linear(outputs, outputs))


def _dense_perceptron(inputs: int, outputs: int) -> nn.Module:
    """The same for every cell of a map (B, inputs, h, w)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 1)
    )


@dataclass(frozen=True, kw_only=True)
class Pretraining(Cotraining):
    """The first stage; the settings of `TwoBranches` are all that it depends on, so fine-tunings can share it."""

    method: TwoBranches

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return _Pretraining(self.method, networks, data, streams)

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        shaping = {"name", *(each.name for each in fields(TwoBranches))}
        described["method"] = {name: value for name, value in described["method"].items() if name in shaping}
        return described


# ---- what a step computes


class TwoBranchWork(CotrainingWork):
    """A student and a teacher that follows it, heads included.

    Args:
        trained: names of the networks that this stage trains; the others stay as they are.
        followed: names of those that the teacher has, too.
    """

    method: TwoBranches

    def __init__(
        self,
        method: TwoBranches,
        networks: nn.ModuleDict,
        data: TrainingData,
        streams: Streams,
        trained: Sequence[str],
        followed: Sequence[str],
    ):
        super().__init__(method, networks, data, streams)
        for name, part in networks.items():
            part.requires_grad_(name in trained)
        self.followed = followed
        self.teacher = Teacher(self._student(), method.ema, method.noisy_teacher)

    def _student(self) -> nn.ModuleDict:
        return nn.ModuleDict({name: self.networks[name] for name in self.followed})

    def taught(self, images: Tensor) -> list[Tensor]:
        """The teacher's logits (B, C, H, W) and feature maps, coarsest first, of images (B, 1, H, W)."""
        with torch.no_grad():
            return logits_and_maps(self.teacher.network.get_submodule("unet"), images)

    def retouched(self, images: Tensor, view: str) -> Tensor:
        """Images as a branch with that ``view`` sees them: brightness, contrast and blur if it is "strong"."""
        if view == "weak":
            return images
        return self.method.strong.photometric.images(images, self.streams.own("strong"))

    def after_step(self) -> None:
        self.teacher.follow(self._student())
        super().after_step()


def logits_and_maps(unet: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits of a U-Net, then the maps of `UNet.maps`."""
    assert isinstance(unet, UNet)
    maps = unet.maps(images)
    return [unet.classifier(maps[-1]), *maps]


class _Pretraining(TwoBranchWork):
    def __init__(self, method: TwoBranches, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        is_local = method.framework == "glcon"
        trained = ["unet", "head", *(["predictor"] if method.framework in ("glcon", "isd", "byol") else [])]
        trained += ["local_head", "local_predictor"] if is_local else []
        followed = [name for name in trained if "predictor" not in name]
        super().__init__(method, networks, data, streams, trained, followed)
        self.queue = FeatureBank(method.queue, method.projection_dim)
        if is_local:
            length = method.local_grid**2 * 2 * data.classes * method.window_cells**2
            self.local_queue = FeatureBank(method.queue, length)
        if method.teacher_gradient:
            heads = [self.teacher.network.get_submodule(name) for name in followed if name != "unet"]
            pulled = [parameter.requires_grad_() for head in heads for parameter in head.parameters()]
            self.optimizer.param_groups[0]["params"] += pulled  # in the student's group: its schedule is theirs

    def train(self, mode: bool = True) -> "_Pretraining":
        super().train(mode)
        if self.method.batch_statistics:
            for layer in self.teacher.modules():
                if isinstance(layer, nn.modules.batchnorm._NormBase):
                    layer.train(mode)
        return self

    def draw(self) -> dict[str, Tensor]:
        """All images with the student's and with the teacher's view, the labelled ones first.

        Windows at the same place must show the same: GLCon warps both views alike. The others have two warps.
        """
        method = self.method
        halves = [sampler.draw() for sampler in self.samplers.values()]
        rows = torch.cat(halves)
        images, labels = self.source.batch(rows)
        others = images if method.framework == "glcon" else self.source.batch(rows)[0]
        return {
            "images": self.retouched(images, method.student_view),
            "others": self.retouched(others, method.teacher_view),
            "labels": labels[: len(halves[0])],
        }

    def forward(self, images: Tensor, others: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits, bottleneck, *_ = logits_and_maps(self.unet, images)
        supervised = self.supervised([logits], labels)
        if self.method.framework == "simclr":
            terms = {"global": self._told_apart(bottleneck, others)}
        elif self.method.framework == "byol":
            terms = {"global": self._predicted(bottleneck, images, others)}
        else:
            taught_logits, taught, *_ = self.taught(others)
            terms = {"global": self._related(bottleneck, taught)}
            if self.method.framework == "glcon":
                terms["local"] = self._locally_related(logits, taught_logits)
        return {"total": supervised + torch.stack([*terms.values()]).sum(), "supervised": supervised, **terms}

    def _told_apart(self, bottleneck: Tensor, others: Tensor) -> Tensor:
        """SimCLR; the student sees both views, one after the other."""
        first, second = (
            self.gather(self.networks["head"](maps)) for maps in (bottleneck, self.unet.encoder(others)[-1])
        )
        return nt_xent_loss(first, second, self.method.temperature)

    def _predicted(self, bottleneck: Tensor, images: Tensor, others: Tensor) -> Tensor:
        """BYOL; both branches see both views."""
        student, teacher = self.networks, self.teacher.network
        with torch.no_grad():
            encoder = teacher.get_submodule("unet.encoder")
            targets = [teacher.get_submodule("head")(encoder(view)[-1]) for view in (others, images)]
        bottlenecks = (bottleneck, self.unet.encoder(others)[-1])
        predictions = [student["predictor"](student["head"](maps)) for maps in bottlenecks]
        losses = [prediction_loss(*map(self.gather, pair)) for pair in zip(predictions, targets, strict=True)]
        return torch.stack(losses).mean()

    def _related(self, bottleneck: Tensor, taught: Tensor) -> Tensor:
        """A framework with a queue; remembers what to push."""
        method = self.method
        student = self.networks["head"](bottleneck)
        teacher = self.gather(self.teacher.network.get_submodule("head")(taught))
        self._embeddings = teacher.detach()
        mined, valid = self.queue.rows, self.queue.valid()
        if method.framework in ("moco", "knn_moco"):
            neighbors = method.neighbors if method.framework == "knn_moco" else 0
            return queue_contrastive_loss(
                self.gather(student), teacher, mined, method.temperature, valid=valid, neighbors=neighbors
            )
        student = self.gather(self.networks["predictor"](student))
        temperatures = (method.student_temperature, method.teacher_temperature)
        return instance_discrimination_loss(
            student, teacher, mined, *temperatures, valid=valid, teacher_gradient=method.teacher_gradient
        )

    def _locally_related(self, logits: Tensor, taught_logits: Tensor) -> Tensor:
        method = self.method
        own = nn.Sequential(self.networks["local_head"], self.networks["local_predictor"])
        student, teacher = (
            self.gather(windows(method, maps, head).transpose(0, 1)).transpose(0, 1)  # (P, B, D)
            for maps, head in ((logits, own), (taught_logits, self.teacher.network.get_submodule("local_head")))
        )
        self._windows = teacher.detach().transpose(0, 1).flatten(1)
        mined = self.local_queue.rows.unflatten(1, (len(teacher), -1)).transpose(0, 1)  # (P, K, D)
        loss = functools.partial(
            local_instance_discrimination_loss, student, teacher, mined, method.student_temperature,
            method.teacher_temperature, teacher_gradient=method.teacher_gradient,
        )  # fmt: skip
        if method.scrambled_fragments:
            return loss(scrambled_fragments=True) * (self.local_queue.pushed >= self.local_queue.capacity)
        return loss(valid=self.local_queue.valid())

    def after_step(self) -> None:
        super().after_step()
        if self.method.framework not in ("simclr", "byol"):
            self.queue.push(self._embeddings)
        if self.method.framework == "glcon":
            self.local_queue.push(self._windows)


def windows(method: TwoBranches, logits: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """The local embeddings (P, B, D) of logits (B, C, H, W) that pre-training with these settings compares."""
    return local_windows(
        logits, head, grid=method.local_grid, size=method.window, stride=method.window // 2, cells=method.window_cells
    )
