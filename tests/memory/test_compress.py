"""Activations in 8 bits: how wrong, on average not at all, and what it does to gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastft import memory
from fastft.memory import _activations
from fastft.memory._activations import Narrowing
from fastft.memory._compress import Compressed, Noise, compress
from fastft.memory._layers import LayerState
from tests.memory.models import llama, same, steps


@pytest.mark.parametrize(("form", "step"), [("int8", 1 / 127), ("float8", 1 / 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_at_most_one_step(form: str, step: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(256, 128) * torch.logspace(-6, 3, 256)[:, None]).to(dtype)
    x[3] = 0
    kept = compress(x, form, Noise(0))
    assert isinstance(kept, Compressed)
    assert kept.codes.element_size() == 1
    got = kept.tensor()
    top = x.float().abs().amax(-1, keepdim=True)
    slack = 2 * torch.finfo(dtype).eps * top
    assert got.dtype == dtype
    assert bool(((got.float() - x.float()).abs() <= step * top + slack).all())
    assert torch.equal(got[3], x[3])


def test_int8_is_right_on_average() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 128)
    noise = Noise(0)
    mean = sum(compress(x, "int8", noise).tensor() for _ in range(400)) / 400  # type: ignore[union-attr]
    scale = x.abs().amax(-1, keepdim=True) / 127
    # A draw is uniform within a step: its mean of 400 deviates by scale / 2 / 20, six times that.
    assert bool(((mean - x).abs() <= 6 * scale / 40).all())
    nearest = (x / scale).round() * scale
    assert (mean - x).abs().mean() < 0.3 * (nearest - x).abs().mean()


@pytest.mark.parametrize("form", ["int8", "float8"])
@pytest.mark.parametrize("least", [-float("inf"), torch.finfo(torch.float32).min])
def test_what_a_mask_hides_stays_hidden_and_the_rest_seen(form: str, least: float) -> None:
    mask = torch.full((192, 192), least).triu(1)
    got = compress(mask, form, Noise(0)).tensor()  # type: ignore[union-attr]
    assert torch.equal(got == 0, mask == 0)
    assert bool((got[mask != 0] < -3e38).all())


def test_small_and_integer_tensors_stay() -> None:
    assert compress(torch.randn(8, 8), "int8", Noise(0)) is None
    assert compress(torch.zeros(1 << 15, dtype=torch.int64).view(64, -1), "int8", Noise(0)) is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("form", "bound"), [("int8", 0.02), ("float8", 0.05)])
def test_gradients_stay_close_and_the_loss_the_same(
    form: str, bound: float, dropout: float
) -> None:
    expected = steps(llama(dropout=dropout), 1, tokens=128)[0]
    model = memory.checkpoint(llama(dropout=dropout), "lora", compression=form)
    got = steps(model, 1, tokens=128)[0]
    assert torch.equal(got[0], expected[0])
    a, b = (torch.cat([g.flatten() for g in step[1:]]) for step in (got, expected))
    error = float((a - b).norm() / b.norm())
    assert 0 < error < bound, error


def test_rounding_draws_nothing_of_torchs_and_the_same_in_every_run() -> None:
    def run() -> list[list[torch.Tensor]]:
        return steps(memory.checkpoint(llama(), "lora", compression="int8"), tokens=128)

    first = run()
    state = torch.get_rng_state()
    assert same(run(), first)
    steps(llama(), tokens=128)
    assert torch.equal(torch.get_rng_state(), state)


def test_rounding_is_another_in_every_layer_step_and_seed() -> None:
    def seeds(index: int) -> list[int]:
        state = LayerState(index, "none", compression="int8")
        return [state.seed() for _ in range(3)]

    torch.manual_seed(1)
    found = seeds(0) + seeds(1)
    torch.manual_seed(2)
    found += seeds(0)
    assert len({Noise(seed).like(torch.zeros(1)).item() for seed in found}) == 9


def narrowed(model: Any, tokens: int, *, autocast: bool = False) -> list[torch.Tensor]:
    """What is kept in 8 bits in a step, as it was before."""
    found = []

    def noting(tensor: torch.Tensor, *rest: Any) -> Compressed | None:
        made = compress(tensor, *rest)
        found.extend([] if made is None else [tensor])
        return made

    memory.checkpoint(model, "none", compression="int8")
    ids = torch.arange(2 * tokens).view(2, tokens) % 128
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_activations, "compress", noting)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=ids)
    return found


def plain(attention: str = "sdpa") -> Any:
    """A Llama without adapters and without fastft's modules."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    config = LlamaConfig(**shape, **heads, attn_implementation=attention)
    return LlamaForCausalLM(config).train()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_as_many_tokens_as_features_are_compressed_as_any_other(
    attention: str, autocast: bool
) -> None:
    model = plain(attention)
    found = set()
    for tokens in (120, 124, 128, 132, 256):
        kept = narrowed(model, tokens, autocast=autocast)
        scores = ((2, 4, tokens, tokens), (8, tokens, tokens))  # more a token, the more there are
        assert any(t.shape in scores for t in kept) == (attention == "eager")
        found.add(sum(t.nbytes / (2 * tokens) for t in kept if t.shape not in scores))
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_under_autocast_its_activations_are_compressed_and_its_weights_are_not(kind: str) -> None:
    model = plain()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=128, n_embd=128, n_layer=2, n_head=4)
        model = GPT2LMHeadModel(config).train()
    weights = [p.detach().bfloat16() for p in model.parameters() if p.dim() == 2]
    for tokens in (120, 128):
        kept = narrowed(model, tokens, autocast=True)
        halves = [t for t in kept if t.dtype == torch.bfloat16]
        assert {t.shape[-1] for t in halves} >= {128, 512 if kind == "gpt2" else 256}
        for t in halves:
            alike = [w for w in weights for w in (w, w.t()) if w.shape == t.shape]
            assert not any(torch.equal(t, w) for w in alike)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_stay(attention: str, autocast: bool) -> None:
    def run(model: Any) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    ids = torch.arange(320).view(2, 160) % 128
    mask = torch.ones_like(ids)
    mask[1, 130:] = 0
    model = plain(attention)
    expected = run(model)
    got = run(memory.checkpoint(model, "none", compression="int8"))
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.02


def test_other_inputs_what_is_made_of_masks_and_what_is_expanded_stay() -> None:
    hidden, mask = torch.zeros(2, 128, 128), torch.zeros(2, 1, 128, 128, dtype=torch.bool)
    table = torch.zeros(1, 128, 128)
    narrow = Narrowing("int8", 0, hidden, [], [hidden, mask, table])
    assert narrow(mask.float()) is None
    assert narrow(table[:, :, :]) is None
    assert narrow(torch.zeros(2, 4, 1, 128).expand(2, 4, 128, 128)) is None
    assert isinstance(narrow(hidden), Compressed)
    assert isinstance(narrow(torch.zeros(2, 4, 128, 128)), Compressed)


@pytest.mark.parametrize("length", [128, 100])
def test_statistics_of_tokens_stay(length: int) -> None:
    narrow = Narrowing("int8", 0, torch.zeros(2, length, 128), [])
    for width in {length, 128}:  # as some kernels on GPUs pad them
        assert narrow(torch.zeros(2, 96, width)) is None
    for shape in ((2, length, length), (2, length, 128), (16, length, length // 2)):
        assert isinstance(narrow(torch.zeros(shape)), Compressed) == (shape[-1] >= 64)
