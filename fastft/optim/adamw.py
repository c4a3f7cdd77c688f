"""``AdamW``, with states in float32 or 8 bits, and for parameters in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastft.errors import ArgumentError
from fastft.optim._base import FusedOptimizer
from fastft.optim._eight_bit import EightBitStates

__all__ = ["AdamW", "AdamW8bit", "AdamWBF16"]


class AdamW(FusedOptimizer):
    """AdamW with decoupled weight decay and float32 states, the whole step in one call.

    A drop-in for ``torch.optim.AdamW``: param groups, schedulers, closures and ``state_dict``
    (its keys and layout, so each loads the other's) are torch's. The formula stands in
    :mod:`fastft.ops.optimizer_step`. 8 bytes of state a parameter.

    Args:
        params: parameters or param groups; float32, bfloat16, float16 or float64.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        amsgrad: refused.
        max_grad_norm, skip_nonfinite, rounding, seed, foreach, fused, capturable: see
            :class:`~fastft.optim.FusedOptimizer`.

    A step whose gradient norm is not finite changes no parameter and no state; it is counted in
    ``skipped_steps``. ``grad_norm`` is the norm of the last step.

    Raises:
        ArgumentError: a hyper-parameter out of range, or amsgrad.
        DtypeError: sparse or complex parameters or gradients, at the step.
    """

    rule = "adamw"
    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        if amsgrad:
            raise ArgumentError(
                f"fastft.optim.{type(self).__name__}", "amsgrad", expected="False", got="True",
                remedy="It is not offered.",
            )  # fmt: skip
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """See the base."""
        return (group["lr"], *group["betas"], group["eps"], group["weight_decay"], 0.0)


class AdamW8bit(EightBitStates, AdamW):
    """AdamW with block-wise 8-bit states: 2.03 bytes of state a parameter.

    The codes are those of ``bitsandbytes.optim.AdamW8bit``, and so is the ``state_dict``: each
    loads the other's. Second moments are never rounded to 0. Parameters in bfloat16 are rounded
    stochastically unless told otherwise: steps far below the spacing of bfloat16 count.

    Args:
        min_8bit_size: tensors of fewer elements keep float32 states.
        saved_bits: of states in a ``state_dict``. 8: bitsandbytes', but of sharded parameters
            float32. 32: float32 of all, coded again as they are loaded, to the same bits;
            torch.distributed.checkpoint then resumes with FSDP2 what was saved without, and without
            what was saved with it.
        others: as in :class:`AdamW`. A param group with ``"state_bits": 32`` keeps float32 states,
            as is usual for embeddings.

    Source: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.
    """

    state_names = ("state1", "state2")


class AdamWBF16(AdamW):
    """AdamW for models trained in bfloat16 without float32 copies of anything: 4 bytes of state a
    parameter, in bfloat16 like ``torch.optim.AdamW``'s of such a model, but parameters and states
    are rounded stochastically, so that what is far below the spacing of bfloat16 counts.

    Args:
        kahan: keep what rounding takes away from the parameters in a second bfloat16 (2 bytes a
            parameter) instead: the pair holds 16 bits of mantissa. States are float32 then, as they
            are with ``flat``.
        others: as in :class:`AdamW`; ``state_bits=32`` for float32 states, 8 bytes.
    """

    def __init__(self, params: Iterable[Any], *args: Any, kahan: bool = False, **more: Any) -> None:
        more.setdefault("rounding", "compensated" if kahan else "stochastic")
        more.setdefault("state_bits", 32 if kahan or more.get("flat") else 16)
        super().__init__(params, *args, **more)
