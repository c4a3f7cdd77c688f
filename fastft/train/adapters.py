"""Adapter folders: written so that a crash or a full disk leaves the previous one, and read with
an error that says what is wrong with a folder instead of a traceback from inside PEFT."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

__all__ = ["load_adapter", "reload_max_diff", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SHOWN = 3  # names listed in an error


def save_adapter(model: PeftModel, path: str | Path, adapter_name: str = "default") -> Path:
    """Writes one adapter in PEFT's format to the folder ``path``.

    It is written to a folder beside ``path``, read back and compared bit for bit with the model,
    and only then renamed over ``path``. If anything fails (``AdapterError``), what was at
    ``path`` before is still there.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors import SafetensorError

    path = Path(path).absolute()
    # Non-default adapters go to a folder of their name: write to the parent of both.
    scratch: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        model.save_pretrained(scratch, selected_adapters=[adapter_name])
        made = scratch if adapter_name == "default" else scratch / adapter_name
        expected = get_peft_model_state_dict(model, adapter_name=adapter_name)
        _compare(_read_weights(made), expected, made)
        made.chmod(0o755)  # mkdtemp makes it private
        for file in made.iterdir():
            _flush(file)
        _keep_others(path, made)
        _swap(made, path)
    except (OSError, SafetensorError) as error:
        kept = "The adapter that was there before is untouched." if path.exists() else None
        raise AdapterError(
            "save_adapter",
            str(path),
            expected="a folder that can be written, on a disk with free space",
            got=str(error),
            remedy=kept,
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def _flush(file: Path) -> None:
    """To the disk: a full disk must show before the rename, not after."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _keep_others(path: Path, made: Path) -> None:
    """Copies what a user put beside the old adapter's files to the new one."""
    for entry in path.iterdir() if path.is_dir() else ():
        target = made / entry.name
        if not target.exists():
            shutil.copytree(entry, target) if entry.is_dir() else shutil.copy2(entry, target)


def _swap(made: Path, path: Path) -> None:
    """Puts ``made`` at ``path``. A folder that is not empty cannot be renamed over, so the old one
    steps aside first, and comes back if the second rename fails."""
    if not path.exists():
        os.replace(made, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent)) / path.name
    try:
        os.replace(path, aside)
        os.replace(made, path)
    finally:  # also where it is interrupted
        if not path.exists() and aside.exists():
            os.replace(aside, path)
        shutil.rmtree(aside.parent, ignore_errors=True)


def _compare(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], folder: Path
) -> None:
    import torch

    if found.keys() != expected.keys() or not found:
        missing = sorted(expected.keys() - found.keys())
        raise _error(folder, WEIGHTS, "every tensor of the adapter", f"without {_list(missing)}")
    for key, tensor in expected.items():
        same = found[key].dtype == tensor.dtype and torch.equal(
            found[key].view(torch.uint8), tensor.detach().cpu().contiguous().view(torch.uint8)
        )
        if not same:
            raise _error(folder, key, "the tensor that was saved", "another one")


