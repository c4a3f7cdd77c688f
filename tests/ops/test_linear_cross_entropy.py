from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from harness import Rejected, assert_as_good_as_torch, assert_rejected, poisoned
from torch import Tensor

from fastft import errors, native, ops
from fastft.ops import _linear_cross_entropy_autograd as autograd_module
from fastft.ops._head_loop import default_chunk
from fastft.reference import linear_cross_entropy as reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Case:
    tokens: int
    hidden: int
    vocabulary: int
    ignored: float
    bias: bool = False
    chunk: int | None = None


CASES = [
    Case(1, 8, 5, 0.0),
    Case(37, 45, 29, 0.0, bias=True),
    Case(37, 45, 29, 0.4, chunk=7),
    Case(130, 33, 1001, 0.5, chunk=64),
    Case(64, 64, 4096, 0.1, bias=True, chunk=16),
    Case(50, 16, 3, 0.98),
]


def inputs(
    case: Case, dtype: torch.dtype, head: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    hidden = torch.randn(case.tokens, case.hidden).to(dtype).requires_grad_()
    weight = (3 * torch.randn(case.vocabulary, case.hidden) / case.hidden**0.5).to(dtype)
    bias = torch.randn(case.vocabulary).to(dtype) if case.bias else None
    labels = torch.randint(case.vocabulary, (case.tokens,))
    labels[torch.rand(case.tokens) < case.ignored] = -100
    labels[0] = 1
    return hidden, weight.requires_grad_(head), bias, labels


@pytest.mark.parametrize("head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_as_good_as_torch(backend: str, case: Case, dtype: torch.dtype, head: bool) -> None:
    hidden, weight, bias, labels = inputs(case, dtype, head)

    def gradients(loss: Tensor, h: Tensor, w: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, [h, w] if head else [h])]

    def eager(dtype: torch.dtype) -> list[Tensor]:
        h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        b = None if bias is None else bias.to(dtype)
        count = (labels != -100).sum()
        return gradients(reference.linear_cross_entropy(h, w, b, labels).sum() / count, h, w)

    with poisoned():
        loss, accuracy = ops.linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            backend=backend,
            chunk=case.chunk,
            return_accuracy=True,
        )
        got = gradients(loss, hidden, weight)
    names = ["loss", "d_hidden", "d_weight"][: len(got)]
    # The loss is float32 over dtype's logits: plain torch's own loss sets its bound.
    assert_as_good_as_torch(names, got, eager(dtype), eager(F64), dtype)
    assert got[0].dtype == F32
    assert [g.dtype for g in got[1:]] == [dtype] * (len(got) - 1)
    logits = hidden.detach().to(F64) @ weight.detach().to(F64).t()
    if bias is not None:
        logits = logits + bias.to(F64)
    kept = labels != -100
    right = (logits.argmax(-1) == labels) & kept
    top2 = logits.topk(min(2, case.vocabulary), -1).values
    # Where rounding to dtype may swap the two largest logits, either answer is right.
    unsure = (top2[:, 0] - top2[:, -1]) < 8 * torch.finfo(dtype).eps * top2[:, 0].abs()
    slack = (unsure & kept).sum() / kept.sum()
    assert abs(accuracy.item() - (right.sum() / kept.sum()).item()) <= slack.item() + 1e-6


