"""``Muon``: its iteration against the formula, itself against torch's."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal import common_optimizers

from fastft import optim
from fastft.optim.muon import orthogonalize
from tests.optim.pairs import gradients as new_gradients

F32, BF16 = torch.float32, torch.bfloat16


class TestMuon:
    @staticmethod
    def polar(x: Tensor, steps: int = 5) -> Tensor:
        """The iteration's result in float64: its polynomial on the singular values."""
        a, b, c = 3.4445, -4.775, 2.0315
        u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(steps):
            s = a * s + b * s**3 + c * s**5
        return u @ torch.diag(s) @ v

    @pytest.mark.parametrize("size", [1.0, 1e-4, 1e18, 1e30])
    @pytest.mark.parametrize(
        ("shape", "bound"), [((16, 576), 1e-4), ((576, 16), 1e-4), ((64, 64), 0.05)]
    )
    def test_orthogonalized_as_the_formula_says(
        self, shape: Any, bound: float, size: float
    ) -> None:
        """Thin matrices in float32 through the Gram matrix; square ones in bfloat16, whose rounding
        the iteration amplifies. Of any size whose squares float32 holds or not."""
        torch.manual_seed(0)
        x = torch.randn(3, *shape)
        got = orthogonalize(x * size, (3.4445, -4.775, 2.0315), 5, 1e-7)
        for own, given in zip(got, x, strict=True):
            truth = self.polar(given)
            assert (own - truth).norm() / truth.norm() < bound

    def test_beside_torch_s(self) -> None:
        torch.manual_seed(0)
        shapes = [(32, 32), (16, 96), (96, 16), (32, 32)]
        mine = [torch.randn(s, requires_grad=True) for s in shapes]
        theirs = [p.detach().clone().requires_grad_() for p in mine]
        entries = common_optimizers.optim_inputs_func_muon("cpu", F32)
        assert len(entries) >= 5
        for entry in entries:
            own, plain = optim.Muon(mine, **entry.kwargs), torch.optim.Muon(theirs, **entry.kwargs)
            start = [p.detach().clone() for p in mine]
            for _ in range(3):
                new_gradients(mine, theirs)
                own.step()
                plain.step()
            for p, q, s in zip(mine, theirs, start, strict=True):
                # torch's iterates all in bfloat16.
                assert (p - q).norm() / (q - s).norm() < 0.05, entry.desc
                p.data.copy_(q.data)

    @pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
    @pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
    def test_adjustments_are_the_formula_s(self, adjust: str, shape: tuple[int, int]) -> None:
        """torch has had the third since 2.14."""
        torch.manual_seed(0)
        gradient, moved = torch.randn(shape), {}
        for kind in (adjust, "none"):
            p = torch.zeros(shape, requires_grad=True)
            p.grad = gradient.clone()
            chosen = None if kind == "none" else kind
            optim.Muon([p], lr=0.1, weight_decay=0.0, adjust_lr_fn=chosen).step()
            moved[kind] = p.detach()
        rows, columns = shape
        factor = {
            "original": max(1.0, rows / columns) ** 0.5,
            "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
            "spectral_unclamped": (rows / columns) ** 0.5,
        }[adjust]
        plain = moved["none"] / max(1.0, rows / columns) ** 0.5
        torch.testing.assert_close(moved[adjust], plain * factor, rtol=1e-5, atol=1e-8)
        p = torch.zeros(shape, requires_grad=True)
        try:
            theirs = torch.optim.Muon([p], lr=0.1, weight_decay=0.0, adjust_lr_fn=adjust)
        except ValueError:
            return
        p.grad = gradient.clone()
        theirs.step()
        # torch's iterates in bfloat16.
        assert (moved[adjust] - p.detach()).norm() / p.detach().norm() < 0.05

    def test_torch_s_own_error_inputs(self) -> None:
        seen = 0
        for entry in common_optimizers.optim_error_inputs_func_muon("cpu", F32):
            given = entry.optimizer_error_input
            if given.params is None or issubclass(entry.error_type, Warning):
                continue
            seen += 1
            with pytest.raises(entry.error_type, match=entry.error_regex):
                optim.Muon(given.params, **given.kwargs).step()
        assert seen >= 5

    def test_saved_and_resumed_gives_the_same_bits(self) -> None:
        torch.manual_seed(0)
        p = torch.randn(16, 64, dtype=BF16, requires_grad=True)
        gradients = [torch.randn_like(p) for _ in range(4)]
        whole = optim.Muon([p], rounding="stochastic", max_grad_norm=1.0)

        def run(optimizer: Any, q: Tensor, steps: slice) -> None:
            for g in gradients[steps]:
                q.grad = g.clone()
                optimizer.step()

        run(whole, p, slice(0, 2))
        q = p.detach().clone().requires_grad_()
        resumed = optim.Muon([q], rounding="stochastic", max_grad_norm=1.0)
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        run(whole, p, slice(2, 4))
        run(resumed, q, slice(2, 4))
        assert torch.equal(p, q)
        q.grad = torch.full_like(q, float("inf"))
        resumed.step()
        assert torch.equal(p, q)
        assert resumed.skipped_steps == 1

    def test_nothing_is_made_of_nothing(self) -> None:
        for shape in ((4, 12), (5, 5), (0, 5), (5, 0)):
            got = orthogonalize(torch.zeros(2, *shape), (3.4445, -4.775, 2.0315), 5, 1e-7)
            assert torch.equal(got, torch.zeros(2, *shape))

    def test_a_group_that_is_refused_is_not_there(self) -> None:
        p, vector = torch.ones(4, 12, requires_grad=True), torch.ones(4, requires_grad=True)
        optimizer = optim.Muon([p])
        with pytest.raises(ValueError, match="2D"):
            optimizer.add_param_group({"params": [vector]})
        assert len(optimizer.param_groups) == 1

    def test_the_clip_and_the_sign(self) -> None:
        """What is orthogonalized has no length: a clip shows in the momentum, maximize in the
        sign."""
        torch.manual_seed(0)
        start, gradient = torch.randn(8, 40), torch.randn(8, 40)
        found = []
        for options in ({}, {"max_grad_norm": 0.5}, {"maximize": True}):
            p = start.clone().requires_grad_()
            p.grad = gradient.clone()
            optimizer = optim.Muon([p], weight_decay=0.0, **options)
            optimizer.step()
            found.append((p.detach() - start, optimizer.state[p]["momentum_buffer"]))
        (plain, momentum), (clipped, less), (up, _) = found
        torch.testing.assert_close(clipped, plain, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(less, momentum * (0.5 / gradient.norm()), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(up, -plain)

    def test_parameters_that_lie_otherwise(self) -> None:
        torch.manual_seed(0)
        plain = torch.randn(12, 30, requires_grad=True)
        turned = plain.detach().t().contiguous().t().requires_grad_()
        assert not turned.is_contiguous()
        one, two = optim.Muon([plain]), optim.Muon([turned])
        for _ in range(2):
            new_gradients([plain], [turned])
            one.step()
            two.step()
        torch.testing.assert_close(plain, turned)

    def test_states_are_made_anew_where_they_were_replaced(self) -> None:
        p = torch.ones(4, 12, requires_grad=True)
        p.grad = torch.ones(4, 12)
        optimizer = optim.Muon([p])
        optimizer.step()
        optimizer.state[p]["momentum_buffer"] = torch.full((4, 12), 7.0)
        optimizer.step()
        assert float(optimizer.state[p]["momentum_buffer"].min()) > 6.0

    def test_nothing_but_the_momentum_outlives_a_step(self) -> None:
        p = torch.randn(64, 96, requires_grad=True)
        p.grad = torch.randn(64, 96)
        optimizer = optim.Muon([p])
        alive = []
        usual = torch.empty

        def empty(*args: Any, **more: Any) -> Tensor:
            made = usual(*args, **more)
            if made.numel() >= p.numel():
                alive.append(weakref.ref(made))
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            for _ in range(2):
                optimizer.step()
        assert len(alive) >= 2
        assert not any(made() is not None for made in alive)

    def test_in_another_default_dtype(self) -> None:
        p = torch.randn(8, 40, dtype=F32, requires_grad=True)
        p.grad = torch.randn(8, 40, dtype=F32)
        before = torch.get_default_dtype()
        torch.set_default_dtype(BF16)
        try:
            for kind in (optim.Muon, optim.Adafactor, optim.AdamW):
                kind([p], max_grad_norm=1.0).step()
        finally:
            torch.set_default_dtype(before)
        assert bool(p.isfinite().all())
