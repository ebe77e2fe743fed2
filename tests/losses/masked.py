"""What a mask leaves out has no say: shared by the tests of several losses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_leaves_no_trace(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor], kept: Sequence[Tensor | bool], anything: float
) -> None:
    """With ``anything`` where ``inputs`` are not ``kept``, value and gradients are bit for bit the same."""
    clean = [x.clone().requires_grad_() for x in inputs]
    broken = [torch.where(torch.as_tensor(k), x, anything).requires_grad_() for k, x in zip(kept, inputs, strict=True)]
    assert any(not x.isfinite().all() for x in broken)
    expected, found = loss(*clean), loss(*broken)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, broken, allow_unused=True),
        torch.autograd.grad(expected, clean, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)
