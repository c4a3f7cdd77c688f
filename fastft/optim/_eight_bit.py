"""What optimizers with 8-bit states share: bitsandbytes' names and files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.ops.optimizer_step import dynamic_map
from fastft.optim._base import FusedOptimizer
from fastft.optim._shards import is_sharded

__all__ = ["EightBitStates"]

# bitsandbytes nests the tensors of 8-bit states under this key, so that FSDP leaves them alone.
_NESTED = "__bnb_optimizer_quant_state__"


class EightBitStates(FusedOptimizer):
    """8-bit states, stochastic rounding and ``min_8bit_size``; state dicts as bitsandbytes'."""

    def __init__(self, params: Any, *args: Any, min_8bit_size: int = 4096, **options: Any) -> None:
        self.min_8bit_size = min_8bit_size
        options.setdefault("state_bits", 8)
        options.setdefault("rounding", "stochastic")
        super().__init__(params, *args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "min_8bit_size": self.min_8bit_size}

    def state_dict(self) -> dict[str, Any]:
        """torch's, with what bitsandbytes' optimizers expect in theirs: step counts as numbers and
        the maps of the codes. Reads the step counts off the device."""
        if any(is_sharded(p) for group in self.param_groups for p in group["params"]):
            raise ArgumentError(
                self._where, "state_dict", expected="whole parameters", got="sharded ones",
                remedy="8-bit states of shards cannot be saved; use AdamW or Lion under FSDP2.",
            )  # fmt: skip
        state_dict = super().state_dict()
        steps = [s["step"] for s in state_dict["state"].values() if isinstance(s["step"], Tensor)]
        numbers = iter(torch.stack([s.cpu() for s in steps]).tolist() if steps else ())
        for group in state_dict["param_groups"]:
            group.setdefault("eps", 0.0)  # theirs read one for every rule
        signed = {"1": True, "2": False}
        for index, own in state_dict["state"].items():
            state = dict(own)
            if isinstance(state["step"], Tensor):
                state["step"] = int(next(numbers))
            for number, is_signed in signed.items():
                if f"absmax{number}" in state:
                    device = state[f"absmax{number}"].device
                    state[f"qmap{number}"] = dynamic_map(is_signed).to(device, copy=True)
            state_dict["state"][index] = state
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also takes bitsandbytes' own, in which the maps must be the dynamic ones.

        Raises:
            ArgumentError: another map.
        """
        flat = {**state_dict, "state": {}}
        for index, own in state_dict["state"].items():
            state = dict(own)
            state.update(state.pop(_NESTED, {}))
            self._check_maps(state)
            for theirs, ours in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
                if theirs in state:  # of an optimizer with float32 states, which they stay
                    state[ours] = state.pop(theirs)
            flat["state"][index] = {k: v for k, v in state.items() if not k.startswith("qmap")}
        super().load_state_dict(flat)

    def _check_maps(self, state: dict[str, Any]) -> None:
        for name, signed in (("qmap1", True), ("qmap2", False)):
            found = state.get(name)
            if found is not None and not torch.allclose(
                found.float().cpu(), dynamic_map(signed), rtol=1e-4, atol=1e-9
            ):
                raise ArgumentError(
                    self._where, name, expected="bitsandbytes' dynamic map", got="another",
                    remedy="Only block-wise 8-bit states can be loaded.",
                )  # fmt: skip
