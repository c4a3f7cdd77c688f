"""Policies keep less and change no bit."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fastft
from fastft import memory
from fastft.errors import ArgumentError, DtypeError
from fastft.memory import _attention
from fastft.memory._auto import measure
from fastft.memory._layers import Layer, find_layers, state_of
from fastft.nn import call_counts
from tests.memory.models import SHAPE, llama, same, steps

LOSSLESS = ("none", "lora", "attention", "full", "offload")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "peft"])
def test_gradients_are_those_of_none_bit_for_bit(fused: bool, dtype: torch.dtype) -> None:
    expected = steps(llama(fused=fused, dtype=dtype))
    for policy in LOSSLESS:
        model = memory.checkpoint(llama(fused=fused, dtype=dtype), policy)
        assert same(steps(model), expected), policy


@pytest.mark.parametrize("policy", ["lora", "attention", "full"])
def test_under_autocast_and_with_an_embedding_that_is_trained(policy: str) -> None:
    def run(policy: str) -> list[list[torch.Tensor]]:
        model = llama()
        model.get_input_embeddings().weight.requires_grad_(True)
        memory.checkpoint(model, policy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return steps(model)

    assert same(run(policy), run("none"))


def compiled_gradients(model: nn.Module) -> list[torch.Tensor]:
    compiled = torch.compile(model, backend="aot_eager")
    ids = torch.arange(12).view(1, 12)
    compiled(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("policy", ["lora", "attention", "full"])
def test_compiled(policy: str) -> None:
    def run(policy: str | None) -> list[torch.Tensor]:
        model = llama(dropout=0.0, num_hidden_layers=2)
        if policy is not None:
            memory.checkpoint(model, policy)
        return compiled_gradients(model)

    for a, b in zip(run(policy), run(None), strict=True):
        torch.testing.assert_close(a, b)


def kept(model: Any) -> list[int]:
    """Bytes that one layer keeps under none, lora, attention and full."""
    found: list[list[int]] = []
    layer = find_layers(model)[0]

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not found:
            found.append([0])
            choices = measure(module, type(module).forward.__get__(module), args, kwargs, args[0])
            found[0] = [choice.kept for choice in choices]

    layer.register_forward_pre_hook(look, with_kwargs=True)
    steps(model, 1)
    return found[0]


def test_each_policy_keeps_what_its_formula_says() -> None:
    h, i, v, heads, tokens, r = 64, 128, 32, 4, 48, 4
    none, lora, attention, full = kept(llama(dropout=0.0))
    # float32; S of seven adapters, two norms' statistics and attention's; masks are shared.
    small = tokens * (7 * r + 2 + heads)
    # The product of gate and up is made again of the two, whatever the policy.
    assert none == 4 * (tokens * (6 * h + 2 * v + 2 * i) + small)
    # S of the down projection is too small a part of its input to be made again.
    assert lora == 4 * (tokens * (4 * h + 2 * v + 2 * i) + small - tokens * 6 * r)
    assert attention == 4 * tokens * (2 * h + heads)
    assert full == 4 * tokens * h


def test_the_last_product_of_a_recompute_is_left_out() -> None:
    from fastft.cpu import lora_linear

    calls = {"fwd": 0, "fwd_adapters": 0, "fwd_values": 0}
    real = {name: getattr(lora_linear, name) for name in calls}

    def counting(name: str) -> Any:
        def call(*args: Any) -> None:
            calls[name] += 1
            real[name](*args)

        return call

    model = memory.checkpoint(llama(dropout=0.0), "full")
    steps(model, 2)  # siblings are learnt
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(lora_linear, name, counting(name))
        steps(model, 1)
    layers, groups = 4, 4  # q/k/v, o, gate/up, down
    # The forward's own calls go through both parts; a recompute saves first and leaves out down.
    assert calls["fwd"] == layers * groups
    assert calls["fwd_adapters"] - calls["fwd"] == layers * groups
    assert calls["fwd_values"] - calls["fwd"] == layers * (groups - 1)


def switch_on(model: Any, name: str, **options: Any) -> None:
    """Transformers' own checkpointing, by the name it has had or the one it has now."""
    enable = getattr(model, f"{name}_checkpointing_enable", None)
    if enable is None:
        pytest.skip("this Transformers has only the other name")
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False, **options}})


