"""In which dtype products are computed."""

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on for ``x``'s device, else the dtype of ``x``.

    Rounding ``x`` to it by hand is done once; autocast would do it again for each product.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
