"""The options of ``linear_cross_entropy``: each beside torch's own, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from harness import assert_as_good_as_torch, poisoned
from torch import Tensor

from fastft import ops
from fastft.reference import linear_cross_entropy as reference

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
T, H, V, R = 37, 45, 301, 4

OPTIONS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "scale and softcap": {"logit_scale": 2.0, "softcap": 5.0},
    "z-loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.2},
    "class weights": {"weighted": True},
    "smoothing with class weights": {"label_smoothing": 0.3, "weighted": True},
    "all": {"label_smoothing": 0.1, "weighted": True, "softcap": 4.0, "z_loss": 0.05,
            "logit_scale": 1.5},
}  # fmt: skip


def draw(dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {
        "hidden": torch.randn(T, H),
        "weight": 3 * torch.randn(V, H) / H**0.5,
        "bias": torch.randn(V),
        "lora_a": torch.randn(R, H) / H**0.5,
        "lora_b": torch.randn(V, R),
    }
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def labels_of(ignored: float = 0.3) -> Tensor:
    labels = torch.randint(V, (T,))
    labels[torch.rand(T) < ignored] = -100
    labels[0] = 1
    return labels


def plain(
    tensors: dict[str, Tensor], labels: Tensor, dtype: torch.dtype, class_weight: Tensor | None,
    weights: Tensor | None, options: dict[str, Any],
) -> list[Tensor]:  # fmt: skip
    """Through all logits: the loss (each token's where weighted) and every gradient."""
    t = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    hidden, weight = t["hidden"], t["weight"]
    if "lora_a" in t:  # as W + B A, in other words [h | h A^T] [W | B]^T
        hidden = torch.cat([hidden, (hidden @ t["lora_a"].t()) * 0.5], 1)
        weight = torch.cat([weight, t["lora_b"]], 1)
    each = reference.linear_cross_entropy(
        hidden,
        weight,
        t.get("bias"),
        labels,
        class_weight=class_weight,
        label_smoothing=options.get("label_smoothing", 0.0),
        z_loss=options.get("z_loss", 0.0),
        scale=options.get("logit_scale", 1.0),
        softcap=options.get("softcap") or 0.0,
    )
    if weights is not None:
        loss = (each * weights).sum()
        return [each.detach(), *torch.autograd.grad(loss, list(t.values()))]
    kept = labels != -100
    divisor = kept.sum() if class_weight is None else class_weight[labels[kept]].sum()
    loss = each.sum() / divisor
    return [loss.detach(), *torch.autograd.grad(loss, list(t.values()))]


@pytest.mark.parametrize("per_token", [False, True], ids=["mean", "each"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_options(backend: str, name: str, dtype: torch.dtype, per_token: bool) -> None:
    """Head, bias and adapter all trained; the mean, and each token with a weight of its own, for
    which the backward makes the logits again."""
    options = dict(OPTIONS[name])
    class_weight = torch.rand(V) + 0.5 if options.pop("weighted", False) else None
    tensors, labels = draw(dtype), labels_of()
    weights = torch.randn(T) if per_token else None
    with poisoned():
        loss = ops.linear_cross_entropy(
            tensors["hidden"], tensors["weight"], labels, bias=tensors["bias"],
            class_weight=class_weight, lora_a=tensors["lora_a"], lora_b=tensors["lora_b"],
            scaling=0.5, reduction="none" if per_token else "mean", backend=backend, chunk=9,
            **options,
        )  # fmt: skip
        total = loss if weights is None else (loss * weights).sum()
        got = [loss.detach(), *torch.autograd.grad(total, list(tensors.values()))]
    options["weighted"] = class_weight is not None
    own, truth = (
        plain(tensors, labels, d, None if class_weight is None else class_weight.to(
            torch.promote_types(d, F32)), weights, options)
        for d in (dtype, F64)
    )  # fmt: skip
    assert_as_good_as_torch(["loss", *(f"d_{n}" for n in tensors)], got, own, truth, dtype)
    assert [g.dtype for g in got[1:]] == [dtype] * len(tensors)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"weighted": True}], ids=str)
