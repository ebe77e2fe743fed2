"""What DACL's density and loss cost, beside the forms that follow the equations.

    python -m tests.benchmarks.bench_dacl

prints the milliseconds of one call, the peak of the memory that tensors take on top of the input, and how many times
faster the library's form is. The slow density holds the table of all similarities of a class and searches it once per
scale; the slow loss goes class by class. Both compute the same numbers (the benchmark checks). The goal is 0.5 s and
600 MB for the density of 10,000 features of 14 classes against banks of 1,000: measured with 10,000 in all, and with
10,000 of each class.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from medlib.losses.dacl import feature_density, soft_density_guided_loss
from tests.benchmarks.bench_coral import forward_backward, peak_megabytes, timed

CLASSES, BANK, DIM = 14, 1000, 64
SCALES = (8, 16, 32)


def density_from_tables(features: Tensor, pool: Tensor, neighbors: tuple[int, ...]) -> Tensor:
    """`feature_density` of all classes, from one table (M, P) per class and one search of it per scale."""
    density = []
    for mine, bank in zip(features, pool, strict=True):
        similarity = torch.nn.functional.normalize(mine, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T
        density.append(torch.stack([similarity.topk(k, dim=1).values.mean(dim=1) for k in neighbors]).mean(dim=0))
    return torch.stack(density)


def loss_class_by_class(anchors: Tensor, center: Tensor, negatives: Tensor, weights: Tensor) -> Tensor:
    """`soft_density_guided_loss` of all classes, one after the other."""
    one_by_one = zip(anchors, center, negatives, weights, strict=True)
    return torch.stack([soft_density_guided_loss(*one) for one in one_by_one]).mean()


def features_and_banks(rows: int, classes: int = CLASSES, bank: int = BANK) -> tuple[Tensor, Tensor]:
    """Features (classes, rows, DIM) and banks (classes, bank, DIM)."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(classes, n, DIM, generator=generator) for n in (rows, bank))  # type: ignore[return-value]


def density_sum(form: Callable[..., Tensor], features: Tensor, pool: Tensor) -> float:
    """The sum of all densities, without gradient, as the method asks for them."""
    with torch.no_grad():
        return form(features, pool, SCALES).double().sum().item()


def anchors_and_keys(anchors: int, negatives: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the loss takes, for all classes."""
    generator = torch.Generator().manual_seed(0)
    rows, keys = (torch.randn(CLASSES, n, DIM, generator=generator) for n in (anchors, negatives))
    return rows.requires_grad_(), keys[:, 0], keys, torch.rand(CLASSES, anchors, generator=generator)


def main() -> None:
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, CPU, {threads} threads, {CLASSES} classes, D = {DIM}, float32")
    print(f"{'':<46}{'form':<26}{'ms':>9}{'peak MB':>10}{'ratio':>8}")
    all_of_them = features_and_banks(-(-10_000 // CLASSES))
    of_each = features_and_banks(10_000)
    keys = anchors_and_keys(256, 512)
    for what, slow, fast, slow_name, repeat in (
        (
            f"density: 10,000 in all, banks of {BANK}",
            partial(density_sum, density_from_tables, *all_of_them),
            partial(density_sum, feature_density, *all_of_them),
            "tables, a search per scale",
            10,
        ),
        (
            f"density: 10,000 of each class, banks of {BANK}",
            partial(density_sum, density_from_tables, *of_each),
            partial(density_sum, feature_density, *of_each),
            "tables, a search per scale",
            3,
        ),
        (
            "loss: 256 anchors, 512 negatives, with gradient",
            partial(forward_backward, loss_class_by_class, *keys),
            partial(forward_backward, soft_density_guided_loss, *keys),
            "class by class",
            10,
        ),
    ):
        expected, slow_seconds = timed(slow, max(1, repeat // 3))
        value, seconds = timed(fast, repeat)
        torch.testing.assert_close(torch.tensor(value), torch.tensor(expected), rtol=1e-4, atol=1e-4)
        print(f"{what:<46}{slow_name:<26}{1e3 * slow_seconds:>9.1f}{peak_megabytes(slow):>10.1f}")
        ratio = f"{slow_seconds / seconds:.1f} x"
        print(f"{'':<46}{'medlib':<26}{1e3 * seconds:>9.1f}{peak_megabytes(fast):>10.1f}{ratio:>8}", flush=True)


if __name__ == "__main__":
    main()
