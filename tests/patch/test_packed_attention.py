"""Sequences one after another in a batch without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft.nn.attention import attention_forward

LENGTHS = (5, 1, 7)
TOKENS = sum(LENGTHS)


class Attention(nn.Module):
    is_causal = True
    num_key_value_groups = 2


MODULE = Attention()


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, TOKENS, 8), (1, 2, TOKENS, 8), (1, 2, TOKENS, 8))
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def packed_mask() -> Tensor:
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return (causal & (owner[:, None] == owner[None, :]))[None, None]


def run(mask: Tensor | None, **kwargs: Any) -> list[Tensor]:
    tensors = inputs()
    out, _ = attention_forward(MODULE, *tensors, mask, **kwargs)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


ENDS = torch.tensor([0, 5, 6, 13], dtype=torch.int32)


@pytest.mark.parametrize("masked", [True, False])
def test_each_sees_only_itself(masked: bool) -> None:
    got = run(packed_mask() if masked else None, cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS)
    for a, b in zip(got, run(packed_mask()), strict=True):
        torch.testing.assert_close(a, b)


def test_a_mask_that_says_something_else_is_obeyed() -> None:
    mask = packed_mask()
    mask[..., 3:5, 0] = False
    for a, b in zip(run(mask, cu_seq_lens_q=ENDS), run(mask), strict=True):
        torch.testing.assert_close(a, b)


def test_lengths_that_do_not_fit_are_ignored() -> None:
    mask = packed_mask()
    wrong = torch.tensor([0, 5, 6], dtype=torch.int32)
    for a, b in zip(run(mask, cu_seq_lens_q=wrong), run(mask), strict=True):
        torch.testing.assert_close(a, b)
