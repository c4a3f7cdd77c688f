from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned
from torch import Tensor

from fastft import errors, native, ops
from fastft.reference.linear_cross_entropy import divergence
from tests.kernels.cases import DIVERGENCE_CASES

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize("from_logits", [False, True], ids=["from-hidden", "from-logits"])
@pytest.mark.parametrize("name", DIVERGENCE_CASES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(backend: str, name: str, from_logits: bool) -> None:
    case = DIVERGENCE_CASES[name]
    inputs = case.inputs()
    with poisoned():
        got = inputs.through_op(backend, from_logits)
    plain, truth = inputs.autograd(case.dtype), inputs.autograd(F64)
    assert_as_good_as_torch(
        list(got), list(got.values()), [plain[k] for k in got], [truth[k] for k in got], case.dtype
    )


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_every_instruction_set(isa: str, kind: int) -> None:
    """The row kernel of each set against float64, far outside exp's and log's easy range too."""
    z, t = torch.randn(6, 1003) * 30, torch.randn(6, 1003) * 30
    z[1, ::2] = float("-inf")
    t[1, ::2] = float("-inf")
    z[2] = t[2]
    if kind != 1:
        t[3, 5:] = float("-inf")
    losses, gradient = torch.empty(6), z.clone()
    native.module().divergence(
        gradient.data_ptr(), t.data_ptr(), 0, 0, 0, losses.data_ptr(), 6, 1003, kind,
        [1.0, 0.0, 1.0, 0.0, 1.0, 0.3], True, 0, 0, isa=isa,
    )  # fmt: skip
    wide = z.double().requires_grad_()
    truth = divergence(kind, wide, t.double(), 0.3)
    torch.testing.assert_close(losses.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    finite = [0, 2, 3, 4, 5]
    (expected,) = torch.autograd.grad(truth[finite].sum(), wide)
    torch.testing.assert_close(gradient[finite].double(), expected[finite], rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(gradient).all())


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8)
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon"):
        loss = ops.linear_divergence(hidden, weight, hidden.detach() @ weight.t(), kind=kind)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert abs(loss.item()) < 1e-6
        assert gradient.abs().max() < 1e-6


def test_reductions_masks_and_a_trained_bias() -> None:
    hidden = torch.randn(2, 6, 8, requires_grad=True)
    weight, bias = torch.randn(40, 8), torch.randn(40, requires_grad=True)
    teacher, mask = torch.randn(2, 6, 40), torch.rand(2, 6) > 0.4
    each = ops.linear_divergence(hidden, weight, teacher, mask=mask, reduction="none")
    assert each.shape == (2, 6)
    assert not each[~mask].any()
    scale = torch.randn(2, 6)
    got = torch.autograd.grad((each * scale).sum(), hidden)[0]
    plain = divergence(0, hidden @ weight.t(), teacher, 0.5)
    want = torch.autograd.grad((plain * mask * scale).sum(), hidden)[0]
    torch.testing.assert_close(got, want)
    mean = ops.linear_divergence(hidden, weight, teacher, mask=mask, bias=bias)
    torch.testing.assert_close(
        mean, divergence(0, hidden @ weight.t() + bias, teacher, 0.5)[mask].mean()
    )
    (d_bias,) = torch.autograd.grad(mean, bias)
    plain = divergence(0, hidden.detach() @ weight.t() + bias, teacher, 0.5)[mask].mean()
    torch.testing.assert_close(d_bias, torch.autograd.grad(plain, bias)[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_entropies(backend: str) -> None:
    """Of the student's distribution at the temperature, where a token counts."""
    hidden, weight, bias = torch.randn(2, 6, 8), torch.randn(40, 8), torch.randn(40)
    teacher, mask = torch.randn(2, 6, 40), torch.rand(2, 6) > 0.4
    options: dict[str, Any] = {"bias": bias, "softcap": 3.0, "temperature": 1.7, "logit_scale": 1.5}
    hidden.requires_grad_()
    loss, entropy = ops.linear_divergence(
        hidden, weight, teacher, mask=mask, return_entropy=True, chunk=3, backend=backend, **options
    )
    assert not entropy.requires_grad
    z = 3 * torch.tanh(1.5 * (hidden.detach() @ weight.t() + bias) / 3) / 1.7
    want = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1) * mask
    torch.testing.assert_close(entropy, want, rtol=1e-5, atol=1e-5)
    same = ops.linear_divergence(hidden, weight, teacher, mask=mask, backend=backend, **options)
    torch.testing.assert_close(loss, same)


def test_autocast() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8)
    teacher = torch.randn(5, 40)
    with torch.autocast("cpu", dtype=BF16):
        loss = ops.linear_divergence(hidden, weight, teacher)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.dtype == F32
    expected = ops.linear_divergence(hidden.bfloat16(), weight.bfloat16(), teacher)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_an_adapter_of_the_head(kind: str, chunk: int | None) -> None:
    """Against plain torch in float64: the loss and each gradient."""
    shapes = {"hidden_states": (2, 5, 8), "weight": (40, 8), "bias": (40,), "lora_s": (2, 5, 3),
              "lora_b": (40, 3)}  # fmt: skip
    given = {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}
    teacher, mask = torch.randn(2, 5, 40, dtype=F64), torch.rand(2, 5) > 0.3
    mask[0, 0] = True

    def plain(
        hidden_states: Tensor, weight: Tensor, bias: Tensor, lora_s: Tensor, lora_b: Tensor
    ) -> Tensor:
        z = (hidden_states @ weight.t() + lora_s @ lora_b.t() + bias) * 1.5
        return ops.divergence(z, teacher, kind=kind, temperature=2.0, mask=mask)

    def results(dtype: torch.dtype, fused: bool) -> list[Tensor]:
        leaves = {name: t.clone().to(dtype).requires_grad_() for name, t in given.items()}
        if fused:
            loss = ops.linear_divergence(
                teacher=teacher.to(dtype), kind=kind, temperature=2.0, logit_scale=1.5, mask=mask,
                chunk=chunk, **leaves,
            )  # fmt: skip
        else:
            loss = plain(**leaves)
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]

    got = results(F32, fused=True)
    for a, b in zip(got, results(F64, fused=False), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    frozen = {name: t.float() for name, t in given.items()}
    frozen["lora_s"].requires_grad_()
    each = ops.linear_divergence(teacher=teacher.float(), reduction="none", **frozen)
    assert bool(torch.autograd.grad(each.sum(), frozen["lora_s"])[0].abs().sum() > 0)


def _rejected() -> list[Rejected]:
    h, w, teacher = torch.randn(4, 6), torch.randn(9, 6), torch.randn(4, 9)

    def call(**change: object) -> object:
        given: dict[str, Tensor] = {"hidden_states": h, "weight": w, "teacher": teacher, **change}
        return lambda: ops.linear_divergence(**given)  # type: ignore[arg-type]

    smaller = ops.Teacher(torch.randn(3, 5), torch.randn(9, 5))
    cases = [
        ("no tensor", {"teacher": [1]}, errors.DtypeError, ["teacher", "torch.Tensor"]),
        ("dtype", {"weight": w.bfloat16()}, errors.DtypeError, ["weight", "float32"]),
        ("vocabulary", {"teacher": teacher[:, :8]}, errors.ShapeError, ["teacher", "(4, 9)"]),
        ("tokens", {"teacher": smaller}, errors.ShapeError, ["teacher.hidden_states", "(4, 5)"]),
        ("bias", {"teacher": ops.Teacher(h, w, torch.zeros(3))}, errors.ShapeError,
         ["teacher.bias", "(9,)"]),
        ("device", {"teacher": teacher.to("meta")}, errors.DeviceError, ["teacher", "meta"]),
        ("mask", {"mask": torch.ones(4)}, errors.DtypeError, ["mask", "bool"]),
        ("kind", {"kind": "kl"}, errors.ArgumentError, ["kind", "forward_kl"]),
        ("temperature", {"temperature": 0.0}, errors.ArgumentError, ["temperature", "above 0"]),
        ("beta", {"beta": 1.0}, errors.ArgumentError, ["beta", "between 0 and 1"]),
        ("reduction", {"reduction": "all"}, errors.ArgumentError, ["reduction", "all"]),
        ("adapter alone", {"lora_b": torch.zeros(9, 2)}, errors.DtypeError, ["lora_s"]),
        ("rank", {"lora_s": torch.zeros(4, 3), "lora_b": torch.zeros(9, 2)}, errors.ShapeError,
         ["lora_s", "(4, 2)"]),
        ("adapter's rows", {"lora_s": torch.zeros(4, 2), "lora_b": torch.zeros(8, 2)},
         errors.ShapeError, ["lora_b", "(9, 2)"]),
        ("trained adapter", {"reduction": "none", "lora_s": torch.zeros(4, 2),
                             "lora_b": torch.zeros(9, 2).requires_grad_()},
         errors.ArgumentError, ["trained head"]),
        ("trained head", {"reduction": "none", "weight": w.clone().requires_grad_()},
         errors.ArgumentError, ["trained head"]),
    ]  # fmt: skip
    return [Rejected(n, call(**c), e, words) for n, c, e, words in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)
