"""What PEFT users do to a PeftModel goes on working when its layers are fused."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file
from transformers.integrations.peft import MIN_PEFT_VERSION

import fastft
from tests.integration import tiny

BATCH = tiny.inputs("llama")


@pytest.fixture
def pair() -> tuple[PeftModel, PeftModel]:
    """The same model twice: plain, and with its LoRA layers and its loss accelerated: a call that
    runs PEFT's own code then gives PEFT's own bits."""
    plain = tiny.peft_model("llama")
    fused = copy.deepcopy(plain)
    return plain, fastft.accelerate(fused, **tiny.LORA_ONLY)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=BATCH["input_ids"]).logits


def fused_and_not(model: torch.nn.Module) -> tuple[int, dict[str, int]]:
    """Calls of LoRA layers since the counters were last at zero."""
    reports = [m for m in fastft.explain(model).to_dict()["modules"] if m["kind"] == "lora"]
    fallback: dict[str, int] = {}
    for report in reports:
        for reason, count in report["fallback_calls"].items():
            fallback[reason] = fallback.get(reason, 0) + count
    return sum(report["fused_calls"] for report in reports), fallback


def test_merge_and_unload(pair: tuple[PeftModel, PeftModel]) -> None:
    plain, fused = pair
    merged = fused.merge_and_unload()
    assert torch.equal(logits(merged), logits(plain.merge_and_unload()))
    assert not tiny.lora_layers(merged)


def test_merge_and_unmerge_in_place(pair: tuple[PeftModel, PeftModel]) -> None:
    plain, fused = pair
    for model in pair:
        model.merge_adapter()
    assert torch.equal(logits(fused), logits(plain))
    count, fallback = fused_and_not(fused)
    assert count == 0
    assert set(fallback) == {"adapter merged into the base"}
    for model in pair:
        model.unmerge_adapter()
    logits(fused)
    assert fused_and_not(fused)[0] == len(tiny.lora_layers(fused))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_merge_and_unmerge_is_exact(name: str, adapters: torch.dtype) -> None:
    """A hundred round trips, two adapters, DoRA and biases among them: the same bits; the merged
    weights are PEFT's own."""
    plain = tiny.peft_model(name, lora_bias=name == "qwen2", target_modules=["c_attn"] if name ==
                            "gpt2" else ["q_proj", "k_proj"])  # fmt: skip
    options = {"use_dora": True} if name == "llama" else {}
    targets = ["c_attn"] if name == "gpt2" else ["q_proj"]
    plain.add_adapter("other", LoraConfig(r=2, target_modules=targets, **options))
    norms = {n: 1.1 * p.data for n, p in plain.named_parameters() if "magnitude" in n}
    tiny.fill_adapters(plain)
    for key, norm in norms.items():
        plain.get_parameter(key).data.copy_(norm)
    plain.to(torch.bfloat16)
    for key, parameter in plain.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(adapters)
    fused = fastft.accelerate(copy.deepcopy(plain))
    before = {key: tensor.clone() for key, tensor in fused.state_dict().items()}
    for turn in range(100):
        names = (["default"], ["other"], ["default", "other"])[turn % 3]
        fused.merge_adapter(adapter_names=names, safe_merge=turn % 2 == 1)
        # PEFT takes the first out and puts it back to merge DoRA after it: another rounding.
        if turn < 2 or (turn == 2 and not options):
            theirs = copy.deepcopy(plain)
            theirs.merge_adapter(adapter_names=names, safe_merge=turn % 2 == 1)
            merged = theirs.state_dict()
            assert all(torch.equal(t, merged[key]) for key, t in fused.state_dict().items())
        fused.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in fused.state_dict().items())
    assert not any("fastft_unmerged" in vars(m) for m in fused.modules())


def test_a_weight_changed_while_merged_is_not_overwritten() -> None:
    model = fastft.accelerate(tiny.peft_model("llama"))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    model.merge_adapter()
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    expected = layer.base_layer.weight - layer.get_delta_weight("default")
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, expected)
    model.merge_adapter()
    fastft.restore(model)
    assert "fastft_unmerged" not in vars(layer)


def test_deepcopy_is_independent(pair: tuple[PeftModel, PeftModel]) -> None:
    plain, fused = pair
    tiny.step(fused, BATCH)
    twin = copy.deepcopy(fused)
    exact = tiny.in_float64(plain)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(2.0)
    tiny.assert_as_exact(tiny.step(twin, BATCH), tiny.step(plain, BATCH), tiny.step(exact, BATCH))
    assert fused_and_not(twin)[0] == len(tiny.lora_layers(twin))
    fastft.restore(twin)
    tiny.assert_equal(tiny.step(twin, BATCH), tiny.step(plain, BATCH))
    assert all(type(layer) is not PeftLinear for layer in tiny.lora_layers(fused).values())


