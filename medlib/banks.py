"""First-in-first-out banks of features that live on the device and travel with every checkpoint."""

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

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` rows (count, D), with replacement, from the filled slots; zeros only while nothing was pushed."""
        filled = self.pushed.clamp(1, self.capacity)
        draw = torch.rand(count, generator=generator, device=self.rows.device)
        return self.rows[(draw * filled).long().clamp(max=self.capacity - 1)]
