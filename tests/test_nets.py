"""The networks have the published sizes, keep shapes and draw their weights from their own stream."""

import copy

import pytest
import torch
from torch import nn

from medlib.nets import (
    Decoder,
    DenseProjectionHead,
    Encoder,
    ProjectionHead,
    ResNetEncoder,
    UNet,
    branched_resnet,
    branched_unet,
    coral_unet,
    parameter_count,
    recompute_levels,
    seeded_init,
    ssl4mis_unet,
    ssl4mis_unet_3d,
    ssl4mis_vnet,
)


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


def convolution(before: int, after: int, kernel: int = 3) -> int:
    """Weights and biases of a 3D convolution, transposed or not."""
    return kernel**3 * before * after + after


@pytest.mark.parametrize("classes", [2, 14])
def test_parameter_counts_of_the_3d_unet(classes):
    """Two convolutions a level; the decoder's first one sees both the skip and all channels from below."""
    widths = (16, 32, 64, 128, 256)
    down = sum(convolution(a, b) + convolution(b, b) for a, b in zip((1, *widths), widths, strict=False))
    up = sum(convolution(a + b, a) + convolution(a, a) for a, b in zip(widths, widths[1:], strict=False))
    unet = ssl4mis_unet_3d(classes)
    assert parameter_count(unet) == down + up + convolution(16, classes, 1)


@pytest.mark.parametrize(("width", "classes", "total"), [(16, 2, 9_448_866), (32, 14, None)])
def test_parameter_counts_of_the_vnet(width, classes, total):
    """V-Net has 9.44 million parameters in the tables of the semi-supervised papers. Norms have two a channel."""

    def normed(before: int, after: int, kernel: int = 3) -> int:
        return convolution(before, after, kernel) + 2 * after

    w = [width * 2**level for level in range(5)]
    levels = [(w[0], 0), (w[1], 2), (w[2], 3), (w[3], 3), (w[4], 3), (w[3], 3), (w[2], 3), (w[1], 2), (w[0], 1)]
    within = normed(1, w[0]) + sum(count * normed(n, n) for n, count in levels)
    between = sum(normed(a, b, 2) + normed(b, a, 2) for a, b in zip(w, w[1:], strict=False))
    expected = within + between + convolution(w[0], classes, 1)
    assert parameter_count(ssl4mis_vnet(classes, width)) == expected and total in (None, expected)


@pytest.mark.parametrize("build", [ssl4mis_unet_3d, ssl4mis_vnet])
def test_3d_networks_keep_shapes_and_have_the_interface_of_the_2d_ones(build):
    unet = build(3, 2)
    images = torch.rand(2, 1, 16, 32, 48)
    assert unet(images).shape == (2, 3, 16, 32, 48)
    features = unet.encoder(images)
    assert [tuple(f.shape[1:3]) for f in features] == [(2, 16), (4, 8), (8, 4), (16, 2), (32, 1)]
    assert [f.shape[1] for f in unet.decoder(features)] == [16, 8, 4, 2]
    with pytest.raises(ValueError, match=r"multiples of 16.*\(16, 24, 48\)"):
        unet(torch.rand(1, 1, 16, 24, 48))


def test_dropout_of_3d_networks_follows_the_bottleneck_and_precedes_the_classifier():
    for unet, kind, rate in ((ssl4mis_unet_3d(2, 2), nn.Dropout, 0.3), (ssl4mis_vnet(2, 2), nn.Dropout3d, 0.5)):
        active = [layer for layer in unet.modules() if isinstance(layer, nn.Dropout | nn.Dropout3d) and layer.p]
        assert active == [unet.encoder.levels[-1][-1], unet.classifier[0]]
        assert all(type(layer) is kind and layer.p == rate for layer in active)