def test_save_and_load(pair: tuple[PeftModel, PeftModel], tmp_path: Path) -> None:
    """The same file as PEFT writes; it loads into plain PEFT and into a fused model."""
    plain, fused = pair
    for name, model in zip(("plain", "fused"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
    theirs = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    configs = [
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("plain", "fused")
    ]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]

    torch.manual_seed(0)
    base = tiny.ARCHITECTURES["llama"].build()
    loaded = PeftModel.from_pretrained(base, tmp_path / "fused", is_trainable=True)
    assert torch.equal(logits(loaded), logits(plain))
    fastft.accelerate(loaded, **tiny.LORA_ONLY)
    assert torch.equal(logits(loaded), logits(fused))


def test_load_adapter_into_an_accelerated_model(
    pair: tuple[PeftModel, PeftModel], tmp_path: Path
) -> None:
    plain, fused = pair
    tiny.fill_adapters(plain, seed=9)
    plain.save_pretrained(tmp_path)
    fused.load_adapter(tmp_path, "other", is_trainable=True)
    fused.set_adapter("other")
    exact = tiny.in_float64(plain)
    with torch.no_grad():
        truth = exact.eval()(input_ids=BATCH["input_ids"]).logits
    bound = tiny.ERROR_FACTOR * tiny.relative(logits(plain), truth)
    assert tiny.relative(logits(fused), truth) <= bound
    assert fused_and_not(fused)[1] == {}


def test_add_and_set_adapter(pair: tuple[PeftModel, PeftModel]) -> None:
    """A second adapter of another rank and other targets; then the first again."""
    plain, fused = pair
    for model in pair:
        torch.manual_seed(3)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        tiny.fill_adapters(model, seed=4)
        model.set_adapter("second")
    exact = tiny.in_float64(plain)
    got = tiny.step(fused, BATCH)
    assert all("second" in name for name in got[1])
    tiny.assert_as_exact(got, tiny.step(plain, BATCH), tiny.step(exact, BATCH))
    count, fallback = fused_and_not(fused)
    assert count == 4
    assert set(fallback) == {"no active adapter"}
    for model in pair:
        model.set_adapter("default")
    tiny.assert_as_exact(
        tiny.step(fused, BATCH), tiny.step(plain, BATCH), tiny.step(tiny.in_float64(plain), BATCH)
    )


def test_delete_adapter(pair: tuple[PeftModel, PeftModel]) -> None:
    _, fused = pair
    fused.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    fused.delete_adapter("second")
    assert not any("second" in name for name, _ in fused.named_parameters())
    tiny.step(fused, BATCH)
    assert fused_and_not(fused)[1] == {}


def test_disable_adapter(pair: tuple[PeftModel, PeftModel]) -> None:
    plain, fused = pair
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(logits(fused), logits(plain))
    assert set(fused_and_not(fused)[1]) == {"adapters disabled"}
    logits(fused)
    assert fused_and_not(fused)[0] == len(tiny.lora_layers(fused))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_dora_and_rslora(name: str, options: dict[str, bool]) -> None:
    """With magnitudes that differ from the norms they start at; three steps, for siblings."""
    plain = tiny.peft_model(name, **options)
    for key, parameter in plain.named_parameters():
        if "magnitude" in key:
            parameter.data *= torch.linspace(0.5, 1.5, parameter.numel())
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    for seed in range(3):
        batch = tiny.inputs(name, seed=seed)
        result = [tiny.step(m, batch) for m in (fused, plain, exact)]
        tiny.assert_as_exact(*result)
    assert fused_and_not(fused) == (3 * len(tiny.lora_layers(fused)), {})
    magnitudes = sum("magnitude" in key for key in result[0][1])
    assert magnitudes == (len(tiny.lora_layers(fused)) if "use_dora" in options else 0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_dora_under_dropout(name: str) -> None:
    """PEFT then multiplies the frozen matrix with the dropped input, too. Masks are torch's, drawn
    in PEFT's order: with the same seed the numbers are PEFT's."""
    plain = tiny.peft_model(name, use_dora=True, dropout=0.3)
    for key, parameter in plain.named_parameters():
        if "magnitude" in key:
            parameter.data *= torch.linspace(0.5, 1.5, parameter.numel())
    fused = fastft.accelerate(copy.deepcopy(plain))
    for seed in range(3):
        batch = tiny.inputs(name, seed=seed)
        results = []
        for model in (fused, plain):
            torch.manual_seed(seed)
            results.append(tiny.step(model, batch))
        (got, found), (want, expected) = results
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert fused_and_not(fused) == (3 * len(tiny.lora_layers(fused)), {})


def test_norms_of_frozen_weights_are_taken_once_and_follow_what_changes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dora = importlib.import_module("fastft.ops.dora_scale")
    taken: list[torch.Tensor] = []
    plain_norms = dora.squared_row_norms

    def counted(weight: torch.Tensor) -> torch.Tensor:
        taken.append(weight)
        return plain_norms(weight)

    for module in (dora, fastft.ops):
        monkeypatch.setattr(module, "squared_row_norms", counted)
    plain = tiny.peft_model("llama", use_dora=True)
    switches = {"norm": False, "glu": False, "attention": False, "verify": False}
    fused = fastft.accelerate(copy.deepcopy(plain), **switches)
    for _ in range(3):
        tiny.step(fused, BATCH)
    assert len(taken) == len(tiny.lora_layers(fused))

    def both(change: str) -> None:
        for model in (plain, fused):
            weight = next(iter(tiny.lora_layers(model).values())).base_layer.weight
            with torch.no_grad():
                if change == "in place":
                    weight.mul_(1.5)
                elif change == "data":
                    weight.data = weight.data * 1.5
                elif change == "an adapter that alters the base":
                    config = LoraConfig(
                        r=4, use_dora=True, init_lora_weights="olora", target_modules=["q_proj"]
                    )
                    model.add_adapter("other", config)
                    model.set_adapter("other")
                    model.set_adapter("default")
                else:
                    model.merge_adapter()
                    model.unmerge_adapter()

    for change in ("in place", "data", "merged and back", "an adapter that alters the base"):
        both(change)
        torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-4, atol=1e-5)


def test_dora_compiles_without_a_graph_break() -> None:
    model = fastft.accelerate(tiny.peft_model("llama", use_dora=True))
    expected = tiny.step(model, BATCH)[1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**BATCH).loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(got) == set(expected)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_dora_merges_and_saves_as_peft(tmp_path: Path) -> None:
    plain = tiny.peft_model("llama", use_dora=True)
    fused = fastft.accelerate(copy.deepcopy(plain))
    for name, model in (("plain", plain), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "fused")]
    assert list(files[0]) == list(files[1])
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    expected = logits(fused)
    merged = fastft.restore(fused).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_lora_bias_is_trained(name: str) -> None:
    """With a base bias under it and without."""
    plain = tiny.peft_model(name, lora_bias=True, target_modules=["q_proj", "v_proj"])
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    for seed in range(3):
        batch = tiny.inputs(name, seed=seed)
        got = tiny.step(fused, batch)
        tiny.assert_as_exact(got, tiny.step(plain, batch), tiny.step(exact, batch))
    assert sum("lora_B.default.bias" in key for key in got[1]) == 4
    fallback = fused_and_not(fused)[1]
    assert not fallback


