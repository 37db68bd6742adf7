"""Tensors on their way to where they are computed with.

A GPU works behind the program, which goes on launching. A copy from ordinary memory first waits until the GPU
has done all it was given (CUDA's rules of synchronisation), so that it then stands idle until the program has
caught up; from pinned memory it is one more thing in the queue.
"""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; on its way to a GPU nobody waits for it.

    From a GPU to the CPU it is waited for: the CPU would read what has yet to be written there.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        # Torch keeps the pinned copy from other use until the GPU has read it.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
