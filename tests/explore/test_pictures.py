"""Pictures: sizes that are true to scale, one square per pixel, and refusals of what does not fit together."""

import numpy as np
import pytest

from medlib.data import Split
from medlib.explore.pictures import image_row, mask_squares, split_picture, stack_to_scale, unet_picture

STACK = np.random.default_rng(0).random((5, 40, 60)).astype(np.float32)


def test_both_cuts_of_a_stack_have_their_size_in_mm() -> None:
    figure = stack_to_scale(STACK, (10.0, 2.0, 1.5), (2, 20, 30), title="phantom")
    front, side = figure.layout.images
    assert (front.sizex, front.sizey) == (90, 80)
    assert (side.sizex, side.sizey) == (80, 50)
    assert side.x > front.sizex
    across, along = (np.ptp(axis.range) for axis in (figure.layout.xaxis, figure.layout.yaxis))
    margin = figure.layout.margin
    wide, tall = 720 - margin.l - margin.r, figure.layout.height - margin.t - margin.b
    assert wide / across == pytest.approx(tall / along, rel=0.01)  # px per mm, both ways


def test_a_voxel_outside_the_stack_is_refused() -> None:
    with pytest.raises(ValueError, match=r"voxel of the image \(5, 40, 60\), got \(5, 0, 0\)"):
        stack_to_scale(STACK, (1.0, 1.0, 1.0), (5, 0, 0), title="phantom")


def test_images_of_a_row_keep_their_sizes() -> None:
    figure = image_row([STACK[0], STACK[1][:20, :20]], [(1.0, 1.0), (2.0, 2.0)], ["a", "b"], title="phantom")
    assert [(image.sizex, image.sizey) for image in figure.layout.images] == [(60, 40), (40, 40)]
    with pytest.raises(ValueError, match="one spacing and title per image"):
        image_row([STACK[0]], [], ["a"], title="phantom")


def test_every_pixel_of_a_mask_is_a_square_in_its_colour() -> None:
    figure = mask_squares([np.eye(3), np.zeros((3, 2))], ["a", "b"], title="masks")
    assert len(figure.layout.shapes) == 9 + 6
    colours = [shape.fillcolor for shape in figure.layout.shapes]
    assert len(set(colours[:9])) == 2 and colours[0] == colours[4] == colours[8] and len(set(colours[9:])) == 1
    with pytest.raises(ValueError, match="one title per mask"):
        mask_squares([np.eye(3)], [], title="masks")


def test_the_boxes_of_a_unet_shrink_with_the_side() -> None:
    figure = unet_picture([(8, 32), (16, 16), (32, 8)], [(16, 16), (8, 32)], title="U-Net")
    widths = [round(shape.x1 - shape.x0, 6) for shape in figure.layout.shapes]  # left, right, left, right, bottom
    assert widths[0] == widths[1] > widths[2] == widths[3] > widths[4]
    with pytest.raises(ValueError, match="3 encoder levels need 2 decoder levels, got 1"):
        unet_picture([(8, 32), (16, 16), (32, 8)], [(16, 16)], title="U-Net")


def test_a_patient_keeps_its_place_in_every_row() -> None:
    few = Split("few", ("a",), ("b", "c"), ("d",), ("e",))
    many = Split("many", ("a", "b"), ("c",), ("d",), ("e",))
    figure = split_picture({"few": few, "many": many}, title="phantom")
    places = {trace.name: list(zip(trace.y, trace.x, strict=True)) for trace in figure.data}
    assert places["labelled"] == [("few", 1), ("many", 1), ("many", 2)]
    assert places["test"] == [("few", 5), ("many", 5)]
    with pytest.raises(ValueError, match="the same patients"):
        split_picture({"few": few, "other": Split("other", ("x",), (), ("d",), ())}, title="phantom")
