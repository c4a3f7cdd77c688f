"""Results that a backward reads, in the hands of a user who may change them in place.

torch refuses such a backward. Where it can do without the result, the change is noticed instead: a
witness has no data, and the version that the result and all its views share.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["unchanged", "witnessed"]

Results = list[Tensor | None]


def witnessed(results: Sequence[Tensor | None]) -> tuple[Results, Results]:
    """What to save for each result, and its witness."""
    saved: Results = []
    witnesses: Results = []
    for result in results:
        saved.append(None if result is None else result.data)
        witness = None if result is None else result.detach()
        if witness is not None:
            witness.data = witness.new_empty(0)
        witnesses.append(witness)
    return saved, witnesses


def unchanged(saved: Sequence[Tensor | None], witnesses: Sequence[Tensor | None]) -> Results:
    """What was saved; None of a result that has been changed since it was new."""
    pairs = zip(saved, witnesses, strict=True)
    return [None if w is None or w._version else result for result, w in pairs]
