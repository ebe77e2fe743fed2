"""Features on a plane or in a box, and how far such a picture can be trusted."""

from typing import NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness

from medlib.explore.measures import unit
from medlib.rng import numpy_generator

PROJECTIONS = ("PCA", "t-SNE")
TSNE_POINTS = 1_500  # t-SNE's time grows faster than their number: some ten seconds on one core, 100,000 take hours
QUALITY_POINTS = 1_000  # trustworthiness ranks all pairs
QUALITY_NEIGHBOURS = 10

MAY_NOT_BE_READ = {
    "PCA": "Two of many directions: points that overlap here may lie far apart in the others.",
    "t-SNE": "Not to be read off: the size of a cluster, its density, the distance between clusters, the axes. Move "
    "perplexity and seed: only what stays is worth a look.",
}


class Quality(NamedTuple):
    """How well a picture keeps neighbours, both in [0, 1]: 1 where all are kept, about 0.5 where they are random.

    ``trustworthiness`` is lowered by points that are neighbours in the picture only, ``continuity`` by neighbours in
    the full space that the picture tears apart (Venna and Kaski 2001).
    """

    trustworthiness: float
    continuity: float


def project(
    features: np.ndarray, projection: str, *, seed: int = 0, perplexity: float = 30.0, dimensions: int = 2,
    start: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """``features`` (N,D) in 2 or 3 ``dimensions``, (N,2) or (N,3) float32, by "PCA" or "t-SNE" of their directions.

    Directions are rows of length 1. t-SNE is seeded and starts from PCA, or from ``start`` (N,dimensions);
    ``perplexity`` is lowered to (N-1)/3 where there are few points. Axes have no unit: each picture is centred and
    scaled to its largest extent, and turned so that it does not mirror between runs.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
    if dimensions not in (2, 3):
        raise ValueError(f"dimensions must be 2 or 3, got {dimensions!r}")
    if features.ndim != 2 or len(features) < 4 or features.shape[1] < dimensions:
        raise ValueError(f"features must be (N,D) with N >= 4 and D >= {dimensions}, got {features.shape}")
    if not perplexity > 0:
        raise ValueError(f"perplexity must be positive, got {perplexity}")
    rows = unit(features)
    if not np.isfinite(rows).all():
        raise ValueError("features must be finite")
    if projection == "PCA":
        many = len(rows) > max(5_000, 10 * rows.shape[1])  # then the covariance is small beside them, and exact enough
        flat = PCA(dimensions, svd_solver="covariance_eigh" if many else "full").fit_transform(rows)
    else:
        near = min(perplexity, (len(rows) - 1) / 3)
        first = "pca" if start is None else 1e-4 * start / max(float(np.std(start[:, 0])), 1e-12)  # as wide as "pca"
        flat = TSNE(dimensions, perplexity=near, init=first, random_state=seed).fit_transform(rows)
    flat = flat - flat.mean(axis=0)
    flat = flat * np.where(flat[np.abs(flat).argmax(axis=0), np.arange(dimensions)] < 0, -1.0, 1.0)
    return (flat / max(float(np.abs(flat).max()), 1e-12)).astype(np.float32)


def sample_rows(count: int, limit: int, seed: int) -> np.ndarray:
    """All rows 0 to ``count`` - 1, or ``limit`` of them drawn at random, in order."""
    if count <= limit:
        return np.arange(count)
    return np.sort(numpy_generator(seed, "embedding sample").choice(count, limit, replace=False))


def projection_quality(features: np.ndarray, flat: np.ndarray, neighbours: int = QUALITY_NEIGHBOURS) -> Quality:
    """`Quality` of the picture ``flat`` (N,2 or 3) of ``features`` (N,D), each point with its ``neighbours`` nearest.

    Neighbours in the full space are by cosine. There may be at most (N-1)/2 of them; fewer are taken where N is small.
    """
    if features.ndim != 2 or flat.ndim != 2 or len(features) != len(flat) or len(flat) < 4:
        raise ValueError(f"features (N,D) and flat (N,2) must have N >= 4 rows, got {features.shape} and {flat.shape}")
    rows, near = unit(features), min(neighbours, (len(flat) - 1) // 2)
    return Quality(
        float(trustworthiness(rows, flat, n_neighbors=near)), float(trustworthiness(flat, rows, n_neighbors=near))
    )
