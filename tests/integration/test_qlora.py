"""LoRA over bitsandbytes' 4 bits (QLoRA): PEFT's results, and no weight's values kept."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.errors import ArgumentError
from fastft.nn import call_counts
from tests.patch.quantized import Two, assert_merged_as_peft

bnb = pytest.importorskip("bitsandbytes")
peft_bnb = pytest.importorskip("peft.tuners.lora.bnb")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FACTOR = 4.0


def quantize(model: nn.Module, dtype: torch.dtype | None, **how: Any) -> nn.Module:
    """Every linear layer but the head in 4 bits, computing in ``dtype``."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or name == "lm_head":
                continue
            sizes = child.in_features, child.out_features
            made = bnb.nn.Linear4bit(*sizes, child.bias is not None, compute_dtype=dtype, **how)
            weight = child.weight.detach()
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=made, **how)
            made.bias = child.bias
            setattr(parent, name, made.to("cpu"))
    model.is_loaded_in_4bit = True  # what PEFT asks for
    return model


def adapted(dtype: torch.dtype, how: dict[str, Any], **config: Any) -> Any:
    torch.manual_seed(0)
    model = quantize(Two().to(dtype), dtype, **how)
    options = {"r": 4, "target_modules": ["q", "k", "o"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**options, **config))


def in_float64(model: Any) -> Any:
    """The same model with the weights' values."""
    wide = copy.deepcopy(model)
    for layer in wide.modules():
        base = getattr(layer, "base_layer", None)
        if base is None:
            continue
        dense = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        state = base.weight.quant_state
        dense.weight.data = bnb.functional.dequantize_4bit(base.weight.data, state).to(
            base.compute_dtype
        )
        dense.bias = base.bias
        layer.base_layer = dense.requires_grad_(False)
    return wide.double()


