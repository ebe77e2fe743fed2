"""Strong views: what moves the image moves label and prediction alike, warps never fold, ranges are those asked for."""

import math

import pytest
import torch
import torch.nn.functional as F
from kornia.geometry.transform import warp_points_tps
from torch import Tensor

from medlib.augment import (
    CutMix,
    DiffeomorphicAugmentation,
    GeometricAugmentation,
    PhotometricAugmentation,
    StrongAugmentation,
    ThinPlateAugmentation,
    _thin_plate_basis,
)
from medlib.rng import generator
from tests.no_waiting import NoWaiting

SIDE = 64
EVERY = {
    "cutmix": lambda g: CutMix.draw(4, SIDE, g).pasted,
    "photometric": lambda g: PhotometricAugmentation().images(smooth(4), g),
    "diffeomorphic": lambda g: DiffeomorphicAugmentation().draw(4, SIDE, g).grid,
    "strong": lambda g: StrongAugmentation().draw(4, SIDE, g).warp.grid,
    "thin-plate": lambda g: ThinPlateAugmentation().draw(4, SIDE, g).grid,
}


def stream(seed: int = 0) -> torch.Generator:
    return generator(seed, "augment")


def smooth(batch: int, seed: int = 1) -> Tensor:
    """Images (B, 1, SIDE, SIDE) without sharp edges."""
    noise = torch.randn(batch, 1, 8, 8, generator=stream(seed))
    return F.interpolate(noise, size=SIDE, mode="bicubic", align_corners=False)


def identity(batch: int = 1) -> Tensor:
    return F.affine_grid(torch.eye(2, 3).expand(batch, -1, -1), [batch, 1, SIDE, SIDE], align_corners=False)


@pytest.mark.parametrize("name", EVERY)
def test_same_stream_same_draw_and_global_state_untouched(name):
    before = torch.get_rng_state()
    assert torch.equal(EVERY[name](stream(5)), EVERY[name](stream(5)))
    assert not torch.equal(EVERY[name](stream(5)), EVERY[name](stream(6)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", EVERY)
def test_no_draw_waits_for_the_device(name):
    source = stream()
    EVERY[name](source)  # what is computed once
    with NoWaiting():
        EVERY[name](source)


# --- CutMix ----------------------------------------------------------------------------------------------------------


def test_cutmix_pastes_a_rectangle_of_the_next_image_into_each():
    mix = CutMix.draw(5, SIDE, stream())
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 2, SIDE, SIDE)
    mixed, labels = mix.images(images), mix.labels(images[:, 0].long())
    for b in range(5):
        rows, columns = mix.pasted[b].any(dim=1), mix.pasted[b].any(dim=0)
        assert torch.equal(mix.pasted[b], rows[:, None] & columns[None, :])  # a rectangle,
        for axis in (rows, columns):
            assert (axis.int().diff() != 0).sum() <= 2  # in one piece
        assert torch.equal(mixed[b, 0], torch.where(mix.pasted[b], (b + 1) % 5, b).float())
    assert torch.equal(labels, mixed[:, 1].long())


@pytest.mark.parametrize("area", [0.5, 0.25])
def test_cutmix_takes_the_area_asked_for_anywhere(area):
    pasted = CutMix.draw(2000, SIDE, stream(), area).pasted.float()
    assert pasted.mean(dim=(1, 2)).min() > area - 0.03 and pasted.mean(dim=(1, 2)).max() < area + 0.03
    widths = pasted.amax(dim=1).sum(dim=1) / SIDE
    heights = pasted.amax(dim=2).sum(dim=1) / SIDE
    for sides in (widths, heights):
        assert sides.min() < area + 0.03 and sides.max() > 0.97  # all shapes from tall to wide
    place = F.adaptive_avg_pool2d(pasted.mean(dim=0)[None], 2)
    torch.testing.assert_close(place, torch.full_like(place, area), atol=0.02, rtol=0)


# --- photometric -----------------------------------------------------------------------------------------------------


def only(**settings) -> PhotometricAugmentation:
    return PhotometricAugmentation(**{"brightness": 0.0, "contrast": 0.0, "probability": 1.0, **settings})


def test_without_chance_nothing_changes():
    images = smooth(3)
    assert torch.equal(PhotometricAugmentation(probability=0.0).images(images, stream()), images)


def test_brightness_and_contrast_are_one_line_an_image():
    images = smooth(200)
    changed = only(brightness=0.25, contrast=0.25, blur=(1e-3, 1e-3)).images(images, stream())
    x, y = images.flatten(1), changed.flatten(1)
    slope = ((x - x.mean(1, True)) * (y - y.mean(1, True))).sum(1) / (x - x.mean(1, True)).square().sum(1)
    shift = y.mean(1) - slope * x.mean(1)
    torch.testing.assert_close(y, slope[:, None] * x + shift[:, None], atol=1e-4, rtol=0)
    assert 0.75 <= slope.min() < 0.77 and 1.23 < slope.max() <= 1.25
    assert -0.25 <= shift.min() < -0.23 and 0.23 < shift.max() <= 0.25


def test_the_blur_is_a_gaussian_of_the_width_asked_for():
    point = torch.zeros(1, 1, 33, 33)
    point[0, 0, 16, 16] = 1
    blurred = only(blur=(1.5, 1.5)).images(point, stream())[0, 0]
    offset = torch.arange(33.0) - 16
    for axis in (0, 1):
        assert (blurred.sum(dim=axis) * offset**2).sum().sqrt().item() == pytest.approx(1.5, rel=0.02)
    assert blurred.sum().item() == pytest.approx(1)


def test_each_image_has_its_own_draw_half_of_them_none():
    images = smooth(1).expand(400, -1, -1, -1)
    changed = PhotometricAugmentation().images(images, stream())
    same = (changed == images).flatten(1).all(dim=1).float().mean().item()
    assert same == pytest.approx(0.25, abs=0.07)  # neither intensity nor blur
    assert len({round(image.mean().item(), 6) for image in changed}) > 150


# --- warps -----------------------------------------------------------------------------------------------------------


def jacobian(grid: Tensor) -> Tensor:
    """Determinants of a warp, 1 where it moves everything alike."""
    across, down = grid[:, :-1, 1:] - grid[:, :-1, :-1], grid[:, 1:, :-1] - grid[:, :-1, :-1]
    return (across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0]) * (SIDE / 2) ** 2


