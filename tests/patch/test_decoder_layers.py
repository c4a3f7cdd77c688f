"""Decoder layers as one operation: the bits of their parts, where they run so and where not."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastft
from fastft.nn import call_counts, decoder
from fastft.nn.calls import reset_call_counts
from fastft.nn.decoder import FusedDecoderLayer

LIKE = torch.empty(0, dtype=torch.bfloat16)
pytestmark = pytest.mark.skipif(
    decoder.backend_of(LIKE, torch.float32) is None,
    reason="needs a processor whose vectors multiply bfloat16",
)

SMALL = {
    "vocab_size": 96,
    "hidden_size": 80,  # a panel of a product, and a part of one
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "use_cache": False,
}
ROWS = (4, 160)  # enough for the products of the parts


def build(family: str = "Llama", *, layer: bool = True, lora: Any = None, **values: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **values})
    model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16().train()
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **(lora or {})}
    model = get_peft_model(model, LoraConfig(**options))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    return fastft.accelerate(model, layer=layer)


def layers_of(model: Any) -> list[nn.Module]:
    return list(model.get_base_model().model.layers)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The calls that ran as one operation."""
    calls: list[Any] = []
    own = decoder.decoder_layer

    def spy(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return own(*arguments)

    with monkeypatch.context() as m:
        m.setattr(decoder, "decoder_layer", spy)
        yield calls


def batch(step: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, SMALL["vocab_size"], ROWS, generator=generator)  # type: ignore[call-overload]
    return {"input_ids": ids, "labels": ids, **more}


def trained(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    loss = model(**given).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def learnt(model: Any) -> Any:
    """After two steps: layers that share an input run together by then."""
    for _ in range(2):
        trained(model, batch())
    return model


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def padded(*starts: int, right: bool) -> Tensor:
    mask = torch.ones(ROWS, dtype=torch.long)
    for row, n in enumerate(starts):
        mask[row, ROWS[1] - n :] = 0 if right else 1
        mask[row, : 0 if right else n] = 0
    return mask


@pytest.mark.parametrize("masked", [None, "right", "left"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])  # biases, norms of heads
def test_the_bits_of_the_parts(
    family: str, dropout: float, masked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"bias": "none", "lora_dropout": dropout}
    apart, whole = (learnt(build(family, layer=on, lora=own)) for on in (False, True))
    for m in apart.modules():
        assert not isinstance(m, FusedDecoderLayer)
    mask = None if masked is None else padded(0, 20, 3, 90, right=masked == "right")
    given = batch(1) if mask is None else batch(1, attention_mask=mask)
    with watched(monkeypatch) as calls:
        got = trained(whole, given)
    assert len(calls) == 2
    assert_same(got, trained(apart, given))


@pytest.mark.parametrize("first", [True, False])
def test_only_what_is_asked_for_gets_a_gradient(first: bool) -> None:
    models = [learnt(build(layer=on)) for on in (False, True)]
    for model in models:
        for name, p in model.named_parameters():
            if "v_proj.lora_A" in name or ("lora_B" in name and "down" in name):
                p.requires_grad_(False)
        if first:  # the embeddings' result, too
            model.enable_input_require_grads()
    assert_same(*(trained(model, batch(1)) for model in reversed(models)))


def test_adapters_in_the_models_dtype_ranks_and_scalings_of_their_own() -> None:
    own = {"rank_pattern": {"q_proj": 6, "down_proj": 3}, "alpha_pattern": {"up_proj": 3}}
    models = [build(layer=on, lora=own) for on in (False, True)]
    for model in models:
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.bfloat16()
        learnt(model)
    assert_same(*(trained(model, batch(1)) for model in reversed(models)))


def test_it_reads_nothing_that_it_has_not_written() -> None:
    model = learnt(build())
    expected = trained(model, batch(1))
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    try:
        assert_same(trained(model, batch(1)), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_any_number_of_threads_and_a_second_time() -> None:
    model = learnt(build())
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(trained(model, batch(1)))
    finally:
        torch.set_num_threads(before)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    loss = model(**batch(1)).loss
    leaves = [p for p in model.parameters() if p.requires_grad]
    once, twice = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_second_derivatives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for on in (False, True):
        model = learnt(build(family, layer=on, lora={"lora_dropout": 0.25}))
        leaves = [p for p in model.parameters() if p.requires_grad]
        torch.manual_seed(3)
        with watched(monkeypatch) as calls:
            loss = model(**batch(1)).loss
        assert len(calls) == (2 if on else 0)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        norm = sum(g.float().square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(norm, leaves)])  # type: ignore[arg-type]
    for a, b in zip(*found, strict=True):
        difference, scale = (a - b).detach().float().norm(), b.detach().float().norm()
        assert float(difference) <= 0.04 * float(scale) + 1e-6


def test_weights_that_change_before_the_backward_are_refused() -> None:
    model = learnt(build())
    loss = model(**batch(1)).loss
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _in_float32(p: nn.Parameter) -> Tensor:
    return p.data.float()


def _by_columns(p: nn.Parameter) -> Tensor:
    return p.data.t().contiguous().t()


@pytest.mark.parametrize("form", [_in_float32, _by_columns])
@pytest.mark.parametrize("part", ["up_proj.base_layer", "k_proj.lora_A", "o_proj.lora_B"])
def test_data_of_another_form_before_the_backward(part: str, form: Any) -> None:
    model = build(lora={"r": 8})
    for name, p in model.named_parameters():  # of which some become float32
        if "lora_" in name:
            p.data = p.data.bfloat16()
    learnt(model)
    expected = trained(model, batch(1))
    model.zero_grad()
    loss = model(**batch(1)).loss
    for name, p in model.named_parameters():
        if part in name:
            p.data = form(p)
    loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            difference = (p.grad.float() - expected[name].float()).norm()
            assert float(difference) <= 0.04 * float(expected[name].float().norm())


def _interface(model: Any) -> Any:
    module = transformers.models.llama.modeling_llama
    own, patched = module.ALL_ATTENTION_FUNCTIONS, pytest.MonkeyPatch()

    class Other:
        def get_interface(self, *names: Any) -> Any:
            return lambda *a, **k: (2 * own.get_interface(*names)(*a, **k)[0], None)

    patched.setattr(module, "ALL_ATTENTION_FUNCTIONS", Other())
    return patched.undo


def _hook(model: Any) -> Any:
    seen: list[Any] = []
    layer = model.get_base_model().model.layers[1]
    layer.self_attn.register_forward_hook(lambda *_: seen.append(1))
    layer.mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))


