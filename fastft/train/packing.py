"""Whether a model keeps apart the examples that ``padding: none`` puts one after another."""

from __future__ import annotations

from typing import Any

from fastft.errors import ConfigError

__all__ = ["check_packing"]

# Tokens of the two sequences that are tried.
LENGTHS = (13, 7)


def check_packing(model: Any, collate: Any, device: Any) -> None:
    """Refuses a model in which the examples of a packed batch see one another: it has to take the
    positions that begin anew (or the sequences' ends) into account, and many families do not.

    Two short sequences are run one after another and alone. No random number is drawn from the
    global state.

    Raises:
        ConfigError: their logits differ by more than rounding, or the model takes no such batch.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    batch = collate([{"input_ids": row, "labels": row} for row in rows])
    batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items() if k != "labels"}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = [model(input_ids=torch.tensor([row], device=device)).logits[0] for row in rows]
            together = model(**batch).logits[0]
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refusal(model, (str(error).splitlines() or [type(error).__name__])[0]) from error
    finally:
        model.train(training)
    expected = torch.cat(alone).double()
    apart = (together.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # Of the second sequence nearly every token moves where it sees the first; rounding may choose
    # other experts of a mixture for one or two.
    apart = apart[LENGTHS[0] :].median()
    # Rounding through all layers leaves half of the digits. A GPU may take float32 as TF32.
    eps = torch.finfo(together.dtype).eps
    eps = eps if together.device.type == "cpu" else max(eps, 2.0**-10)
    if not float(apart) <= eps**0.5:
        raise _refusal(model, f"logits that differ by {float(apart):.1e} of their size")


def _refusal(model: Any, got: str) -> ConfigError:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ConfigError(
        "TrainConfig",
        "padding",
        expected="longest or max_length: with none, examples would see one another in "
        f"{type(base).__name__}",
        got=f"'none', and of two sequences in one row and alone {got}",
        remedy="Set padding: longest.",
    )
