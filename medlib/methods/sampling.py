"""Which voxels of a batch a feature head sees: samples of a fixed size, without a wait for the device."""

import torch
from torch import Tensor


def voxels_of(maps: Tensor, places: Tensor) -> Tensor:
    """The rows (n, F) of maps (B, F, *space) at ``places`` (n,), which count the voxels of the whole batch."""
    flat = maps.flatten(2)  # (B, F, V)
    return flat[places // flat.shape[2], :, places % flat.shape[2]]


def spread_sample(member: Tensor, count: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """``count`` of the members of a mask (N,) bool, at even steps through it: positions (count,), and which are new.

    The first is chosen by ``start``, 0-d in [0, 1), so that each member is as likely as any other. With fewer members
    than ``count`` all of them come, again and again; new (count,) bool is True the first time. Without a member no
    position means anything and none is new. One pass over the mask, no sort, nothing waits for the device.
    """
    reach = member.cumsum(0)  # members up to here
    total = reach[-1]
    number = torch.arange(count, device=member.device)
    offset = torch.minimum((start * total).long(), total - 1)
    rank = torch.where(total >= count, (number * total + offset) // count, number % total.clamp(min=1))
    return torch.searchsorted(reach, rank + 1).clamp(max=len(member) - 1), number < total


def spread_by_class(classes: Tensor, count: int, starts: Tensor) -> tuple[Tensor, Tensor]:
    """`spread_sample` of each class c = 0, 1, ...: positions (C, count) in ``classes`` (N,), and which are new.

    ``starts`` (C,) in [0, 1). A voxel of no class has -1 in ``classes``.
    """
    drawn = [spread_sample(classes == c, count, start) for c, start in enumerate(starts)]
    positions, new = zip(*drawn, strict=True)
    return torch.stack(positions), torch.stack(new)