NAMES = pytest.mark.parametrize("name", ["gradient", "activation"])


@NAMES
def test_trainers_and_transformers_own_flag_has_no_further_effect(name: str) -> None:
    model = memory.checkpoint(llama(), "attention")
    switch_on(model, name)
    assert not any(layer.gradient_checkpointing for layer in find_layers(model))
    assert same(steps(model), steps(llama()))


@NAMES
@pytest.mark.parametrize("policy", ["lora", "attention", "full"])
def test_policies_through_transformers_own_checkpointing(policy: str, name: str) -> None:
    model = llama()
    options = {"context_fn": memory.context_fn(policy)}
    switch_on(model, name, **options)
    assert all(layer.gradient_checkpointing for layer in find_layers(model))
    assert same(steps(model), steps(llama()))
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize("policy", ["lora", "attention", "full"])
def test_transformers_own_checkpointing_keeps_what_the_policy_keeps(policy: str) -> None:
    def held(model: Any) -> int:
        ids = torch.arange(512).view(2, 256) % 128
        for _ in range(3):  # siblings are learnt, and what is made once is
            before = live_bytes()
            loss = model(input_ids=ids, labels=ids).loss
            found = live_bytes() - before
            loss.backward()
            del loss
        return found

    theirs = llama()
    switch_on(theirs, "gradient", context_fn=memory.context_fn(policy))
    # Theirs may hold positions, and torch's random state a layer.
    assert abs(held(theirs) - held(memory.checkpoint(llama(), policy))) < 1 << 15


@pytest.mark.parametrize("policy", ["lora", "attention", "full"])
def test_transformers_own_checkpointing_compiled(policy: str) -> None:
    def run(policy: str | None) -> list[torch.Tensor]:
        model = llama(dropout=0.0, num_hidden_layers=2)
        if policy is not None:
            switch_on(model, "gradient", context_fn=memory.context_fn(policy))
        return compiled_gradients(model)

    for a, b in zip(run(policy), run(None), strict=True):
        torch.testing.assert_close(a, b)


def test_other_policies_have_no_context_fn() -> None:
    with pytest.raises(ArgumentError, match=r"one of lora, attention, full.*checkpoint\(model"):
        memory.context_fn("offload")
    with pytest.raises(ArgumentError, match="did you mean 'attention'"):
        memory.context_fn("atention")


def test_attention_runs_once_a_layer_under_attention_and_twice_under_full() -> None:
    from fastft.cpu import attention

    for policy, times in (("attention", 1), ("offload", 1), ("full", 2)):
        model = memory.checkpoint(llama(), policy)
        count, real = [0], attention.fwd

        def fwd(*args: Any, real: Any = real, count: Any = count, **kwargs: Any) -> None:
            count[0] += 1
            real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "fwd", fwd)
            steps(model, 1)
        assert count[0] == 4 * times, policy


def test_restore_and_fastft_restore_leave_no_trace() -> None:
    model = llama()
    types = [type(module) for module in model.modules()]
    held = [set(vars(module)) for module in model.modules()]
    memory.checkpoint(model, "attention")
    memory.checkpoint(model, "lora", mlp_tile=8)
    assert memory.explain(model) == "4 x lora"
    memory.restore(model)
    assert [type(module) for module in model.modules()] == types
    assert [set(vars(module)) for module in model.modules()] == held
    memory.checkpoint(model, "full")
    fastft.restore(model)
    assert not any(key.startswith("fastft") for m in model.modules() for key in vars(m))
    assert not any(isinstance(m, Layer) or state_of(m) for m in model.modules())
    assert memory.explain(model).startswith("no policy")


def test_copies_and_pickles_keep_the_policy() -> None:
    model = memory.checkpoint(llama(fused=False), "attention")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert memory.explain(twin) == "4 x attention"
        assert same(steps(twin), steps(llama(fused=False)))


