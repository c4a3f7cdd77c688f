"""LoRA over convolutions and embeddings, fused, beside PEFT's own layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import fastft
from fastft.nn import FusedLoraEmbedding
from fastft.nn.conv import FUSED_CONVS

F32, BF16 = torch.float32, torch.bfloat16
CONVS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1x1": (nn.Conv2d(12, 20, 1), (12, 5, 7)),
    "1x1-no-bias": (nn.Conv2d(12, 20, 1, bias=False), (12, 5, 7)),
    "1x1-strided": (nn.Conv2d(12, 20, 1, stride=2), (12, 5, 7)),
    "3x3": (nn.Conv2d(12, 20, 3, padding=1), (12, 5, 7)),
    "patches": (nn.Conv2d(3, 20, 4, stride=4), (3, 16, 12)),
    "same": (nn.Conv2d(12, 20, 3, padding="same"), (12, 5, 7)),
    "1d": (nn.Conv1d(12, 20, 3, padding=1), (12, 9)),
    "3d": (nn.Conv3d(6, 20, 3), (6, 5, 4, 5)),
}


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, dtype: torch.dtype = F32, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"], **config}
    model = get_peft_model(Holder(copy.deepcopy(layer)).to(dtype), LoraConfig(**config))
    _randomise(model)
    return model


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=(p.numel() / p.shape[0]) ** -0.5)


def results(model: Any, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    if x.is_floating_point():
        x = x.detach().requires_grad_()
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    leaves = [*([x] if x.requires_grad else []), *wanted.values()]
    names = [*(["dx"] if x.requires_grad else []), *wanted]
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))}


def as_accurate(got: Any, peft: Any, exact: Any) -> None:
    """At most four times PEFT's own error against float64, and four roundings."""
    for name, truth in exact.items():
        scale = truth.norm()
        own, its = ((d[name].double() - truth).norm() / scale for d in (got, peft))
        assert own <= 4 * its + 4 * torch.finfo(got[name].dtype).eps, name


def compare(model: PeftModel, x: Tensor) -> None:
    exact = results(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    peft = results(copy.deepcopy(model), x)
    fastft.accelerate(model, strict=True)
    got = results(model, x)
    assert got["y"].dtype == peft["y"].dtype
    assert got["y"].shape == peft["y"].shape
    as_accurate(got, peft, exact)
    assert fastft.explain(model).to_dict()["calls"] == {"fused": 1, "fallback": {}}


LAYOUTS = [(name, False) for name in CONVS]
LAYOUTS += [(name, True) for name, (_, shape) in CONVS.items() if len(shape) == 3]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("name", "channels_last"), LAYOUTS)
def test_convolutions(name: str, channels_last: bool, dtype: torch.dtype) -> None:
    layer, shape = CONVS[name]
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    compare(adapted(layer, dtype), x)


