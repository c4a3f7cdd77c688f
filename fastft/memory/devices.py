"""What devices can hold and do: the table behind the planner's predictions.

``tflops`` and ``bandwidth`` are what large products and large copies reach, not what the data sheet
says: on GPUs of the table four fifths of the dense 16-bit rate and nine tenths of the memory's
(measured on no card here; ``fastft doctor --measure`` puts a machine's own numbers in their place).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastft.errors import ArgumentError, nearest

__all__ = ["DEVICES", "Device", "find_device"]

# Achieved share of the published dense 16-bit rate, and of the published bandwidth.
_PRODUCTS, _COPIES = 0.8, 0.9


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        type: torch's name of its kind.
        memory: bytes.
        tflops: 10^12 floating-point operations a second of a large 16-bit product.
        tflops32: the same in float32 (TF32 where the device has it and torch is told to).
        bandwidth: 10^12 bytes a second, reads and writes together.
        launch: seconds an operation takes at least, on the device or to launch it.
        pcie: 10^9 bytes a second to host memory, one way.
        scores: share of ``tflops`` that attention's products reach.
        source: of the numbers.
        bfloat16: whether it multiplies bfloat16.
    """

    name: str
    type: str
    memory: int
    tflops: float
    tflops32: float
    bandwidth: float
    launch: float = 5e-6
    pcie: float = 25.0
    scores: float = 0.6
    source: str = "data sheet"
    bfloat16: bool = True


def _gpu(
    name: str, gib: float, tflops: float, tflops32: float, terabytes: float, **more: Any
) -> Device:
    memory = int(gib * 2**30)
    rates = (tflops * _PRODUCTS, tflops32 * _PRODUCTS, terabytes * _COPIES)
    return Device(name, "cuda", memory, *rates, **more)


# Published: memory in GiB as torch reports it, dense bfloat16 (T4: float16) and float32 (vector
# units) in TFLOP/s, terabytes a second. H100 SXM, A100 SXM 80 GB, H200, B200 of their data sheets;
# GeForce cards accumulate in float32, at half the rate of the larger cards.
DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        _gpu("A100", 79.1, 312, 19.5, 2.04),
        _gpu("A100-40GB", 39.4, 312, 19.5, 1.56),
        _gpu("H100", 79.1, 989, 67, 3.35, pcie=50.0),
        _gpu("H200", 139.8, 989, 67, 4.8, pcie=50.0),
        _gpu("B200", 178.0, 2250, 75, 7.7, pcie=50.0),
        _gpu("L4", 22.0, 121, 30, 0.30),
        _gpu("L40S", 44.4, 362, 92, 0.86),
        _gpu("A10", 22.0, 125, 31, 0.60),
        _gpu("T4", 14.6, 65, 8.1, 0.32, pcie=12.0, bfloat16=False),
        _gpu("RTX 3090", 23.6, 71, 36, 0.94),
        _gpu("RTX 4090", 23.5, 165, 83, 1.01),
        _gpu("RTX 5090", 31.4, 210, 105, 1.79, pcie=50.0),
    )
}


def find_device(name: str) -> Device:
    """The device of that name, in any case, with or without spaces.

    Raises:
        ArgumentError: it is not in the table.
    """
    plain = {_plain(known): device for known, device in DEVICES.items()}
    found = plain.get(_plain(name)) or plain.get(_plain("RTX" + name))
    if found is None:
        raise ArgumentError(
            "fastft plan",
            "device",
            expected=f"cpu, this machine's GPU (cuda), or one of {', '.join(DEVICES)}",
            got=repr(name),
            remedy=nearest(name, list(DEVICES)) or None,
        )
    return found


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
