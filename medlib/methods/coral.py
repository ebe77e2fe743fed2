"""CORAL: relational and ordinal pre-training of the encoder, then fine-tuning (arXiv 2511.11276)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from medlib.losses.coral import CoralLoss
from medlib.methods.base import register
from medlib.methods.pretraining import PretrainThenFinetune, SliceContrast


class _CoralContrast(SliceContrast):
    """Eq. 6 on both views of every slice: 2B rows, the two views of a slice at the same position."""

    def __init__(self, loss: CoralLoss):
        super().__init__()
        self.loss = loss

    def forward(
        self, first: Tensor, second: Tensor, positions: Tensor, index: Tensor, depth: Tensor
    ) -> dict[str, Tensor]:
        return self.loss(torch.cat([first, second]), positions.repeat(2))


@register("coral", title="CORAL")
@dataclass(frozen=True, kw_only=True)
class Coral(PretrainThenFinetune):
    """CORAL, eq. 3-6.

    ``variant="paper"`` follows the text: unweighted pairs, encoder frozen in fine-tuning, both views in one pass.
    ``variant="released"`` follows the code: pair weights sigmoid(|dp|), nothing frozen, one pass for each view.

    Attributes:
        temperature: tau of eq. 4.
        soft_weight: k of the released pair weights sigmoid(k |p_i - p_j|); 0 is the paper's unweighted mean.
        relational_weight, ordinal_weight: weights of eq. 4 and eq. 5 in eq. 6; (1, 0) is the ablation "w/ L_RAL",
            (0, 1) is "w/ L_OAL".
    """

    variant: str = "paper"
    temperature: float = 0.1
    soft_weight: float = 0.0
    relational_weight: float = 1.0
    ordinal_weight: float = 1.0

    variants: ClassVar = {"paper": {}, "released": dict(soft_weight=1.0, frozen=False, separate_views=True)}

    def contrast_settings(self) -> dict[str, Any]:
        names = ("temperature", "soft_weight", "relational_weight", "ordinal_weight")
        return {name: getattr(self, name) for name in names}

    def contrast(self) -> SliceContrast:
        # the initial direction, too, comes from the surrounding seeded_init
        loss = CoralLoss(self.projection_dim, **self.contrast_settings(), generator=torch.default_generator)
        return _CoralContrast(loss)