def test_probabilities_are_torchs(
    backend: str, dtype: torch.dtype, options: dict[str, Any], trained: bool
) -> None:
    options = dict(options)
    class_weight = torch.rand(V) + 0.5 if options.pop("weighted", False) else None
    tensors, target = draw(dtype), torch.rand(T, V) ** 8
    target /= target.sum(-1, keepdim=True)
    target[3] = 0.0
    target[3, 7] = 1.0  # log 0 for all the others
    target[4] = 0.0  # padding: it counts in the mean, as in torch
    names = ["hidden", "weight", "bias"] if trained else ["hidden"]

    def eager(dtype: torch.dtype) -> list[Tensor]:
        t = {name: tensors[name].detach().to(dtype).requires_grad_() for name in tensors}
        z = (t["hidden"] @ t["weight"].t()).to(torch.promote_types(dtype, F32)) + t["bias"]
        w = None if class_weight is None else class_weight.to(z.dtype)
        loss = torch.nn.functional.cross_entropy(z, target.to(z.dtype), w, **options)
        return [loss.detach(), *torch.autograd.grad(loss, [t[name] for name in names])]

    given = {n: t if n in names else t.detach() for n, t in tensors.items()}
    with poisoned():
        loss = ops.linear_cross_entropy(
            given["hidden"], given["weight"], target, bias=given["bias"],
            class_weight=class_weight, backend=backend, chunk=9, **options,
        )  # fmt: skip
        got = [loss.detach(), *torch.autograd.grad(loss, [given[n] for n in names])]
    assert_as_good_as_torch(["loss", *names], got, eager(dtype), eager(F64), dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_statistics_of_each_token(backend: str) -> None:
    tensors, labels = draw(F32), labels_of()
    with poisoned():
        losses, found = ops.linear_cross_entropy(
            tensors["hidden"], tensors["weight"], labels, softcap=4.0, return_statistics=True,
            reduction="none", backend=backend,
        )  # fmt: skip
    z = 4 * torch.tanh(tensors["hidden"].double() @ tensors["weight"].double().t() / 4)
    kept, log_p = labels != -100, torch.log_softmax(z, -1)
    expected = {
        "logsumexp": torch.logsumexp(z, -1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_squares": torch.logsumexp(2 * log_p, -1),
        "mean_logit": z.mean(-1),
    }
    for name, value in expected.items():
        got = getattr(found, name)
        assert got.requires_grad == (name == "entropy")
        torch.testing.assert_close(got[kept].double(), value[kept].detach(), rtol=1e-5, atol=2e-6)
        assert not got[~kept].any()
    assert torch.equal(found.prediction, torch.where(kept, z.argmax(-1), -1))
    assert losses.requires_grad


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_gradient_of_the_entropy(
    backend: str, dtype: torch.dtype, trained: bool, compiled: bool
) -> None:
    """A bonus for entropy beside weighted log-probabilities, as in reinforcement learning."""
    tensors, labels = draw(dtype), labels_of()
    weights, bonus = torch.randn(T), torch.randn(T)
    names = ["hidden", "weight", "bias"] if trained else ["hidden"]

    def objective(losses: Tensor, entropy: Tensor) -> Tensor:
        return (losses * weights.to(losses.dtype)).sum() + (entropy * bonus).sum()

    def eager(dtype: torch.dtype) -> list[Tensor]:
        t = {name: tensors[name].detach().to(dtype).requires_grad_() for name in tensors}
        z = reference.transform(t["hidden"] @ t["weight"].t(), t["bias"], 1.0, 4.0)
        log_p, kept = torch.log_softmax(z, -1), labels != -100
        losses = reference.linear_cross_entropy(
            t["hidden"], t["weight"], t["bias"], labels, softcap=4.0
        )
        entropy = torch.where(kept, -(log_p.exp() * log_p).sum(-1), 0.0)
        return list(torch.autograd.grad(objective(losses, entropy), [t[n] for n in names]))

    given = {n: t if n in names else t.detach() for n, t in tensors.items()}

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        losses, found = ops.linear_cross_entropy(
            hidden, weight, labels, bias=bias, softcap=4.0, reduction="none",
            return_statistics=True, backend=backend, chunk=9,
        )  # fmt: skip
        return objective(losses, found.entropy)

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    with poisoned():
        total = run(given["hidden"], given["weight"], given["bias"])
        got = torch.autograd.grad(total, [given[n] for n in names])
    assert_as_good_as_torch(names, list(got), eager(dtype), eager(F64), dtype)


def test_registered_recomputing_operation_passes_opcheck_and_compiles() -> None:
    tensors, labels = draw(F32), labels_of()
    call = (
        *(tensors[n] for n in ("hidden", "weight", "bias")), None, None, None, labels, -100, 16,
        [1.0, 2.0, 0.1, 0.0], "cpu", False, [True, True, True, False, False],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastft.linear_cross_entropy_fwd.default, (*call, True))
    weights = torch.randn(T)

    def run(*given: Tensor) -> Tensor:
        hidden, weight, bias, a, b = given
        each = ops.linear_cross_entropy(
            hidden, weight, labels, bias=bias, lora_a=a, lora_b=b, reduction="none", softcap=2.0
        )
        return (each * weights).sum()

    leaves = list(tensors.values())
    expected = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(got, want)


def _rank(rank: int, port: int, dtype: torch.dtype, queue: Any) -> None:
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    tensors, labels, weights = draw(dtype), labels_of(), torch.randn(T)
    class_weight = torch.rand(V) + 0.5
    rows = slice(0, 120) if rank == 0 else slice(120, V)  # unequal parts
    own = {n: tensors[n].detach().requires_grad_() for n in ("hidden", "lora_a")}
    own |= {n: tensors[n][rows].detach().requires_grad_() for n in ("weight", "bias", "lora_b")}
    results = []
    for options in ({}, {"label_smoothing": 0.2, "class_weight": class_weight, "softcap": 4.0}):
        for reduction in ("mean", "none"):
            loss, accuracy = ops.linear_cross_entropy(
                own["hidden"], own["weight"], labels, bias=own["bias"], lora_a=own["lora_a"],
                lora_b=own["lora_b"], scaling=0.5, reduction=reduction, chunk=9,
                shard=ops.Shard(rows.start, V, None if rank < 0 else torch.distributed.group.WORLD),
                return_accuracy=True, **options,
            )  # fmt: skip
            total = loss if reduction == "mean" else (loss * weights).sum()
            leaves = [own[n] for n in ("hidden", "lora_a", "weight", "bias", "lora_b")]
            results.append([loss.detach(), accuracy, *torch.autograd.grad(total, leaves)])
    queue.put((rank, [[t.float().numpy() for t in result] for result in results]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_vocabulary_over_two_processes(dtype: torch.dtype) -> None:
    """Two processes with a part of the head each get the loss of the whole, and together its
    gradients."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, port, dtype, queue)) for r in range(2)]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    torch.manual_seed(0)
    tensors, labels, weights = draw(dtype), labels_of(), torch.randn(T)
    class_weight = torch.rand(V) + 0.5
    order = ("hidden", "weight", "bias", "lora_a", "lora_b")
    cases = [
        (options, None if reduction == "mean" else weights)
        for options in ({}, {"label_smoothing": 0.2, "softcap": 4.0})
        for reduction in ("mean", "none")
    ]
    for i, (options, per_token) in enumerate(cases):
        weighted = class_weight if options else None
        own, truth = (
            plain(tensors, labels, d, None if weighted is None else weighted.to(
                torch.promote_types(d, F32)), per_token, options)
            for d in (dtype, F64)
        )  # fmt: skip
        parts = [[torch.from_numpy(t) for t in found[rank][i]] for rank in range(2)]
        for of_rank_0, of_rank_1 in zip(parts[0][:4], parts[1][:4], strict=True):
            torch.testing.assert_close(of_rank_0, of_rank_1)  # the same on both
        loss, _, d_hidden, d_a, *_ = parts[0]
        joined = [torch.cat([parts[0][j], parts[1][j]]) for j in (4, 5, 6)]
        got = [loss, d_hidden, joined[0], joined[1], d_a, joined[2]]
        assert_as_good_as_torch(["loss", *order], got, own, truth, dtype)
