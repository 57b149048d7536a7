"""Notes about tensors are found by identity and keep nothing alive."""

from __future__ import annotations

import torch

from pat_fast.plan.noted import Noted


def test_a_tensor_is_found_by_identity_and_not_kept_alive() -> None:
    notes: Noted[int] = Noted()
    one, two = torch.ones(2), torch.ones(2)
    assert not notes
    notes[one] = 1
    assert notes
    assert (one in notes, two in notes) == (True, False)
    assert (notes.get(one, 0), notes.get(two, 0)) == (1, 0)
    assert (notes.pop(one, 0), notes.pop(one, 0)) == (1, 0)
    notes[two] = 2
    number = id(two)
    del two
    assert notes._found[number][0]() is None


def test_another_tensor_with_the_id_of_one_that_is_gone_is_not_found() -> None:
    notes: Noted[int] = Noted()
    one, other = torch.ones(2), torch.ones(2)
    notes[one] = 1
    notes._found[id(other)] = notes._found.pop(id(one))
    del one
    assert other not in notes
    assert notes.get(other, 0) == 0
