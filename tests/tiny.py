"""Training data in memory, small enough for a step to take milliseconds."""

import numpy as np

from medlib.data import Case, dataset_info
from medlib.data.batches import TrainingData
from medlib.data.prepare import Prepared, Protocol
from medlib.data.splits import Split

SIDE = 32
SETTINGS = dict(
    image_size=SIDE, spacing=None, width=2, projection_dim=8, pretrain_steps=6, pretrain_batch=4,
    pretrain_learning_rate=0.02, finetune_steps=6, finetune_batch=3, finetune_learning_rate=1e-2,
)  # fmt: skip


def volume(patient: str, depth: int = 5, labelled: bool = True, seed: int = 0) -> Prepared:
    """A disc that shrinks along z on noise; inside it class 3, around it a ring of class 2."""
    rng = np.random.default_rng([seed, *patient.encode()])
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    radius = np.linspace(11, 6, depth)[:, None, None]
    distance = np.sqrt(y**2 + x**2)[None]
    label = np.where(distance < radius - 3, 3, np.where(distance < radius, 2, 0)).astype(np.uint8)
    image = (label - 1 + rng.normal(0, 0.5, label.shape)).astype(np.float16)
    case = Case(
        about=dataset_info("acdc"),
        case=f"{patient}_frame01",
        patient=patient,
        images=(),
        labels=(),
        reader="acdc_nifti",
        info={},
    )
    return Prepared(
        case=case, protocol=Protocol(size=SIDE), image=image, label=label if labelled else None,
        native_shape=label.shape, spacing=None,
    )  # fmt: skip


def training_data(labelled: int = 1, train: int = 3) -> TrainingData:
    """``train`` training patients, of whom the first ``labelled`` show their labels, and one validation patient."""
    names = tuple(f"patient{number:03d}" for number in range(1, train + 1))
    return TrainingData(
        info=dataset_info("acdc"),
        split=Split("tiny", names[:labelled], names[labelled:], ("patient099",), ()),
        train=[volume(name) for name in names],
        val=[volume("patient099")],
        test=[],
    )
