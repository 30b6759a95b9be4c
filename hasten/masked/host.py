"""Bookkeeping of a pass on the host, in numpy.

Which places are open and which rows a pass computes are questions of some dozens of numbers. On tensors
each step of the answer costs several times what it costs here. On an accelerator each question that ends
in a number is a wait, too; here it is one where a text, drafts or a guess are fetched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def fetched(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an array that must not be written to: it may share the tensor's memory."""
    return tensor.cpu().numpy()  # type: ignore[no-any-return]


def sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array that nobody writes to any more, as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
