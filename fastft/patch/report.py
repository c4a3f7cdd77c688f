"""``explain``: what of a model is fused, by which backend, what is not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastft.memory._layers import state_of
from fastft.nn.calls import call_counts
from fastft.nn.decoder import FusedDecoderLayer, Members, members_of, served, state_refusal
from fastft.nn.plans import plain_parts
from fastft.nn.siblings import group_of
from fastft.patch.apply import refusals
from fastft.patch.rules import RULES, Rule, Site

__all__ = ["Explanation", "ModuleReport", "explain"]


@dataclass(frozen=True)
class ModuleReport:
    """One module a rule speaks of, or a decoder layer.

    Attributes:
        kind: "lora", "conv", "embedding", "table", "experts", "loss", "norm", "glu", "attention",
            "rope" or "layer".
        fused: whether it has a fused forward and nothing in its state keeps it from running.
        backend: who runs it, in the dtype of its weights; None when not fused.
        reason: why it is not fused; None when it is.
        siblings: how many modules run with it in one call, itself included (known after the
            first training step).
        fused_calls: calls that ran fused.
        fallback_calls: calls that did not, by reason.
    """

    name: str
    kind: str
    fused: bool
    backend: str | None
    reason: str | None
    siblings: int
    fused_calls: int
    fallback_calls: dict[str, int]


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; prints as a table, ``to_dict`` for programs.

    Attributes:
        modules: what is fused by itself or could be.
        layers: decoder layers of fused modules; one that is not fused runs them one by one.
    """

    modules: tuple[ModuleReport, ...]
    layers: tuple[ModuleReport, ...] = ()

    @property
    def fused(self) -> int:
        """Number of fused modules."""
        return sum(m.fused for m in self.modules)

    @property
    def fallback(self) -> int:
        """Number of modules that run PEFT's own code."""
        return len(self.modules) - self.fused

    def to_dict(self) -> dict[str, Any]:
        """{"modules": [...], "layers": [...], "calls": {"fused": n, "fallback": {reason: n}}}"""
        fallback: Counter[str] = Counter()
        for m in self.modules:
            fallback.update(m.fallback_calls)
        return {
            "modules": [vars(m) for m in self.modules],
            "layers": [vars(m) for m in self.layers],
            "calls": {
                "fused": sum(m.fused_calls for m in self.modules),
                "fallback": dict(fallback),
            },
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Equal modules of different layers in one row: count, module, kind, state, calls."""
        rows: dict[tuple[str, str, str], list[ModuleReport]] = {}
        for m in (*self.modules, *self.layers):
            leaf = next((p for p in reversed(m.name.split(".")) if not p.isdigit()), m.name)
            state = f"fused ({m.backend})" if m.fused else f"not fused: {m.reason}"
            rows.setdefault((leaf, m.kind, state), []).append(m)
        table = []
        for (leaf, kind, state), members in rows.items():
            calls = f"{sum(m.fused_calls for m in members)} fused"
            others: Counter[str] = Counter()
            for m in members:
                others.update(m.fallback_calls)
            calls += "".join(f"; {n} {reason}" for reason, n in others.most_common())
            if members[0].siblings > 1:
                calls += f"; {members[0].siblings} siblings a call"
            table.append((str(len(members)), leaf, kind, state, calls))
        return table

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"{self.fused} modules fused, {self.fallback} not")
        for heading in ("count", "module", "kind", "state", "calls"):
            table.add_column(heading)
        for row in self.rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        rows = [("count", "module", "kind", "state", "calls"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
        return "\n".join([f"{self.fused} modules fused, {self.fallback} not", *lines])


def explain(model: nn.Module) -> Explanation:
    """Every module of ``model`` that fastft knows how to fuse, and what became of it."""
    reports = [
        _report(rule, site, refusals.get(site.module, {}).get(rule.kind))
        for rule in RULES.values()
        for site in rule.sites(model)
    ]
    return Explanation(tuple(reports), tuple(_layers(model, reports)))


def _layers(model: nn.Module, reports: list[ModuleReport]) -> Iterator[ModuleReport]:
    for name, module in model.named_modules():
        members = members_of(module)
        if members is None:
            continue
        apart = [m for m in reports if m.reason and m.name.startswith(f"{name}.")]
        backend: str | None = None
        reason: str | None
        if not isinstance(module, FusedDecoderLayer):
            reason = refusals.get(module, {}).get("layer", "its parts run one by one")
        elif apart:
            reason = f"{apart[0].name.removeprefix(name)[1:]}: {apart[0].reason}"
        elif (reason := _by_now(module, members)) is None:
            backend, reason = served(members)
        yield ModuleReport(
            name=name,
            kind="layer",
            fused=reason is None,
            backend=backend,
            reason=reason,
            siblings=1,
            fused_calls=call_counts(module).fused,
            fallback_calls={},
        )


def _by_now(layer: Any, members: Members) -> str | None:
    """What in its state keeps a layer from running in one operation."""
    norms, attention, _, projections = members
    policy = state_of(layer)
    own = [p for m in (*norms, *[p.base_layer for p in projections]) for p in m.parameters()]
    plain = [plain_parts(p) for p in projections]
    dtypes = {found[1].adapter()[0].dtype for found in plain if found is not None}
    reasons = {
        "activations are under a policy": policy is not None and policy.policy != "none",
        "Transformers' checkpointing is on": vars(layer).get("gradient_checkpointing", False),
        "a projection has more than one plain adapter, or another": None in plain,
        "adapters are of several dtypes": len(dtypes) > 1,
        "a norm or a frozen weight is trained": any(p.requires_grad for p in own),
        "a weight is not stored by rows": not all(p.is_contiguous() for p in own),
        "attention has dropout": vars(attention).get("attention_dropout", 0.0) != 0.0,
    }
    held = (reason for reason, holds in reasons.items() if holds)
    return state_refusal(members) or next(held, None)


def _report(rule: Rule, site: Site, refused: str | None) -> ModuleReport:
    reason = site.refusal or refused
    if reason is None and not issubclass(type(site.module), site.fused or ()):
        reason = "not accelerated: call fastft.accelerate(model)"
    backend = None
    if reason is None:
        backend = rule.backend(site.module)
        if backend == "reference":
            reason, backend = "no fused backend for this device and dtype", None
    counts = call_counts(site.module, "rope" if rule.kind == "rope" else "")
    group = group_of(site.module)
    return ModuleReport(
        name=site.name,
        kind=rule.kind,
        fused=reason is None,
        backend=backend,
        reason=reason,
        siblings=len(group.layers()) if group is not None else 1,
        fused_calls=counts.fused,
        fallback_calls=dict(counts.fallback),
    )
