"""``param_groups``: learning rates by layer, decay, LoRA+ and frozen parts, as param groups."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastft.errors import ArgumentError, nearest

__all__ = ["param_groups"]

_WHERE = "fastft.optim.param_groups"


def param_groups(
    model: nn.Module,
    lr: float | Tensor,
    *,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    no_decay: bool | Sequence[str] = True,
    loraplus_ratio: float | None = None,
    freeze: Sequence[str] = (),
    embeddings_32bit: bool = False,
) -> list[dict[str, Any]]:
    """Param groups of a model's trainable parameters, named, for any optimizer.

    Args:
        model: any torch model, PEFT's included.
        lr: of the last layer's parameters, and of all without ``layer_decay``; a number, or a
            tensor, of which each group then has one.
        weight_decay: of the parameters that decay.
        layer_decay: lr of block i of n is lr * layer_decay^(n - i); matrices that the model names
            before its blocks (embeddings) have one factor more, all else none. Blocks are those of
            each ``ModuleList`` that lies in no other, as an encoder's and a decoder's.
        no_decay: True for parameters of one dimension (biases, norms); or patterns of names, as
            ``fnmatch`` takes them.
        loraplus_ratio: lr of LoRA's B over that of A (LoRA+, Hayou et al. 2024,
            https://arxiv.org/abs/2402.12354, recommends 16).
        freeze: patterns of names; those parameters stop requiring gradients and are left out.
        embeddings_32bit: give weights of ``nn.Embedding`` states in 32 bits in 8-bit optimizers.

    Returns:
        One group for each combination of learning rate, decay and state, in the model's order, each
        with ``(name, parameter)`` pairs: optimizers keep the names.

    Raises:
        ArgumentError: a pattern that matches nothing, a layer_decay without blocks, a value out of
            range, or nothing left to train.
    """
    for name, value in (
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("layer_decay", layer_decay),
        ("loraplus_ratio", loraplus_ratio),
    ):
        if value is not None and not value >= 0:
            raise ArgumentError(_WHERE, name, expected=">= 0", got=repr(value))
    named = list(model.named_parameters())
    frozen = _matching("freeze", freeze, [name for name, _ in named])
    trained = [(name, p) for name, p in named if p.requires_grad and name not in frozen]
    if not trained:
        raise ArgumentError(_WHERE, "model", expected="parameters to train", got="none")
    if isinstance(no_decay, bool):
        spared = {name for name, p in trained if no_decay and p.dim() <= 1}
    else:
        spared = _matching("no_decay", no_decay, [name for name, _ in trained])
    factors = _layer_factors(model, [name for name, _ in trained], layer_decay)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, p in trained:
        rate = lr * factors[name]
        if loraplus_ratio is not None and _is_lora_b(name):
            rate *= loraplus_ratio
        more = {"state_bits": 32} if embeddings_32bit and id(p) in tables else {}
        decay = 0.0 if name in spared else weight_decay
        # A tensor's hash is its own, not its number's.
        key = (float(rate), decay, *more)
        group = groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay, **more})
        group["params"].append((name, p))
    for name, p in named:
        if name in frozen:
            p.requires_grad_(False)
    return list(groups.values())


def _is_lora_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


def _matching(argument: str, patterns: Sequence[str], names: list[str]) -> set[str]:
    if isinstance(patterns, str):
        raise ArgumentError(_WHERE, argument, expected="a list of patterns", got=repr(patterns))
    found: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise ArgumentError(
                _WHERE, argument, expected="patterns that match parameters' names",
                got=repr(pattern), remedy=nearest(pattern, names) or None,
            )  # fmt: skip
        found.update(hits)
    return found


def _layer_factors(
    model: nn.Module, names: list[str], layer_decay: float | None
) -> dict[str, float]:
    if layer_decay is None:
        return dict.fromkeys(names, 1.0)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    # Stacks of blocks: not the lists within a block, as experts are.
    stacks = {
        name + ".": len(blocks)
        for name, blocks in lists
        if len(blocks) > 1 and not any(name.startswith(other + ".") for other, _ in lists)
    }
    order = {name: (i, p.dim()) for i, (name, p) in enumerate(model.named_parameters())}
    inside = [name for name in order if name.startswith(tuple(stacks))]
    if not stacks or not inside:
        raise ArgumentError(
            _WHERE, "layer_decay", expected="a model with a ModuleList of blocks", got="none"
        )
    first, deepest = order[inside[0]][0], max(stacks.values())
    factors = {}
    for name in names:
        prefix = next((p for p in stacks if name.startswith(p)), None)
        place, dims = order[name]
        if prefix is not None:
            index = int(name[len(prefix) :].split(".")[0])
            factors[name] = layer_decay ** (stacks[prefix] - 1 - index)
        else:
            # Embeddings come before the blocks; a last norm may too, by its place in the model.
            factors[name] = layer_decay**deepest if place < first and dims > 1 else 1.0
    return factors
