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


def whole(form: Callable[..., Tensor], n: int, chunk: int) -> Callable[..., float]:
    """Forward and backward of a slow form over all anchors, ``chunk`` at a time; returns the loss."""

    def run(*args: Tensor | float) -> float:
        total = 0.0
        for start in range(0, n, chunk):
            share = form(*args, slice(start, start + chunk))
            share.backward()
            total += share.item()
        return total

    return run


def fast(form: Callable[..., Tensor]) -> Callable[..., float]:
    """Forward and backward of a form of the library; returns the loss."""

    def run(*args: Tensor | float) -> float:
        loss = form(*args)
        loss.backward()
        return loss.item()

    return run


def batch(n: int, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    """Features, positions and a direction. Positions are all different: the case that is hardest to sort."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, dim, generator=generator).requires_grad_()
    return features, torch.rand(n, generator=generator), torch.randn(dim, generator=generator)


def seconds(run: Callable[[], object], repeat: int) -> float:
    """The fastest of ``repeat`` runs, after one that does not count if there is more than one."""
    if repeat > 1:
        run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_megabytes(run: Callable[[], object]) -> float:
    """The peak of what tensors allocate during one run, by the count of torch's own allocator (CPU)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return max(held) / 1e6


def compare(n: int, repeat: int, slow_repeat: int, chunk: int, dim: int = DIM) -> list[dict]:
    """One row per loss and form: loss, n, form, milliseconds, megabytes, and ratio (slow / fast, on the fast row)."""
    features, positions, direction = batch(n, dim)
    in_chunks = "" if chunk >= n else f", {chunk} anchors at a time"
    pairs = {
        "relational": (relational_loss, relational_loss_cubed, "N x N x N", (features, positions, TEMPERATURE)),
        "ordinal": (ordinal_loss, ordinal_loss_stepped, "N x N x D", (features, positions, direction)),
    }
    rows = []
    for loss, (form, slow_form, table, args) in pairs.items():
        values, times = [], []
        for name, run, times_run in (
            (table + in_chunks, whole(slow_form, n, chunk), slow_repeat),
            ("medlib", fast(form), repeat),
        ):
            values.append(run(*args))
            times.append(seconds(lambda run=run, args=args: run(*args), times_run))
            memory = peak_megabytes(lambda run=run, args=args: run(*args))
            rows.append({"loss": loss, "n": n, "form": name, "milliseconds": 1e3 * times[-1], "megabytes": memory})
        torch.testing.assert_close(torch.tensor(values[1]), torch.tensor(values[0]), rtol=1e-4, atol=1e-5)
        rows[-1]["ratio"] = times[0] / times[1]
    return rows


def main() -> None:
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, D = {DIM}, float32, forward + backward")
    print(f"{'loss':<11}{'N':>5}  {'form':<30}{'ms':>10}{'peak MB':>10}{'ratio':>8}")
    for n, repeat, slow_repeat, chunk in ((64, 50, 50, 64), (256, 20, 3, 256), (1024, 5, 1, 16)):
        for row in compare(n, repeat, slow_repeat, chunk):
            ratio = f"{row['ratio']:.0f} x" if "ratio" in row else ""
            print(
                f"{row['loss']:<11}{n:>5}  {row['form']:<30}{row['milliseconds']:>10.2f}{row['megabytes']:>10.1f}{ratio:>8}"
            )


if __name__ == "__main__":
    main()
