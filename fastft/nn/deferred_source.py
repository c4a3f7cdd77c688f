"""What deferred logits are made of, and how they are made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastft.errors import ArgumentError
from fastft.nn.calls import count
from fastft.ops._checks import autocast_as, without_autocast

__all__ = ["HeadAdapter", "Logits", "Uses"]


class HeadAdapter(NamedTuple):
    """A head's adapter in its forward: lora_s (..., r), the scaled A of the hidden states with
    their dropout, and a copy of B, both connected to the graph. Neither changes when A, B, the
    scaling or the mode of the head does."""

    lora_s: Tensor
    lora_b: Tensor


@dataclass
class Uses:
    """What became of the logits of one forward: whether something with a gradient was computed
    without them, and whether somebody asked for a gradient of theirs."""

    fused: bool = False
    watched: bool = False


@dataclass(frozen=True)
class Logits:
    """softcap(scale (head(x) + bias)), not computed yet; softcap(z) = c tanh(z / c).

    Attributes:
        hidden_states: (..., hidden), connected to the graph.
        head: the language-model head.
        weight, bias: (vocabulary, hidden) and (vocabulary,) or None.
        adapter: the head's.
        added: what the model has added to the bias, (vocabulary,) or None.
        autocast, graph: whether the head ran under autocast (its dtype) and with gradients; whoever
            looks may be elsewhere.
        steps: what the model did to the logits, one function after the other: ``scale``,
            ``softcap`` (0: none) and ``added`` say the same to the fused loss.
        fleeting: read before the step, or never: ``detach`` then defers, too.
        copied: by a wrapper that throws the copy away: DDP where it finds unused parameters.
        uses: one for all that is made of one forward's.
    """

    hidden_states: Tensor
    head: nn.Module
    weight: Tensor
    bias: Tensor | None = None
    adapter: HeadAdapter | None = None
    added: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    autocast: torch.dtype | None = None
    graph: bool = True
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    fleeting: bool = False
    copied: bool = False
    uses: Uses = field(default_factory=Uses)
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.versions:
            object.__setattr__(self, "versions", self._versions())

    def _versions(self) -> tuple[int, ...]:
        tensors = (self.hidden_states, self.weight, self.bias, self.added)
        given = [t for t in tensors if t is not None]
        return tuple(-1 if t.is_inference() else t._version for t in given)

    def changed(self) -> str | None:
        """What has happened to what they are made of; None where nothing has."""
        if self.weight.numel() and not self.weight.untyped_storage().size():
            return "the head's weight is freed (FSDP)"
        if self._versions() != self.versions:
            return "an in-place change since"
        if getattr(self.head, "merged", False):  # into weight.data, which has another version
            return "a merge of the head's adapter since"
        return None

    def check(self) -> None:
        """Refuses logits that can no longer be what they were.

        Raises:
            ArgumentError: what they are made of was changed in place, or freed.
        """
        changed = self.changed()
        if changed is None:
            return
        raise ArgumentError(
            "fastft (deferred logits)",
            "logits",
            expected="logits used before what they are made of is changed or freed",
            got=changed,
            remedy="Use them inside the forward or before the step, or accelerate(loss=False).",
        )

    def value(self, dtype: torch.dtype) -> Tensor:
        """The logits, without a graph."""
        self.check()
        count(self.head, "logits were read")
        # Also for whoever reads them again, after inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return self.computed(dtype)

    def computed(self, dtype: torch.dtype) -> Tensor:
        """The logits, with the graph from what they are made of where gradients are enabled."""
        # The casts of the forward's autocast are written out: where torch asks for the values from
        # inside an operation, autocast does nothing any more.
        hidden, *head = (
            t if t is None or self.autocast is None else t.to(self.autocast)
            for t in (self.hidden_states, self.weight, self.bias)
        )
        with without_autocast(self.hidden_states.device.type):
            logits = nn.functional.linear(hidden, *head)  # type: ignore[arg-type]
            if self.adapter is not None:
                lora_s, lora_b = self.adapter
                logits = logits + nn.functional.linear(lora_s, lora_b.to(lora_s.dtype))
            for step in self.steps:
                logits = step(logits)
            return logits.to(dtype)

    def inputs(self) -> tuple[Tensor | None, ...]:
        """Of the head's product: what its gradient goes to."""
        lora_s, lora_b = self.adapter or (None, None)
        return self.hidden_states, self.weight, self.bias, lora_s, lora_b

    def gradients(self, d_logits: Tensor, needs: tuple[bool, ...]) -> list[Any]:
        """Of :meth:`inputs`, where the logits are the head's product and nothing is done to it."""
        self.check()
        return _product_gradients(d_logits, needs, *self.inputs())  # type: ignore[arg-type]

    def context(self) -> AbstractContextManager[object]:
        """Autocast as it was for the head."""
        return autocast_as(self.hidden_states.device.type, self.autocast)

    def total_bias(self) -> Tensor | None:
        """The head's bias and what the model has added."""
        if self.bias is None or self.added is None:
            return self.added if self.bias is None else self.bias
        return self.bias + self.added

    def trained(self) -> bool:
        """Whether the loss of each token apart would take the logits twice: the head, its bias or
        its adapter is trained."""
        trained = [t.requires_grad for t in (self.weight, self.bias) if t is not None]
        return self.adapter is not None or any(trained)

    def at(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What changes where other positions, or the same in another shape, are taken."""
        adapter = self.adapter
        if adapter is not None:
            adapter = adapter._replace(lora_s=pick(adapter.lora_s))
        return {"hidden_states": pick(self.hidden_states), "adapter": adapter}


def _product_gradients(
    d_logits: Tensor,
    needs: tuple[bool, ...],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_s: Tensor | None,
    lora_b: Tensor | None,
) -> list[Tensor | None]:
    """Of hidden @ weight^T + bias + lora_s @ lora_b^T; made of torch's own operations, so that they
    have derivatives themselves."""
    rows = d_logits.reshape(-1, d_logits.shape[-1])
    dtype = d_logits.dtype  # autocast's, where that was on
    found: list[Tensor | None] = []
    for n, (given, other) in enumerate(((hidden, weight), (lora_s, lora_b))):
        of_rows = of_classes = None
        if given is not None and other is not None:
            if needs[3 * n]:
                of_rows = d_logits.matmul(other.to(dtype)).to(given.dtype)
            if needs[3 * n + 1]:
                flat = given.reshape(-1, given.shape[-1]).to(dtype)
                of_classes = rows.t().matmul(flat).to(other.dtype)
        found += [of_rows, of_classes]
        if n == 0:
            found.append(None if bias is None or not needs[2] else rows.sum(0).to(bias.dtype))
    return found
