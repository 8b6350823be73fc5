"""The frozen vision tower's features, kept on disk, each picture encoded once per run instead of once per step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class FeatureStore:
    """Features [P, N, D_v] of named pictures in one safetensors file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        with safe_open(str(path), framework="pt") as file:
            self._features = file.get_tensor("features")
            names = bytes(file.get_tensor("names").numpy().tobytes()).decode().split("\0")
        self._index = {name: position for position, name in enumerate(names)}

    def get(self, names: Sequence[str]) -> Tensor:
        """Features [len(names), N, D_v], in the order of `names`."""
        return self._features[[self._index[name] for name in names]]


def save_features(path: Path, names: Sequence[str], features: Tensor) -> None:
    """Write a store atomically: names of P pictures and their features [P, N, D_v]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    joined = torch.frombuffer(bytearray("\0".join(names).encode()), dtype=torch.uint8)
    partial = path.with_suffix(".partial")
    save_file({"features": features.contiguous(), "names": joined}, str(partial))
    partial.replace(path)
