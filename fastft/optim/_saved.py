"""What an optimizer gives to files, copies and pickles, and takes from them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.optim._places import check_place, put
from fastft.optim._ring import Ring, new_ring
from fastft.optim._shards import local

__all__ = ["SavedState"]

# What lies beside the states of any optimizer. All else that is no number is a state.
_BESIDE = frozenset(("step", "compensation"))
# bitsandbytes nests the tensors of 8-bit states under this key, so that FSDP leaves them alone.
_NESTED = "__bnb_optimizer_quant_state__"


class SavedState(torch.optim.Optimizer):
    """The part of ``FusedOptimizer`` that keeps, saves and loads states."""

    states: str
    state_names: ClassVar[tuple[str, ...]]
    # What a parameter's state may be in a file, where that is not all of state_names.
    state_sets: ClassVar[tuple[frozenset[str], ...]] = ()
    # What may lie beside it there.
    beside: ClassVar[frozenset[str]] = frozenset()
    flat: bool
    defaults: dict[str, Any]
    _where: str
    _more: dict[str, Any]
    _batches: dict[Any, Any]
    _keys: dict[int, int]
    _flats: list[Any]
    _rings: dict[torch.device, Ring | None]

    @classmethod
    def _bits(cls) -> tuple[int, ...]:
        """What ``state_bits`` may be."""
        raise NotImplementedError

    def _start(self) -> None:
        """Nothing is known yet."""
        raise NotImplementedError

    def ring_of(self, device: torch.device) -> Ring | None:
        """Through which states of parameters on a device visit it; None where they stay there."""
        if self.states == "host" and device not in self._rings:
            self._rings[device] = new_ring(device)
        return self._rings.get(device)

    def __getstate__(self) -> dict[str, Any]:
        self.wait_for_states()
        # torch's own leaves out what it does not know.
        names = (
            "max_grad_norm",
            "skip_nonfinite",
            "rounding",
            "seed",
            "flat",
            "states",
            "_scaled",
            "_stats",
            "_where",
        )
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **own, "_more": self._more}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # From a copy or a pickle, or (with two keys) from load_state_dict.
        if "_where" in state:
            self._start()
        super().__setstate__(state)
        self._batches, self._keys, self._flats = {}, {}, []
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """As in torch. Step counts that flat parameters share are each one's own in it."""
        self.wait_for_states()
        # Before a user's hooks, which may wrap it.
        handle = self.register_state_dict_post_hook(lambda _, own: self._saved(own), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _saved(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """torch's state dict as it is saved."""
        if self.flat:
            state_dict["state"] = {
                index: {**state, "step": deepcopy(state["step"])} if "step" in state else state
                for index, state in state_dict["state"].items()
            }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; states keep the dtype they were saved in, whatever the parameters'.

        Raises:
            ArgumentError: the state of an amsgrad optimizer, or of one with other states.
        """
        for group in self.param_groups:
            check_place(self, group["params"])
        seen: list[dict[str, Any]] = []

        def last(_: Any, own: dict[str, Any]) -> dict[str, Any]:
            own = self._loaded(_unnested(own))
            self._check_loaded(own)
            seen.append(own)
            return own if self.states == "device" else _without_tensors(own)

        # Behind a user's hooks, which may unwrap it, and before those that change what is loaded.
        handles = (
            self.register_load_state_dict_pre_hook(last),
            self.register_load_state_dict_post_hook(lambda _: self._keep(seen[-1]), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        self._batches, self._flats = {}, []

    def _loaded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The other way from :meth:`_saved`."""
        return state_dict

    def _keep(self, state_dict: dict[str, Any]) -> None:
        """Gives the states that torch has loaded the dtypes and places of theirs."""
        saved = state_dict["state"]
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved_ids, params, strict=True):
            for key, value in saved.get(index, {}).items():
                now = self.state[p][key]
                if not isinstance(value, Tensor) or not isinstance(now, Tensor):
                    continue
                if self.states != "device" and key != "step":
                    self.state[p][key] = put(self, key, value, local(p).device)
                elif now.dtype != value.dtype or key == "step":
                    self.state[p][key] = value.to(now.device, copy=True)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Refuses states that this optimizer would pass over, to begin anew in the middle."""
        groups = state_dict["param_groups"]
        for group in groups:
            if group.get("amsgrad"):
                raise ArgumentError(
                    self._where, "amsgrad", expected="False", got="True",
                    remedy="It is not offered.",
                )  # fmt: skip
            if len(group.get("betas", (0, 0))) != 2:
                self._refuse_loaded(f"a group with betas={group['betas']}")
            bits = group.get("state_bits")
            if bits is not None and bits not in self._bits():
                self._refuse_loaded(f"a group with state_bits={bits}")
        whole = self.state_sets or (frozenset(self.state_names),)
        for state in state_dict["state"].values():
            there = {name for name, value in state.items() if value is not None}
            held = {name for name in there if isinstance(state[name], (Tensor, dict, list, tuple))}
            found = held - _BESIDE - self.beside
            if found not in whole and (found or "step" in there):
                self._refuse_loaded(", ".join(sorted(found)) or "step alone")
            # SGD's and Muon's have one name.
            if found == {"momentum_buffer"}:
                for group in groups:
                    if ("ns_steps" in group) != ("ns_steps" in self.defaults):
                        self._refuse_loaded("Muon's" if "ns_steps" in group else "SGD's")

    def _refuse_loaded(self, got: str) -> None:
        whole = self.state_sets or (frozenset(self.state_names),)
        raise ArgumentError(
            self._where,
            "state_dict",
            expected="that of such an optimizer, with "
            + " or ".join(", ".join(sorted(names)) or "none" for names in whole),
            got=got,
            remedy="Load it into the optimizer it was saved from.",
        )

    def wait_for_states(self) -> None:
        """The host goes on when states in host memory are written; ``state_dict`` calls it, and so
        does who reads ``state``."""
        for ring in self._rings.values():
            if ring is not None:
                ring.finish()


def _unnested(state_dict: dict[str, Any]) -> dict[str, Any]:
    """With bitsandbytes' tensors among the others."""
    states = {
        index: {
            **{key: value for key, value in own.items() if key != _NESTED},
            **own.get(_NESTED, {}),
        }
        for index, own in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def _without_tensors(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same with empty states: torch would carry them to the parameters' device."""
    empty = torch.empty(0, device="cpu")
    light = {
        index: {
            key: empty if isinstance(value, Tensor) and key != "step" else value
            for key, value in own.items()
        }
        for index, own in state_dict["state"].items()
    }
    return {**state_dict, "state": light}