@pytest.mark.parametrize("shift", [1 / 256, 8 / 256])
def test_a_diffeomorphic_warp_never_folds(shift):
    """A displacement field as large as the larger of these folds; its flow does not."""
    augmentation = DiffeomorphicAugmentation(probability=1.0, cells=16, shift=shift)
    grid = augmentation.draw(8, SIDE, stream()).grid
    assert jacobian(grid).min() > 0
    if shift > 1 / 256:
        once = DiffeomorphicAugmentation(probability=1.0, cells=16, shift=shift * 2, squarings=1)
        assert jacobian(once.draw(8, SIDE, stream()).grid).min() < 0


@pytest.mark.parametrize("side", [80, 256])
def test_its_shifts_are_those_of_the_reference_in_parts_of_the_image(side):
    """1.3 px on average and 4 px at most, of 256, in the released code."""
    moved = DiffeomorphicAugmentation(probability=1.0).draw(4, side, stream()).grid
    still = F.affine_grid(torch.eye(2, 3).expand(4, -1, -1), [4, 1, side, side], align_corners=False)
    shift = (moved - still).norm(dim=-1) * 128
    assert 0.9 < shift.mean() < 1.6 and 3 < shift.max() < 7


def test_more_squarings_are_the_same_flow():
    few, many = (
        DiffeomorphicAugmentation(probability=1.0, squarings=n, shift=2 / 256).draw(2, SIDE, stream()).grid
        for n in (6, 10)
    )
    assert (few - many).abs().max() < 0.1 * (few - identity(2)).abs().max()


def test_half_of_the_images_stay_where_they_are():
    grid = DiffeomorphicAugmentation().draw(400, 16, stream()).grid
    still = F.affine_grid(torch.eye(2, 3).expand(400, -1, -1), [400, 1, 16, 16], align_corners=False)
    kept = torch.isclose(grid, still, atol=1e-6).flatten(1).all(dim=1).float().mean().item()
    assert kept == pytest.approx(0.5, abs=0.08)


def test_a_strong_view_mixes_and_then_warps_image_and_label_alike():
    view = StrongAugmentation(diffeomorphic=DiffeomorphicAugmentation(probability=1.0, shift=0.03)).draw(
        4, SIDE, stream()
    )
    labels = (smooth(4)[:, 0] > 0).long()
    moved = view.images(labels[:, None].float())[:, 0]
    assert torch.equal(view.images(smooth(4)), view.warp.images(view.mix.images(smooth(4))))
    agreement = ((moved > 0.5) == (view.labels(labels) == 1)).float().mean()
    assert agreement > 0.99 and not torch.equal(view.labels(labels), view.mix.labels(labels))
    assert (view.labels(torch.full_like(labels, 3), outside=-1) == -1).any()


def thin_plate(**settings) -> ThinPlateAugmentation:
    still = dict(jitter=0.0, mirror=0.0, rotation=0.0, scale=(1.0, 1.0), shift=0.0)
    return ThinPlateAugmentation(**{**still, **settings})


def test_a_thin_plate_without_ranges_is_the_identity():
    torch.testing.assert_close(thin_plate().draw(2, SIDE, stream()).grid, identity(2), atol=1e-5, rtol=0)


