"""Networks: one U-Net built from MONAI's blocks, its published configurations, and projection heads.

MONAI's own ``BasicUNet`` is not the graph of either reference: it does not halve the channels in its last up-sampling,
has one dropout rate for all levels and always normalises the bottleneck. The blocks are the same, so they are MONAI's.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets import resnet50
from monai.networks.nets.basic_unet import TwoConv, UpCat
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from medlib.rng import stream_seed

Activation = tuple[str, dict[str, Any]]
LEAKY_RELU: Activation = ("LeakyReLU", {"negative_slope": 0.01, "inplace": True})
RELU: Activation = ("relu", {"inplace": True})


@contextlib.contextmanager
def seeded_init(seed: int, *name: str | int) -> Iterator[None]:
    """Modules built inside draw their initial weights from the stream ``name``; the global state is as before after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, *name))
        yield


def kaiming_init(module: nn.Module, slope: float = 0.01) -> nn.Module:
    """He initialisation of every convolution (normal, for LeakyReLU of ``slope``), biases 0; returns ``module``.

    Linear layers keep PyTorch's default, as in the code of PCL and CORAL.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(layer.weight, a=slope)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


class Half(nn.Module):
    """An encoder or a decoder. Some of its ``levels`` can be computed again in the backward pass (`recompute_levels`).

    Attributes:
        recomputed: number of levels, finest first, that keep only what goes in and out.
    """

    levels: nn.ModuleList
    recomputed: int = 0

    def through(self, fineness: int, level: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``level(*inputs)``; ``fineness`` is 0 at full resolution."""
        if fineness >= self.recomputed or not torch.is_grad_enabled():
            return level(*inputs)

        def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
            return contextlib.nullcontext(), _StatisticsKept(self)

        return cast(Tensor, checkpoint(level, *inputs, use_reentrant=False, context_fn=contexts))


class _StatisticsKept(contextlib.AbstractContextManager[None]):
    """Inside, batch norms do not move their running statistics: what is computed again has moved them already.

    It can be entered again: a graph that is kept has several backward passes.
    """

    def __init__(self, module: nn.Module):
        self.norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
        self.kept: list[list[dict[str, Tensor]]] = []

    def __enter__(self) -> None:
        self.kept.append([dict(norm.named_buffers()) for norm in self.norms])
        for norm, buffers in zip(self.norms, self.kept[-1], strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())

    def __exit__(self, *exception: object) -> None:
        for norm, buffers in zip(self.norms, self.kept.pop(), strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def recompute_levels(networks: nn.Module, levels: int) -> nn.Module:
    """The finest ``levels`` of each U-Net or V-Net in ``networks`` are computed again in the backward pass.

    Until then such a level keeps only what goes in and out of it, so that a step takes less memory and more time. Loss,
    gradients, dropout and running statistics are the same. Each level has a like share of the work, and twice the
    memory of the next, so the first two pay best. 0: none is. Returns ``networks``; ValueError: ``levels`` is no whole
    number from 0.
    """
    if type(levels) is not int or levels < 0:
        raise ValueError(f"recompute must be a whole number of levels, 0 or more, got {levels!r}")
    for module in networks.modules():
        if isinstance(module, Half):
            module.recomputed = levels
    return networks


class Encoder(Half):
    """The contracting half of a U-Net: two convolutions a level, max-pooling between levels.

    Args:
        widths: channels of each level, finest first; the last is the bottleneck.
        spatial_dims: 2 or 3.
        norm: MONAI name of the normalisation ("batch", "instance").
        normalise_bottleneck: False leaves the bottleneck without normalisation and with plain ReLU (PCL, CORAL).
        dropout: rate between the two convolutions of each level, in [0, 1).
        act: activation of all other convolutions, as MONAI names it.
    """

    def __init__(
        self,
        widths: Sequence[int],
        spatial_dims: int = 2,
        norm: str = "batch",
        normalise_bottleneck: bool = True,
        dropout: Sequence[float] | None = None,
        act: Activation = LEAKY_RELU,
    ):
        super().__init__()
        rates = tuple(dropout) if dropout is not None else (0.0,) * len(widths)
        if len(rates) != len(widths):
            raise ValueError(f"dropout needs one rate a level: got {len(rates)} rates for {len(widths)} levels")
        inputs = (1, *widths[:-1])
        self.levels = nn.ModuleList()
        for level, (before, after, rate) in enumerate(zip(inputs, widths, rates, strict=True)):
            plain = level == len(widths) - 1 and not normalise_bottleneck
            block: nn.Module = TwoConv(
                spatial_dims,
                before,
                after,
                act=RELU if plain else act,
                norm="" if plain else norm,  # "" is MONAI's way to say: none
                bias=True,
            )
            if rate:
                first, second = block.children()
                block = nn.Sequential(first, nn.Dropout(rate), second)
            self.levels.append(block)
        self.pool = nn.MaxPool2d(2) if spatial_dims == 2 else nn.MaxPool3d(2)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 1, *space) -> feature maps of every level, finest first; the last one is the bottleneck."""
        features = [self.through(0, self.levels[0], images)]
        for number, level in enumerate(self.levels[1:], start=1):
            features.append(self.through(number, nn.Sequential(self.pool, level), features[-1]))
        return features


class Decoder(Half):
    """The expanding half: up-sampling by two, concatenation with the encoder's map, two convolutions a level.

    Args:
        widths: channels of the encoder's levels, finest first.
        upsample: "deconv" (transposed convolution), "nontrainable" (1x1 convolution and linear interpolation) or
            "interpolation" (that alone, corners not aligned).
    """

    def __init__(
        self,
        widths: Sequence[int],
        spatial_dims: int = 2,
        norm: str = "batch",
        upsample: str = "deconv",
        act: Activation = LEAKY_RELU,
    ):
        super().__init__()
        how: dict[str, Any] = dict(upsample=upsample)
        if upsample == "interpolation":
            how = dict(upsample="nontrainable", pre_conv=None, align_corners=False)
        self.levels = nn.ModuleList(
            UpCat(spatial_dims, coarse, fine, fine, act, norm, bias=True, **how)
            for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps of the encoder -> feature maps of the decoder, coarsest first; the last has full resolution."""
        maps = []
        x = features[-1]
        for number, (level, skip) in enumerate(zip(self.levels, features[-2::-1], strict=True), start=1):
            x = self.through(len(self.levels) - number, level, x, skip)
            maps.append(x)
        return maps


