"""A bank returns what was pushed, the newest last, and nothing else."""

import pytest
import torch

from medlib.banks import FeatureBank
from medlib.rng import generator


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1).expand(-1, 2).clone()


def test_oldest_make_room_across_the_end_of_the_ring():
    bank = FeatureBank(4, 2)
    for start in (1.0, 4.0, 7.0):
        bank.push(rows(start, start + 1, start + 2))
    assert sorted(bank.rows[:, 0].tolist()) == [6, 7, 8, 9]
    assert bank.valid().all()


def test_more_than_it_holds_keeps_the_last():
    bank = FeatureBank(3, 2)
    bank.push(rows(1, 2, 3, 4, 5))
    assert sorted(bank.rows[:, 0].tolist()) == [3, 4, 5]


def test_never_an_empty_row():
    bank = FeatureBank(100, 2)
    bank.push(rows(1, 2, 3))
    assert bank.valid().sum() == 3
    drawn = bank.sample(500, generator(0, "bank"))
    assert set(drawn[:, 0].tolist()) == {1.0, 2.0, 3.0}


def test_features_are_detached_and_survive_a_checkpoint():
    bank = FeatureBank(4, 2)
    bank.push(rows(1, 2).requires_grad_())
    assert not bank.rows.requires_grad
    other = FeatureBank(4, 2)
    other.load_state_dict(bank.state_dict())
    other.push(rows(3, 4, 5))
    assert sorted(other.rows[:, 0].tolist()) == [2, 3, 4, 5]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="capacity"):
        FeatureBank(0, 2)
    with pytest.raises(ValueError, match=r"\(N, 2\).*\(3, 5\)"):
        FeatureBank(4, 2).push(torch.zeros(3, 5))
