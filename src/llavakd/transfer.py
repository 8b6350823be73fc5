"""From the host to the device without a wait."""

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; through page-locked memory on its way to a GPU, so that the host goes on at once."""
    if device.type == "cuda" and not values.is_cuda:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
