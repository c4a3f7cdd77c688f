"""The optimizers beside their authors' and bitsandbytes', where those are installed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from fastft import optim
from tests.optim.pairs import gradients, models, same


def test_schedule_free_is_its_authors() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    mine, theirs = models()
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 3, "r": 0.5}
    own = optim.ScheduleFreeAdamW(mine, **options)
    plain = schedulefree.AdamWScheduleFree(theirs, **options)
    plain.train()
    for _ in range(6):
        gradients(mine, theirs)
        own.step()
        plain.step()
    same(mine, theirs)
    y = [p.detach().clone() for p in mine]
    own.eval()
    plain.eval()
    same(mine, theirs, 2e-5)
    with pytest.raises(ValueError, match="train"):
        own.step()
    own.train()
    assert all(torch.equal(p, q) for p, q in zip(mine, y, strict=True))


class TestBitsandbytes:
    """Its 8-bit state dicts, both ways."""

    @pytest.fixture(autouse=True)
    def _module(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.bnb = pytest.importorskip("bitsandbytes")

    @pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
    def test_each_loads_the_other_s(self, name: str) -> None:
        torch.manual_seed(0)
        shapes = [(64, 80), (17,)]
        mine = [torch.randn(s, requires_grad=True) for s in shapes]
        theirs = [p.detach().clone().requires_grad_() for p in mine]
        own = getattr(optim, name)(mine, lr=1e-2)
        plain = getattr(self.bnb.optim, name)(theirs, lr=1e-2)
        for _ in range(3):
            gradients(mine, theirs)
            own.step()
            plain.step()
        # 8-bit states differ by a code here and there: theirs keeps the sign of a small m.
        same(mine, theirs, 2e-3)
        to_own, to_plain = copy.deepcopy(plain.state_dict()), copy.deepcopy(own.state_dict())
        own.load_state_dict(to_own)
        plain.load_state_dict(to_plain)
        for p, q in zip(mine, theirs, strict=True):
            own_state, plain_state = own.state[p], plain.state[q]
            assert own_state["state1"].dtype == plain_state["state1"].dtype
        for p, q in zip(mine, theirs, strict=True):
            p.data.copy_(q.data)
        for _ in range(2):
            gradients(mine, theirs)
            own.step()
            plain.step()
        same(mine, theirs, 2e-3)
        assert int(own.state[mine[0]]["step"]) == 5
        assert int(plain.state[theirs[0]]["step"]) == 5

    @pytest.mark.parametrize(
        "other",
        ["SGD8bit", "SGD", "RMSprop8bit", "Adagrad8bit", "LAMB8bit", "LARS8bit", "AdEMAMix8bit"],
    )
    def test_states_of_its_other_optimizers_are_refused(self, other: str) -> None:
        p = torch.randn(80, 70, requires_grad=True)
        more = {"momentum": 0.9} if other[:3] in ("SGD", "LAR") else {}
        theirs = getattr(self.bnb.optim, other)([p], lr=1e-2, **more)
        p.grad = torch.randn_like(p)
        theirs.step()
        kinds: list[Any] = [optim.SGD, optim.AdamW, optim.AdamW8bit, optim.Lion, optim.Lion8bit]
        for kind in kinds:
            with pytest.raises(ValueError, match="state_dict"):
                kind([p], lr=1e-2).load_state_dict(copy.deepcopy(theirs.state_dict()))

    def test_another_map_is_refused(self) -> None:
        p = torch.randn(5000, requires_grad=True)
        optimizer = optim.AdamW8bit([p])
        p.grad = torch.randn(5000)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["qmap1"] = torch.linspace(-1, 1, 256)
        with pytest.raises(ValueError, match="dynamic map"):
            optimizer.load_state_dict(saved)
