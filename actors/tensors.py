"""Tensors in Ray's object store: read in place by all processes of a node, not copied to each."""

import warnings
from typing import Any

import numpy as np
import ray.util
import torch
from torch import Tensor


def share_tensors() -> None:
    """Let this process send tensors as numpy arrays, the form that Ray maps from shared memory without a copy.

    What arrives is read-only memory: clients and server copy what they change (their values never alias a message).
    """
    ray.util.register_serializer(Tensor, serializer=_to_array, deserializer=_to_tensor)


def _to_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    return array


def _to_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
