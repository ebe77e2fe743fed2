"""Pre-train CORAL on a network without batch norm, in one process or several, and save what it learnt."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from medlib.augment import GeometricAugmentation
from medlib.methods.coral import Coral
from medlib.nets import Decoder, Encoder, ProjectionHead, UNet
from medlib.train import make_fabric, train
from tests.tiny import SETTINGS, training_data


@dataclass(frozen=True, kw_only=True)
class WithoutBatchNorm(Coral):
    """Batch statistics are each process's own, so only without them can one process and two agree."""

    def networks(self, classes: int) -> nn.ModuleDict:
        widths = (2, 4)
        unet = UNet(Encoder(widths, norm=""), Decoder(widths, norm=""), nn.Conv2d(2, classes, 1))
        head = ProjectionHead(4, self.projection_dim)
        return nn.ModuleDict({"unet": unet, "head": head, "contrast": self.contrast()})


def pretrain(processes: int, folder: Path) -> None:
    """Writes what the network learnt to ``folder / "pretrained.pt"``."""
    still = GeometricAugmentation(mirror=0.0, deform=0.0)  # augmentation differs between processes
    method = WithoutBatchNorm(**{**SETTINGS, "finetune_batch": 4}, augmentation=still)
    fabric = make_fabric("cpu", devices=processes)
    assert fabric.world_size == processes
    trained = train(method, training_data(), seed=0, output_dir=folder, fabric=fabric, progress=False)
    if fabric.is_global_zero:
        torch.save(trained.state("pretrain"), folder / "pretrained.pt")


if __name__ == "__main__":
    pretrain(int(sys.argv[1]), Path(sys.argv[2]))
