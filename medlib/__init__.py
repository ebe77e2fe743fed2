"""medlib: contrastive semi-supervised segmentation of volumetric medical images, to read and to run."""

__version__ = "0.1.0"
