"""Copies between the host and an accelerator: only where somebody waits for a copy may it be left under way."""

from __future__ import annotations

import torch


def copies_in_background(device: torch.device) -> bool:
    """
    Whether copies between this device and pinned memory may be left under way.

    CUDA keeps the order of copies and kernels and holds pinned memory until its copies are done. Other devices make no
    such promise for memory of the host, so their copies are waited for.
    """
    return device.type == "cuda"


def compiles_shapes(device: torch.device) -> bool:
    """
    Whether a step is compiled anew for every new shape and every new place of a slice: there, shapes must not depend
    on the data, and places are told by tensors of indices.
    """
    return device.type == "xla"


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor, without making the host wait where the device allows for that."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and copies_in_background(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until everything that was asked of this device is done."""
    if device.type == "cpu":
        return
    if hasattr(torch, "accelerator"):
        torch.accelerator.synchronize(device)
    else:
        getattr(torch, device.type).synchronize()
