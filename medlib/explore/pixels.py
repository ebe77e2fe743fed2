"""Arrays to small PNG pictures, with labels drawn over them. Needs NumPy and zlib only."""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from medlib.explore.style import DISAGREEMENT

_GRAY_LEVELS = 48  # what an eye tells apart in a small slice; few enough that gray plus class tints fit 256 colours


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG of ``pixels`` (H,W,3) or (H,W,4) uint8; stored with a palette where at most 256 colours occur."""
    height, width, channels = pixels.shape
    if pixels.dtype != np.uint8 or channels not in (3, 4):
        raise ValueError(f"pixels must be (H,W,3) or (H,W,4) uint8, got {pixels.shape} {pixels.dtype}")
    colours, index = np.unique(pixels.reshape(-1, channels), axis=0, return_inverse=True)
    chunks = []
    if len(colours) <= 256:
        body, colour_type = index.reshape(height, width).astype(np.uint8), 3
        chunks.append((b"PLTE", colours[:, :3].tobytes()))
        if channels == 4:
            chunks.append((b"tRNS", colours[:, 3].tobytes()))
    else:
        body, colour_type = pixels.reshape(height, -1), 2 if channels == 3 else 6
    rows = np.concatenate([np.zeros((height, 1), np.uint8), body], axis=1)  # each row starts with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def data_uri(pixels: np.ndarray) -> str:
    """``pixels`` as the address of an image that carries its own bytes."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


def to_gray(image: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """``image`` (...,H,W) as uint8 gray, ``limits`` (default: its 1st and 99th percentile) to black and white."""
    low, high = np.percentile(image, (1, 99)) if limits is None else limits
    scaled = np.clip((np.asarray(image, np.float32) - low) / max(float(high - low), 1e-12), 0, 1)
    return (np.round(scaled * (_GRAY_LEVELS - 1)) * (255 / (_GRAY_LEVELS - 1))).astype(np.uint8)


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green, blue (0-255) of a colour written ``#rrggbb``."""
    if len(colour) != 7 or colour[0] != "#":
        raise ValueError(f"a colour is written #rrggbb, got {colour!r}")
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:], 16)


def _outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of ``mask`` (H,W) bool that touch a pixel outside it."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def label_overlay(label: np.ndarray, colours: Sequence[str], fill: float = 0.45) -> np.ndarray:
    """``label`` (H,W) int as an RGBA layer: class 0 clear, others a tint of opacity ``fill`` inside a solid outline."""
    layer = np.zeros((*label.shape, 4), np.uint8)
    for value in range(1, len(colours)):
        mask = label == value
        layer[mask] = (*rgb(colours[value]), round(255 * fill))
        layer[_outline(mask), 3] = 255
    return layer


def disagreement_overlay(label: np.ndarray, prediction: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """RGBA layer of (H,W) maps: class tint where ``prediction`` equals ``label``, solid magenta where it does not."""
    layer = label_overlay(np.where(label == prediction, label, 0), colours, fill=0.3)
    layer[..., 3] = np.minimum(layer[..., 3], round(255 * 0.3))
    layer[label != prediction] = (*rgb(DISAGREEMENT), 235)
    return layer


def blend(gray: np.ndarray, layer: np.ndarray | None = None) -> np.ndarray:
    """``gray`` (H,W) uint8 under an RGBA ``layer`` (H,W,4), as opaque (H,W,3)."""
    base = np.repeat(gray[..., None], 3, axis=2)
    if layer is None:
        return base
    alpha = layer[..., 3:].astype(np.float32) / 255
    return np.round(base * (1 - alpha) + layer[..., :3] * alpha).astype(np.uint8)


def shrink(array: np.ndarray, size: int) -> np.ndarray:
    """Every k-th pixel of (...,H,W), with the smallest k that brings height and width to ``size`` or less."""
    step = max(1, -(-max(array.shape[-2:]) // size))
    return array[..., ::step, ::step]