def test_a_1x1_convolution_of_channels_last_is_one_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And where lora_linear would refuse, the library's convolutions serve."""
    from fastft import ops

    calls: list[int] = []
    plain = ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *a, **k: calls.append(1) or plain(*a, **k))

    def ran(model: PeftModel, layer: nn.Conv2d) -> int:
        fastft.accelerate(model, strict=True)
        del calls[:]
        x = torch.randn(2, layer.in_channels, 5, 7).to(memory_format=torch.channels_last)
        expected = model(x)
        assert fastft.explain(model).to_dict()["calls"]["fallback"] == {}
        fastft.restore(model)
        torch.testing.assert_close(expected, model(x), rtol=1e-4, atol=1e-5)
        return len(calls)

    assert ran(adapted(nn.Conv2d(12, 20, 1)), CONVS["1x1"][0]) == 1
    assert ran(adapted(nn.Conv2d(12, 20, 3)), CONVS["3x3"][0]) == 0
    narrow = nn.Conv2d(4, 4, 1)
    assert ran(adapted(narrow, r=8), narrow) == 0
    hooked, seen = adapted(narrow), []
    conv = hooked.base_model.model.layer.base_layer
    conv.register_full_backward_hook(lambda *a: seen.append(1))
    fastft.accelerate(hooked)
    del seen[:]  # verification called it too
    x = torch.randn(1, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    hooked(x).sum().backward()
    assert seen == [1]


def test_inputs_without_a_batch_run_through_peft() -> None:
    for layer, shape in ((nn.Conv2d(6, 6, 1), (6, 6, 6)), (nn.Conv1d(6, 8, 3), (6, 9))):
        model = adapted(layer)
        x = torch.randn(*shape)
        expected = model(x)
        fastft.accelerate(model)
        assert torch.equal(model(x), expected)
        assert "input without a batch" in str(fastft.explain(model))


def test_an_embedding_under_autocast_keeps_its_dtype() -> None:
    model = adapted(nn.Embedding(30, 16))
    ids = torch.tensor([[1, 3, 3, 29]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(model, ids)
        fastft.accelerate(model)
        got = results(model, ids)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype == F32, name
        # PEFT multiplies in bfloat16 there.
        assert (got[name] - value).norm() <= 4 * torch.finfo(BF16).eps * value.norm(), name


@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_a_convolution_drops_as_peft_says(name: str) -> None:
    """The mean over many masks is the layer without dropout; evaluation has none."""
    layer, shape = CONVS[name]
    model = fastft.accelerate(adapted(layer, lora_dropout=0.4))
    x = torch.randn(1, *shape).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.manual_seed(0)
        model.train()
        drawn = torch.stack([model(x) for _ in range(2000)])
        model.eval()
        plain = model(x)
        assert torch.equal(plain, model(x))
    assert not torch.equal(drawn[0], drawn[1])
    # Five standard errors of the mean, at the element whose draws spread most.
    error = (drawn.mean(0) - plain).abs()
    assert bool((error <= 5 * drawn.std(0) / 2000**0.5 + 1e-5).all())


def test_several_adapters_and_autocast() -> None:
    model = adapted(CONVS["3x3"][0])
    model.add_adapter("more", LoraConfig(r=2, target_modules=["layer"]))
    _randomise(model)
    model.base_model.set_adapter(["default", "more"])
    x = torch.randn(2, 12, 5, 7)
    compare(model, x)
    fastft.restore(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(model, x)
        fastft.accelerate(model)
        got = results(model, x)
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 4 * torch.finfo(BF16).eps * value.norm(), name
        assert got[name].dtype == value.dtype


@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_a_convolution_under_vmap_runs_as_peft_s(name: str) -> None:
    model = adapted(CONVS[name][0])
    x = torch.randn(3, *CONVS[name][1]).unsqueeze(1)
    expected = torch.func.vmap(model)(x)
    got = torch.func.vmap(fastft.accelerate(model))(x)
    assert torch.equal(got, expected)


def test_what_a_convolution_leaves_to_peft() -> None:
    x = torch.randn(2, 12, 5, 7)
    for config, reason in (
        ({"use_dora": True}, "LoRA variant on a convolution"),
        ({"lora_bias": True}, "lora_bias on a convolution"),
    ):
        model = adapted(CONVS["3x3"][0], **config)
        expected = results(model, x)
        fastft.accelerate(model)
        got = results(model, x)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        assert fastft.explain(model).to_dict()["calls"]["fallback"] == {reason: 1}
    grouped = adapted(nn.Conv2d(12, 20, 3, groups=4))
    fastft.accelerate(grouped)
    grouped(x)
    assert "grouped convolution" in str(fastft.explain(grouped))
    merged = fastft.accelerate(adapted(CONVS["3x3"][0]))
    before = merged(x)
    merged.merge_adapter()
    torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-5)
    assert "adapter merged into the base" in str(fastft.explain(merged))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("padding", [None, 3])
def test_embeddings(dtype: torch.dtype, padding: int | None) -> None:
    layer = nn.Embedding(30, 16, padding_idx=padding)
    ids = torch.tensor([[1, 3, 3, 29], [0, 7, 1, 1]])
    compare(adapted(layer, dtype), ids)


def test_a_scaled_embedding_and_several_adapters() -> None:
    """Gemma's embedding multiplies its rows: the adapter's too."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    layer = Gemma3TextScaledWordEmbedding(30, 16, 0, embed_scale=4.0)
    model = adapted(layer)
    model.add_adapter("more", LoraConfig(r=2, target_modules=["layer"]))
    _randomise(model)
    model.base_model.set_adapter(["default", "more"])
    compare(model, torch.tensor([[1, 3, 3, 29]]))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Embedding(30, 16), torch.tensor([[1, 3], [4, 3]])),
        (CONVS["1d"][0], torch.randn(2, 12, 9)),
    ],
    ids=["embedding", "conv"],
)
def test_mixed_batches_run_through_peft(layer: nn.Module, x: Tensor) -> None:
    model = adapted(layer)
    model.add_adapter("more", LoraConfig(r=2, target_modules=["layer"]))
    _randomise(model)
    model.base_model.set_adapter(["default", "more"])
    names = ["default", "more"]
    with torch.no_grad(), fastft.mixed_batch(model, names):
        expected = model(x)
    fastft.accelerate(model)
    with torch.no_grad(), fastft.mixed_batch(model, names):
        assert torch.equal(model(x), expected)
    assert fastft.explain(model).to_dict()["calls"]["fallback"] == {"mixed batch": 1}


@pytest.mark.parametrize("ids", [torch.tensor(3), torch.zeros(2, 0, dtype=torch.int64)], ids=str)
def test_one_token_alone_and_none(ids: Tensor) -> None:
    model = adapted(nn.Embedding(30, 16))
    expected = model(ids)
    fastft.accelerate(model, strict=True)
    torch.testing.assert_close(model(ids), expected)


@pytest.mark.parametrize(
    "layer", [CONVS["3x3"][0], nn.Embedding(30, 16)], ids=["conv", "embedding"]
)
def test_copies_pickles_and_restore(layer: nn.Module) -> None:
    model = adapted(layer)
    keys, kind = list(model.state_dict()), type(model.base_model.model.layer)
    x = torch.randn(2, 12, 5, 7) if isinstance(layer, nn.Conv2d) else torch.tensor([[1, 2]])
    expected = model(x)
    fastft.accelerate(model)
    fused = type(model.base_model.model.layer)
    assert fused in (*FUSED_CONVS.values(), FusedLoraEmbedding)
    assert fused.__name__ == kind.__name__
    assert list(model.state_dict()) == keys
    twin = pickle.loads(pickle.dumps(model.base_model.model.layer))
    assert type(twin) is fused
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-5, atol=1e-5)
    fastft.restore(model)
    assert type(model.base_model.model.layer) is kind
    assert torch.equal(model(x), expected)


def test_compiled_without_a_break() -> None:
    for layer, x in (
        (CONVS["3x3"][0], torch.randn(2, 12, 5, 7)),
        (nn.Embedding(30, 16), torch.tensor([[1, 2]])),
    ):
        model = fastft.accelerate(adapted(layer))
        expected = model(x)
        compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def test_patch_peft_gives_fused_ones() -> None:
    fastft.patch_peft()
    try:
        made = adapted(CONVS["3x3"][0]), adapted(nn.Embedding(30, 16))
    finally:
        fastft.unpatch_peft()
    assert [type(m.base_model.model.layer) for m in made] == [
        FUSED_CONVS[type(adapted(CONVS["3x3"][0]).base_model.model.layer)],
        FusedLoraEmbedding,
    ]


def _table(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(30, 16, **options), nn.Linear(16, 4)).to(torch.bfloat16)


def test_an_embedding_that_is_trained_sums_its_gradient_in_float32() -> None:
    model = _table(padding_idx=2)
    ids = torch.cat([torch.full((900,), 7), torch.arange(30)])
    plain = copy.deepcopy(model).double()
    keys = list(model.state_dict())
    fastft.accelerate(model, strict=True)
    for m in (model, plain):
        m(ids).double().square().sum().backward()
    got, expected = model[0].weight.grad, plain[0].weight.grad
    assert float((got.double() - expected).norm() / expected.norm()) < 0.02
    assert not got[2].any()
    report = [m for m in fastft.explain(model).modules if m.kind == "table"]
    assert [(m.fused, m.backend, m.fused_calls) for m in report] == [(True, "cpu", 1)]
    assert list(model.state_dict()) == keys
    fastft.restore(model)
    assert type(model[0]) is nn.Embedding


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sparse": True}, "sparse"),
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "frequency"),
    ],
)
def test_an_embedding_of_another_kind_is_left_alone(options: Any, reason: str) -> None:
    model = fastft.accelerate(_table(**options))
    (report,) = (m for m in fastft.explain(model).modules if m.kind == "table")
    assert not report.fused
    assert reason in str(report.reason)
    assert type(model[0]) is nn.Embedding


def test_a_frozen_embedding_and_one_that_is_switched_off_are_not_spoken_of() -> None:
    frozen = _table().requires_grad_(False)
    for model in (fastft.accelerate(frozen), fastft.accelerate(_table(), embedding=False)):
        assert type(model[0]) is nn.Embedding


def test_an_embedding_of_a_class_of_its_own_is_named() -> None:
    """Gemma scales the rows, BART moves the ids: trained, they run as they are and explain says
    so."""
    from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.ModuleDict(
        {"ids": Gemma3TextScaledWordEmbedding(30, 16, 0, embed_scale=4.0)}
        | {"places": BartLearnedPositionalEmbedding(12, 16)}
    )
    with pytest.raises(fastft.errors.VerificationError, match="or embedding=False"):
        fastft.accelerate(model, strict=True)
    fastft.accelerate(model)
    found = {m.name: (m.kind, m.fused, m.reason) for m in fastft.explain(model).modules}
    assert found == {
        "ids": ("table", False, "Gemma3TextScaledWordEmbedding is not nn.Embedding itself"),
        "places": ("table", False, "BartLearnedPositionalEmbedding is not nn.Embedding itself"),
    }
    fastft.restore(model)
    model.requires_grad_(False)
    assert not fastft.explain(fastft.accelerate(model)).modules