def _vnet_layer(before: int, after: int, **how: Any) -> nn.Module:
    """Convolution (3x3x3 unless ``how`` says otherwise), batch norm, ReLU."""
    return Convolution(3, before, after, act=RELU, norm="batch", adn_ordering="NA", **how)


class VNetEncoder(Half):
    """The contracting half of the V-Net of SSL4MIS: strided convolutions between levels, 1 to 3 convolutions a level.

    It is not MONAI's V-Net, which has 5x5x5 kernels, residual blocks and concatenated skips.

    Args:
        widths: channels of each level, finest first; the last is the bottleneck.
        convolutions: of each level.
        dropout: rate at which whole channels of the bottleneck are dropped.
    """

    def __init__(self, widths: Sequence[int], convolutions: Sequence[int] = (1, 2, 3, 3, 3), dropout: float = 0.5):
        super().__init__()
        self.levels = nn.ModuleList()
        for level, (width, count) in enumerate(zip(widths, convolutions, strict=True)):
            down = [_vnet_layer(widths[level - 1], width, kernel_size=2, strides=2, padding=0)] if level else []
            inputs = (width if level else 1, *[width] * (count - 1))
            last = [nn.Dropout3d(dropout)] if level == len(widths) - 1 else []
            self.levels.append(nn.Sequential(*down, *(_vnet_layer(before, width) for before in inputs), *last))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> feature maps of every level, finest first; the last one is the bottleneck."""
        features = []
        x = images
        for number, level in enumerate(self.levels):
            x = self.through(number, level, x)
            features.append(x)
        return features


class VNetDecoder(Half):
    """The expanding half: transposed convolution by two, the encoder's map added, 1 to 3 convolutions a level.

    Args:
        widths: channels of the encoder's levels, finest first.
        convolutions: of each level, coarsest first.
    """

    def __init__(self, widths: Sequence[int], convolutions: Sequence[int] = (3, 3, 2, 1)):
        super().__init__()
        self.up, self.levels = nn.ModuleList(), nn.ModuleList()
        for fine, coarse, count in zip(widths[-2::-1], widths[:0:-1], convolutions, strict=True):
            up = _vnet_layer(coarse, fine, kernel_size=2, strides=2, padding=0, output_padding=0, is_transposed=True)
            self.up.append(up)
            self.levels.append(nn.Sequential(*(_vnet_layer(fine, fine) for _ in range(count))))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps of the encoder -> feature maps of the decoder, coarsest first; the last has full resolution."""
        maps = []
        x = features[-1]
        for number, (up, level, skip) in enumerate(zip(self.up, self.levels, features[-2::-1], strict=True), start=1):

            def refined(x: Tensor, skip: Tensor, up: nn.Module = up, level: nn.Module = level) -> Tensor:
                return cast(Tensor, level(up(x) + skip))

            x = self.through(len(self.levels) - number, refined, x, skip)
            maps.append(x)
        return maps