@pytest.mark.parametrize("isa", native.build_info()["instruction_sets_usable"])
def test_every_instruction_set(isa: str) -> None:
    """The row kernel of each set against float64, far outside exp's easy range too."""
    z = torch.randn(9, 1003) * 30
    z[1] = -z[1].abs() * 1e3
    z[2, 5] = float("inf")
    z[3, 5] = float("nan")
    z[4, ::2] = float("-inf")
    labels = torch.randint(1, 1003, (9,)) | 1
    logits, top, log_sum, z_label = z.clone(), *torch.empty(3, 9)
    argmax = torch.empty(9, dtype=torch.int64)
    native.module().cross_entropy(
        logits.data_ptr(),
        [0] * 5 + [t.data_ptr() for t in (labels, top, log_sum, z_label)] + [0] * 4
        + [argmax.data_ptr()],
        9, 1003, [1.0, 0.0, 0.0, 0.0, 1003.0, 1003.0], True, True, 0, isa=isa,
    )  # fmt: skip
    losses = log_sum + (top - z_label)
    truth = torch.nn.functional.cross_entropy(z.double(), labels, reduction="none")
    gradient = torch.softmax(z.double(), -1) - torch.nn.functional.one_hot(labels, 1003)
    finite = [0, 1, 4, 5, 6, 7, 8]
    torch.testing.assert_close(losses[finite].double(), truth[finite], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits[finite].double(), gradient[finite], rtol=1e-5, atol=1e-7)
    assert bool(losses[[2, 3]].isnan().all())


def test_shift_mean_sum_and_num_items_are_transformers_own() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, weight = torch.randn(3, 11, 16), torch.randn(50, 16)
    labels = torch.randint(50, (3, 11))
    labels[:, :4] = -100
    logits = hidden @ weight.t()
    for items in (None, 17, torch.tensor(17)):
        expected = ForCausalLMLoss(logits, labels, 50, num_items_in_batch=items)
        got = ops.linear_cross_entropy(hidden, weight, labels, shift=True, num_items_in_batch=items)
        torch.testing.assert_close(got, expected)
    summed = ops.linear_cross_entropy(hidden, weight, labels, shift=True, reduction="sum")
    torch.testing.assert_close(summed / 17, expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_loss_for_each_token(backend: str, dtype: torch.dtype, compiled: bool) -> None:
    """Each with a gradient of its own: log-probabilities, weighted tokens, sums over groups."""
    hidden, weight, _, labels = inputs(CASES[2], dtype, False)
    shaped = labels[:36].view(4, 9)
    scale = torch.randn(4, 9)

    def run(h: Tensor) -> Tensor:
        h = h[:36].view(4, 9, -1)
        return ops.linear_cross_entropy(h, weight, shaped, reduction="none", backend=backend)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        h = hidden.detach().to(dtype).requires_grad_()
        logits = (h[:36] @ weight.detach().to(dtype).t()).to(torch.promote_types(dtype, F32))
        losses = torch.nn.functional.cross_entropy(logits, shaped.flatten(), reduction="none")
        grad = torch.autograd.grad((losses * scale.flatten()).sum(), h)[0]
        return [losses.detach(), grad]

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    with poisoned():
        losses = run(hidden)
        (gradient,) = torch.autograd.grad((losses * scale).sum(), hidden)
    assert losses.shape == (4, 9)
    assert not losses[shaped == -100].any()
    got = [losses.detach().flatten(), gradient]
    assert_as_good_as_torch(["losses", "d_hidden"], got, plain(dtype), plain(F64), dtype)


def test_all_ignored_is_nan_as_in_torch_and_zero_gradient() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    labels = torch.full((4,), -100)
    assert bool(ops.linear_cross_entropy(hidden, weight, labels).isnan())
    with poisoned():
        ops.linear_cross_entropy(hidden, weight, labels, reduction="sum").backward()
    assert torch.equal(hidden.grad, torch.zeros(4, 8))


def test_an_ignore_index_above_the_vocabulary() -> None:
    hidden, weight, w = torch.randn(4, 8), torch.randn(9, 8), torch.rand(9)
    labels = torch.tensor([1, 255, 3, 255])
    got = ops.linear_cross_entropy(hidden, weight, labels, ignore_index=255, class_weight=w)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, w, ignore_index=255)
    torch.testing.assert_close(got, expected)


def test_empty_batch() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = ops.linear_cross_entropy(
        hidden, torch.randn(9, 8), torch.empty(0, dtype=torch.int64), reduction="sum"
    )
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, 8)


