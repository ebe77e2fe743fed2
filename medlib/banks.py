"""First-in-first-out banks of features that live on the device and travel with every checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class FeatureBank(nn.Module):
    """A ring buffer of feature vectors.

    A module, so that moving the training to a device moves it and a checkpoint holds it. It never hands out a row that
    was not pushed, and pushing waits for nothing on the device.

    Args:
        capacity: rows it holds; the oldest make room.
        dim: length of a feature vector.
    """

    rows: Tensor
    pushed: Tensor

    def __init__(self, capacity: int, dim: int):
        super().__init__()
        if capacity < 1 or dim < 1:
            raise ValueError(f"capacity and dim must be at least 1, got {capacity} and {dim}")
        self.capacity = capacity
        self.register_buffer("rows", torch.zeros(capacity, dim))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))  # ever, not only those still held

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Append ``features`` (N, D), detached; of more than ``capacity`` only the last are kept."""
        if features.ndim != 2 or features.shape[1] != self.rows.shape[1]:
            raise ValueError(f"features must be (N, {self.rows.shape[1]}), got {tuple(features.shape)}")
        kept = features[-self.capacity :]
        first = self.pushed + len(features) - len(kept)
        slots = (first + torch.arange(len(kept), device=self.rows.device)) % self.capacity
        self.rows[slots] = kept.to(self.rows.dtype)
        self.pushed += len(features)

    def valid(self) -> Tensor:
        """(capacity,) bool: the slots that hold a feature."""
        return torch.arange(self.capacity, device=self.rows.device) < self.pushed


class ClassBanks(nn.Module):
    """One ring buffer per class, all of one size, for entries of several parts: a feature and its density, say.

    A module, as `FeatureBank`: it moves with the training, a checkpoint holds it, and no method waits for the device,
    so the number of rows that a class pushes may differ from class to class and from step to step without a loop.

    ``banks["density"]`` is the buffer (classes, capacity, ...) of a part, in no particular order, with zeros in slots
    that `valid` says are empty; writing into it in place renews a part without ageing the entries.

    Args:
        classes: number of banks.
        capacity: entries each holds; its oldest make room.
        parts: shape of each part of an entry, by name: ``{"feature": (64,), "density": ()}``.
    """

    pushed: Tensor

    def __init__(self, classes: int, capacity: int, parts: Mapping[str, tuple[int, ...]]):
        super().__init__()
        if classes < 1 or capacity < 1 or not parts:
            raise ValueError(
                f"classes, capacity and parts must be at least 1, got {classes}, {capacity}, {dict(parts)}"
            )
        self.classes, self.capacity = classes, capacity
        self.parts = {name: tuple(shape) for name, shape in parts.items()}
        for name, shape in self.parts.items():
            self.register_buffer(f"part_{name}", torch.zeros(classes, capacity, *shape))
        self.register_buffer("pushed", torch.zeros(classes, dtype=torch.long))  # ever, not only those still held

    def __getitem__(self, name: str) -> Tensor:
        """The buffer (classes, capacity, ...) of a part."""
        if name not in self.parts:
            raise KeyError(f"{name!r} is no part of these banks; there are {', '.join(self.parts)}")
        return self.get_buffer(f"part_{name}")

    @torch.no_grad()
    def push(self, valid: Tensor, **parts: Tensor) -> None:
        """Append to each class its rows, in order and detached: ``valid`` (classes, N) bool says which of N are there.

        Each part is (classes, N, ...). Of more valid rows than ``capacity`` only a class's last are kept.
        """
        self._check(valid, parts)
        rows = min(valid.shape[1], self.capacity)
        # The valid rows of a class go last, in order, so that the last `rows` columns hold all that can be kept.
        order = valid.long().argsort(dim=1, stable=True)[:, valid.shape[1] - rows :]  # (classes, rows)
        write = valid.gather(1, order)
        self.pushed += valid.sum(dim=1)
        column = torch.arange(rows, device=valid.device)
        slots = (self.pushed[:, None] - rows + column) % self.capacity  # all different: what is not written stays
        for name, new in parts.items():
            buffer = self[name]
            spread = (..., *[None] * (buffer.ndim - 2))  # an index (classes, rows) against entries of any shape
            shape = (*slots.shape, *buffer.shape[2:])
            new = new.to(buffer.dtype).gather(1, order[spread].expand(shape))
            old = buffer.gather(1, slots[spread].expand(shape))
            buffer.scatter_(1, slots[spread].expand(shape), torch.where(write[spread], new, old))

    def valid(self) -> Tensor:
        """(classes, capacity) bool: the slots that hold an entry."""
        return torch.arange(self.capacity, device=self.pushed.device) < self.pushed[:, None]

    def sample(self, count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """``count`` entries of each class, with replacement, and (classes, count) bool, False for an empty class.

        The entries are copies, part by part (classes, count, ...); those of an empty class are zeros.
        """
        filled = self.pushed.clamp(1, self.capacity)[:, None]
        draw = torch.rand(self.classes, count, generator=generator, device=self.pushed.device)
        slots = torch.minimum((draw * filled).long(), filled - 1)  # draw * filled can round up to filled
        bank = torch.arange(self.classes, device=self.pushed.device)[:, None]
        return {name: self[name][bank, slots] for name in self.parts}, (self.pushed > 0)[:, None].expand(-1, count)

    def _check(self, valid: Tensor, parts: Mapping[str, Tensor]) -> None:
        if valid.dtype != torch.bool or valid.ndim != 2 or len(valid) != self.classes:
            raise ValueError(f"valid must be ({self.classes}, N) bool, got {tuple(valid.shape)} {valid.dtype}")
        if parts.keys() != self.parts.keys():
            raise ValueError(f"an entry has the parts {', '.join(self.parts)}; got {', '.join(parts) or 'none'}")
        for name, shape in self.parts.items():
            wanted = (*valid.shape, *shape)
            if parts[name].shape != wanted:
                raise ValueError(f"{name} must be {wanted}, got {tuple(parts[name].shape)}")
