"""What MONA's contrastive part costs, beside a dense head and beside loops.

    python -m tests.benchmarks.bench_mona

prints two tables. The first is one step of the anatomical contrastive loss, forward and backward, on the five levels of
the U-Net at the paper's size (256 x 256 px, 8 labelled and 8 unlabelled images, 512 features, 4 classes, 256 queries
and 512 keys a class): with the representation head on every pixel, and on the sampled pixels. Both get the same pixels,
and the benchmark checks that they give the same loss and the same gradient. The dense step needs about 12 GB
(``--images 4`` takes a quarter of everything). The second table sets each sampler beside the loop that it replaces.
"""

import argparse
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlib.losses.mona import (
    anatomical_contrastive_loss,
    class_means,
    class_relation_distribution,
    local_windows,
    sample_features,
    sample_negative_classes,
    sample_negatives,
    sample_queries,
)
from tests.benchmarks.bench_coral import peak_megabytes, timed

WIDTHS = (16, 32, 64, 128, 256)  # of the U-Net's levels, finest first; each is half as wide in px as the one before
DIM = 512
CLASSES = 4
THRESHOLD = 0.97


@dataclass
class Batch:
    """Decoder maps (B, C_l, side / 2^l, ...), labels (B, side, side), probabilities (B, CLASSES, side, side), head."""

    maps: list[Tensor]
    labels: Tensor
    probabilities: Tensor
    head: nn.Linear


def hearts(images: int, side: int, generator: torch.Generator) -> Tensor:
    """Labels (B, side, side): rings of the classes 1 to 3 round a centre that moves, background around them."""
    axis = torch.linspace(-1, 1, side)
    centre = 0.4 * torch.rand(images, 2, 1, 1, generator=generator) - 0.2
    radius = torch.hypot(axis[:, None] - centre[:, 0], axis[None, :] - centre[:, 1])  # (B, side, side)
    return 3 - torch.bucketize(radius, torch.tensor([0.12, 0.2, 0.3]))


def batch(images: int, side: int, dim: int = DIM) -> Batch:
    """A heart in each image, maps and head at random, and a prediction that is mostly right."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(images, width, side >> level, side >> level, generator=generator).requires_grad_()
        for level, width in enumerate(WIDTHS)
    ]
    labels = hearts(images, side, generator)
    logits = 6 * F.one_hot(labels, CLASSES).permute(0, 3, 1, 2)
    noise = 2 * torch.randn(images, CLASSES, side, side, generator=generator)
    head = nn.Linear(sum(WIDTHS), dim)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / sum(WIDTHS) ** 0.5)
        head.bias.copy_(0.1 * torch.randn(dim, generator=generator))
    return Batch(maps, labels, (logits + noise).softmax(dim=1), head)


def draw(given: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (C, 256), negatives (C, 512) and the valid classes of a step; the graph is that of the class means."""
    queries, has_queries = sample_queries(given.labels, given.probabilities, generator)
    with torch.no_grad():
        means, present = class_means(given.maps, given.labels, CLASSES)
        distribution = class_relation_distribution(given.head(means), present)
    negatives, has_negatives = sample_negatives(given.labels, distribution, generator)
    return queries, negatives, has_queries & has_negatives


def contrast_sampled(given: Batch, queries: Tensor, negatives: Tensor, valid: Tensor) -> Tensor:
    """The loss with the head on the sampled pixels and on the class means. Keys get no gradient."""
    size = (given.labels.shape[1], given.labels.shape[2])
    rows = given.head(sample_features(given.maps, queries, size))
    with torch.no_grad():
        keys = given.head(sample_features(given.maps, negatives, size))
        positives = given.head(class_means(given.maps, given.labels, CLASSES)[0])
    return anatomical_contrastive_loss(rows, positives, keys, valid=valid)


def every_pixel(maps: list[Tensor], head: nn.Linear, size: tuple[int, int]) -> Tensor:
    """The head on every pixel (B, H * W, D): up-sample, concatenate, 1x1 convolution."""
    full = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps], dim=1)
    dense = F.conv2d(full, head.weight[:, :, None, None], head.bias)  # (B, D, H, W)
    return dense.flatten(2).transpose(1, 2)  # a view