def test_ignored_tokens_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored rows reach no product."""
    from fastft.cpu import linear_cross_entropy as launcher

    rows: list[int] = []
    original = launcher.project
    monkeypatch.setattr(
        launcher, "project", lambda s, h, w: rows.append(h.shape[0]) or original(s, h, w)
    )
    labels = torch.randint(9, (64,))
    labels[::2] = -100
    ops.linear_cross_entropy(torch.randn(64, 8), torch.randn(9, 8), labels, chunk=16)
    assert rows == [16, 16]


def test_slab_is_an_eighth_of_the_logits_and_bounded() -> None:
    assert default_chunk(1024, 32768, 2, "cpu") == 128
    assert default_chunk(1024, 32768, 2, "cpu", trained=True) == 512
    assert default_chunk(100_000, 49152, 4, "cpu") * 49152 * 4 <= 48 << 20
    # A GPU's products want 2048 tokens, of whole tiles, but at most half of them.
    assert default_chunk(4096, 128256, 2, "cuda") == 2048
    assert default_chunk(65536, 128256, 2, "cuda") == 2048
    assert default_chunk(1024, 128256, 2, "cuda") == 512
    assert default_chunk(32768, 32768, 2, "cuda") == 4096
    assert default_chunk(4096, 128256, 2, "cuda", free_bytes=1 << 30) == 512
    assert default_chunk(4, 10, 4, "cpu") == 16


def test_backward_twice_and_scaled() -> None:
    hidden, weight, _, labels = inputs(CASES[1], F32, True)
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_registered_operation_passes_opcheck_and_compiles() -> None:
    hidden, weight, _, labels = inputs(CASES[1], F32, True)
    arguments = (
        hidden, weight, None, None, None, None, labels, -100, 16, [1.0, 0.0, 0.1, 0.01], "cpu",
        True, [True, True, False, False, False], False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastft.linear_cross_entropy_fwd.default, arguments)

    def run(h: Tensor, w: Tensor) -> Tensor:
        return ops.linear_cross_entropy(h, w, labels) * 2

    expected = torch.autograd.grad(run(hidden, weight), (hidden, weight))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_strided_bias_and_bad_labels_of_a_compiled_graph() -> None:
    hidden, weight, _, labels = inputs(CASES[1], F32, False)
    bias = torch.randn(29, 2)[:, 0]
    got = ops.linear_cross_entropy(hidden, weight, labels, bias=bias)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t() + bias, labels)
    torch.testing.assert_close(got, expected)
    with pytest.raises(errors.ArgumentError, match="labels"):
        torch.ops.fastft.linear_cross_entropy_fwd(
            hidden, weight, None, None, None, None, labels + 29, -100, 16, [1.0, 0.0, 0.0, 0.0],
            "cpu", False, [True, False, False, False, False], False,
        )  # fmt: skip


def test_evaluating_a_trained_head_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.cpu import linear_cross_entropy as launcher

    wanted: list[bool] = []
    original = launcher.rows

    def spy(slab: Tensor, **given: object) -> None:
        wanted.append(given["gradient"])
        original(slab, **given)

    monkeypatch.setattr(launcher, "rows", spy)
    hidden, weight, _, labels = inputs(CASES[1], F32, True)
    with torch.no_grad():
        ops.linear_cross_entropy(hidden, weight, labels)
    ops.linear_cross_entropy(hidden, weight, labels)
    assert list(dict.fromkeys(wanted)) == [False, True]


def test_autocast() -> None:
    hidden, weight, _, labels = inputs(CASES[3], F32, False)
    with torch.autocast("cpu", dtype=BF16):
        loss = ops.linear_cross_entropy(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.dtype == F32
    expected = ops.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    torch.testing.assert_close(loss, expected)


def _rejected() -> list[Rejected]:
    h, w, labels = torch.randn(4, 6), torch.randn(9, 6), torch.tensor([1, 2, -100, 8])

    def call(**change: object) -> object:
        given = {"hidden_states": h, "weight": w, "labels": labels, **change}
        return lambda: ops.linear_cross_entropy(**given)  # type: ignore[arg-type]

    cases = [
        ("no tensor", {"labels": [1]}, errors.DtypeError, ["labels", "torch.Tensor"]),
        ("int32 labels", {"labels": labels.int()}, errors.DtypeError, ["labels", "int64"]),
        ("dtype", {"weight": w.bfloat16()}, errors.DtypeError, ["weight", "float32", "bfloat16"]),
        ("shape", {"weight": w[:, :5]}, errors.ShapeError, ["weight", "(vocabulary, 6)"]),
        ("labels", {"labels": labels[:3]}, errors.ShapeError, ["labels", "(4,)", "(3,)"]),
        ("device", {"labels": labels.to("meta")}, errors.DeviceError, ["labels", "meta"]),
        ("bias", {"bias": torch.zeros(8)}, errors.ShapeError, ["bias", "(9,)"]),
        ("label 9", {"labels": torch.tensor([1, 2, 3, 9])}, errors.ArgumentError,
         ["labels", "0 to 8", "9"]),
        ("label -1", {"labels": torch.tensor([1, 2, 3, -1])}, errors.ArgumentError,
         ["labels", "-1"]),
        ("reduction", {"reduction": "all"}, errors.ArgumentError, ["reduction", "'none'", "all"]),
        ("half an adapter", {"lora_a": torch.zeros(2, 6)}, errors.ArgumentError,
         ["lora_b", "together"]),
        ("rank", {"lora_a": torch.zeros(2, 6), "lora_b": torch.zeros(9, 3)}, errors.ShapeError,
         ["lora_a", "(3, 6)", "(2, 6)"]),
        ("rank of s", {"lora_s": torch.zeros(4, 2), "lora_b": torch.zeros(9, 3)}, errors.ShapeError,
         ["lora_s", "(4, 3)", "(4, 2)"]),
        ("two adapters", {"lora_s": torch.zeros(4, 2), "lora_a": torch.zeros(2, 6),
         "lora_b": torch.zeros(9, 2)}, errors.ArgumentError, ["lora_b", "lora_a or lora_s"]),
        ("smoothing", {"label_smoothing": 1.5}, errors.ArgumentError, ["label_smoothing", "1.5"]),
        ("softcap", {"softcap": 0.0}, errors.ArgumentError, ["softcap", "above 0"]),
        ("class weights", {"class_weight": torch.ones(8)}, errors.ShapeError, ["class_weight"]),
        ("probabilities", {"labels": torch.rand(4, 8)}, errors.ShapeError, ["labels", "(4, 9)"]),
        ("probabilities each", {"labels": torch.rand(4, 9), "reduction": "none",
         "weight": w.clone().requires_grad_()}, errors.ArgumentError, ["reduction", "trained"]),
        ("trained probabilities", {"labels": torch.rand(4, 9).requires_grad_()},
         errors.ArgumentError, ["labels", "without a gradient"]),
        ("shifted probabilities", {"labels": torch.rand(4, 9), "shift": True},
         errors.ArgumentError, ["labels", "probabilities"]),
        ("chunk", {"chunk": 0}, errors.ArgumentError, ["chunk", "at least 1"]),
    ]  # fmt: skip
    return [Rejected(n, call(**c), e, words) for n, c, e, words in cases]


@pytest.mark.parametrize("case", _rejected(), ids=lambda c: c.name)
def test_rejected(case: Rejected) -> None:
    assert_rejected(case)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("each", [False, True], ids=["one", "each-row"])
@pytest.mark.parametrize("shape", [(7, 5), (9,), (0, 5), (4, 40)], ids=str)
def test_gradients_are_scaled_a_panel_at_a_time(
    shape: tuple[int, ...], each: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bits of all at once, whether a panel is some rows or less than one."""
    monkeypatch.setattr(autograd_module, "_PANEL", 16)
    gradient = torch.randn(shape).to(dtype if each else F32)
    scale = torch.randn(shape[0] if each else 1, *[1] * (len(shape) - 1) if each else [])
    found = autograd_module._scaled(gradient, scale, BF16, "cpu")
    assert found.dtype == BF16
    assert torch.equal(found, (gradient * scale).to(BF16))