def _second(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])


def _train_norms(model: Any) -> None:
    for layer in layers_of(model):
        layer.input_layernorm.weight.requires_grad_()  # type: ignore[union-attr]


def _turn_weights(model: Any) -> None:
    for layer in layers_of(model):
        weight = layer.mlp.up_proj.base_layer.weight  # type: ignore[union-attr]
        weight.data = weight.data.t().contiguous().t()  # type: ignore[union-attr,operator]


def _drop_attention(model: Any) -> None:
    for layer in layers_of(model):
        layer.self_attn.attention_dropout = 0.5  # type: ignore[union-attr]


def _other_rotary(model: Any) -> Any:
    module = transformers.models.llama.modeling_llama
    own = module.apply_rotary_pos_emb
    patched = pytest.MonkeyPatch()
    patched.setattr(module, "apply_rotary_pos_emb", lambda *a, **k: own(*a, **k))
    return patched.undo


def _policy(model: Any) -> None:
    fastft.memory.checkpoint(model, "lora")


def _offloaded() -> Any:
    return torch.autograd.graph.save_on_cpu()


OUT_OF_THE_ORDINARY: dict[str, tuple[Callable[[Any], Any], Callable[[], Any], dict[str, Any]]] = {
    "hooks on parts": (_hook, nullcontext, {}),
    "two adapters": (_second, nullcontext, {}),
    "adapters off": (lambda m: m.base_model.disable_adapter_layers(), nullcontext, {}),
    "merged": (lambda m: m.merge_adapter(), nullcontext, {}),
    "trained norms": (_train_norms, nullcontext, {}),
    "a weight stored by columns": (_turn_weights, nullcontext, {}),
    "another rotary function": (_other_rotary, nullcontext, {}),
    "eager attention": (lambda m: m.set_attn_implementation("eager"), nullcontext, {}),
    "checkpointing": (lambda m: m.gradient_checkpointing_enable(), nullcontext, {}),
    "a policy": (_policy, nullcontext, {}),
    "saved tensors asked for": (lambda m: None, _offloaded, {}),
    "autocast": (lambda m: None, lambda: torch.autocast("cpu", torch.bfloat16), {}),
    "another attention interface": (_interface, nullcontext, {}),
    "not causal": (lambda m: None, nullcontext, {"is_causal": False}),
    "a cache": (lambda m: None, nullcontext, {"use_cache": True}),
}


@pytest.mark.parametrize("case", OUT_OF_THE_ORDINARY)
def test_other_calls_run_the_layers_own_code(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, context, more = OUT_OF_THE_ORDINARY[case]
    found = []
    for on in (False, True):
        model = learnt(build(layer=on))
        undo = change(model)
        with watched(monkeypatch) as calls, context():
            model.zero_grad()
            loss = model(**batch(1, **more)).loss
            if loss.requires_grad:
                loss.backward()
        assert len(calls) == (1 if on and case == "hooks on parts" else 0)
        names = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **names})
        if callable(undo):
            undo()
    assert_same(found[1], found[0])


