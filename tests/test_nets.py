"""The networks have the published sizes, keep shapes and draw their weights from their own stream."""

import pytest
import torch
from torch import nn

from medlib.nets import Decoder, Encoder, ProjectionHead, UNet, coral_unet, parameter_count, seeded_init, ssl4mis_unet


@pytest.mark.parametrize(
    ("width", "classes", "encoder", "decoder", "head"),
    [(48, 4, 10_602_384, 6_859_632, 984_320), (32, 8, 4_713_568, 3_050_016, 525_312)],
)
def test_parameter_counts_of_pcl_and_coral(width, classes, encoder, decoder, head):
    unet = coral_unet(classes, width)
    assert parameter_count(unet.encoder) == encoder
    assert parameter_count(unet.decoder) + parameter_count(unet.classifier) == decoder
    assert parameter_count(ProjectionHead(16 * width, 512)) == head


@pytest.mark.parametrize(("classes", "total"), [(3, 1_813_619), (4, 1_813_764), (8, 1_814_344)])
def test_parameter_counts_of_ssl4mis(classes, total):
    unet = ssl4mis_unet(classes)
    assert parameter_count(unet) == total
    assert parameter_count(unet.encoder) == 1_180_464


@pytest.mark.parametrize("unet", [coral_unet(4, 2), ssl4mis_unet(4, 2)])
def test_shapes(unet):
    images = torch.rand(2, 1, 32, 48)
    assert unet(images).shape == (2, 4, 32, 48)
    features = unet.encoder(images)
    assert [tuple(f.shape[1:]) for f in features] == [(2, 32, 48), (4, 16, 24), (8, 8, 12), (16, 4, 6), (32, 2, 3)]
    assert [f.shape[1] for f in unet.decoder(features)] == [16, 8, 4, 2]
    assert ProjectionHead(32, 7)(features[-1]).shape == (2, 7)


def test_the_same_blocks_make_a_3d_network():
    widths = (2, 4, 8)
    unet = UNet(Encoder(widths, 3, "instance"), Decoder(widths, 3, "instance"), nn.Conv3d(2, 5, 1))
    assert unet(torch.rand(1, 1, 8, 12, 16)).shape == (1, 5, 8, 12, 16)


def test_the_bottleneck_of_coral_has_no_normalisation_and_the_others_have():
    levels = coral_unet(4, 2).encoder.levels
    norms = [sum(isinstance(layer, nn.BatchNorm2d) for layer in level.modules()) for level in levels]
    assert norms == [2, 2, 2, 2, 0]


def test_dropout_stands_between_the_two_convolutions():
    rates = [
        [layer.p for layer in level.modules() if isinstance(layer, nn.Dropout) and layer.p]
        for level in ssl4mis_unet(4, 2).encoder.levels
    ]
    assert rates == [[0.05], [0.1], [0.2], [0.3], [0.5]]


def test_a_side_that_cannot_be_halved_four_times_is_refused():
    with pytest.raises(ValueError, match=r"multiples of 16.*\(40, 32\)"):
        coral_unet(4, 2)(torch.rand(1, 1, 40, 32))
    with pytest.raises(ValueError, match="2 rates for 3 levels"):
        Encoder((2, 4, 8), dropout=(0.1, 0.2))


def test_seeded_init_repeats_and_leaves_the_global_state():
    before = torch.get_rng_state()

    def weights(seed: int) -> torch.Tensor:
        with seeded_init(seed, "weights"):
            return torch.cat([p.flatten() for p in coral_unet(4, 2).parameters()])

    first, again, other = weights(1), weights(1), weights(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    kernel = coral_unet(4, 8).encoder.levels[2].conv_1.conv.weight  # He: variance 2 / ((1 + slope^2) fan-in)
    assert kernel.std().item() == pytest.approx((2 / (1 + 0.01**2) / (32 * 9)) ** 0.5, rel=0.05)
