"""What a whole training step of MONA costs, beside the same step with a dense head and loops over classes.

    python -m tests.benchmarks.bench_mona_step

prints the terms of the loss in both forms and a table of one step of fine-tuning at the paper's size (256 x 256 px, 8
labelled and 8 unlabelled images): views, student, teacher, all five terms, backward, optimiser, teacher and banks. Both
draw the same pixels, and the benchmark checks that they give the same terms and the same gradients in a first step;
the next are timed. They share the passes of the networks, which the first row has alone.

On two otherwise idle cores, two threads: the networks alone 5.3 s and 3.7 GB, the dense step 24.7 s and 8.8 GB, the
sampled step 5.2 s and 3.9 GB: 4.7 times faster, 2.3 times less memory. What the networks keep for their backward pass
is 95 % of that peak: no head can do better than 2.4 times for the whole. With the two finest levels of the networks
computed again in the backward pass (``recompute=2``) it is 6.0 s and 1.8 GB: 4.1 times faster, 4.8 times less memory.
"""

import argparse
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlib.data import Case, dataset_info
from medlib.data.batches import TrainingData
from medlib.data.prepare import Prepared, Protocol
from medlib.data.splits import Split
from medlib.losses.mona import class_relation_distribution, sample_negative_classes, sample_pixels, sample_queries
from medlib.methods import Streams, build
from medlib.methods.mona import Mona, PseudoLabels, _Finetuning
from medlib.nets import channels_last, recompute_levels, seeded_init
from tests.benchmarks.bench_coral import peak_megabytes, timed
from tests.benchmarks.bench_mona import CLASSES, every_pixel, hearts

SURE = 100.0  # factor on the classifier's weights: pseudo-labels of an untrained network would count for nothing