def test_evaluation_and_caches_are_left_alone() -> None:
    model = memory.checkpoint(llama(), "full").eval()
    plain = llama().eval()
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        made = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=True)
    assert made.shape == (1, 12)
    model.train()
    model.config.use_cache = True
    assert cache_of(model(input_ids=ids, labels=ids)) is not None
    model(input_ids=ids, labels=ids).loss.backward()


def cache_of(output: Any) -> Any:
    """By either of the names that Transformers gives it."""
    return output["cache"] if "cache" in output else output["past_key_values"]


@pytest.mark.parametrize("policy", ["attention", "full", "offload", "auto"])
def test_a_cache_passed_by_position_is_written_once(policy: str) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(config).train()
    budget = 2**17 if policy == "auto" else None  # some layers keep little, and are run twice
    model = memory.checkpoint(copy.deepcopy(plain), policy, budget=budget)
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    for m, caches in ((plain, False), (model, True)):
        for _ in range(2):  # auto chooses after the first step
            torch.manual_seed(1)
            m.zero_grad()
            m(**given, use_cache=caches).loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("policy", ["lora", "attention", "full", "auto"])
def test_a_cache_that_holds_a_prefix_is_read(policy: str) -> None:
    ids = torch.arange(24).view(2, 12)

    def run(policy: str | None) -> list[torch.Tensor]:
        model = llama()
        if policy is not None:
            memory.checkpoint(model, policy, budget=1 << 20 if policy == "auto" else None)
        found = []
        for _ in range(2):  # auto chooses after the first step
            torch.manual_seed(1)
            with torch.no_grad():
                cache = cache_of(model(input_ids=ids[:, :5], use_cache=True))
            loss = model(input_ids=ids[:, 5:], labels=ids[:, 5:], past_key_values=cache).loss
            model.zero_grad()
            loss.backward()
            found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        return found

    for a, b in zip(run(policy), run(None), strict=True):
        assert torch.equal(a, b)


def test_prefixes_that_are_trained_reach_layers_under_a_policy() -> None:
    def run(policy: str) -> list[list[torch.Tensor]]:
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**SHAPE))
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        return steps(memory.checkpoint(get_peft_model(base, config).train(), policy))

    assert same(run("full"), run("none"))


def test_a_cache_that_stays_empty_is_said() -> None:
    model = memory.checkpoint(llama(), "full")
    ids = torch.arange(8).view(1, 8)
    with pytest.warns(UserWarning, match="the one that is returned is empty"):
        model(input_ids=ids, labels=ids, use_cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=ids, use_cache=False)