def contrast_dense(given: Batch, queries: Tensor, negatives: Tensor, valid: Tensor) -> Tensor:
    """The same loss with the head on every pixel, from which the rows are picked."""
    pixels = every_pixel(given.maps, given.head, (given.labels.shape[1], given.labels.shape[2]))
    area = pixels.shape[1]
    rows = pixels[queries // area, queries % area]
    with torch.no_grad():
        keys = pixels[negatives // area, negatives % area]
        members = (given.labels.flatten(1)[:, None] == torch.arange(CLASSES)[:, None]).float()  # (B, C, H * W)
        positives = (members @ pixels).sum(dim=0) / members.sum(dim=(0, 2)).clamp(min=1)[:, None]
    return anatomical_contrastive_loss(rows, positives, keys, valid=valid)


def step(form, given: Batch, *pixels: Tensor) -> float:
    """Forward and backward; the gradients replace those of the last step."""
    for leaf in (*given.maps, *given.head.parameters()):
        leaf.grad = None
    loss = form(given, *pixels)
    loss.backward()
    return loss.item()


def compare_heads(images: int, side: int, repeat: int, dense_repeat: int) -> list[dict]:
    """One row per head: form, seconds, megabytes. Raises where loss or gradients differ."""
    given = batch(images, side)
    pixels = draw(given, torch.Generator().manual_seed(1))
    rows, seen = [], []
    for name, form, times in (("dense", contrast_dense, dense_repeat), ("sampled", contrast_sampled, repeat)):
        runs: list[tuple[float, float]] = []
        run = partial(step, form, given, *pixels)
        megabytes = peak_megabytes(lambda run=run, times=times, runs=runs: runs.append(timed(run, times)))
        [(value, seconds)] = runs
        leaves = (*given.maps, *given.head.parameters())
        seen.append([torch.tensor(value), *(leaf.grad for leaf in leaves)])
        rows.append({"form": name, "loss": value, "seconds": seconds, "megabytes": megabytes})
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    draws = timed(lambda: draw(given, torch.Generator().manual_seed(1))[0].sum().item(), repeat)[1]
    rows.append({"form": "drawing", "seconds": draws})
    return rows


# --- loops -----------------------------------------------------------------------------------------------------------


def queries_in_a_loop(labels: Tensor, probabilities: Tensor, generator: torch.Generator, count: int = 256) -> Tensor:
    """Class by class, query by query, from the list of the class's hard pixels."""
    index = torch.zeros(CLASSES, count, dtype=torch.long)
    for c in range(CLASSES):
        hard = ((labels == c) & (probabilities[:, c] <= THRESHOLD)).flatten().nonzero()[:, 0]
        for q in range(count if len(hard) else 0):
            index[c, q] = hard[int(torch.randint(len(hard), (), generator=generator))]
    return index


def negatives_in_a_loop(labels: Tensor, distribution: Tensor, generator: torch.Generator, count: int = 512) -> Tensor:
    """Class by class, key by key: a class from the graph, then one of its pixels."""
    pools = [(labels == v).flatten().nonzero()[:, 0] for v in range(CLASSES)]
    index = torch.zeros(CLASSES, count, dtype=torch.long)
    for c in range(CLASSES):
        for j in range(count):
            v = int(torch.multinomial(distribution[c], 1, generator=generator))
            index[c, j] = pools[v][int(torch.randint(len(pools[v]), (), generator=generator))]
    return index


def negative_classes_in_a_loop(distribution: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """One draw at a time."""
    index = torch.zeros(CLASSES, count, dtype=torch.long)
    for c in range(CLASSES):
        for j in range(count):
            index[c, j] = int(torch.multinomial(distribution[c], 1, generator=generator))
    return index


def class_means_of_all_pixels(maps: list[Tensor], labels: Tensor) -> Tensor:
    """Up-sample and concatenate every map, then average the rows of each class."""
    size = labels.shape[1:]
    full = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps], dim=1)
    return torch.stack([full.transpose(0, 1)[:, labels == c].mean(dim=1) for c in range(CLASSES)])


def features_one_by_one(maps: list[Tensor], index: Tensor, size: tuple[int, int]) -> Tensor:
    """Level by level, the whole map up-sampled, then the pixels picked."""
    rows = []
    for features in maps:
        full = F.interpolate(features, size=size, mode="bilinear", align_corners=False).flatten(2)
        rows.append(full[index // full.shape[2], :, index % full.shape[2]])
    return torch.cat(rows, dim=-1)


def windows_in_a_loop(maps: Tensor, head: nn.Module) -> Tensor:
    """Window by window: cut, pool, head."""
    windows = [
        head(F.adaptive_avg_pool2d(maps[:, :, y : y + 64, x : x + 64], 8)).flatten(1)
        for y in range(0, 192, 32)
        for x in range(0, 192, 32)
    ]
    return torch.stack(windows)


def compare_samplers(images: int, side: int, repeat: int, slow_repeat: int) -> list[dict]:
    """One row per sampler: name, seconds, slow_seconds."""
    given = batch(images, side)
    generator = torch.Generator().manual_seed(2)
    size = (side, side)
    with torch.no_grad():
        means, present = class_means(given.maps, given.labels, CLASSES)
        distribution = class_relation_distribution(given.head(means), present)
        pixels = draw(given, generator)[0]
        mlp = nn.Sequential(nn.Conv2d(CLASSES, 2 * CLASSES, 1), nn.ReLU(), nn.Conv2d(2 * CLASSES, CLASSES, 1))
        for weight in mlp.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        maps = [m.detach() for m in given.maps]
        labels, probabilities = given.labels, given.probabilities
        same = (
            (class_means(maps, labels, CLASSES)[0], class_means_of_all_pixels(maps, labels)),
            (sample_features(maps, pixels, size), features_one_by_one(maps, pixels, size)),
            (local_windows(probabilities, mlp), windows_in_a_loop(probabilities, mlp)),
        )
        for one, other in same:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        pairs = {
            "sample_queries": (
                lambda: sample_queries(labels, probabilities, generator)[0],
                lambda: queries_in_a_loop(labels, probabilities, generator),
            ),
            "sample_negative_classes": (
                lambda: sample_negative_classes(distribution, 512, generator),
                lambda: negative_classes_in_a_loop(distribution, 512, generator),
            ),
            "sample_negatives": (
                lambda: sample_negatives(labels, distribution, generator)[0],
                lambda: negatives_in_a_loop(labels, distribution, generator),
            ),
            "class_means": (
                lambda: class_means(maps, labels, CLASSES)[0],
                lambda: class_means_of_all_pixels(maps, labels),
            ),
            "sample_features": (
                lambda: sample_features(maps, pixels, size),
                lambda: features_one_by_one(maps, pixels, size),
            ),
            "local_windows": (
                lambda: local_windows(probabilities, mlp),
                lambda: windows_in_a_loop(probabilities, mlp),
            ),
        }
        rows = []
        for name, (fast, slow) in pairs.items():
            seconds, slow_seconds = timed(fast, repeat)[1], timed(slow, slow_repeat)[1]
            rows.append({"name": name, "seconds": seconds, "slow_seconds": slow_seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="images in the batch (the paper's size: 8 + 8)")
    parser.add_argument("--side", type=int, default=256, help="px, a multiple of 16 and at least 224")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, float32")
    print(f"{args.images} images of {args.side} px, {sum(WIDTHS)} -> {DIM} features, {CLASSES} classes")
    print(f"\n{'step of the loss':<26}{'ms':>10}{'peak MB':>10}{'ratio':>16}")
    dense, sampled, drawing = compare_heads(args.images, args.side, repeat=3, dense_repeat=1)
    ratio = f"{dense['seconds'] / sampled['seconds']:.0f} x, {dense['megabytes'] / sampled['megabytes']:.0f} x"
    print(f"{'head on every pixel':<26}{1e3 * dense['seconds']:>10.0f}{dense['megabytes']:>10.0f}")
    print(f"{'head on sampled pixels':<26}{1e3 * sampled['seconds']:>10.0f}{sampled['megabytes']:>10.0f}{ratio:>16}")
    print(f"{'drawing the pixels':<26}{1e3 * drawing['seconds']:>10.0f}")
    print(f"\n{'sampler':<26}{'ms':>10}{'loop ms':>10}{'ratio':>16}")
    for row in compare_samplers(args.images, args.side, repeat=5, slow_repeat=2):
        ratio = f"{row['slow_seconds'] / row['seconds']:.1f} x"
        print(
            f"{row['name']:<26}{1e3 * row['seconds']:>10.1f}{1e3 * row['slow_seconds']:>10.1f}{ratio:>16}", flush=True
        )


if __name__ == "__main__":
    main()
