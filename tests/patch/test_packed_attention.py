"""Sequences one after another in a batch without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.nn import attention
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


def test_lengths_without_contents_are_ignored() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(t.shape) for t in inputs()]
        out, _ = attention_forward(MODULE, *tensors, None, cu_seq_lens_q=torch.empty(4))
    assert out.shape == (1, TOKENS, 4, 8)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU, where torch's own attention is the best there is: the tokens of its calls."""
    taken: list[int] = []
    sdpa = attention.sdpa_attention_forward

    def counted(module: Any, query: Tensor, *arguments: Any, **kwargs: Any) -> Any:
        taken.append(query.shape[2])
        return sdpa(module, query, *arguments, **kwargs)

    monkeypatch.setattr(attention, "librarys", lambda device: True)
    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    return taken


@pytest.mark.parametrize(("short", "calls"), [(4, [*LENGTHS]), (5, [TOKENS])])
def test_the_library_takes_long_sequences_one_by_one(
    short: int, calls: list[int], library: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(packed_mask())
    library.clear()
    monkeypatch.setattr(attention, "_SHORT", short)
    got = run(packed_mask(), cu_seq_lens_q=ENDS)
    assert library == calls
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_library_takes_short_sequences_one_by_one_where_no_mask_parts_them(
    library: list[int],
) -> None:
    """A model makes none where it also has a cache, or a mask of ones."""
    expected = run(packed_mask())
    library.clear()
    got = run(None, cu_seq_lens_q=ENDS)
    assert library == [*LENGTHS]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_position_bias_is_the_librarys(library: list[int]) -> None:
    """T5's decoder has one; on a CPU the module is not fused at all."""
    bias = torch.randn(1, 4, TOKENS, TOKENS)
    found = [run(None, position_bias=bias, **more) for more in ({}, {"cu_seq_lens_q": ENDS})]
    assert library == [TOKENS] * 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_what_a_tensor_says_is_read_once_a_version() -> None:
    tensor, reads = torch.zeros(3), []

    def read() -> int:
        reads.append(int(tensor.sum()))
        return reads[-1]

    assert [attention._once(tensor, read) for _ in range(3)] == [0, 0, 0]
    tensor += 1
    assert [attention._once(tensor, read) for _ in range(2)] == [3, 3]
    assert reads == [0, 3]
    with torch.inference_mode():
        assert attention._once(torch.ones(2), read) == 3


def test_a_model_whose_attention_is_the_librarys(
    library: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SHORT", 4)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(64, (1, TOKENS))
    batch = {
        "input_ids": ids, "labels": ids, "use_cache": False, "cu_seq_lens_q": ENDS,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
    }  # fmt: skip

    def step() -> list[Tensor]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = step()
    fastft.accelerate(model, strict=True)
    library.clear()
    for a, b in zip(step(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert library == [*LENGTHS] * 2
    reports = [m for m in fastft.explain(model).modules if m.kind == "attention"]
    assert [(m.fused, m.backend, m.fused_calls) for m in reports] == [(True, "torch", 1)] * 2
    del batch["cu_seq_lens_q"], batch["position_ids"]
    library.clear()
    step()
    assert library == [TOKENS] * 2, "and a batch of one sequence a row is one call, not a fallback"
    fastft.restore(model)
    assert not any(isinstance(m, attention.FusedAttention) for m in model.modules())


@pytest.mark.parametrize("gpu", [False, True])
def test_attention_that_does_something_else_for_sdpa_is_left_alone(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's narrows its mask to the keys an indexer chose, where the name is sdpa."""
    if not hasattr(transformers, "DeepseekV32Config"):
        pytest.skip("a Transformers without DeepSeek-V3.2")
    if gpu:
        monkeypatch.setattr(attention, "librarys", lambda device: True)
    torch.manual_seed(0)
    config = transformers.DeepseekV32Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, n_group=1,
        num_attention_heads=4, num_key_value_heads=4, first_k_dense_replace=1, topk_group=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        index_topk=4, index_n_heads=2, index_head_dim=16,
    )  # fmt: skip
    model = transformers.DeepseekV32ForCausalLM(config).eval()
    ids = torch.randint(64, (1, 24))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        fastft.accelerate(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    reports = [m for m in fastft.explain(model).modules if m.kind == "attention"]
    reasons = [] if gpu else ["its code has a way of its own for sdpa"]
    assert [m.reason for m in reports] == reasons


def test_which_code_asks_for_sdpa() -> None:
    class Asks(nn.Module):
        def mask(self, name: str) -> bool:
            return name in ("eager", "sdpa")

    class Inherits(Asks):
        pass

    class Speaks(nn.Module):
        def forward(self) -> str:
            """What sdpa does."""
            return "slower than sdpa"

    assert [attention.asks_for_sdpa(c) for c in (Asks, Inherits, Speaks)] == [True, True, False]
