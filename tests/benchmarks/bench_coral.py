"""What CORAL's losses cost, beside the forms that build the tables of the equations.

    python -m tests.benchmarks.bench_coral

prints, for some batch sizes N, the milliseconds of one forward and backward pass, the peak of the memory that tensors
take on top of the input, and how many times faster the library's form is. The slow forms compute the same numbers (the
benchmark checks), from an N x N x N table of set memberships and an N x N x D table of steps. At N = 1024 those do not
fit everyone's memory, so they go through the anchors in chunks, which is the faster way for them, too.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from medlib.losses.contrastive import TIE
from medlib.losses.coral import ordinal_loss, relational_loss

DIM = 128
TEMPERATURE = 0.1


def relational_loss_cubed(features: Tensor, positions: Tensor, temperature: float, anchors: slice) -> Tensor:
    """The share of ``anchors`` in `relational_loss`, from a boolean table (anchors, N, N) of who is in N_r(i, j)."""
    n = len(features)
    unit = torch.nn.functional.normalize(features, dim=1)
    similarity = unit[anchors] @ unit.T / temperature  # (A, N)
    distance = (positions[anchors, None] - positions).abs()  # (A, N)
    others = ~torch.eye(n, dtype=torch.bool)[anchors]  # (A, N)
    farther = (distance[:, None, :] > distance[:, :, None] - TIE) & others[:, None, :]  # (A, N, N): anchor i, j, k
    among = similarity[:, None, :].masked_fill(~farther, -math.inf).logsumexp(dim=2)  # (A, N)
    return (among - similarity)[others].sum() / (n * (n - 1))


def ordinal_loss_stepped(features: Tensor, positions: Tensor, direction: Tensor, anchors: slice) -> Tensor:
    """The share of ``anchors`` in `ordinal_loss`, from the table (anchors, N, D) of steps h_j - h_i."""
    steps = features - features[anchors, None]  # (A, N, D)
    ordered = positions > positions[anchors, None]  # (A, N)
    cosine = torch.cosine_similarity(steps, direction, dim=2)
    return -cosine[ordered].sum() / (positions > positions[:, None]).sum()


def in_chunks(form: Callable[..., Tensor], n: int, chunk: int) -> Callable[..., float]:
    """Forward and backward of a slow form over all n anchors, ``chunk`` at a time; returns the loss."""

    def run(*args: Tensor | float) -> float:
        return sum(forward_backward(form, *args, slice(start, start + chunk)) for start in range(0, n, chunk))

    return run


def forward_backward(form: Callable[..., Tensor], *args: Tensor | float | slice) -> float:
    """Forward and backward; returns the loss."""
    loss = form(*args)
    loss.backward()
    return loss.item()


def batch(n: int, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    """Features, positions and a direction. Positions are all different: the case that is hardest to sort."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, dim, generator=generator).requires_grad_()
    return features, torch.rand(n, generator=generator), torch.randn(dim, generator=generator)


def timed(run: Callable[[], float], repeat: int) -> tuple[float, float]:
    """What ``run`` returns, and the seconds of the fastest of ``repeat`` runs."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        value = run()
        times.append(time.perf_counter() - start)
    return value, min(times)


def peak_megabytes(run: Callable[[], object]) -> float:
    """The peak of what tensors allocate during one run, by the count of torch's own allocator (CPU)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    before = held[0]["args"]["Total Allocated"] - held[0]["args"]["Bytes"]  # by earlier runs in this process
    return (max(event["args"]["Total Allocated"] for event in held) - before) / 1e6


def compare(n: int, repeat: int, slow_repeat: int, chunk: int, dim: int = DIM) -> list[dict]:
    """One row per loss and form: loss, n, form, milliseconds, megabytes, and ratio (slow / fast, on the fast row)."""
    features, positions, direction = batch(n, dim)
    rows = []
    for loss, form, slow_form, table, args in (
        ("relational", relational_loss, relational_loss_cubed, "N x N x N", (features, positions, TEMPERATURE)),
        ("ordinal", ordinal_loss, ordinal_loss_stepped, "N x N x D", (features, positions, direction)),
    ):
        slow, fast = partial(in_chunks(slow_form, n, chunk), *args), partial(forward_backward, form, *args)
        expected, slow_seconds = timed(slow, slow_repeat)
        value, fast_seconds = timed(fast, repeat)
        torch.testing.assert_close(torch.tensor(value), torch.tensor(expected), rtol=1e-4, atol=1e-5)
        one_chunk = partial(forward_backward, slow_form, *args, slice(0, chunk))  # the chunks follow one another
        table += "" if chunk >= n else f", {chunk} anchors at a time"
        rows += [
            {"loss": loss, "n": n, "form": table, "seconds": slow_seconds, "megabytes": peak_megabytes(one_chunk)},
            {"loss": loss, "n": n, "form": "medlib", "seconds": fast_seconds, "megabytes": peak_megabytes(fast),
             "ratio": slow_seconds / fast_seconds},
        ]  # fmt: skip
    return rows


def main() -> None:
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, D = {DIM}, float32, forward + backward")
    print(f"{'loss':<11}{'N':>5}  {'form':<30}{'ms':>10}{'peak MB':>10}{'ratio':>8}")
    for n, repeat, slow_repeat, chunk in ((64, 50, 50, 64), (256, 20, 3, 256), (1024, 5, 1, 16)):
        for row in compare(n, repeat, slow_repeat, chunk):
            ratio = f"{row['ratio']:.0f} x" if "ratio" in row else ""
            what = f"{row['loss']:<11}{n:>5}  {row['form']:<30}"
            print(f"{what}{1e3 * row['seconds']:>10.2f}{row['megabytes']:>10.1f}{ratio:>8}", flush=True)


if __name__ == "__main__":
    main()