def test_trained_base_bias() -> None:
    """`bias="lora_only"` trains the base layers' biases beside the adapters."""
    plain = tiny.peft_model("qwen2", bias="lora_only")
    fused = fastft.accelerate(copy.deepcopy(plain))
    batch = tiny.inputs("qwen2")
    got = tiny.step(fused, batch)
    assert any(name.endswith("base_layer.bias") for name in got[1])
    tiny.assert_as_exact(got, tiny.step(plain, batch), tiny.step(tiny.in_float64(plain), batch))


def test_fastft_lora_is_get_peft_model_and_accelerate() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    models = []
    for make in (fastft.lora, get_peft_model):
        torch.manual_seed(0)
        models.append(make(tiny.ARCHITECTURES["llama"].build(), copy.deepcopy(config)))
    assert type(models[0]) is type(models[1])
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    tiny.step(models[0], BATCH)
    assert fused_and_not(models[0]) == (4, {})


def test_patch_peft_serves_every_way_to_make_adapters() -> None:
    """get_peft_model and Transformers' own add_adapter give fused layers until unpatched."""
    from peft.tuners.lora import model as peft_lora_model

    original = peft_lora_model.dispatch_default
    fastft.patch_peft()
    try:
        fastft.patch_peft()
        model = tiny.peft_model("llama")
        tiny.step(model, BATCH)
        assert fused_and_not(model) == (len(tiny.lora_layers(model)), {})
        # Transformers 5.24 wants a PEFT here that is not out yet.
        if Version(peft.__version__) >= Version(MIN_PEFT_VERSION):
            torch.manual_seed(0)
            native = tiny.ARCHITECTURES["llama"].build()
            native.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
            tiny.step(native, BATCH)
            assert fused_and_not(native) == (2, {})
    finally:
        fastft.unpatch_peft()
    assert peft_lora_model.dispatch_default is original
    after = tiny.peft_model("llama")
    assert all(type(layer) is PeftLinear for layer in tiny.lora_layers(after).values())


def test_strict_raises_where_a_layer_cannot_be_fused() -> None:
    model = tiny.peft_model("llama", alora_invocation_tokens=[1])
    types = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(fastft.errors.VerificationError, match="LoRA variant"):
        fastft.accelerate(model, strict=True)
    assert {name: type(m) for name, m in model.named_modules()} == types