def test_a_tensor_changed_in_place_after_it_was_saved_is_refused() -> None:
    model = memory.checkpoint(llama(), "lora")
    caught: list[torch.Tensor] = []
    layer = find_layers(model)[1]
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    ids = torch.arange(8).view(1, 8)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        caught[0].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("policy", ["none", "lora", "full"])
def test_tiled_mlp_gives_the_gradients_up_to_rounding(policy: str) -> None:
    expected = steps(llama(dropout=0.0, dtype=torch.float32))
    model = memory.checkpoint(llama(dropout=0.0), policy, mlp_tile=20)
    for got, want in zip(steps(model), expected, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    assert call_counts(find_layers(model)[0].mlp).fallback == {}


def test_tiled_mlp_draws_the_same_dropout_again() -> None:
    model = memory.checkpoint(llama(dropout=0.3), "none", mlp_tile=20)
    mlp = find_layers(model)[0].mlp
    x = torch.randn(1, 48, 64, dtype=torch.float64).float().requires_grad_()
    torch.manual_seed(5)
    y = mlp(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    # The same masks without tiles in the backward: each tile by hand, in order.
    torch.manual_seed(5)
    memory.restore(model)
    parts = [mlp(part) for part in x.split(20, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), y)
    (expected,) = torch.autograd.grad(torch.cat(parts, 1).sum(), x)
    torch.testing.assert_close(dx, expected)


def test_a_tiled_mlp_refuses_second_derivatives() -> None:
    mlp = find_layers(memory.checkpoint(llama(dropout=0.0), "none", mlp_tile=20))[0].mlp
    x = torch.randn(1, 48, 64, requires_grad=True)
    with pytest.raises(ArgumentError, match="first derivatives"):
        torch.autograd.grad(mlp(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("policy", ["lora", "attention", "full"])
def test_second_derivatives_go_through_a_policy(policy: str) -> None:
    def run(policy: str) -> list[torch.Tensor]:
        model = memory.checkpoint(llama(num_hidden_layers=2), policy)
        ids = torch.arange(24).view(2, 12)
        torch.manual_seed(1)
        weights = [p for p in model.parameters() if p.requires_grad]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        first = torch.autograd.grad(loss, weights, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), weights))

    for a, b in zip(run(policy), run("none"), strict=True):
        assert torch.equal(a, b)


def test_a_tile_from_the_budget() -> None:
    per_token = 6 * 128 * 4  # gate, up, product and their gradients, in float32
    for tokens, tile in ((100, 256), (600, 512), (5000, 4864)):
        model = memory.checkpoint(llama(), "full", budget=8 * tokens * per_token, mlp_tile="auto")
        assert {layer.mlp.__dict__["fastft_tile"] for layer in find_layers(model)} == {tile}
    model = memory.checkpoint(llama(dropout=0.0), "auto", budget=1 << 22, mlp_tile="auto")
    expected = steps(memory.checkpoint(llama(dropout=0.0), "full"))
    assert same(steps(model), expected), "48 tokens are not tiled"


def test_bad_arguments() -> None:
    model = llama(num_hidden_layers=2)
    with pytest.raises(DtypeError, match=r"torch\.nn\.Module"):
        memory.checkpoint(3, "full")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="did you mean 'attention'"):
        memory.checkpoint(model, "attentoin")
    with pytest.raises(ArgumentError, match="except with policy or mlp_tile 'auto'"):
        memory.checkpoint(model, "full", budget=1 << 30)
    with pytest.raises(ArgumentError, match="bytes, 1 or more"):
        memory.checkpoint(model, "auto", budget=0)
    with pytest.raises(ArgumentError, match="int8, float8"):
        memory.checkpoint(model, "lora", compression="int4")
    with pytest.raises(ArgumentError, match="keep activations"):
        memory.checkpoint(model, "full", compression="int8")
    with pytest.raises(ArgumentError, match="tokens, 1 or more"):
        memory.checkpoint(model, "lora", mlp_tile=0)
    with pytest.raises(ArgumentError, match="fused gated MLPs"):
        memory.checkpoint(llama(fused=False), "lora", mlp_tile=8)
    with pytest.raises(ArgumentError, match="repeated layers"):
        memory.checkpoint(nn.Linear(3, 3), "full")
    assert memory.explain(model).startswith("no policy")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", ["lora", "attention", "full"])
def test_dora_of_long_enough_batches_has_the_same_bits(policy: str, dropout: float) -> None:
    """Where a processor multiplies bfloat16 its scale goes along in the product."""
    models = [llama(dropout=dropout, use_dora=True, dtype=torch.bfloat16) for _ in range(2)]
    memory.checkpoint(models[1], policy)
    want, got = (steps(model, tokens=300) for model in models)
    for step, other in zip(want, got, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, other, strict=True))


@pytest.mark.parametrize("what", ["dora", "hook"])
def test_tiled_mlp_makes_the_value_where_somebody_looks_at_it(what: str) -> None:
    def run(tile: int | None) -> list[list[torch.Tensor]]:
        model = llama(dropout=0.0, use_dora=what == "dora")
        memory.checkpoint(model, "none", mlp_tile=tile)
        if what == "hook":
            for layer in find_layers(model):
                layer.mlp.down_proj.register_forward_hook(lambda m, args, out: out.sin())
        return steps(model)

    for got, want in zip(run(20), run(None), strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-6)