def test_the_vnet_adds_its_skips_and_the_3d_unet_only_interpolates():
    decoder = ssl4mis_vnet(2, 2).eval().decoder
    features = [torch.rand(1, 2 * 2**level, *[16 // 2**level] * 3) for level in range(5)]
    x = decoder.up[0](features[4]) + features[3]
    torch.testing.assert_close(decoder.levels[0](x), decoder(features)[0])
    level = ssl4mis_unet_3d(2, 2).eval().decoder.levels[0]
    coarse, skip = torch.rand(1, 32, 2, 2, 2), torch.rand(1, 16, 4, 4, 4)
    interpolated = nn.functional.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False)
    torch.testing.assert_close(level.convs(torch.cat([skip, interpolated], dim=1)), level(coarse, skip))


def test_convolutions_of_the_vnet_are_normalised_and_rectified():
    """Each is followed by batch norm, then ReLU: in training every output channel has mean 0 before it is cut."""
    for layer in (ssl4mis_vnet(2, 2).encoder.levels[1][0], ssl4mis_vnet(2, 2).decoder.up[0]):
        assert [type(part).__name__ for part in (layer.adn.N, layer.adn.A)] == ["BatchNorm3d", "ReLU"]
        assert list(dict(layer.adn.named_children())) == ["N", "A"]


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


def test_the_encoder_of_ideal_is_a_resnet_50_for_one_channel():
    encoder = ResNetEncoder()
    assert parameter_count(encoder) == 23_501_760  # notes B5; 3 channels have 23,508,032
    features = encoder(torch.rand(2, 1, 64, 96))
    shapes = [(64, 32, 48), (256, 16, 24), (512, 8, 12), (1024, 4, 6), (2048, 2, 3)]
    assert [tuple(f.shape[1:]) for f in features] == shapes


def test_the_dense_head_has_as_many_parameters_as_the_global_one_and_is_it_cell_by_cell():
    assert parameter_count(DenseProjectionHead(2048, 128)) == parameter_count(ProjectionHead(2048, 128)) == 4_458_624
    dense, pooled = DenseProjectionHead(6, 4), ProjectionHead(6, 4)
    for layer, other in ((0, 0), (2, 2)):
        pooled.mlp[other].weight.data = dense.mlp[layer].weight.data.flatten(1)
        pooled.mlp[other].bias.data = dense.mlp[layer].bias.data
    features = torch.randn(2, 6, 3, 5)
    grid = dense(features)
    assert grid.shape == (2, 4, 3, 5)
    torch.testing.assert_close(grid[:, :, 1, 2], pooled(features[:, :, 1:2, 2:3]))


def test_two_branches_share_the_encoder_and_differ_in_how_they_upsample():
    resnet = branched_resnet(4)
    unet = branched_unet(4, 2)
    for network, side in ((resnet, 64), (unet, 32)):
        logits = network(torch.rand(2, 1, side, side))
        assert [tuple(one.shape) for one in logits] == [(2, 4, side, side)] * 2
        first, second = network.decoders
        assert [len(decoder.levels) for decoder in (first, second)] == [4, 4]
        learned = [
            sum(isinstance(layer, nn.ConvTranspose2d) for layer in decoder.modules()) for decoder in (first, second)
        ]
        assert learned == [4, 0]
        interpolated = [sum(isinstance(layer, nn.Upsample) for layer in d.modules()) for d in (first, second)]
        assert interpolated == [0, 4]
        assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"encoder", "decoders", "classifiers"}
    with pytest.raises(ValueError, match=r"multiples of 16.*\(40, 32\)"):
        unet(torch.rand(1, 1, 40, 32))
    with pytest.raises(ValueError, match="multiples of 32"):
        resnet(torch.rand(1, 1, 48, 48))


def test_one_branch_is_the_unet_of_the_others():
    with seeded_init(0, "weights"):
        plain = coral_unet(4, 2)
    with seeded_init(0, "weights"):
        branched = branched_unet(4, 2, branches=1)
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(branched(images), [plain(images)], rtol=0, atol=0)


NETS = {
    "coral": (lambda: coral_unet(4, 4), (2, 1, 32, 32)),
    "ssl4mis": (lambda: ssl4mis_unet(4, 4), (2, 1, 32, 32)),
    "3D": (lambda: ssl4mis_unet_3d(3, 2), (2, 1, 16, 16, 32)),
    "V-Net": (lambda: ssl4mis_vnet(3, 2), (2, 1, 16, 16, 16)),
    "two branches": (lambda: branched_unet(4, 4), (2, 1, 32, 32)),
}


def passes(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Two passes and one way back: the logits of the second, the bytes that autograd kept."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)  # dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        first, second = (network(part) for part in (images, images.flip(-1)))
    if isinstance(first, list):
        first, second = torch.stack(first), torch.stack(second)
    (first.square().mean() - second.abs().mean()).backward()
    return second, sum(kept.values())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_levels_computed_again_change_memory_and_nothing_else(name, training):
    make, shape = NETS[name]
    images = torch.rand(shape)
    with seeded_init(0, "weights"):
        plain = make().train(training)
    copies = [copy.deepcopy(plain) for _ in range(3)]
    logits, kept = passes(plain, images)
    for lean, (levels, less) in zip(copies, ((1, 0.75), (2, 0.55), (9, 0.35)), strict=True):
        recompute_levels(lean, levels)
        found, bytes_kept = passes(lean, images)
        assert torch.equal(found, logits) and bytes_kept < less * kept
        for (weight, one), (_, other) in zip(plain.named_parameters(), lean.named_parameters(), strict=True):
            assert torch.equal(one.grad, other.grad), weight
        for (buffer, one), (_, other) in zip(plain.named_buffers(), lean.named_buffers(), strict=True):
            assert torch.equal(one, other), buffer


def test_levels_computed_again_take_a_number_from_0():
    unet = recompute_levels(coral_unet(4, 2), 2)
    assert [half.recomputed for half in (unet.encoder, unet.decoder)] == [2, 2]
    assert recompute_levels(unet, 0).encoder.recomputed == 0
    with pytest.raises(ValueError, match="recompute must be a whole number of levels, 0 or more, got -1"):
        recompute_levels(unet, -1)
