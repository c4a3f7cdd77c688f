"""``adafactor_step``: a step of Adafactor over all tensors, with clip and non-finite check.

    g <- c s g as in ``optimizer_step``;  rate = t^decay
    R <- lerp(R, mean_columns g^2, rate);  C <- lerp(C, mean_rows g^2, rate)
    U = g / sqrt(max(R C / max(mean R, eps1), eps1^2))
    p <- p (1 - lr wd) - max(eps2, rms p) min(lr, 1 / sqrt t) / max(1, rms U / d) U

over the last two dimensions of a tensor; of a vector V <- lerp(V, g^2, rate) stands for R C / mean
R. Columns of ``hyper``: lr, wd, d, eps1 (below 0: the eps of the parameter's dtype), eps2, decay,
sign. Moments are float32 (float64 of float64 parameters). eps1^2 is no less than float32's smallest
normal number: an element whose row and column are zero is left where it is, and not made NaN.

Gradients are read three times and parameters twice, whatever the number of tensors; parameters are
rounded as in ``optimizer_step``.

Source: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235, as ``torch.optim.Adafactor`` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ShapeError
from fastft.ops._checks import check_device, check_dtype, check_shape, check_tensor
from fastft.ops.optimizer_step import STATE_BLOCK, StepTensors, check_step, facts_of

__all__ = ["FACTORED_HYPER", "FactoredTensors", "adafactor_step", "factored_launcher_of"]

_WHERE = "fastft.ops.adafactor_step"

FACTORED_HYPER = ("lr", "weight_decay", "threshold", "eps1", "eps2", "decay", "sign")
# Rows and elements of a tile: a column's sums are written once a tile, a row's once for each
# STATE_BLOCK columns.
_TILE_ROWS, _TILE = 128, 32768
# Rows or columns of one item of the pass over the moments; csrc/include/fastft/adafactor.h.
LINES = 1024


class FactoredTensors(StepTensors):
    """The tensors of a step but the gradients, all on one device; checked when it is made.

    Args:
        params, steps, compensation, rounding, keys: as in :class:`StepTensors`.
        rows: n tensors (..., rows, 1), or None of a vector.
        columns: n tensors (..., 1, columns); of a vector its shape.

    Raises:
        ArgumentError, DtypeError, ShapeError, DeviceError: what does not fit the above.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        rows: Sequence[Tensor | None],
        columns: Sequence[Tensor],
        compensation: Sequence[Tensor | None] = (),
        rounding: str = "nearest",
        keys: Sequence[int] = (),
    ) -> None:
        super().__init__("sgd", params, steps, [], [], compensation, rounding, keys)
        self.rows, self.columns = rows, columns
        _check_moments(self)
        shapes = [_matrix(p) for p in params]
        tiles, lines, scratch = 0, 0, 0
        places: list[list[int]] = []
        counts: list[tuple[int, int]] = []
        for p, row, column, (batch, m, n) in zip(params, rows, columns, shapes, strict=True):
            tile_rows, tile_columns = _tile(m, n)
            down = _parts(m, tile_rows)
            row_sums = scratch
            column_sums = row_sums + batch * _parts(n, STATE_BLOCK) * m
            row_means = column_sums + batch * down * n
            place = [0 if row is None else row.data_ptr(), column.data_ptr(), batch, m, n]
            place += [tile_rows, tile_columns, tiles, lines, row_sums, column_sums, row_means]
            places.append(place)
            above = 0 if row is None else _parts(m, LINES)
            scratch = row_means + batch * above
            empty = not p.numel()
            own = (batch * down * _parts(n, tile_columns), batch * (above + _parts(n, LINES)))
            counts.append((0, 0) if empty else own)
            tiles, lines = tiles + counts[-1][0], lines + counts[-1][1]
        # Of each tile, and of each item of LINES rows or columns, its tensor.
        which = torch.arange(len(params), dtype=torch.int32, device="cpu")
        repeats = torch.tensor(counts, dtype=torch.int64, device="cpu").view(-1, 2)
        self.tile_tensor = which.repeat_interleave(repeats[:, 0])
        self.line_tensor = which.repeat_interleave(repeats[:, 1])
        # float32 elements that a launcher needs room for: sums, then those of tiles and tensors.
        self.scratch_sizes = (max(scratch, 1), 3 * tiles + max(len(params), 1))
        geometry = torch.tensor(places, dtype=torch.int64, device="cpu").view(len(params), 12)
        self._whole = torch.cat((self._table, geometry), 1)
        self._table = self._whole[:, : self._table.shape[1]]  # written where addresses change

    def table(self, grads: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """The rows of csrc/include/fastft/adafactor.h, int64 (n, 24) on the CPU, and whether
        anything has changed since the last call."""
        return self._whole, super().table(grads)[1]

    def call(
        self, table: Tensor, tile_tensor: Tensor, line_tensor: Tensor, *buffers: Tensor
    ) -> list[int]:
        """The first fields of csrc/include/fastft/adafactor.h's FactoredCall: the three tables,
        where the launcher has them, and scratch, partials, hyper and stats."""
        fields = [table.data_ptr(), len(self.params)]
        for work in (tile_tensor, line_tensor):
            fields += [work.data_ptr(), work.numel()]
        return fields + [buffer.data_ptr() for buffer in buffers]


def adafactor_step(
    tensors: FactoredTensors,
    grads: Sequence[Tensor],
    hyper: Tensor,
    stats: Tensor,
    *,
    max_norm: float = 0.0,
    needs_norm: bool = True,
    seed: int = 0,
    backend: str | None = None,
) -> None:
    """One step, in place, over every tensor.

    Args:
        tensors: parameters and moments.
        hyper: (n, 7) float32, see above.
        grads, stats, max_norm, needs_norm, seed, backend: as in
            :func:`~fastft.ops.optimizer_step`.

    A skipped step changes nothing but ``stats``.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: gradients or tables that do not fit.
        BackendError: the backend asked for cannot run it.
    """
    check_step(_WHERE, tensors, grads, hyper, stats, max_norm, needs_norm)
    if len(tensors.params):
        factored_launcher_of(tensors, backend).step(
            tensors, list(grads), hyper, stats, max_norm=max_norm, needs_norm=needs_norm, seed=seed
        )


def factored_launcher_of(tensors: FactoredTensors, backend: str | None = None) -> Any:
    """The backend's module whose ``step`` takes these tensors.

    Raises:
        BackendError: the backend asked for cannot run it.
    """
    facts = facts_of(tensors)
    known = {name: facts[name] for name in ("device_type", "dtype", "rounding")}
    return backends.select("adafactor_step", backend, **known)[1]


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def _matrix(p: Tensor) -> tuple[int, int, int]:
    """How many matrices of how many rows and columns."""
    if p.dim() < 2:
        return 1, 1, max(p.numel(), 1)
    rows, columns = (max(size, 1) for size in p.shape[-2:])
    return max(p.shape[:-2].numel(), 1), rows, columns


def _tile(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a tile: all columns, or a multiple of STATE_BLOCK."""
    across = _TILE // min(rows, _TILE_ROWS)
    if across < columns:
        across = across // STATE_BLOCK * STATE_BLOCK
    across = min(columns, across)
    return min(rows, max(_TILE // across, 1)), across


def _check_moments(tensors: FactoredTensors) -> None:
    if not len(tensors.params) == len(tensors.rows) == len(tensors.columns):
        got = f"{len(tensors.params)}, {len(tensors.rows)} and {len(tensors.columns)}"
        raise ShapeError(_WHERE, "params", expected="as many of each", got=got)
    for p, row, column in zip(tensors.params, tensors.rows, tensors.columns, strict=True):
        if (row is None) != (p.dim() < 2):
            got = "None" if row is None else str(tuple(row.shape))
            expected = "a tensor of a matrix, None of a vector"
            raise ShapeError(_WHERE, "rows", expected=expected, got=got)
        lines = (*p.shape[:-2], 1, *p.shape[-1:]) if p.dim() > 1 else tuple(p.shape)
        wide = torch.promote_types(p.dtype, torch.float32)
        for name, moment, shape in (
            ("rows", row, (*p.shape[:-1], 1)),
            ("columns", column, lines),
        ):
            if moment is None:
                continue
            check_tensor(_WHERE, name, moment)
            check_dtype(_WHERE, name, moment, (wide,))
            check_device(_WHERE, name, moment, p.device)
            check_shape(_WHERE, name, moment, tuple(shape), "shape")
            if not moment.is_contiguous():
                got = f"strides {moment.stride()}"
                raise ShapeError(_WHERE, name, expected="contiguous tensors", got=got)
