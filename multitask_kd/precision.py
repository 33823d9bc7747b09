"""Which device a run computes on, and in which precision."""

from __future__ import annotations

import torch

from .errors import UserError


def resolve_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N -> device. Raises UserError for a device that is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"run.device: '{name}' is none of auto, cpu, cuda, cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"run.device: {name} is not there; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return found


def resolve_amp(name: str, device: torch.device, where: str) -> torch.dtype | None:
    """The dtype of autocast. Raises UserError for a precision that the device does not have."""
    if name == "none":
        return None
    cuda = device.type == "cuda"
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if cuda else _cpu_multiplies_bf16()
        return torch.bfloat16 if native else None
    if name == "fp16" and not cuda:
        raise UserError(f"{where}: fp16 needs a CUDA device; use bf16 or none on {device}")
    if name == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        raise UserError(f"{where}: this GPU has no bf16; use fp16 or none")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions. Without them autocast is slower than float32."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