def load_adapter(
    model: nn.Module, path: str | Path, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """``PeftModel.from_pretrained(model, path)``, checked before and after.

    ``model`` is the base model. Raises ``AdapterError`` for a folder that is missing, truncated,
    corrupt, partial, of another model, or that uses what the installed PEFT does not know.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    path = Path(path)
    _read_config(path)
    weights = _read_weights(path)
    _check_model(model, weights, path)
    try:
        loaded = PeftModel.from_pretrained(
            model, path, adapter_name=adapter_name, is_trainable=is_trainable
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise _error(path, "adapter", "one PEFT can load into this model", first) from error
    wanted = get_peft_model_state_dict(loaded, adapter_name=adapter_name).keys()
    if missing := sorted(wanted - weights.keys()):
        raise _error(
            path,
            WEIGHTS,
            f"all {len(wanted)} tensors its {CONFIG} asks for",
            f"{len(wanted) - len(missing)} of them, without {_list(missing)}",
            "Save the adapter again from the run that made it.",
        )
    return loaded


def _read_config(path: Path) -> dict[str, Any]:
    from peft import __version__ as installed
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if not path.is_dir():
        raise _error(path, "folder", "an adapter folder", "no such folder")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__} at the top")
    except FileNotFoundError as error:
        got = f"a folder with {_list(p.name for p in path.iterdir())}"
        raise _error(path, CONFIG, "PEFT's configuration file", got) from error
    except (OSError, ValueError) as error:
        raise _error(path, CONFIG, "valid JSON", str(error), "Copy the adapter again.") from error
    made_by = config.get("peft_version") or "an unknown version"
    upgrade = (
        f"It was saved by PEFT {made_by}, {installed} is installed: 'pip install --upgrade peft'."
    )
    kind = config.get("peft_type")
    known = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise _error(path, "peft_type", f"one of {', '.join(sorted(known))}", repr(kind), upgrade)
    # A newer PEFT writes all its fields. Those that are off change nothing and may be left out;
    # one that is on would be dropped by PEFT with a warning, and the adapter compute otherwise.
    fields = known[kind].__dataclass_fields__
    unknown = sorted(k for k, v in config.items() if k not in fields and v)
    if unknown:
        got = ", ".join(f"{key}={config[key]!r}" for key in unknown)
        raise _error(path, CONFIG, f"settings that PEFT {installed} knows", got, upgrade)
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / WEIGHTS
    if not file.is_file():
        remedy = None
        if (path / "adapter_model.bin").is_file():
            remedy = "It holds a pickle (adapter_model.bin): load it with PEFT and save it again."
        raise _error(path, WEIGHTS, "the adapter's weights", "no such file", remedy)
    try:
        weights = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise _error(
            path,
            WEIGHTS,
            "a whole safetensors file",
            f"{file.stat().st_size} bytes that are truncated or corrupt ({error})",
            "Copy the adapter again, or train from the last checkpoint.",
        ) from error
    if not weights:
        raise _error(path, WEIGHTS, "at least one tensor", "none")
    return weights


def _check_model(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Each LoRA pair of the file against the module of that name."""
    from fastft.nn.quantized import dtype_of, shape_of

    modules = dict(model.named_modules())
    absent: list[str] = []
    wrong: list[str] = []
    for key, tensor in weights.items():
        name, found, side = key.removeprefix(PREFIX).partition(".lora_")
        if not found or side not in ("A.weight", "B.weight"):
            continue
        if name not in modules:
            absent.append(name)
            continue
        weight = getattr(modules[name], "weight", None)
        features = tensor.shape[1] if side == "A.weight" else tensor.shape[0]
        # Packed weights of other kinds do not say their features.
        if weight is None or weight.dim() != 2 or not dtype_of(modules[name]).is_floating_point:
            continue
        if features not in shape_of(weight):
            wrong.append(f"{name} ({features} against {shape_of(weight)})")
    got = []
    if absent:
        got.append(f"modules this model lacks: {_list(dict.fromkeys(absent))}")
    if wrong:
        got.append(f"other shapes: {_list(wrong)}")
    if got:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        raise _error(
            path,
            "base model",
            "an adapter of this model",
            "; ".join(got),
            f"It was trained on {base!r}." if base else None,
        )


def reload_max_diff(
    model: PeftModel, path: str | Path, inputs: dict[str, Any], adapter_name: str = "default"
) -> float:
    """Largest difference of the model's logits on ``inputs`` between the adapter in memory and the
    one in the folder ``path``.

    The adapter's tensors are overwritten with NaN before the file is read into them, so a tensor
    that the file lacks shows as NaN. The model is left as it was.
    """
    import torch
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    live = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    kept = {key: tensor.detach().clone() for key, tensor in live.items()}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            before = model(**inputs).logits.float()
            for tensor in live.values():
                tensor.fill_(float("nan"))
            set_peft_model_state_dict(model, _read_weights(Path(path)), adapter_name=adapter_name)
            after = model(**inputs).logits.float()
    finally:
        with torch.no_grad():
            for key, tensor in live.items():
                tensor.copy_(kept[key])
        model.train(training)
    if not torch.isfinite(before).all():
        raise AdapterError(
            "reload_max_diff", "logits", expected="finite values", got="NaN or infinity"
        )
    diff = (after - before).abs()
    # max() of a tensor with NaN is NaN, which is what a missing tensor shall give.
    return float(diff.max())


def _error(
    path: Path, what: str, expected: str, got: str, remedy: str | None = None
) -> AdapterError:
    return AdapterError(str(path), what, expected=expected, got=got, remedy=remedy)


def _list(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return (", ".join(every[:SHOWN]) or "nothing") + more