def test_strict_raises_at_a_call_that_cannot_be_fused() -> None:
    model = fastft.accelerate(tiny.peft_model("llama"), strict=True)
    tiny.step(model, BATCH)
    with model.disable_adapter(), pytest.raises(fastft.errors.BackendError, match="disabled"):
        model(**BATCH)


def test_verify_leaves_a_layer_alone_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel gone wrong is noticed before it trains anything."""
    from fastft.cpu import lora_linear

    right = lora_linear.fwd

    def wrong(ys: list, *rest: object) -> None:
        right(ys, *rest)
        ys[0][0, 0] += 1.0

    monkeypatch.setattr(lora_linear, "fwd", wrong)
    plain = tiny.peft_model("llama")
    model = fastft.accelerate(copy.deepcopy(plain))
    monkeypatch.undo()
    assert all(type(layer) is PeftLinear for layer in tiny.lora_layers(model).values())
    reports = [m for m in fastft.explain(model).to_dict()["modules"] if m["kind"] == "lora"]
    assert all("verification" in report["reason"] for report in reports)


def test_accelerate_twice_and_restore_twice_are_refused(
    pair: tuple[PeftModel, PeftModel],
) -> None:
    _, fused = pair
    with pytest.raises(fastft.errors.ArgumentError):
        fastft.accelerate(fused)
    fastft.restore(fused)
    with pytest.raises(fastft.errors.ArgumentError):
        fastft.restore(fused)


def test_switches_of_accelerate() -> None:
    kinds = ("lora", "loss", "norm", "glu", "attention", "rope")
    for kind in kinds:
        switches = {other: other == kind for other in kinds}
        model = fastft.accelerate(tiny.peft_model("llama"), **switches)
        found = fastft.explain(model).to_dict()["modules"]
        assert {m["kind"] for m in found if m["fused"]} == {kind}
        assert {m["kind"] for m in found} == set(kinds)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_within_twice_peft_s_own_error(dropout: float) -> None:
    """bfloat16 layers of PEFT, adapters in bfloat16, against float64: the output and each gradient.
    With dropout on PEFT draws another mask: its error is that of the same layer without."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(192, 160)
    x, dy = torch.randn(300, 192), torch.randn(300, 160)

    def build(dtype: torch.dtype, p: float) -> PeftModel:
        torch.manual_seed(1)
        holder = torch.nn.ModuleDict({"layer": copy.deepcopy(layer)}).bfloat16()
        config = LoraConfig(r=16, lora_alpha=32, target_modules=["layer"], lora_dropout=p)
        model = get_peft_model(holder, config, autocast_adapter_dtype=False)
        torch.nn.init.normal_(model.base_model.model.layer.lora_B["default"].weight, std=0.2)
        return model.to(dtype)

    def run(model: PeftModel, seen: torch.Tensor) -> dict[str, torch.Tensor]:
        own = model.base_model.model.layer
        dtype = own.base_layer.weight.dtype
        seen = seen.bfloat16().to(dtype).requires_grad_()
        y = own(seen)
        parts = {"da": own.lora_A["default"].weight, "db": own.lora_B["default"].weight}
        leaves = [seen, *parts.values()]
        gradients = torch.autograd.grad(y, leaves, dy.bfloat16().to(dtype))
        return {"y": y.detach(), **dict(zip(["dx", *parts], gradients, strict=True))}

    truth, peft = run(build(torch.float64, 0.0), x), run(build(torch.bfloat16, 0.0), x)
    fused = fastft.accelerate(build(torch.bfloat16, dropout))
    if dropout:  # every element kept: the masked products, and a truth that is known
        from fastft.cpu import lora_linear as launcher

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "dropout_mask", lambda out, seed, p: out.fill_(255))
            patch.setattr(launcher, "keep", lambda mask, p: 1.0)
            got = run(fused, x)
    else:
        got = run(fused, x)
    for name, exact in truth.items():
        own, its = ((r[name].double() - exact).norm() for r in (got, peft))
        assert own <= 2 * its, f"{name}: {own / exact.norm():.2e}, PEFT {its / exact.norm():.2e}"


def test_hot_swap(tmp_path: Path) -> None:
    """PEFT's hotswap_adapter writes another adapter over the one in use: fused layers follow."""
    from peft.utils.hotswap import hotswap_adapter

    plain = tiny.peft_model("llama")
    other = tiny.peft_model("llama")
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_" in name:
                p.mul_(-1.5)
    other.save_pretrained(tmp_path)
    fused = fastft.accelerate(copy.deepcopy(plain), **tiny.LORA_ONLY)
    before = logits(fused)
    for model in (plain, fused):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    after = logits(fused)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, logits(plain), rtol=1e-4, atol=1e-5)
    assert fused_and_not(fused)[1] == {}