def test_arguments_that_are_only_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learnt(build())
    with watched(monkeypatch) as calls:  # as a Trainer gives it
        trained(model, batch(1, num_items_in_batch=torch.tensor(7)))
    assert len(calls) == 2
    ends = torch.tensor([0, 100, 160], dtype=torch.int32)
    with watched(monkeypatch) as calls:
        ids = {name: ids[:1].repeat(1, 4) for name, ids in batch(1).items()}
        trained(model, {**ids, "cu_seq_lens_q": ends * 4, "cu_seq_lens_k": ends * 4})
    assert not calls


def test_dropout_of_attention_runs_the_layers_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learnt(build())
    _drop_attention(model)
    with watched(monkeypatch) as calls:
        trained(model, batch(1))
    assert not calls


def test_evaluation_runs_the_layers_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learnt(build()).eval()  # code may do something else then, and was tried in training
    with watched(monkeypatch) as calls:
        trained(model, batch(1))
        assert not calls
        trained(model.train(), batch(1))
    assert len(calls) == 2


@pytest.mark.parametrize("tokens", [1, 100])
def test_few_rows_and_no_gradients_run_the_layers_own_code(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = learnt(build())
    few = {name: ids[:, :tokens] for name, ids in batch(1).items()}
    with watched(monkeypatch) as calls:
        trained(model, few)
        with torch.no_grad():
            model(**batch(1))
    assert not calls


def test_the_first_forward_learns_and_calls_are_counted_as_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    for on in (False, True):
        model = build(layer=on)
        with watched(monkeypatch) as calls:
            trained(model, batch())
            assert not calls  # nobody knows yet which layers share an input
            reset_call_counts()
            trained(model, batch())
            assert len(calls) == (2 if on else 0)
        explained = fastft.explain(model)
        counts.append([(m.name, m.fused_calls, m.siblings) for m in explained.modules])
        total = call_counts()
        counts[-1].append(("", total.fused, sum(total.fallback.values())))
    assert counts[0] == counts[1]


FUSED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Ernie4_5")
# A norm after the attention, scales of residuals, of queries far along, layers without positions,
# more norms, one weight for gate and up, no gate.
APART = ("Olmo2", "Granite", "Ministral3", "SmolLM3", "Gemma2", "Phi3", "Arcee", "Nemotron")


@pytest.mark.parametrize("family", FUSED + APART)
def test_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    whole = [isinstance(layer, FusedDecoderLayer) for layer in layers_of(model)]
    assert whole == [family in FUSED] * 2
    if not any(whole):
        return
    learnt(model)
    with watched(monkeypatch) as calls:
        got = trained(model, batch(1))
    assert len(calls) == 2
    assert_same(got, trained(learnt(build(family, layer=False)), batch(1)))


def test_scores_far_apart_as_in_trained_models() -> None:
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).bfloat16()
    for layer in model.model.layers:
        for part in ("q_proj", "k_proj"):
            getattr(layer.self_attn, part).weight.data.mul_(40)
    model = get_peft_model(model.train(), LoraConfig(r=4, target_modules="all-linear"))
    explained = fastft.explain(fastft.accelerate(model))
    assert [m.reason for m in explained.layers] == [None, None]


def test_explain_says_which_layers_run_so_and_why_not() -> None:
    model = learnt(build())
    found = fastft.explain(model).layers
    assert [(m.name.rsplit(".", 2)[1:], m.kind, m.backend, m.fused_calls) for m in found] == [
        (["layers", "0"], "layer", "cpu", 1),
        (["layers", "1"], "layer", "cpu", 1),
    ]
    assert "2      layers  " in str(fastft.explain(model))
    for family, layer, reason in (
        ("Llama", False, "its parts run one by one"),
        ("Granite", True, "its code says more than Llama's: residual_multiplier"),
    ):
        (row,) = {m.reason for m in fastft.explain(build(family, layer=layer)).layers}
        assert row == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.merge_adapter(), "adapter merged into the base"),
        (lambda m: m.base_model.disable_adapter_layers(), "adapters disabled"),
        (lambda m: m.set_attn_implementation("eager"), "self_attn: "),
        (_hook, "a part has a hook"),
        (lambda m: m.float(), "no backend runs torch.float32 on cpu"),
        (lambda m: m.eval(), "it is not in training"),
        (_policy, "under a policy"),
        (lambda m: m.gradient_checkpointing_enable(), "checkpointing is on"),
        (_second, "more than one plain adapter"),
        (_train_norms, "is trained"),
        (_turn_weights, "stored by rows"),
        (_drop_attention, "attention has dropout"),
    ],
)
def test_explain_says_what_keeps_a_layer_from_it_by_now(change: Any, reason: str) -> None:
    model = learnt(build())
    change(model)
    row = fastft.explain(model).layers[1]
    assert (row.fused, row.backend) == (False, None)
    assert reason in str(row.reason)


