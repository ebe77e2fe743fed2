"""A bank returns what was pushed, the newest last, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.banks import ClassBanks, FeatureBank
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


def test_an_empty_slot_is_not_valid():
    bank = FeatureBank(100, 2)
    assert not bank.valid().any()
    bank.push(rows(1, 2, 3))
    assert sorted(bank.rows[bank.valid()][:, 0].tolist()) == [1, 2, 3]


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


# --- one ring per class ----------------------------------------------------------------------------------------------


def entries(*per_class: list[float]) -> dict[str, torch.Tensor]:
    """Parts and mask of a push: the number v as the feature (v, v, v) and the density -v; NaN where nothing is."""
    longest = max(len(values) for values in per_class)
    density = torch.full((len(per_class), longest), torch.nan)
    for c, values in enumerate(per_class):
        density[c, : len(values)] = -torch.tensor(values, dtype=torch.float32)
    valid = torch.arange(longest) < torch.tensor([len(values) for values in per_class])[:, None]
    return {"valid": valid, "feature": -density[:, :, None].expand(-1, -1, 3), "density": density}


def banks(classes: int, capacity: int) -> ClassBanks:
    return ClassBanks(classes, capacity, {"feature": (3,), "density": ()})


def held(bank: ClassBanks) -> list[list[float]]:
    """What each class holds, sorted, once its parts are found to belong together."""
    valid = bank.valid()
    assert (bank["feature"][valid] == -bank["density"][valid][:, None]).all()
    assert (bank["feature"][~valid] == 0).all()
    return [sorted(bank["feature"][c, valid[c], 0].tolist()) for c in range(bank.classes)]


def test_each_class_makes_room_for_its_own():
    bank = banks(3, 3)
    assert held(bank) == [[], [], []]
    bank.push(**entries([1, 2], [], [5]))
    assert held(bank) == [[1, 2], [], [5]]
    bank.push(**entries([3, 4], [7], [6]))
    assert held(bank) == [[2, 3, 4], [7], [5, 6]]
    bank.push(**entries([], [8, 9, 10, 11], []))
    assert held(bank) == [[2, 3, 4], [9, 10, 11], [5, 6]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.lists(st.lists(st.booleans(), max_size=8), min_size=2, max_size=2), max_size=6),
)
def test_a_bank_is_a_queue(capacity, pushes):
    bank, expected, number = banks(2, capacity), [[], []], 0.0
    for masks in pushes:
        longest = max(len(mask) for mask in masks)
        valid = torch.zeros(2, longest, dtype=torch.bool)
        density = torch.full((2, longest), torch.nan)  # wherever the gaps are
        for c, mask in enumerate(masks):
            for i, there in enumerate(mask):
                if there:
                    number += 1
                    valid[c, i], density[c, i] = True, -number
                    expected[c] = [*expected[c], number][-capacity:]
        bank.push(valid, feature=-density[:, :, None].expand(-1, -1, 3), density=density)
        assert held(bank) == expected


def test_samples_are_entries_whose_parts_belong_together():
    bank = banks(3, 50)
    bank.push(**entries([1, 2, 3], [], [4]))
    drawn, there = bank.sample(400, generator(0, "bank"))
    assert drawn["feature"].shape == (3, 400, 3)
    assert there.all(dim=1).tolist() == [True, False, True]
    assert there.any(dim=1).tolist() == [True, False, True]
    assert (drawn["feature"] == -drawn["density"][:, :, None]).all()
    assert set(drawn["density"][0].tolist()) == {-1, -2, -3}
    assert set(drawn["density"][1].tolist()) == {0}
    assert set(drawn["density"][2].tolist()) == {-4}
    drawn["density"].fill_(9)
    assert held(bank) == [[1, 2, 3], [], [4]]


def test_a_part_can_be_renewed_without_ageing():
    bank = banks(2, 4)
    bank.push(**entries([1, 2], [3]))
    bank["density"].mul_(2)
    assert bank["density"][bank.valid()].tolist() == [-2, -4, -6]
    assert bank.pushed.tolist() == [2, 1]


def test_entries_are_detached_and_survive_a_checkpoint():
    bank = banks(2, 3)
    first = entries([1, 2], [3])
    first["feature"] = first["feature"].clone().requires_grad_()
    bank.push(**first)
    assert not bank["feature"].requires_grad
    other = banks(2, 3)
    other.load_state_dict(bank.state_dict())
    assert set(bank.state_dict()) == {"part_feature", "part_density", "pushed"}
    other.push(**entries([4, 5], []))
    assert held(other) == [[2, 4, 5], [3]]
    assert held(bank) == [[1, 2], [3]]


def test_half_and_other_shapes_are_taken():
    bank = ClassBanks(1, 2, {"map": (2, 2)})
    bank.push(torch.tensor([[True, True, True]]), map=torch.arange(12).reshape(1, 3, 2, 2).half())
    assert sorted(bank["map"][0, :, 0, 0].tolist()) == [4, 8]
    assert bank["map"].dtype == torch.float32


def test_a_bank_leaves_global_random_state_alone():
    before = torch.get_rng_state()
    banks(2, 3).sample(5, generator(0, "bank"))
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_pushes_are_refused():
    for wrong in ((0, 3, {"feature": ()}), (2, 0, {"feature": ()}), (2, 3, {})):
        with pytest.raises(ValueError, match="classes, capacity and parts"):
            ClassBanks(*wrong)
    bank, valid = banks(2, 3), torch.ones(2, 4, dtype=torch.bool)
    feature, density = torch.zeros(2, 4, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="feature, density; got feature"):
        bank.push(valid, feature=feature)
    with pytest.raises(ValueError, match=r"feature must be \(2, 4, 3\), got \(2, 4\)"):
        bank.push(valid, feature=density, density=density)
    with pytest.raises(ValueError, match=r"valid must be \(2, N\) bool, got \(3, 4\)"):
        bank.push(torch.ones(3, 4, dtype=torch.bool), feature=feature, density=density)
    with pytest.raises(ValueError, match=r"valid must be .*float32"):
        bank.push(valid.float(), feature=feature, density=density)
    with pytest.raises(KeyError, match="label.*feature, density"):
        bank["label"]
    assert held(bank) == [[], []]