class ResNetEncoder(nn.Module):
    """ResNet-50 for one-channel slices, 23,501,760 parameters: the encoder of IDEAL.

    Random initial weights (He, fan-out, as ResNet has it); there are no weights of natural images for one channel.
    """

    widths = (64, 256, 512, 1024, 2048)

    def __init__(self) -> None:
        super().__init__()
        self.trunk = resnet50(
            spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False, bias_downsample=False
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 1, H, W) -> the stem's map at half resolution, then those of the four stages, down to 1/32."""
        trunk = self.trunk
        features = [trunk.act(trunk.bn1(trunk.conv1(images)))]
        x = trunk.maxpool(features[0])
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            x = stage(x)
            features.append(x)
        return features


class UNet(nn.Module):
    """Encoder, decoder and a classifier: images (B, 1, *space) -> logits (B, classes, *space).

    Every side of ``space`` must be a multiple of ``2 ** (levels - 1)``.
    """

    def __init__(self, encoder: Encoder | VNetEncoder, decoder: Decoder | VNetDecoder, classifier: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.classifier = classifier
        self.stride = 2 ** (len(encoder.levels) - 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.maps(images)[-1])

    def maps(self, images: Tensor) -> list[Tensor]:
        """The encoder's last map and the decoder's, coarsest first; the classifier reads the last, of full resolution.

        A map (B, channels, *space) has half the side and twice the channels of the next.
        """
        if any(side % self.stride for side in images.shape[2:]):
            raise ValueError(f"image sides must be multiples of {self.stride}, got {tuple(images.shape[2:])}")
        features = self.encoder(images)
        return [features[-1], *self.decoder(features)]


class BranchedUNet(nn.Module):
    """One encoder and several decoders: images (B, 1, *space) -> for each decoder, logits (B, classes, *space).

    Args:
        stride: every side of ``space`` must be a multiple of it.
    """

    def __init__(self, encoder: nn.Module, decoders: Sequence[Decoder], classifiers: Sequence[nn.Module], stride: int):
        super().__init__()
        self.encoder = encoder
        self.decoders = nn.ModuleList(decoders)
        self.classifiers = nn.ModuleList(classifiers)
        self.stride = stride

    def forward(self, images: Tensor) -> list[Tensor]:
        if any(side % self.stride for side in images.shape[2:]):
            raise ValueError(f"image sides must be multiples of {self.stride}, got {tuple(images.shape[2:])}")
        features = self.encoder(images)
        pairs = zip(self.decoders, self.classifiers, strict=True)
        return [classifier(decoder(features)[-1]) for decoder, classifier in pairs]


BRANCHES = ("deconv", "nontrainable")
"""How the first and the second decoder of IDEAL and of MC-Net up-sample: transposed convolution, interpolation."""


def branched_unet(classes: int, width: int = 48, branches: int = 2) -> BranchedUNet:
    """`coral_unet` with ``branches`` decoders, 1 or 2, that differ in how they up-sample (see `BRANCHES`).

    With one branch it is `coral_unet` itself: the same layers, and the same initial weights from the same stream.
    """
    widths = [width * 2**level for level in range(5)]
    encoder = Encoder(widths, normalise_bottleneck=False)
    decoders = [Decoder(widths, upsample=upsample) for upsample in BRANCHES[:branches]]
    classifiers = [nn.Conv2d(width, classes, kernel_size=1, bias=False) for _ in decoders]
    unet = BranchedUNet(encoder, decoders, classifiers, stride=16)
    kaiming_init(unet)
    return unet


def branched_resnet(classes: int, branches: int = 2) -> BranchedUNet:
    """IDEAL's network: `ResNetEncoder` and ``branches`` U-Net decoders of four up-scalings, as in `branched_unet`.

    The decoders end at the stem's half resolution; a last interpolation by two, without parameters, brings the logits
    of both branches to the pixels of the image. The paper says "4 upscaling layers" and leaves that step open.
    """
    encoder = ResNetEncoder()
    decoders = [Decoder(encoder.widths, upsample=upsample) for upsample in BRANCHES[:branches]]
    classifiers = [
        nn.Sequential(
            nn.Conv2d(encoder.widths[0], classes, kernel_size=1, bias=False),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        )
        for _ in decoders
    ]
    for new in (*decoders, *classifiers):
        kaiming_init(new)
    return BranchedUNet(encoder, decoders, classifiers, stride=32)


def coral_unet(classes: int, width: int = 48) -> UNet:
    """The 2D U-Net of PCL and CORAL: ``width`` channels at full resolution (48 for ACDC, 32 for CHD), five levels.

    At width 48 and 4 classes: encoder 10,602,384 parameters, decoder with classifier 6,859,632.
    """
    widths = [width * 2**level for level in range(5)]
    unet = UNet(
        Encoder(widths, normalise_bottleneck=False),
        Decoder(widths),
        nn.Conv2d(width, classes, kernel_size=1, bias=False),
    )
    kaiming_init(unet)
    return unet


def ssl4mis_unet(classes: int, width: int = 16) -> UNet:
    """The 2D U-Net of SSL4MIS, which the semi-supervised papers share on ACDC: 1,813,764 parameters for 4 classes.

    Its decoder up-samples by 1x1 convolution and bilinear interpolation (with transposed convolutions it would have
    1,944,324 parameters).
    """
    widths = [width * 2**level for level in range(5)]
    return UNet(
        Encoder(widths, dropout=(0.05, 0.1, 0.2, 0.3, 0.5)),
        Decoder(widths, upsample="nontrainable"),
        nn.Conv2d(width, classes, kernel_size=3, padding=1),
    )


def ssl4mis_unet_3d(classes: int, width: int = 16) -> UNet:
    """The 3D U-Net of SSL4MIS and GuidedNet: five levels from ``width`` channels, instance norm, ReLU.

    Its decoder up-samples by trilinear interpolation alone. Dropout of 0.3 follows the bottleneck and precedes the
    classifier. 5,884,050 parameters for 2 classes.
    """
    widths = [width * 2**level for level in range(5)]
    encoder = Encoder(widths, 3, "instance", act=RELU)
    encoder.levels[-1] = nn.Sequential(encoder.levels[-1], nn.Dropout(0.3))
    decoder = Decoder(widths, 3, "instance", upsample="interpolation", act=RELU)
    unet = UNet(encoder, decoder, nn.Sequential(nn.Dropout(0.3), nn.Conv3d(width, classes, kernel_size=1)))
    kaiming_init(unet, slope=0)
    return unet


def ssl4mis_vnet(classes: int, width: int = 16) -> UNet:
    """The V-Net of SSL4MIS (``width`` 16, 9,448,866 parameters for 2 classes) and of DHC (``width`` 32).

    Dropout of whole channels, 0.5, follows the bottleneck and precedes the classifier.
    """
    widths = [width * 2**level for level in range(5)]
    classifier = nn.Sequential(nn.Dropout3d(0.5), nn.Conv3d(width, classes, kernel_size=1))
    return UNet(VNetEncoder(widths), VNetDecoder(widths), classifier)


class ProjectionHead(nn.Module):
    """Global average pooling, then Linear - ReLU - Linear: feature maps (B, C, *space) -> embeddings (B, dim).

    The head of PCL and CORAL (``dim`` 512, hidden size = C): no normalisation inside or after.
    """

    def __init__(self, channels: int, dim: int = 512):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(features.flatten(2).mean(dim=2))


class DenseProjectionHead(nn.Module):
    """1x1 convolution - ReLU - 1x1 convolution: feature maps (B, C, h, w) -> one embedding a cell (B, dim, h, w).

    IDEAL's head: `ProjectionHead` without the pooling, "with an equal number of parameters" (section 2.2).
    """

    def __init__(self, channels: int, dim: int = 128):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=1), nn.ReLU(inplace=True), nn.Conv2d(channels, dim, kernel_size=1)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(features)


def pixel_head(channels: int, dim: int) -> nn.Sequential:
    """Linear - ReLU - Linear over the last axis: rows (n, channels) of a map -> features (n, dim).

    Two 1x1 convolutions that can be applied to some pixels or voxels alone: without batch norm, which would take its
    statistics from the sample.
    """
    return nn.Sequential(nn.Linear(channels, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))


def channels_last(module: nn.Module) -> nn.Module:
    """Lay out convolution weights with channels last, in place: a fifth faster here on CPUs, more on GPUs."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
    return module


def parameter_count(module: nn.Module) -> int:
    """The number of parameters of ``module``, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())
