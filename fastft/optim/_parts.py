"""``Part``: what a step takes of one device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Part", "by_device"]


@dataclass(eq=False)
class Part:
    """Parameters of one device, their gradients and groups.

    Attributes:
        batches: what is run.
        ready: the gradients as the first of them takes these.
    """

    device: torch.device
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    ready: list[Tensor] = field(default_factory=list)


def by_device(
    params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]
) -> list[Part]:
    """A part for each device."""
    if len(set(map(Tensor.get_device, params))) <= 1:
        return [Part(params[0].device, params, grads, groups)] if params else []
    parts: dict[torch.device, Part] = {}
    for p, g, group in zip(params, grads, groups, strict=True):
        part = parts.setdefault(p.device, Part(p.device))
        part.params.append(p)
        part.grads.append(g)
        part.groups.append(group)
    return list(parts.values())
