"""Every method trains and predicts under bf16 autocast, the default on a GPU, here on the CPU."""

import dataclasses

import pytest
import torch

from medlib.methods import available, build
from medlib.train import make_fabric, predictor, train
from tests.tiny import SIDE, training_data

SHORT = dict(
    image_size=SIDE, spacing=None, patch=None, width=4, steps=4, pretrain_steps=4, finetune_steps=4, anchors=8,
    pool=32, queries=32, delay=1,
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(available()))
def test_every_method_trains_and_predicts_in_bf16(tmp_path, name):
    known = {field.name for field in dataclasses.fields(build(name))}
    method = build(name, scale="ci", **{key: value for key, value in SHORT.items() if key in known})
    data = training_data(labelled=1)
    trained = {}
    for precision in ("bf16-mixed", "32-true"):
        trained[precision] = train(
            method, data, seed=0, output_dir=tmp_path / "runs", fabric=make_fabric("cpu", precision=precision),
            log_every=1, progress=False,
        )  # fmt: skip
    half, full = trained.values()
    for mine, theirs in zip(half.stages, full.stages, strict=True):
        first, other = mine.history()[0]["total"], theirs.history()[0]["total"]
        assert first == pytest.approx(other, rel=0.1, abs=0.05)  # the same images, the same loss
    assert all(parameter.dtype == torch.float32 for parameter in half.networks.parameters())
    found = predictor(method, half.networks, make_fabric("cpu", precision="bf16-mixed"))(torch.rand(2, 1, SIDE, SIDE))
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, SIDE, SIDE), atol=2e-2, rtol=0)
