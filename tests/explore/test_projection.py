"""Projections are repeatable, and how far a picture can be trusted agrees with its definition."""

import numpy as np
import pytest

from medlib.explore import project, projection_quality
from medlib.explore.measures import unit
from medlib.explore.projection import MAY_NOT_BE_READ, PROJECTIONS, sample_rows
from medlib.rng import numpy_generator


def features(count: int = 40, width: int = 12) -> np.ndarray:
    rng = numpy_generator(0, "projection")
    return np.linspace(0, 3, count)[:, None] * rng.normal(size=(1, width)) + rng.normal(size=(count, width))


def lost_ranks(space: np.ndarray, other: np.ndarray, near: int) -> float:
    """1 - 2 / (N k (2N - 3k - 1)) sum_i sum_{j in U_i} (r(i, j) - k): U_i are the neighbours of i in ``other`` that
    are none in ``space``, r the rank of j around i in ``space`` (Venna and Kaski 2001)."""
    count, total = len(space), 0
    for i in range(count):
        order = [j for j in np.argsort(np.linalg.norm(space - space[i], axis=1), kind="stable") if j != i]
        seen = [j for j in np.argsort(np.linalg.norm(other - other[i], axis=1), kind="stable") if j != i][:near]
        total += sum(order.index(j) + 1 - near for j in seen if order.index(j) >= near)
    return 1 - 2 / (count * near * (2 * count - 3 * near - 1)) * total


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_projections_are_repeatable_and_centred(kind, dimensions):
    flat = project(features(), kind, dimensions=dimensions)
    np.testing.assert_array_equal(flat, project(features(), kind, dimensions=dimensions))
    assert flat.shape == (40, dimensions) and flat.dtype == np.float32
    assert np.abs(flat).max() == pytest.approx(1) and np.abs(flat.mean(axis=0)).max() < 1e-6
    assert kind in MAY_NOT_BE_READ


def test_pca_of_many_points_is_that_of_few():
    many = features(6_000, 8)
    rows = unit(many) - unit(many).mean(axis=0)
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    flat = project(many, "PCA")
    wanted = rows @ axes[:2].T
    correlation = [abs(np.corrcoef(flat[:, i], wanted[:, i])[0, 1]) for i in (0, 1)]
    assert min(correlation) == pytest.approx(1, abs=1e-6)


def test_tsne_follows_its_seed_perplexity_and_start():
    plain = project(features(), "t-SNE")
    assert not np.array_equal(plain, project(features(), "t-SNE", perplexity=3))
    assert not np.array_equal(plain, project(features(), "t-SNE", start=project(features(), "PCA")[:, ::-1]))
    assert np.isfinite(project(features(5), "t-SNE", perplexity=100)).all()  # lowered to (N-1)/3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection": "UMAP"}, "UMAP"),
        ({"dimensions": 4}, "dimensions must be 2 or 3"),
        ({"perplexity": 0}, "perplexity must be positive"),
        ({"features": np.ones((3, 5))}, "N >= 4"),
        ({"features": np.ones((9, 2)), "dimensions": 3}, "D >= 3"),
        ({"features": np.full((9, 4), np.nan)}, "finite"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        project(**{"features": features(), "projection": "PCA", **change})


def test_quality_agrees_with_its_definition():
    space, flat = unit(features()), project(features(), "PCA")
    quality = projection_quality(features(), flat, neighbours=5)
    assert quality.trustworthiness == pytest.approx(lost_ranks(space, flat, 5), rel=1e-9)
    assert quality.continuity == pytest.approx(lost_ranks(flat, space, 5), rel=1e-9)
    assert quality.trustworthiness != pytest.approx(quality.continuity)


def test_quality_of_a_faithful_and_of_a_random_picture():
    angles = np.linspace(0, 2, 60)
    arc = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert projection_quality(arc * numpy_generator(0, "length").uniform(1, 9, (60, 1)), arc) == pytest.approx((1, 1))
    shuffled = arc[numpy_generator(0, "shuffle").permutation(60)]
    assert max(projection_quality(arc, shuffled)) < 0.65


def test_quality_sees_which_way_a_picture_lies():
    angles = np.linspace(0, np.pi, 60)
    arc = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    folded = projection_quality(arc, np.abs(arc))  # two ends on top of each other: false neighbours, none torn apart
    assert folded.trustworthiness < folded.continuity
    torn = np.stack([np.where(angles < 1.5, angles, angles + 50), 0 * angles], axis=1)
    assert projection_quality(arc, torn).trustworthiness > 0.99


def test_a_sample_is_drawn_once_and_in_order():
    rows = sample_rows(1000, 50, seed=0)
    np.testing.assert_array_equal(rows, sample_rows(1000, 50, seed=0))
    assert len(set(rows.tolist())) == 50 and (np.diff(rows) > 0).all() and rows[-1] < 1000
    assert not np.array_equal(rows, sample_rows(1000, 50, seed=1))
    np.testing.assert_array_equal(sample_rows(7, 50, seed=0), np.arange(7))
