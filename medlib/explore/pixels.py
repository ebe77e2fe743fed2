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
    codes = _pack(pixels)
    found, index = np.unique(codes, return_inverse=True)
    chunks = []
    if len(found) <= 256:
        body, colour_type = index.reshape(height, width).astype(np.uint8), 3
        colours = found[:, None] >> np.arange(0, 8 * channels, 8, dtype=np.uint32) & 255
        chunks.append((b"PLTE", colours[:, :3].astype(np.uint8).tobytes()))
        if channels == 4:
            chunks.append((b"tRNS", colours[:, 3].astype(np.uint8).tobytes()))
    else:
        body, colour_type = pixels.reshape(height, -1), 2 if channels == 3 else 6
    rows = np.concatenate([np.zeros((height, 1), np.uint8), body], axis=1)  # each row starts with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _pack(pixels: np.ndarray) -> np.ndarray:
    """One whole number per pixel of (H,W,C) uint8."""
    return (
        pixels.reshape(-1, pixels.shape[-1]).astype(np.uint32) << np.arange(0, 8 * pixels.shape[-1], 8, dtype=np.uint32)
    ).sum(axis=1, dtype=np.uint32)


def decode_canvas(png: bytes) -> np.ndarray:
    """The (H,W,3) uint8 pixels of a PNG as Chromium writes a canvas: 8 bits, RGBA, opaque, rows unfiltered or "up"."""
    at, data, header = 8, b"", b""
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + length]
        header, data = body if kind == b"IHDR" else header, data + body if kind == b"IDAT" else data
        at += 12 + length
    width, height, depth, colour_type, *_, interlaced = struct.unpack(">IIBBBBB", header)
    rows = np.frombuffer(zlib.decompress(data), np.uint8)
    if (depth, colour_type, interlaced) != (8, 6, 0):
        raise ValueError(f"not a canvas of Chromium: {depth} bits, colour type {colour_type}, interlaced {interlaced}")
    rows = rows.reshape(height, 1 + 4 * width)
    if not np.isin(rows[1:, 0], 2).all() or rows[0, 0] not in (0, 2):
        raise ValueError(f"not a canvas of Chromium: row filters {np.unique(rows[:, 0])}")
    return np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(height, width, 4)[..., :3]


def fewer_colours(pixels: np.ndarray, step: int) -> np.ndarray:
    """``pixels`` (H,W,3) uint8 with the colours of each cube of side ``step`` replaced by their mean."""
    if step == 1:
        return pixels
    _, index = np.unique(_pack(pixels // step), return_inverse=True)
    count = np.bincount(index)
    flat = pixels.reshape(-1, 3)
    means = np.stack([np.bincount(index, flat[:, c]) / count for c in range(3)], axis=1)
    return np.round(means).astype(np.uint8)[index].reshape(pixels.shape)


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
    """(...,H,W) made k times smaller, with the smallest k that brings height and width to ``size`` or less.

    Images (float) become means of k x k blocks, maps (integers) keep every k-th pixel; a last incomplete block is
    dropped.
    """
    step = max(1, -(-max(array.shape[-2:]) // size))
    height, width = (n // step for n in array.shape[-2:])
    whole = array[..., : height * step, : width * step]
    if np.issubdtype(array.dtype, np.floating):
        return whole.reshape(*array.shape[:-2], height, step, width, step).mean(axis=(-3, -1))
    return whole[..., step // 2 :: step, step // 2 :: step]


def focus(maps: np.ndarray, margin: float = 0.5) -> tuple[slice, slice]:
    """Rows and columns around all that is not background in ``maps`` (...,H,W), and ``margin`` times its size more."""
    structure = np.asarray(maps > 0, bool).reshape(-1, *maps.shape[-2:]).any(axis=0)
    if not structure.any():
        return slice(0, maps.shape[-2]), slice(0, maps.shape[-1])
    spans = [np.flatnonzero(np.any(structure, axis=axis)) for axis in (1, 0)]
    room = round(margin * max(s[-1] - s[0] + 1 for s in spans))
    rows, columns = (slice(max(0, int(s[0]) - room), int(s[-1]) + 1 + room) for s in spans)
    return rows, columns
