"""What optimizers with 8-bit states share: bitsandbytes' names and files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.ops.optimizer_step import dynamic_map
from fastft.optim._base import FusedOptimizer
from fastft.optim._batch import is_eight_bit
from fastft.optim._places import absmax_name, coded, decoded, put
from fastft.optim._shards import is_sharded, like_param, local

__all__ = ["EightBitStates"]


class EightBitStates(FusedOptimizer):
    """8-bit states, stochastic rounding and ``min_8bit_size``; state dicts as bitsandbytes'."""

    # The last holds norms of gradients, by whose percentiles older bitsandbytes can clip.
    beside = frozenset(("absmax1", "absmax2", "gnorm_vec"))

    saved_bits = 8

    def __init__(
        self,
        params: Any,
        *args: Any,
        min_8bit_size: int = 4096,
        saved_bits: int = 8,
        **options: Any,
    ) -> None:
        if saved_bits not in (8, 32):
            where = f"fastft.optim.{type(self).__name__}"
            raise ArgumentError(where, "saved_bits", expected="8 or 32", got=repr(saved_bits))
        self.min_8bit_size, self.saved_bits = min_8bit_size, saved_bits
        options.setdefault("state_bits", 8)
        options.setdefault("rounding", "stochastic")
        super().__init__(params, *args, **options)

    def __getstate__(self) -> dict[str, Any]:
        own = {"min_8bit_size": self.min_8bit_size, "saved_bits": self.saved_bits}
        return {**super().__getstate__(), **own}

    def _saved(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """torch's, with what bitsandbytes' optimizers expect in theirs: step counts as numbers and
        the maps of the codes. Reads the step counts off the device.

        Of sharded parameters the states are float32, sharded alike, so that
        torch.distributed.checkpoint saves them and cuts them up anew; blocks are of the part that
        is here. Loaded in the same shards they are the same codes and scales. ``saved_bits=32``
        has whole parameters' states saved so too: that module loads what a process has, of the same
        names and kinds, and no file of ours can be both bitsandbytes' and theirs.
        """
        state_dict = super()._saved(state_dict)
        wide = self._saved_wide(state_dict)
        for index, p in wide.items():
            state_dict["state"][index] = _wide(state_dict["state"][index], p)
        steps = [
            s["step"]
            for index, s in state_dict["state"].items()
            if isinstance(s.get("step"), Tensor) and index not in wide
        ]
        numbers = iter(torch.stack([s.cpu() for s in steps]).tolist() if steps else ())
        for group in state_dict["param_groups"]:
            group.setdefault("eps", 0.0)  # theirs read one for every rule
        signed = {"1": True, "2": False}
        for index, own in state_dict["state"].items():
            if index in wide:
                continue
            state = dict(own)
            if isinstance(state.get("step"), Tensor):
                state["step"] = int(next(numbers))
            for number, is_signed in signed.items():
                if f"absmax{number}" in state:
                    device = state[f"absmax{number}"].device
                    state[f"qmap{number}"] = dynamic_map(is_signed).to(device, copy=True)
            state_dict["state"][index] = state
        return state_dict

    def _loaded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Also takes bitsandbytes' own, in which the maps must be the dynamic ones.

        Raises:
            ArgumentError: another map.
        """
        flat = {**state_dict, "state": {}}
        for index, own in state_dict["state"].items():
            state = dict(own)
            self._check_maps(state)
            for theirs, ours in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
                if theirs in state:  # of an optimizer with float32 states, which they stay
                    state[ours] = state.pop(theirs)
            flat["state"][index] = {k: v for k, v in state.items() if not k.startswith("qmap")}
        return super()._loaded(flat)

    def _keep(self, state_dict: dict[str, Any]) -> None:
        """As the base; what is saved in float32 is coded again."""
        super()._keep(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                wide = self._is_saved_wide(p) and is_eight_bit(self, p, group)
                if wide and self.state.get(p):
                    self.state[p] = self._narrow(self.state[p], p)

    def _is_saved_wide(self, p: Tensor) -> bool:
        return self.saved_bits == 32 or is_sharded(p)

    def _saved_wide(self, state_dict: dict[str, Any]) -> dict[Any, Tensor]:
        """The parameters whose states are saved in float32, by the index of these."""
        params = (p for group in self.param_groups for p in group["params"])
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        pairs = zip(ids, params, strict=True)
        return {i: p for i, p in pairs if i in state_dict["state"] and self._is_saved_wide(p)}

    def _narrow(self, state: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """The other way from :func:`_wide`; what is in 8 bits already stays."""
        narrow = dict(state)
        device = local(p).device
        for name, signed in (("state1", True), ("state2", False)):
            value = state.get(name)
            if value is not None and value.dtype != torch.uint8:
                codes, scales = coded(local(value), signed)
                narrow[name] = put(self, name, like_param(codes, p), device)
                narrow[absmax_name(name)] = put(self, absmax_name(name), scales, device)
        return narrow

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


def _wide(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """The state of a parameter with float32 values in place of codes and scales."""
    wide = {name: value for name, value in state.items() if not name.startswith("absmax")}
    for name, signed in (("state1", True), ("state2", False)):
        absmax = state.get(absmax_name(name))
        if absmax is not None:
            wide[name] = like_param(decoded(local(state[name]), absmax, signed), p)
    return wide
