"""What IDEAL's local contrastive loss costs, beside the form that holds the whole table of similarities.

    python -m tests.benchmarks.bench_ideal

prints, for some batches B of grids of S = side x side cells, the milliseconds of one forward and backward pass and the
peak of the memory that tensors take on top of the input. The plain form builds the (B S, B S) table once and keeps what
its backward pass needs; at 32 x 22 x 22 cells that is several GB, so it runs only up to 16 x 22 x 22. Both compute the
same number and the same gradient (the benchmark checks). The last column is the match: time of `dense_correspondence`.
"""

import math
from functools import partial

import torch
from torch import Tensor

from medlib.losses.ideal import dense_correspondence, local_contrastive_loss
from tests.benchmarks.bench_coral import peak_megabytes, timed

DIM = 128
TEMPERATURE = 0.2


def local_contrastive_loss_plain(query: Tensor, key: Tensor, correspondence: Tensor, temperature: float) -> Tensor:
    """`local_contrastive_loss` from one table (B S, B S), with plain PyTorch."""
    batch, dim = query.shape[:2]
    q, k = (torch.nn.functional.normalize(x.flatten(2).mT.reshape(-1, dim), dim=1) for x in (query, key))
    image = torch.arange(batch).repeat_interleave(len(q) // batch)
    start = torch.arange(batch)[:, None] * (len(q) // batch)
    positive = (q * k[(start + correspondence).flatten()]).sum(dim=1) / temperature
    others = (q @ k.T / temperature).masked_fill(image[:, None] == image, -math.inf)
    return (torch.cat([positive[:, None], others], dim=1).logsumexp(dim=1) - positive).mean()


def batch(images: int, side: int, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    """Two views (images, dim, side, side) that want a gradient, and their match."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(images, dim, side, side, generator=generator).requires_grad_() for _ in range(2))
    return query, key, dense_correspondence(query, key)


def forward_backward(form, query: Tensor, key: Tensor, match: Tensor) -> tuple[float, Tensor]:
    """The loss, and its gradient at the query."""
    loss = form(query, key, match, TEMPERATURE)
    (gradient, _) = torch.autograd.grad(loss, [query, key])
    return loss.item(), gradient


def compare(images: int, side: int, repeat: int, plain: bool = True) -> list[dict]:
    """One row per form: images, side, form, seconds, megabytes, and the seconds of the match."""
    query, key, match = batch(images, side)
    _, match_seconds = timed(partial(dense_correspondence, query, key), repeat)
    forms = {"medlib": local_contrastive_loss} | ({"plain": local_contrastive_loss_plain} if plain else {})
    rows, results = [], []
    for form, loss in forms.items():
        run = partial(forward_backward, loss, query, key, match)
        result, seconds = timed(run, repeat)
        results.append(result)
        rows.append(
            {"images": images, "side": side, "form": form, "seconds": seconds, "megabytes": peak_megabytes(run),
             "match": match_seconds}
        )  # fmt: skip
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1e-9)
    return rows


def main() -> None:
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, D = {DIM}, float32, forward + backward")
    print(f"{'B':>3}{'cells':>9}  {'form':<8}{'ms':>10}{'peak MB':>10}{'match ms':>10}")
    for images, side, repeat, plain in ((16, 5, 20, True), (16, 12, 3, True), (16, 22, 1, True), (32, 22, 1, False)):
        for row in compare(images, side, repeat, plain):
            what = f"{images:>3}{f'{side} x {side}':>9}  {row['form']:<8}"
            print(
                f"{what}{1e3 * row['seconds']:>10.1f}{row['megabytes']:>10.1f}{1e3 * row['match']:>10.1f}", flush=True
            )


if __name__ == "__main__":
    main()