def run(model: Any, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients; the second call of siblings is one operation."""
    for _ in range(2):
        model.zero_grad()
        own = x.to(dtype, copy=True).requires_grad_()
        y = model(own)
        (y.to(F64) * torch.linspace(-1, 1, y.numel(), dtype=F64).view(y.shape)).sum().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    return [y.detach(), own.grad, *trained]  # type: ignore[list-item]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("how", "config"),
    [
        ({"quant_type": "nf4"}, {}),
        ({"quant_type": "fp4", "compress_statistics": False}, {"use_rslora": True}),
        ({"quant_type": "nf4"}, {"use_dora": True}),
        ({"quant_type": "nf4"}, {"lora_bias": True, "rank_pattern": {"k": 7}}),
    ],
    ids=["nf4", "fp4", "dora", "biases"],
)
def test_results_and_gradients(
    how: dict[str, Any], config: dict[str, Any], dtype: torch.dtype
) -> None:
    plain = adapted(dtype, how, **config)
    fused = fastft.accelerate(copy.deepcopy(plain))
    assert fastft.explain(fused).fallback == 0, str(fastft.explain(fused))
    x = torch.randn(3, 50, 64)
    found = [run(m, x, d) for m, d in ((fused, dtype), (plain, dtype), (in_float64(plain), F64))]
    for got, theirs, truth in zip(*found, strict=True):
        assert got.dtype == theirs.dtype
        floor = torch.finfo(got.dtype).eps * truth.norm()
        bound = FACTOR * max((theirs.to(F64) - truth).norm(), floor)
        assert (got.to(F64) - truth).norm() <= bound
    for report in fastft.explain(fused).modules:
        assert report.fused_calls == 2
        assert not report.fallback_calls
    assert any(report.siblings == 2 for report in fastft.explain(fused).modules)


def test_no_values_of_a_weight_are_kept() -> None:
    """Not for the backward, nor by the layer."""
    model = fastft.accelerate(adapted(BF16, {"quant_type": "nf4"}))
    x = torch.randn(3, 50, 64, dtype=BF16, requires_grad=True)
    for _ in range(2):
        kept: set[tuple[int, ...]] = set()

        def note(tensor: Tensor, kept: Any = kept) -> Tensor:
            kept.add(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = model(x)
        assert kept
        assert not {(96, 64), (64, 96)} & kept
        y.sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("change", ["dtype", "state"])
def test_what_a_weight_stands_for_may_change_between_siblings(change: str) -> None:
    how = {"quant_type": "nf4", "compress_statistics": False}
    model = fastft.accelerate(adapted(F32, how))
    x = torch.randn(3, 50, 64)
    run(model, x, F32)
    q, k = model.base_model.model.q, model.base_model.model.k
    with torch.autocast("cpu", BF16) if change == "dtype" else contextlib.nullcontext():
        if change == "dtype":
            q.base_layer.compute_dtype = k.base_layer.compute_dtype = BF16
        q(x)
        if change == "dtype":
            k.base_layer.compute_dtype = F16
        else:
            k.base_layer.weight.quant_state = copy.copy(k.base_layer.weight.quant_state)
            k.base_layer.weight.quant_state.absmax = k.base_layer.weight.quant_state.absmax * 2
        got = k(x)
        want = k(x.clone())
    assert torch.equal(got, want)


def test_a_weight_made_again_must_be_frozen() -> None:
    x, w, a, b = (torch.randn(s) for s in ((5, 8), (6, 8), (2, 8), (6, 2)))
    calls = []

    def make() -> Tensor:
        calls.append(1)
        return w

    (y,) = fastft.ops.lora_linear_siblings(
        x.requires_grad_(), [w], [a], [b], scalings=[1.0], remake=[make]
    )
    assert not calls
    y.sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(x.grad, (w + b @ a).sum(0).expand(5, 8), rtol=1e-4, atol=1e-4)
    for weights, remake in (([w.requires_grad_()], [make]), ([w.detach()], [make, make])):
        with pytest.raises(ArgumentError, match="remake"):
            fastft.ops.lora_linear_siblings(x, weights, [a], [b], scalings=[1.0], remake=remake)


def test_a_weight_of_another_dtype_than_products() -> None:
    """bitsandbytes' default, float32, over a model in bfloat16, as its forward and its backward
    round the values."""
    torch.manual_seed(0)
    plain = quantize(Two().to(BF16), F32, quant_type="nf4").float()
    options = {"r": 4, "target_modules": ["q", "k", "o"], "init_lora_weights": False}
    plain = get_peft_model(plain, LoraConfig(**options))
    fused = fastft.accelerate(copy.deepcopy(plain))
    assert fastft.explain(fused).fallback == 0, str(fastft.explain(fused))
    x = torch.randn(3, 50, 64)
    for got, want in zip(run(fused, x, F32), run(plain, x, F32), strict=True):
        torch.testing.assert_close(got, want)


def test_what_computes_in_another_dtype_is_pefts() -> None:
    """Activations in float32, as ``prepare_model_for_kbit_training`` leaves them, over layers that
    compute in bfloat16; under autocast they are fused, and their results float32 as well."""
    plain = adapted(BF16, {"quant_type": "nf4"})
    fused = fastft.accelerate(copy.deepcopy(plain))
    x = torch.randn(2, 70, 64)
    assert torch.equal(fused(x), plain(x))
    counts = call_counts(fused.base_model.model.q)
    assert dict(counts.fallback) == {"mixed dtypes": 1}
    with torch.autocast("cpu", dtype=BF16):
        got, want = fused(x), plain(x)
    assert got.dtype == want.dtype == F32
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    assert counts.fused == 1


def test_states_that_are_pefts() -> None:
    """A layer whose dtype the first input chooses, a weight without its state, or compiled."""
    model = fastft.accelerate(adapted(BF16, {"quant_type": "nf4"}))
    layer = model.base_model.model.q
    layer.base_layer.compute_type_is_set = False

    def reason() -> str | None:
        return next(r.reason for r in fastft.explain(model).modules if r.name.endswith(".q"))

    assert "not chosen" in str(reason())
    x = torch.randn(2, 70, 64, dtype=BF16)
    model(x)
    assert layer.base_layer.compute_type_is_set
    assert reason() is None
    state, layer.base_layer.weight.quant_state = layer.base_layer.weight.quant_state, None
    assert "without its quantization state" in str(reason())
    layer.base_layer.weight.quant_state = state
    compiled = torch.compile(lambda t: layer(t), backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)


def test_dora_with_dropout_is_pefts() -> None:
    """Its second product would keep the values of the weight."""
    model = fastft.accelerate(adapted(BF16, {"quant_type": "nf4"}, use_dora=True, lora_dropout=0.5))
    x = torch.randn(2, 70, 64, dtype=BF16)
    model(x)
    counts = call_counts(model.base_model.model.q)
    assert dict(counts.fallback) == {"DoRA with dropout over a 4-bit weight": 1}
    model.eval()(x)
    assert counts.fused == 1


def test_a_weight_that_has_forgotten_its_layer() -> None:
    """What moves a weight by itself makes a new one of it, which knows the dtype it had before."""
    torch.manual_seed(0)
    plain = get_peft_model(
        quantize(Two(), BF16, quant_type="nf4"), LoraConfig(r=4, target_modules=["q", "k", "o"])
    )
    for layer in plain.modules():
        if hasattr(layer, "base_layer"):
            layer.base_layer.weight = layer.base_layer.weight.to("cpu")
    fused = fastft.accelerate(copy.deepcopy(plain), verify=False)
    for dtype in (F32, BF16):
        x = torch.randn(2, 70, 64, dtype=dtype)
        torch.testing.assert_close(fused(x), plain(x), rtol=3e-2, atol=3e-2)
    counts = call_counts(fused.base_model.model.q)
    assert (counts.fused, dict(counts.fallback)) == (1, {"mixed dtypes": 1})


def test_verification_chooses_no_dtype() -> None:
    model = quantize(LlamaForCausalLM(tiny_config()).to(BF16), None, quant_type="nf4")
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    fused = fastft.accelerate(get_peft_model(model, LoraConfig(**options)))
    layers = [m for m in fused.modules() if hasattr(m, "compute_type_is_set")]
    assert layers
    assert not any(m.compute_type_is_set or m.compute_dtype for m in layers)


def test_what_has_no_adapter_is_fused_around_4_bits() -> None:
    """A gated MLP whose projections are only frozen, in 4 bits, is verified and fused."""
    model = quantize(LlamaForCausalLM(tiny_config()).to(BF16), BF16, quant_type="nf4")
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    plain = get_peft_model(model, LoraConfig(**options, init_lora_weights=False))
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (fused, plain)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)
    assert {m.kind for m in fastft.explain(fused).modules if m.fused_calls} >= {"glu", "attention"}


def test_a_head_in_4_bits_has_its_logits() -> None:
    """PEFT's layer of dense weights, which it takes where a model does not say what it holds."""
    model = quantize(LlamaForCausalLM(tiny_config()).to(BF16), BF16, quant_type="nf4")
    del model.is_loaded_in_4bit
    head = nn.ModuleDict({"of": model.lm_head})
    model.lm_head = quantize(head, BF16, quant_type="nf4").of  # type: ignore[union-attr]
    options = {"r": 4, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    plain = get_peft_model(model, LoraConfig(**options, init_lora_weights=False))
    fused = fastft.accelerate(copy.deepcopy(plain), verify=False)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (fused, plain)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)


def test_a_mixed_batch_of_few_rows() -> None:
    """They run bitsandbytes' own product, and each sample's adapter."""
    model = adapted(F32, {"quant_type": "nf4"})
    model.add_adapter("b", LoraConfig(r=3, target_modules=["q", "o"], init_lora_weights=False))
    for layer in (model.base_model.model.q, model.base_model.model.k, model.base_model.model.o):
        layer.base_layer.support_avx512bf16_for_cpu = False  # it packs no weight of these sizes
    fused, x = fastft.accelerate(copy.deepcopy(model)).eval(), torch.randn(3, 1, 64)
    names = ["default", "b", "__base__"]
    with torch.no_grad(), fastft.mixed_batch(fused, names):
        torch.testing.assert_close(fused(x), model.eval()(x, adapter_names=names))


def tiny_config() -> LlamaConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    return LlamaConfig(**sizes, **heads)


def tiny_llama(how: dict[str, Any] | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).to(BF16)
    model = quantize(model, BF16, quant_type="nf4", **(how or {}))
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(model, LoraConfig(**options, init_lora_weights=False))


IDS = torch.arange(4, 84).view(2, 40)


def test_a_model_generates_and_is_restored(tmp_path: Path) -> None:
    """Few rows without gradients run bitsandbytes' own products; what leaves is PEFT's."""
    plain = tiny_llama()
    fused = fastft.accelerate(copy.deepcopy(plain))
    classes = [type(m) for m in plain.modules()]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = [m.eval().generate(input_ids=IDS[:1, :6], **options) for m in (fused, plain)]
    assert torch.equal(*tokens)
    # On a CPU that multiplies bfloat16 bitsandbytes packs a weight for these products.
    assert not any(m.fallback_calls for m in fastft.explain(fused).modules)
    fused.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path)
    for (name, p), (other, q) in zip(
        fused.named_parameters(), again.named_parameters(), strict=True
    ):
        if "lora_" in name:
            assert name == other
            assert torch.equal(p, q)
    assert [type(m) for m in fastft.restore(fused).modules()] == classes


