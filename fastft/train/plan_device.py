"""The device that is planned for: of the table, or this machine's, with the rates it reached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastft.errors import ConfigError
from fastft.memory.ceilings import Ceilings
from fastft.memory.devices import Device
from fastft.train.config import TrainConfig
from fastft.train.plan_model import dtype_of

__all__ = ["ceilings_of", "device_of", "measure_here"]


def _ceilings_file() -> Path:
    from fastft.train.models import cache_folder

    return cache_folder() / "ceilings.json"


def ceilings_of(device: Device, cfg: TrainConfig) -> Ceilings | None:
    """Measured rates of a device: kept ones, and for the CPU, of which there is no table, measured
    now where there are none."""
    import torch

    from fastft.memory import ceilings

    dtype = dtype_of(cfg, device)
    name = str(dtype).removeprefix("torch.")
    found = ceilings.load(_ceilings_file(), device.name, name)
    if found is None and (device.type == "cpu" or device.source == "measured"):
        found = ceilings.measure(torch.device(device.type), device.name, dtype)
    return found


def measure_here() -> list[str]:
    """Measures this machine in the dtypes it trains in and keeps the rates; a line each."""
    import torch

    from fastft.memory import ceilings

    device = device_of("auto")
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        found = ceilings.measure(torch.device(device.type), device.name, dtype)
        ceilings.save(_ceilings_file(), found)
        best = max(point[3] for point in found.products) / 1e12
        lines.append(
            f"{device.name}, {found.dtype}: {best:.3g} TFLOP/s, {found.copies / 1e9:.3g} GB/s; "
            f"kept in {_ceilings_file()}"
        )
    return lines


def device_of(name: str) -> Device:
    """The device that ``name`` stands for: "cpu" and "cuda" are this machine's, "auto" the one it
    would train on, another is one of the table.

    Raises:
        ConfigError: "cuda" without a CUDA GPU.
        ArgumentError: no such device.
    """
    import torch

    from fastft.memory.devices import DEVICES, find_device
    from fastft.train.machine import cpu_name, native_bfloat16, total_memory

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        # Its rates are measured: a table of processors would be wrong on most.
        return Device(cpu_name(), "cpu", total_memory(), 0.0, 0.0, 0.0, source="measured")
    if name != "cuda":
        return find_device(name)
    if not torch.cuda.is_available():
        expected = f"a name of the table where there is no GPU: {', '.join(DEVICES)}"
        raise ConfigError("fastft plan", "device", expected=expected, got="cuda, without a GPU")
    properties = torch.cuda.get_device_properties(0)
    known = [d for d in DEVICES.values() if d.name.split("-")[0] in properties.name]
    near = min(known, key=lambda d: abs(d.memory - properties.total_memory), default=None)
    if near is None:
        near = Device(properties.name, "cuda", 0, 0, 0, 0, source="measured")
    return replace(
        near,
        name=properties.name,
        memory=properties.total_memory,
        bfloat16=native_bfloat16("cuda"),
    )
