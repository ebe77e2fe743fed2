"""A warp moves image, label and prediction together, and only as far as it was asked to."""

import pytest
import torch

from medlib.augment import DiffeomorphicAugmentation, GeometricAugmentation, ThinPlateAugmentation, Warp
from medlib.rng import generator

SIDE = 64


def disc(radius: float = 12.0, dx: float = 8.0) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(SIDE) - 31.5, torch.arange(SIDE) - 31.5, indexing="ij")
    return (((x - dx) ** 2 + y**2) < radius**2).long()


def draw(batch: int = 4, seed: int = 0, **settings) -> Warp:
    return GeometricAugmentation(**settings).draw(batch, SIDE, generator(seed, "augment"))


def test_no_mirror_and_no_deformation_is_the_identity():
    images = torch.rand(4, 1, SIDE, SIDE)
    warp = draw(mirror=0.0, deform=0.0)
    torch.testing.assert_close(warp.images(images), images, atol=1e-4, rtol=0)
    assert warp.inside().all()


def test_mirroring_both_axes_is_a_flip():
    images = torch.rand(2, 1, SIDE, SIDE)
    torch.testing.assert_close(draw(2, mirror=1.0, deform=0.0).images(images), images.flip((-1, -2)), atol=1e-4, rtol=0)


def test_label_follows_its_image():
    label = disc().expand(8, -1, -1)
    warp = draw(8, deform=1.0)
    moved = warp.images(label.unsqueeze(1).float()).squeeze(1) > 0.5
    disagreement = (moved != (warp.labels(label) == 1)).float().mean()
    assert disagreement < 0.01
    assert not torch.equal(warp.labels(label), label)


def test_predictions_can_be_warped_with_gradients():
    logits = torch.rand(2, 3, SIDE, SIDE, requires_grad=True)
    draw(2, deform=1.0).predictions(logits).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_pixels_from_outside_get_the_value_asked_for():
    warp = draw(2, mirror=0.0, deform=1.0, scale=(1.0, 3.0), rotation=0.0)
    labels = warp.labels(torch.full((2, SIDE, SIDE), 2), outside=-1)
    assert set(labels.unique().tolist()) <= {-1, 2}
    assert ((labels == -1) == ~warp.inside()).float().mean() > 0.97  # they differ by half a pixel at the border


@pytest.mark.parametrize("side", [48, 96, 352])
def test_elastic_displacement_is_that_of_the_references_in_parts_of_the_image(side):
    """Standard deviation 0.163 alpha/sigma: 1.0 to 4.1 px at 352 px."""
    settings = dict(mirror=0.0, deform=1.0, rotation=0.0, scale=(1.0, 1.0))
    grid = GeometricAugmentation(**settings).draw(6, side, generator(3, "elastic")).grid
    identity = GeometricAugmentation(mirror=0.0, deform=0.0).draw(6, side, generator(3, "x")).grid
    inner = slice(side // 8, -(side // 8))
    shift = (grid - identity)[:, inner, inner] * 352 / 2  # px at 352
    spread = shift.flatten(1).std(dim=1)
    assert (spread > 0.6).all() and (spread < 5).all(), spread


def test_rotation_and_zoom_stay_in_their_ranges():
    settings = dict(mirror=0.0, deform=1.0, elastic_alpha=(0.0, 0.0))
    grid = GeometricAugmentation(**settings, rotation=30.0).draw(64, SIDE, generator(1, "r")).grid
    along_x = grid[:, SIDE // 2, -1] - grid[:, SIDE // 2, 0]
    angle = torch.rad2deg(torch.atan2(along_x[:, 1], along_x[:, 0]))
    zoom = along_x.norm(dim=1) / (2 - 2 / SIDE)
    assert angle.abs().max() <= 30.01 and angle.std() > 10
    assert zoom.min() >= 0.699 and zoom.max() <= 1.301 and zoom.std() > 0.1


def test_same_stream_same_warp_and_global_state_untouched():
    before = torch.get_rng_state()
    assert torch.equal(draw(seed=5).grid, draw(seed=5).grid)
    assert not torch.equal(draw(seed=5).grid, draw(seed=6).grid)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [dict(mirror=1.5), dict(deform=-0.1), dict(scale=(1.1, 1.3)), dict(scale=(0.0, 1.3))])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GeometricAugmentation(**wrong)


@pytest.mark.parametrize("kind", [GeometricAugmentation, DiffeomorphicAugmentation, ThinPlateAugmentation])
def test_autocast_moves_no_place(kind):
    plain = kind().draw(2, SIDE, generator(0, "augment")).grid
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warp = kind().draw(2, SIDE, generator(0, "augment"))
        assert warp.grid.dtype == torch.float32 and torch.equal(warp.grid, plain)


def test_a_warp_of_bfloat16_looks_where_that_of_float32_does():
    images = torch.rand(4, 1, SIDE, SIDE, generator=generator(0, "images")).bfloat16()
    moved = draw().images(images)
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved, draw().images(images.float()).bfloat16(), atol=0, rtol=0)