def test_a_module_in_two_places_stays_what_it_is() -> None:
    model = build()
    fastft.restore(model)
    for layer in layers_of(model):
        layer.self_attn.k_proj.lora_A = layer.self_attn.q_proj.lora_A  # type: ignore[union-attr]
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    fastft.accelerate(model)
    assert {m.reason for m in fastft.explain(model).layers} == {"a module stands in two places"}
    for name, p in model.named_parameters():
        assert p is before[name]
        assert torch.equal(p, values[name])


def test_checkpointing_that_is_on_is_no_reason() -> None:
    model = build()
    fastft.restore(model)
    model.gradient_checkpointing_enable()
    fastft.accelerate(model)
    assert all(isinstance(layer, FusedDecoderLayer) for layer in layers_of(model))
    assert all(vars(layer)["gradient_checkpointing"] for layer in layers_of(model))
    assert [layer.self_attn.layer_idx for layer in layers_of(model)] == [0, 1]  # type: ignore[union-attr]


def _by_index(self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any,
              past_key_values: Any = None, **kwargs: Any) -> Any:  # fmt: skip
    """Llama's, whose layers with an even index have no positions; in names of its module."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
    k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
    v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    if self.layer_idx % 2:
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)  # type: ignore[name-defined]  # noqa: F821
    interface: Any = ALL_ATTENTION_FUNCTIONS.get_interface(  # type: ignore[name-defined]  # noqa: F821
        self.config._attn_implementation,
        eager_attention_forward,  # type: ignore[name-defined]  # noqa: F821
    )
    given = {"dropout": 0.0, "scaling": self.scaling, **kwargs}
    out, weights = interface(self, q, k, v, attention_mask, **given)
    out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
    return self.o_proj(out), weights


def test_code_that_looks_at_the_layers_index_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = transformers.models.llama.modeling_llama
    forward = types.FunctionType(_by_index.__code__, vars(module), argdefs=_by_index.__defaults__)
    monkeypatch.setattr(module.LlamaAttention, "forward", forward)
    (reason,) = {m.reason for m in fastft.explain(build()).layers}
    assert "'_Index'" in str(reason)  # which is nothing to count with


def test_code_that_does_something_else_with_the_parts_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls: Any = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    own = cls.forward

    def twice(self: Any, hidden_states: Tensor, **given: Any) -> Tensor:
        hidden = hidden_states + 2 * self.self_attn(self.input_layernorm(hidden_states), **given)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]

    def named(self: Any, hidden_states: Tensor, **given: Any) -> Tensor:
        return own(self, hidden_states, **given) * torch.ones(())  # type: ignore[no-any-return]

    for forward in (twice, named):
        with monkeypatch.context() as m:
            m.setattr(cls, "forward", forward)
            model = build()
        assert not any(isinstance(layer, FusedDecoderLayer) for layer in layers_of(model))
        (reason,) = {m.reason for m in fastft.explain(model).layers}
        assert reason is not None
        assert reason.startswith("verification: relative" if forward is twice else "its code says")


def test_a_forward_that_is_replaced_later_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learnt(build())
    module = transformers.models.llama.modeling_llama
    for cls in (module.LlamaDecoderLayer, module.LlamaAttention):
        with watched(monkeypatch) as calls, monkeypatch.context() as m:
            own = cls.forward
            m.setattr(cls, "forward", lambda *a, own=own, **k: own(*a, **k))
            trained(model, batch(1))
        assert not calls


def test_restored_copied_and_pickled() -> None:
    model = learnt(build())
    expected = trained(model, batch(1))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(isinstance(layer, FusedDecoderLayer) for layer in layers_of(again))
        assert_same(trained(learnt(again), batch(1)), expected)
    fastft.restore(model)
    kind = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    assert {type(layer) for layer in layers_of(model)} == {kind}


@pytest.mark.parametrize("policy", ["full", "attention", "offload", "none"])
def test_policies_have_the_same_gradients(policy: str) -> None:
    model = learnt(build(lora={"lora_dropout": 0.25}))
    expected = trained(model, batch(1))
    fastft.memory.checkpoint(model, policy)
    assert_same(trained(model, batch(1)), expected)
    fastft.memory.restore(model)
    assert_same(trained(model, batch(1)), expected)