@torch.library.custom_op("fastft_tests::drawing", mutates_args=())
def drawing(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for attention with dropout: it draws, and is kept."""
    mask = torch.bernoulli(torch.full_like(x, 0.5))
    return x * mask, mask


def _save_mask(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])


drawing.register_autograd(lambda ctx, d, _: d * ctx.saved_tensors[0], setup_context=_save_mask)


class Draws(nn.Linear):
    """Attention, and dropout after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = torch.ops.fastft_tests.drawing(super().forward(x))
        return torch.rand_like(x) * x**2


def test_attention_that_draws_leaves_later_draws_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_attention, "ATTENTION_OPS", ("fastft_tests::drawing",))

    def run(policy: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), Draws(16, 16)) for _ in range(2)))
        memory.checkpoint(layers, policy)
        torch.manual_seed(1)
        layers(torch.ones(8, 16, requires_grad=True)).sum().backward()
        return [p.grad for p in layers.parameters() if p.grad is not None]

    for a, b in zip(run("attention"), run("none"), strict=True):
        assert torch.equal(a, b)


def test_nothing_outlives_what_was_saved() -> None:
    import gc
    import weakref

    model = memory.checkpoint(llama(dropout=0.0), "lora")
    seen: list[Any] = []
    mlp = find_layers(model)[0].mlp
    mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    ids = torch.arange(12).view(1, 12)
    loss = model(input_ids=ids, labels=ids).loss
    gc.collect()
    assert seen[-1]() is None, "the GLU's result is made again, not kept"
    loss.backward()


def test_adapters_results_are_made_again_with_the_norms_before_them() -> None:
    """S of q, k and v comes from a norm's result that is not kept either: one recipe in another."""
    from fastft.ops import _lora_linear_autograd

    widths: list[int] = []
    real = _lora_linear_autograd._adapters_again

    def counting(constants: Any, x: torch.Tensor, *tensors: Any) -> torch.Tensor:
        widths.append(x.shape[-1])
        return real(constants, x, *tensors)

    expected = steps(llama(dropout=0.1), 1)
    model = memory.checkpoint(llama(dropout=0.1), "lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_lora_linear_autograd, "_adapters_again", counting)
        got = steps(model, 1)
    # All but the down projection's, whose input is 128 wide: r = 4 is less than a sixteenth of it.
    assert set(widths) == {64}
    assert len(widths) <= 6 * len(find_layers(model))
    assert same(got, expected)


def test_a_norm_is_made_again_once_whoever_asks() -> None:
    """Siblings save its result, and S is made from it; siblings are learnt in the first step."""
    rms_norm = sys.modules["fastft.ops.rms_norm"]
    made: list[int] = []
    real = rms_norm._fwd_kernel

    def counting(*call: Any) -> Any:
        made.append(1)
        return real(*call)

    model = memory.checkpoint(llama(dropout=0.0), "lora")
    steps(model, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rms_norm, "_fwd_kernel", counting)
        loss = model(
            input_ids=torch.arange(24).view(1, 24), labels=torch.arange(24).view(1, 24)
        ).loss
        made.clear()
        loss.backward()
    assert len(made) == 2 * len(find_layers(model))


def test_compressed_recipes_hold_nothing_that_is_not_compressed() -> None:
    """What a result is made from again is kept in 8 bits too, once for all who save it."""
    kept = []
    for compression in (None, "int8"):
        model = llama(dropout=0.0, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
        memory.checkpoint(model, "lora", compression=compression)
        steps(model, 1, tokens=256)
        ids = torch.arange(512).view(2, 256) % 128
        before = live_bytes()
        loss = model(input_ids=ids, labels=ids).loss
        kept.append(live_bytes() - before)
        del loss
    # Statistics, attention's own and the loss's are as they were.
    assert kept[1] < 0.55 * kept[0]


def live_bytes() -> int:
    """Of all tensors that Python or autograd's hooks hold, by storage."""
    import gc

    gc.collect()
    found = {}
    for held in gc.get_objects():
        if (
            type(held) is torch.Tensor
            and held.layout == torch.strided
            and held.device.type == "cpu"
        ):
            storage = held.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())
