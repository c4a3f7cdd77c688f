"""Transformers' look for several sequences in a row, asked once a length."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

import fastft
from fastft.nn import positions


def make() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lengths of the batches that Transformers' own function is asked about."""
    lengths: list[int] = []
    original = positions._original

    def counted(position_ids: Tensor) -> Tensor | None:
        lengths.append(position_ids.shape[1])
        found: Tensor | None = original(position_ids)
        return found

    monkeypatch.setattr(positions, "_original", counted)
    yield lengths
    assert getattr(positions._thread, "lengths", None) is None, "nothing outlives a forward"


def ids(rows: int, tokens: int) -> Tensor:
    return torch.arange(rows * tokens).view(rows, tokens) % 64


def test_it_is_asked_once_a_length(asked: list[int]) -> None:
    model = make()
    expected = [model(ids(rows, n), use_cache=False).logits for rows, n in ((2, 8), (1, 8), (3, 5))]
    fastft.accelerate(model)
    asked.clear()
    for _ in range(2):
        for (rows, n), logits in zip(((2, 8), (1, 8), (3, 5)), expected, strict=True):
            torch.testing.assert_close(model(ids(rows, n), use_cache=False).logits, logits)
    assert asked == [8, 5]
    other = copy.deepcopy(model)
    other(ids(2, 8), use_cache=False)
    assert asked == [8, 5, 8], "a copy is another model"
    fastft.restore(model)
    model(ids(2, 8), use_cache=False)
    assert asked == [8, 5, 8, 8]


def test_positions_and_masks_that_are_given_are_looked_at(asked: list[int]) -> None:
    model = make()
    row = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    padded = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    cases: list[Callable[[], Tensor]] = [
        lambda: model(ids(1, 8), position_ids=row, use_cache=False).logits,
        lambda: model(ids(1, 8), None, row, use_cache=False).logits,
        lambda: model(ids(2, 8), attention_mask=padded, use_cache=False).logits[padded.bool()],
    ]
    expected = [case() for case in cases]
    fastft.accelerate(model)
    for _ in range(2):
        model(ids(1, 8), use_cache=False)
        asked.clear()
        for case, logits in zip(cases, expected, strict=True):
            torch.testing.assert_close(case(), logits)
        assert asked == [8, 8], "of the mask nothing is asked"


def test_positions_of_a_rows_contents_are_looked_at(asked: list[int]) -> None:
    model = make()
    fastft.accelerate(model)
    made = ids(1, 8).ne(3).cumsum(1)  # one row of its own, as made from a batch of one
    for position_ids in (made, made + 0, made.expand(2, 8), torch.stack([made, made])[0]):
        assert not positions._one_row(position_ids)
    assert positions._one_row(torch.arange(8)[None])
    assert positions._one_row(torch.arange(8)[None].expand(4, -1))
    assert masking_utils.find_packed_sequence_indices is positions._sequences_in


def test_a_forward_that_fails_leaves_nothing(asked: list[int]) -> None:
    model = make()
    fastft.accelerate(model)
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 64), use_cache=False)
    model(ids(1, 4), use_cache=False)
    model.model(ids(1, 4), use_cache=False)
    assert asked == [4, 4], "the inner model's forward is not the accelerated one's"
