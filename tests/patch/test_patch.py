"""accelerate, restore and explain on their own terms; whole models are in tests/integration."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft import errors
from fastft.nn import DeferredLogits, FusedLoraLinear, call_counts, calls
from fastft.nn import head as head_module
from fastft.nn import siblings as siblings_module
from fastft.patch import proofs as proofs_module

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# Activated LoRA: adapters that take the tokens after an invocation only.
ACTIVATED = {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    config = {"r": 4, "target_modules": "all-linear", **config}
    model = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def same(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-4, atol=1e-6)


def test_accelerate_explain_restore() -> None:
    model = llama()
    keys, before = list(model.state_dict()), gradients(model)
    types = {n: type(m) for n, m in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert fastft.accelerate(model) is model
    assert list(model.state_dict()) == keys
    for _ in range(3):
        same(gradients(model), before)
    report = fastft.explain(model)
    # 14 adapters and a head; 5 norms, 2 gated MLPs, 2 attentions and their rotary functions.
    assert report.fused == 26
    assert report.fallback == 0
    data = report.to_dict()
    assert {m["backend"] for m in data["modules"]} == {"cpu"}
    assert data["calls"] == {"fused": 26 * 3, "fallback": {}}
    assert "26 modules fused, 0 not" in str(report)
    fastft.restore(model)
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert "_loss_function" not in model.get_base_model().__dict__
    after = gradients(model)
    assert after[0] == before[0]
    assert all(torch.equal(after[1][n], before[1][n]) for n in before[1])


def test_twice_and_restore_without() -> None:
    model = llama()
    with pytest.raises(errors.ArgumentError, match=r"not accelerated"):
        fastft.restore(model)
    fastft.accelerate(model)
    with pytest.raises(errors.ArgumentError, match=r"restore\(model\) first"):
        fastft.accelerate(model)
    with pytest.raises(errors.DtypeError, match=r"torch.nn.Module.*list"):
        fastft.accelerate([model])  # type: ignore[arg-type]


def test_siblings_share_one_call_and_one_saved_input() -> None:
    model = fastft.accelerate(llama())
    calls: list[int] = []
    original = FusedLoraLinear.fused_call

    def counted(plans: list[Any], x: Tensor) -> Any:
        calls.append(len(plans))
        return original(plans, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedLoraLinear, "fused_call", staticmethod(counted))
        gradients(model)
        assert calls == [1] * 14
        calls.clear()
        gradients(model)
    assert calls == [3, 1, 2, 1] * 2
    layer = model.get_base_model().model.layers[0].self_attn
    group = siblings_module.group_of(layer.q_proj)
    assert group is not None
    assert group.layers() == [layer.q_proj, layer.k_proj, layer.v_proj]
    assert not group._held.__dict__
    assert fastft.explain(model).modules[0].siblings == 3


def test_a_forward_that_raises_keeps_nothing() -> None:
    """q computed k's and v's outputs; nobody fetches them, and nobody drops them either."""
    model = fastft.accelerate(llama())
    for _ in range(2):
        gradients(model)
    attention = model.get_base_model().model.layers[0].self_attn
    seen: list[weakref.ref[Tensor]] = []

    def stop(_: nn.Module, inputs: Any) -> None:
        seen.append(weakref.ref(inputs[0]))
        raise KeyboardInterrupt

    handle = attention.k_proj.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**batch())
    handle.remove()
    group = siblings_module.group_of(attention.q_proj)
    assert group is not None
    assert group._held.__dict__, "q computed for its siblings"
    del group
    fastft.restore(model)
    gc.collect()
    assert seen[0]() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_siblings_learnt_under_checkpointing_never_break_the_recompute(reentrant: bool) -> None:
    """Two forwards before any backward, dropout on: groups come into force only between steps."""
    model = fastft.accelerate(llama(lora_dropout=0.2))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    plain = llama(lora_dropout=0.2)
    plain.train()
    for step in range(3):
        torch.manual_seed(step)
        (model(**batch()).loss + model(**batch()).loss).backward()
    assert fastft.explain(model).modules[0].siblings == 3
    # The same seed, with and without recompute, in force: bitwise the same gradients.
    torch.manual_seed(7)
    first = gradients(model)
    model.gradient_checkpointing_disable()
    torch.manual_seed(7)
    second = gradients(model)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][n], second[1][n]) for n in first[1])


def test_a_recompute_of_the_whole_model_learns_no_siblings() -> None:
    model = get_peft_model(_Residual(changes=False), LoraConfig(r=4, target_modules=["a", "b"]))
    fastft.accelerate(model)
    for _ in range(3):
        checkpoint(model, torch.randn(3, 16), use_reentrant=False).sum().backward()
    assert fastft.explain(model).modules[0].siblings == 2


def test_sibling_called_with_another_tensor_runs_alone() -> None:
    model = fastft.accelerate(llama())
    gradients(model)
    gradients(model)
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 5, 32)
    q, k = attention.q_proj(x), attention.k_proj(x.clone())
    x += 1  # the same object, another content
    v = attention.v_proj(x)
    fastft.restore(model)
    torch.testing.assert_close(v, attention.v_proj(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(k, attention.k_proj(x - 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q, attention.q_proj(x - 1), rtol=1e-4, atol=1e-5)


FALLBACKS = {
    "adapters disabled": lambda m: m.disable_adapter_layers(),
    "adapter merged into the base": lambda m: m.merge_adapter(),
    "DoRA beside another adapter": lambda m: (
        m.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", use_dora=True)),
        m.base_model.set_adapter(["default", "other"]),
    ),
    "hooks on the base layer": lambda m: [
        layer.base_layer.register_forward_hook(lambda *_: None)
        for layer in m.modules()
        if isinstance(layer, FusedLoraLinear)
    ],
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_states_that_are_not_fused_run_as_peft_and_are_counted(reason: str) -> None:
    model = llama()
    FALLBACKS[reason](model)
    expected = model(**batch()).loss.item()
    other = fastft.accelerate(llama())
    FALLBACKS[reason](other)
    assert other(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)
    assert fastft.explain(other).to_dict()["calls"]["fallback"] == {reason: 14}


def test_state_refused_at_first_is_fused_later() -> None:
    model = llama()
    model.merge_adapter()
    fastft.accelerate(model)
    assert fastft.explain(model).fused == 12
    model.unmerge_adapter()
    assert fastft.explain(model).fused == 26


def test_variants_and_other_layers_are_named() -> None:
    model = fastft.accelerate(llama(**ACTIVATED))
    reasons = {m.reason for m in fastft.explain(model).modules if m.kind == "lora"}
    assert reasons == {"LoRA variant other than DoRA"}
    model = fastft.accelerate(llama(target_modules=["embed_tokens", "q_proj"]))
    assert {m.kind for m in fastft.explain(model).modules if m.fused} >= {"lora", "embedding"}
    holder = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    model = fastft.accelerate(get_peft_model(holder, LoraConfig(target_modules=["attention"])))
    reasons = {m.reason for m in fastft.explain(model).modules if not m.fused}
    assert "MultiheadAttention layers are not fused" in reasons


def test_strict_refuses_modules_and_calls() -> None:
    with pytest.raises(errors.VerificationError, match=r"q_proj.*LoRA variant"):
        fastft.accelerate(llama(**ACTIVATED), strict=True)
    model = fastft.accelerate(llama(), strict=True)
    gradients(model)
    with pytest.raises(errors.BackendError, match="adapters disabled"), model.disable_adapter():
        model(**batch())


def test_verification_refuses_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.cpu import lora_linear as launcher

    original = launcher.fwd

    def wrong(ys: list[Tensor], *rest: Any) -> None:
        original(ys, *rest)
        if ys[0].shape[1] == 48:  # gate and up only
            ys[0].mul_(1.001)

    monkeypatch.setattr(launcher, "fwd", wrong)
    model = llama()
    expected = model(**batch()).loss.item()
    fastft.accelerate(model)
    unfused = {m.name.rsplit(".")[-1] for m in fastft.explain(model).modules if not m.fused}
    assert unfused == {"gate_proj", "up_proj"}
    reasons = {str(m.reason) for m in fastft.explain(model).modules if not m.fused}
    assert all(reason.startswith("verification: relative difference") for reason in reasons)
    assert model(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)


def test_verification_runs_once_a_shape_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[Any] = []
    original = proofs_module.difference
    monkeypatch.setattr(
        "fastft.patch.apply.difference",
        lambda m, *kinds, **how: checked.append(m) or original(m, *kinds, **how),
    )
    model = llama()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    fastft.accelerate(model)
    # q and o, k and v, gate and up, down, head: five shapes among fifteen sites; norm, MLP and
    # attention, rope: one each.
    assert len(checked) == 9
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_logits_are_deferred_and_true() -> None:
    model = llama()
    expected = model(**batch()).logits
    fastft.accelerate(model)
    output = model(**batch())
    logits = output.logits
    assert type(logits) is DeferredLogits
    assert (logits.shape, logits.dtype, logits.device.type) == (
        expected.shape,
        torch.float32,
        "cpu",
    )
    assert type(logits.float()) is DeferredLogits
    head = model.get_output_embeddings()
    assert not call_counts(head).fallback
    torch.testing.assert_close(logits[:, 1], expected[:, 1])
    torch.testing.assert_close(logits + 0, expected)
    assert call_counts(head).fallback == {"logits were read": 1}
    (gradient,) = torch.autograd.grad(
        logits.sum(), model.get_base_model().model.layers[0].mlp.up_proj.lora_B.default.weight
    )
    assert bool(gradient.abs().sum() > 0)
    assert "DeferredLogits" in repr(logits)
    # Without labels there is nothing to defer.
    assert type(model(input_ids=batch()["input_ids"]).logits) is Tensor
    assert model.generate(batch()["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 11)


def test_adapter_on_the_head_gets_its_gradient_without_logits() -> None:
    model = llama(target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    before = gradients(model)
    assert any("lm_head" in name for name in before[1])
    fastft.accelerate(model, strict=True)  # which would refuse to read the logits
    same(gradients(model), before)
    (head,) = [m for m in fastft.explain(model).modules if m.kind == "loss"]
    assert head.fused
    assert head.fused_calls == 1
    model.disable_adapter_layers()  # a state that is not deferred: PEFT's layer, real logits
    fastft.restore(model)
    fastft.accelerate(model)
    assert type(model(**batch()).logits) is Tensor


def test_what_models_do_to_logits_is_remembered_not_done() -> None:
    """Scaling, a cap, a bias, shapes and positions: each as torch would have it, and the logits of
    those are never made before cross_entropy."""
    import torch.nn.functional as F

    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=True)
    plain, fused = head, copy.deepcopy(head)
    fused.__class__ = fastft.nn.FusedHead
    hidden, bias = torch.randn(2, 7, 16), torch.randn(1, 50)
    labels, mask = torch.randint(50, (2, 7)), torch.rand(2, 7) > 0.5
    chains = {
        "cohere": lambda z: (z * 0.0625).float().view(-1, 50),
        "granite": lambda z: (z / 8.0)[:, :].reshape(14, 50),
        "gemma": lambda z: (torch.tanh(z / 30.0) * 30.0).contiguous().view(14, -1).view(14, 50),
        "bart": lambda z: (z + bias).view(-1, 50),
        "negative": lambda z: (-1.0 * z).view(-1, 50),  # computed
        "softmax first": lambda z: z.softmax(-1).view(-1, 50),  # computed
    }
    reads = {"negative": 1, "softmax first": 1}
    for name, chain in chains.items():
        losses = []
        for module in (plain, fused):
            x = hidden.clone().requires_grad_()
            with head_module.deferring(module):
                z = chain(module(x))
            loss = F.cross_entropy(z, labels.view(-1), label_smoothing=0.1)
            losses.append([loss, *torch.autograd.grad(loss, [x, module.weight, module.bias])])
        for got, want in zip(losses[1], losses[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert call_counts(fused).fallback["logits were read"] == reads.get(name, 0), name
        calls.reset_call_counts()
    want = plain(hidden)
    for choose in (
        lambda z: z[:, :-1],
        lambda z: z[..., :-1, :],
        lambda z: z[mask],
        lambda z: z[1:, ::2].to(torch.bfloat16),
    ):
        with head_module.deferring(fused):
            z = fused(hidden)
        assert type(choose(z)) is DeferredLogits
        torch.testing.assert_close(choose(z).clone(), choose(want))
    for taken in (lambda z: z[0], lambda z: z[..., 3], lambda z: z[:, :, :5], lambda z: z[None]):
        torch.testing.assert_close(taken(z), taken(want))
    by_keyword = z.view(size=(14, 50))  # computed
    torch.testing.assert_close(by_keyword, want.view(14, 50))
    three = z.transpose(1, 2)  # torch's classes in the second dimension
    assert type(three) is Tensor
    torch.testing.assert_close(F.cross_entropy(three, labels), F.cross_entropy(want.mT, labels))


def test_accuracy_of_accumulation_with_num_items_in_batch() -> None:
    model = llama()
    items = torch.tensor(40)
    expected = model(**batch(), num_items_in_batch=items).loss
    fastft.accelerate(model)
    torch.testing.assert_close(model(**batch(), num_items_in_batch=items).loss, expected)


def test_copies_and_pickles() -> None:
    model = fastft.accelerate(llama())
    expected = gradients(model)
    twin = copy.deepcopy(model)
    same(gradients(twin), expected)
    same(gradients(twin), expected)
    fastft.restore(twin)
    assert not any(isinstance(m, FusedLoraLinear) for m in twin.modules())
    assert any(isinstance(m, FusedLoraLinear) for m in model.modules())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    same(gradients(torch.load(buffer, weights_only=False)), expected)


def test_patch_peft_is_process_wide_and_undone() -> None:
    fastft.patch_peft()
    try:
        assert any(isinstance(m, FusedLoraLinear) for m in llama().modules())
    finally:
        fastft.unpatch_peft()
    assert not any(isinstance(m, FusedLoraLinear) for m in llama().modules())


def test_lora_is_peft_and_accelerate() -> None:
    base = LlamaForCausalLM(LlamaConfig(**SMALL))
    model = fastft.lora(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), loss=False)
    fused = [m.kind for m in fastft.explain(model).modules if m.fused]
    assert fused.count("lora") == 4
    assert set(fused) == {"lora", "norm", "glu", "attention", "rope"}


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (LoraConfig(target_modules=["q_porj"]), errors.ArgumentError, ["q_porj", "'q_proj'"]),
        (LoraConfig(r=4, target_modules=["x"]), errors.ArgumentError, ["'x'", "down_proj", "lm_"]),
        ({"r": 4}, errors.DtypeError, ["peft.LoraConfig", "dict"]),
    ],
)
def test_lora_refuses(config: Any, error: type[Exception], words: list[str]) -> None:
    base = LlamaForCausalLM(LlamaConfig(**SMALL))
    with pytest.raises(error) as info:
        fastft.lora(base, config)
    assert all(word in str(info.value) for word in words), str(info.value)
    assert not any("lora" in name for name, _ in base.named_modules())


def test_rank_zero_is_refused() -> None:
    config = LoraConfig(r=8)
    config.r = 0
    with pytest.raises(errors.ArgumentError, match=r"r: expected at least 1, got 0"):
        fastft.lora(LlamaForCausalLM(LlamaConfig(**SMALL)), config)


def test_errors_survive_pickling() -> None:
    import pickle

    error = errors.ShapeError("here", "x", expected="a", got="b", remedy="c")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is errors.ShapeError
    assert str(twin) == str(error) == "here: x: expected a, got b. c"


class _Residual(nn.Module):
    """Two layers on one tensor object that changes in between, or does not."""

    def __init__(self, changes: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.changes = nn.Linear(16, 16), nn.Linear(16, 16), changes

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.changes:
            x.mul_(3)
        return y + self.b(x)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_input_changed_in_place_between_layers_is_no_sibling(mode: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(_Residual(), LoraConfig(r=4, target_modules=["a", "b"]))
    x = torch.randn(3, 16)
    with mode():
        expected = model(x.clone())
        fastft.accelerate(model)
        for _ in range(3):
            torch.testing.assert_close(model(x.clone()), expected)


def test_logits_read_without_a_graph_still_give_gradients_later() -> None:
    model = fastft.accelerate(llama())
    logits = model(**batch()).logits
    with torch.no_grad():
        first = logits.argmax(-1)
    assert logits.logsumexp(-1).requires_grad
    assert logits.requires_grad
    assert torch.equal(logits.detach().argmax(-1), first)


def test_patched_layers_are_proved_against_peft_not_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = FusedLoraLinear.fused_call
    monkeypatch.setattr(
        FusedLoraLinear,
        "fused_call",
        staticmethod(lambda plans, x: tuple(1.5 * y for y in original(plans, x))),
    )
    fastft.patch_peft()
    try:
        model = fastft.accelerate(llama())
    finally:
        fastft.unpatch_peft()
    reasons = {str(m.reason) for m in fastft.explain(model).modules if m.kind == "lora"}
    assert all(reason.startswith("verification") for reason in reasons)


def test_functorch_and_replaced_forwards_run_as_peft() -> None:
    model = llama()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    plain = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * plain(x)
    expected = model(**batch()).loss.item()
    fastft.accelerate(model)
    assert model(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)
    (report,) = [m for m in fastft.explain(model).modules if m.name.endswith("0.self_attn.q_proj")]
    assert report.reason == "hooks on the base layer"
    up = model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    got = torch.func.grad(lambda x: up(x).square().sum())(x)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(up(x).square().sum(), x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert call_counts(up).fallback == {"torch.func, forward-mode AD or a trace": 1}


def test_logits_read_outside_the_autocast_they_were_made_in() -> None:
    """A wrapper runs the forward under autocast; the loss is somebody else's, outside."""
    model = llama()
    ids = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**ids).logits
    fastft.accelerate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**ids).logits
    assert type(logits) is DeferredLogits
    assert logits.dtype == expected.dtype == torch.bfloat16
    loss = nn.functional.cross_entropy(logits.float().view(-1, 64), ids["labels"].view(-1))
    want = nn.functional.cross_entropy(expected.float().view(-1, 64), ids["labels"].view(-1))
    torch.testing.assert_close(loss, want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits.clone(), expected, rtol=5e-2, atol=5e-2)


def test_a_trained_bias_of_the_head_gets_its_gradient() -> None:
    model = llama()
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(64))
    model(**batch()).loss.backward()
    expected, head.bias.grad = head.bias.grad, None
    fastft.accelerate(model, strict=True)
    model(**batch()).loss.backward()
    torch.testing.assert_close(head.bias.grad, expected)


def test_two_threads_on_one_model() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = fastft.accelerate(llama())
    gradients(model)
    gradients(model)
    inputs = [torch.randint(64, (2, 9)) for _ in range(24)]

    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    expected = [run(ids) for ids in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(run, inputs), expected):
            torch.testing.assert_close(got, want)