class DenseFinetuning(_Finetuning):
    """The step as one first writes it down: the head on every pixel, then class by class. It draws the same pixels."""

    def _contrast(self, images: Tensor, logits: Tensor, maps: list[Tensor], labels: Tensor) -> Tensor:
        method, stream, area = self.method, self.streams.own("pixels"), labels[0].numel()
        pixels = every_pixel(maps, self.networks["representation"], (labels.shape[1], labels.shape[2]))
        queries, valid = sample_queries(
            labels, logits.detach().softmax(dim=1), stream, method.queries, method.threshold
        )
        with torch.no_grad():
            members = [(labels == c).flatten(1) for c in range(CLASSES)]
            positives = torch.stack([pixels[own].mean(dim=0) if own.any() else pixels[0, 0] * 0 for own in members])
            present = torch.stack([own.any() for own in members]) & (self.class_banks.pushed > 0)
            pushed, there = sample_pixels(torch.stack(members).flatten(1), method.queries, stream)
            new = torch.stack([pixels[index // area, index % area] for index in pushed])
            self._keys = new, there[:, None].expand_as(pushed)
            relation = class_relation_distribution(positives, present)
            drawn, _ = self.class_banks.sample(method.keys, stream)
            source = sample_negative_classes(relation, method.keys, stream)
            valid = valid & (relation > 0).any(dim=1)
        losses = []
        for c in range(CLASSES):
            if not valid[c]:
                continue
            rows = pixels[queries[c] // area, queries[c] % area]  # (Q, D)
            keys = torch.stack([drawn["feature"][v, k] for k, v in enumerate(source[c])])  # (K, D)
            table = torch.cat([positives[c][None], keys]).repeat(len(rows), 1, 1)  # (Q, 1 + K, D)
            similarity = torch.cosine_similarity(rows[:, None], table, dim=2) / method.contrast_temperature
            losses.append(F.cross_entropy(similarity, torch.zeros(len(rows), dtype=torch.long)))
        return torch.stack(losses).mean()


class NetworkPasses(_Finetuning):
    """What both forms share: the passes of student and teacher, forward and backward, and the updates of both."""

    def prepare(self, unlabelled: Tensor) -> tuple[Tensor, PseudoLabels]:
        logits, bottleneck, *_ = self.taught(unlabelled)
        return unlabelled, PseudoLabels(logits.argmax(dim=1), logits.amax(dim=1), bottleneck)

    def terms(self, outputs: list[Tensor], images: Tensor, labelled: int, targets: PseudoLabels) -> dict[str, Tensor]:
        with torch.no_grad():
            self.teacher.network.get_submodule("unet.encoder")(images[:labelled])
        return {"equivariance": (outputs[0] - self.unet(images)).square().mean()}

    def after_step(self) -> None:
        self.teacher.follow(self._student())


def data(images: int, side: int) -> TrainingData:
    """Two patients with half of the ``images`` each, the first of them labelled: hearts on noise."""
    generator = torch.Generator().manual_seed(0)
    labels = hearts(images, side, generator)
    pictures = labels - 1 + 0.5 * torch.randn(labels.shape, generator=generator)
    volumes = []
    for patient, label, picture in zip(("first", "second"), labels.chunk(2), pictures.chunk(2), strict=True):
        case = Case(about=dataset_info("acdc"), case=patient, patient=patient, images=(), labels=(), reader="", info={})
        volume = Prepared(
            case=case, protocol=Protocol(size=side), image=picture.numpy().astype(np.float16),
            label=label.numpy().astype(np.uint8), native_shape=tuple(label.shape), spacing=None,
        )  # fmt: skip
        volumes.append(volume)
    split = Split("benchmark", ("first",), ("second",), (), ())
    return TrainingData(info=dataset_info("acdc"), split=split, train=volumes, val=[], test=[])


def begin(form: type[_Finetuning], method: Mona, given: TrainingData) -> _Finetuning:
    """Fine-tuning under way: the banks are filled, the teacher is sure of some pixels."""
    generator = torch.Generator().manual_seed(1)
    with seeded_init(0, "weights"):
        networks = channels_last(method.networks(given.classes))
    with torch.no_grad():
        networks["unet"].classifier.weight.mul_(SURE)
    work = form(method, networks, given, Streams(0, "finetune", "cpu")).train()
    rows = torch.randn(CLASSES, method.class_bank, method.representation_dim, generator=generator)
    work.class_banks.push(torch.ones(rows.shape[:2], dtype=torch.bool), feature=rows)
    work.bank.push(torch.randn(method.queue, method.projection_dim, generator=generator))
    return work


def step(work: _Finetuning) -> dict[str, float]:
    """One step as `medlib.train` takes it; the values of its terms."""
    work.optimizer.zero_grad(set_to_none=True)
    terms = work(**work.draw())
    terms["total"].backward()
    work.optimizer.step()
    work.schedule.step()
    work.after_step()
    return {name: term.item() for name, term in terms.items()}


def gradient(network: nn.Module) -> Tensor:
    """Of all weights, in one vector. One weight by itself may have none but rounding: a bias in front of a norm."""
    return torch.cat(
        [weight.grad.flatten() for weight in network.parameters() if weight.grad is not None] or [torch.zeros(0)]
    )


FORMS = {
    "networks": (NetworkPasses, 0),
    "dense": (DenseFinetuning, 0),
    "sampled": (_Finetuning, 0),
    "sampled, recomputed": (_Finetuning, 2),
}
"""By name: the work, and the levels of the networks that are computed again in the backward pass."""


def compare(images: int, side: int, times: int) -> dict[str, dict]:
    """By form: terms of a first step, seconds and megabytes of the next.

    Raises where a form differs from the dense one in a term or in the gradient of a weight.
    """
    method, given = build("mona", framework="none", image_size=side, batch_size=images), data(images, side)
    rows: dict[str, dict] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for form, (kind, levels) in FORMS.items():
        seconds: list[float] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout
            work = begin(kind, method, given)
            recompute_levels(work.networks, levels)
            terms = step(work)
            gradients[form] = {name: gradient(work.networks[name]) for name in work.networks}
            run = partial(step, work)
            megabytes = peak_megabytes(lambda run=run, seconds=seconds: seconds.append(timed(run, times)[1]))
        rows[form] = {"terms": terms, "seconds": seconds[0], "megabytes": megabytes}
    for form in ("sampled", "sampled, recomputed"):
        for name, value in rows["dense"]["terms"].items():
            found = rows[form]["terms"][name]
            assert math.isclose(value, found, rel_tol=1e-4), (form, name, value, found)
        for name, one in gradients["dense"].items():
            difference = (one - gradients[form][name]).norm()
            assert difference <= 1e-3 * one.norm(), (form, name, difference.item(), one.norm().item())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="images in the batch (the paper's size: 8 + 8)")
    parser.add_argument("--side", type=int, default=256, help="px, a multiple of 16")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of each form; the fastest counts")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, float32")
    print(f"{args.images} images of {args.side} px, half of them labelled\n")
    rows = compare(args.images, args.side, args.steps)
    networks, dense = rows.pop("networks"), rows["dense"]
    print(f"{'terms of the loss':<30}" + "".join(f"{name:>14}" for name in dense["terms"]))
    for form, row in rows.items():
        print(f"{form:<30}" + "".join(f"{value:>14.6f}" for value in row["terms"].values()))
    print(f"\n{'whole step':<30}{'s':>10}{'peak MB':>10}{'less than dense':>20}")
    print(f"{'networks alone':<30}{networks['seconds']:>10.1f}{networks['megabytes']:>10.0f}")
    for form, row in rows.items():
        ratio = (
            "" if row is dense else ", ".join(f"{dense[unit] / row[unit]:.1f} x" for unit in ("seconds", "megabytes"))
        )
        print(f"{form:<30}{row['seconds']:>10.1f}{row['megabytes']:>10.0f}{ratio:>20}")
    beyond = [rows[form]["megabytes"] - networks["megabytes"] for form in ("dense", "sampled")]
    print(
        f"without the networks, the sampled step takes {beyond[0] / beyond[1]:.0f} times less memory than the dense one"
    )


if __name__ == "__main__":
    main()