def test_the_spline_is_the_one_that_kornia_evaluates():
    """Weights from the linear system of a thin-plate spline, whose last rows keep the plate from pulling far away."""
    size, moves = 9, torch.randn(9, 2, generator=stream(), dtype=torch.double)
    axis = torch.linspace(-1, 1, 3, dtype=torch.double)
    control = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(-1, 2)
    distance = torch.cdist(control, control)
    system = torch.zeros(size + 3, size + 3, dtype=torch.double)
    system[:size, :size] = torch.where(distance > 0, distance**2 * distance.clamp(min=1e-9).log(), 0)
    system[:size, size], system[:size, size + 1 :] = 1, control
    system[size:, :size] = system[:size, size:].T
    weights = torch.linalg.solve(system, torch.cat([moves, torch.zeros(3, 2, dtype=torch.double)]))
    pixels = identity().view(1, -1, 2).double()
    expected = warp_points_tps(pixels, control[None], weights[None, :size], weights[None, size:])
    found = _thin_plate_basis(SIDE, 3, torch.device("cpu")) @ moves.float()
    torch.testing.assert_close(found, expected[0].float(), atol=1e-4, rtol=1e-3)


def test_a_thin_plate_bends_by_its_jitter():
    bend = thin_plate(jitter=0.01).draw(50, SIDE, stream()).grid - identity(50)
    assert bend.abs().amax(dim=(1, 2, 3)).min() > 0.005 and bend.abs().max() < 0.02
    assert not torch.equal(bend[0], bend[1])


def test_rotation_zoom_and_shift_stay_in_their_ranges():
    grid = thin_plate(rotation=60.0, scale=(0.8, 1.25), shift=0.1).draw(500, 16, stream()).grid
    along_x = grid[:, 8, -1] - grid[:, 8, 0]
    angle = torch.rad2deg(torch.atan2(along_x[:, 1], along_x[:, 0]))
    zoom = along_x.norm(dim=1) / (2 - 2 / 16)
    centre = grid.mean(dim=(1, 2))
    assert 58 < angle.max() <= 60.01 and -60.01 <= angle.min() < -58
    assert 0.799 <= zoom.min() < 0.82 and 1.23 < zoom.max() <= 1.251
    assert 0.098 < centre.abs().max() <= 0.1001


def test_a_mirror_turns_left_and_right_of_half_of_the_images():
    grid = thin_plate(mirror=0.5).draw(400, 16, stream()).grid
    turned = grid[:, 0, 0, 0] > 0
    assert turned.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert (grid[:, 0, 0, 1] < 0).all()
    still = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 16, 16], align_corners=False)
    torch.testing.assert_close(grid[turned], still.flip(2).expand(int(turned.sum()), -1, -1, -1))


def test_warped_predictions_have_gradients():
    logits = torch.randn(2, 3, SIDE, SIDE, generator=stream(), requires_grad=True)
    ThinPlateAugmentation().draw(2, SIDE, stream()).predictions(logits).sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (PhotometricAugmentation, dict(probability=1.5)),
        (PhotometricAugmentation, dict(brightness=-0.1)),
        (PhotometricAugmentation, dict(brightness=math.nan)),
        (PhotometricAugmentation, dict(contrast=1.0)),
        (PhotometricAugmentation, dict(blur=(0.0, 1.0))),
        (DiffeomorphicAugmentation, dict(probability=-0.1)),
        (DiffeomorphicAugmentation, dict(cells=1)),
        (DiffeomorphicAugmentation, dict(squarings=0)),
        (DiffeomorphicAugmentation, dict(shift=-1.0)),
        (StrongAugmentation, dict(area=1.0)),
        (ThinPlateAugmentation, dict(mirror=2.0)),
        (ThinPlateAugmentation, dict(points=1)),
        (ThinPlateAugmentation, dict(scale=(1.2, 0.8))),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else ",".join(value),
)
def test_impossible_settings_are_refused(kind, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind(**wrong)


def test_a_rectangle_of_nothing_or_everything_is_refused():
    for area in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"area .*{area}"):
            CutMix.draw(2, SIDE, stream(), area)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (GeometricAugmentation, {"rotation": math.nan}, "rotation must be a finite number, got nan"),
        (GeometricAugmentation, {"elastic_sigma": (2.0, 1.0)}, "elastic_sigma must be a range of two finite numbers"),
        (GeometricAugmentation, {"scale": ("a", 1)}, "scale must be a range of two finite numbers"),
        (GeometricAugmentation, {"scale": (1.0,)}, "scale must be a range of two finite numbers"),
        (ThinPlateAugmentation, {"points": 2.5}, "points must be a whole number, got 2.5"),
        (ThinPlateAugmentation, {"jitter": math.inf}, "jitter must be a finite number, got inf"),
        (DiffeomorphicAugmentation, {"shift": "much"}, "shift must be a finite number, got 'much'"),
        (StrongAugmentation, {"area": True}, "area must be a finite number, got True"),
        (PhotometricAugmentation, {"blur": 1.0}, "blur must be a range of two finite numbers"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)