def test_patch_peft_makes_fused_layers() -> None:
    fastft.patch_peft()
    try:
        model = adapted(BF16, {"quant_type": "nf4"})
    finally:
        fastft.unpatch_peft()
    model(torch.randn(2, 70, 64, dtype=BF16))
    assert call_counts(model.base_model.model.q).fused == 1
    assert type(adapted(BF16, {"quant_type": "nf4"}).base_model.model.q) is peft_bnb.Linear4bit


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    model = fastft.accelerate(tiny_llama(lora_dropout=0.3)).train()
    model.enable_input_require_grads()

    def gradients() -> list[Tensor]:
        for _ in range(2):
            torch.manual_seed(3)
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(torch.equal(a, b) for a, b in zip(gradients(), want, strict=True))
    assert not any(r.fallback_calls for r in fastft.explain(model).modules if r.kind == "lora")


def test_merging_copies_and_pickles() -> None:
    plain = tiny_llama()
    fused = fastft.accelerate(copy.deepcopy(plain))
    assert_merged_as_peft(fused, plain)
    held = io.BytesIO()
    torch.save(fused, held)
    held.seek(0)
    want = fused(input_ids=IDS, labels=IDS).loss
    for other in (torch.load(held, weights_only=False), copy.deepcopy(fused)):
        assert torch.equal(other(input_ids=IDS, labels=IDS).loss, want)
