"""What the contrastive part of one DVCL step costs, beside the version that builds the N x N matrix of cosines.

    python -m tests.benchmarks.bench_dvcl

Q = 1024 queries, a pool of N = 16,384 unreliable voxels with D = 64 features and C = 14 class probabilities, K = 10,
K' = 15, U = 50: neighbours and outsiders, affinities and outliers, loss, and the gradient of the probabilities. Both
versions find the same partners (the benchmark compares). Each runs in a process of its own, because the memory that
counts is what the process holds at its peak: the rise of its resident set, read from Linux's /proc.

Then the entropy of a batch of patches, (4, 14, 64, 128, 128) logits: one pass over the classes beside softmax and log.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from medlib.losses.dvcl import (
    distance_aware_loss,
    entropy_from_logits,
    nearest_and_farthest,
    partition_neighbors,
    voxel_entropy,
)

QUERIES, POOL, DIM, CLASSES = 1024, 16_384, 64, 14
NEAR, FAR, WIDE, ORDINARY = 10, 15, 50, 0.5
PATCHES = (4, CLASSES, 64, 128, 128)


def voxels(queries: int, pool: int, dim: int = DIM, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Features (pool, dim) in a noisy cluster for each class, logits (pool, classes) and query rows (queries,)."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(classes, (pool,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    features = centres[label] + torch.randn(pool, dim, generator=generator)
    logits = torch.nn.functional.one_hot(label, classes) + torch.randn(pool, classes, generator=generator)
    return features, logits, torch.randperm(pool, generator=generator)[:queries]


def step(features: Tensor, logits: Tensor, queries: Tensor) -> dict[str, Tensor]:
    """The library's contrastive step; ``loss``, its ``gradient`` (pool, classes), and who met whom."""
    neighbors, outsiders = nearest_and_farthest(features, queries, NEAR, FAR)
    affinity, inlier = partition_neighbors(features, queries, neighbors, WIDE, ORDINARY)
    return _learn(logits, queries, neighbors, outsiders, affinity, inlier)


def step_by_matrix(features: Tensor, logits: Tensor, queries: Tensor) -> dict[str, Tensor]:
    """The same from one N x N matrix of cosines: its rows sorted as far as needed, then looked up. No loop."""
    unit = torch.nn.functional.normalize(features, dim=1)
    cosine = unit @ unit.T  # (N, N)
    outsiders = cosine[queries].topk(FAR, largest=False).indices
    nearest = cosine.fill_diagonal_(-2).topk(WIDE).indices  # (N, U), of every row: the neighbours' sets are among them
    neighbors = nearest[queries, :NEAR]  # (Q, K)
    returned = nearest[neighbors] == queries[:, None, None]  # (Q, K, U)
    affinity = torch.where(returned[:, :, :NEAR].any(dim=2), 1.0, ORDINARY)
    return _learn(logits, queries, neighbors, outsiders, affinity, returned.any(dim=2).any(dim=1))


def _learn(
    logits: Tensor, queries: Tensor, neighbors: Tensor, outsiders: Tensor, affinity: Tensor, keep: Tensor
) -> dict[str, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = distance_aware_loss(logits.softmax(dim=1), queries, neighbors, outsiders, affinity, keep)
    (gradient,) = torch.autograd.grad(loss, logits)
    found = {"neighbors": neighbors, "outsiders": outsiders, "affinity": affinity, "keep": keep}
    return {"loss": loss.detach(), "gradient": gradient, **found}


def entropy(logits: Tensor) -> Tensor:
    return entropy_from_logits(logits)


def entropy_by_softmax(logits: Tensor) -> Tensor:
    return voxel_entropy(logits.softmax(dim=1))


FORMS = {form.__name__: form for form in (step, step_by_matrix, entropy, entropy_by_softmax)}


def peak_resident_megabytes() -> float:
    """The largest resident set this process ever had. Not ``ru_maxrss``: a child inherits that from its parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def measure_here(form: str, repeat: int, *sizes: int) -> dict[str, float]:
    """Seconds of the fastest of ``repeat`` runs and the rise of this process's peak resident set, in megabytes.

    For a fresh process. ``sizes``: queries and pool of a step, or the shape of the logits.
    """
    args = voxels(*sizes) if form.startswith("step") else (torch.randn(sizes, generator=torch.Generator()),)
    warm = voxels(8, 64) if form.startswith("step") else (args[0][:1, :, :2],)
    FORMS[form](*warm)  # the libraries' own buffers are nobody's
    before = peak_resident_megabytes()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = FORMS[form](*args)
        times.append(time.perf_counter() - start)
    megabytes = peak_resident_megabytes() - before
    value = result["loss"] if isinstance(result, dict) else result.mean()
    return {"seconds": min(times), "megabytes": megabytes, "value": value.item()}


def measure(form: str, repeat: int, *sizes: int) -> dict[str, float]:
    """`measure_here` in a fresh process."""
    call = (
        f"import json; from {__spec__.name} import measure_here; print(json.dumps(measure_here{form, repeat, *sizes}))"
    )
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, float32")
    fast, slow = (form(*voxels(256, 4096)) for form in (step, step_by_matrix))
    same = [(fast[name] == slow[name]).float().mean().item() for name in ("neighbors", "outsiders", "affinity", "keep")]
    print("same neighbours, outsiders, affinities, inliers (N = 4096):", ", ".join(f"{100 * x:.2f} %" for x in same))
    print(f"\n{'form':<20}{'ms':>10}{'peak MB':>10}{'faster':>10}{'smaller':>10}")
    for form, slow_form, repeat, sizes in (
        ("step", "step_by_matrix", 3, (QUERIES, POOL)),
        ("entropy", "entropy_by_softmax", 3, PATCHES),
    ):
        rows = {name: measure(name, repeat, *sizes) for name in (slow_form, form)}
        torch.testing.assert_close(rows[form]["value"], rows[slow_form]["value"], rtol=1e-4, atol=1e-4)
        for name, row in rows.items():
            ratios = [
                f"{rows[slow_form][key] / row[key]:.1f} x" if name == form else "" for key in ("seconds", "megabytes")
            ]
            print(f"{name:<20}{1e3 * row['seconds']:>10.0f}{row['megabytes']:>10.0f}{ratios[0]:>10}{ratios[1]:>10}")


if __name__ == "__main__":
    main()
