"""Small encoders with reproducible, peaked weights."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exaonepath import ExaonePathSlideEncoderConfig, ExaonePathSlideEncoderModel

TINY = {
    "input_dim": 24,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "ffn_layer": "swiglu",
    "n_storage_tokens": 3,
}


@pytest.fixture
def tiny_config() -> dict:
    return dict(TINY)


@pytest.fixture
def make_slide_encoder():
    """Build a small slide encoder in eval mode, float64, biases non-zero and attention peaked so that mistakes show."""

    def make(**changes) -> ExaonePathSlideEncoderModel:
        generator = torch.Generator().manual_seed(0)
        model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg={**TINY, **changes})).eval().double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.5 if parameter.ndim != 2 else (2.0 if "qkv" in name else 1.0) / parameter.shape[1] ** 0.5
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
                parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else noise)
        return model

    return make


@pytest.fixture
def make_slide():
    """A batch of made-up slides: features, mask, coords, contour_index."""

    def make(batch=2, n=40, contours=4, dtype=torch.float64, seed=0, masked=True):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(batch, n, TINY["input_dim"], generator=generator, dtype=torch.float64).to(dtype)
        mask = torch.rand(batch, n, generator=generator) > 0.25 if masked else torch.ones(batch, n, dtype=torch.bool)
        coords = torch.randint(0, 200_000, (batch, n, 2), generator=generator)
        contour = torch.randint(0, contours, (batch, n), generator=generator)
        return features, mask, coords, contour

    return make


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that are alive on one type of device, and their peak, while the mode is on.

    On the device "meta" nothing is computed: shapes of any size cost nothing, and every allocation is seen.
    """

    def __init__(self, device: str, *held: torch.Tensor) -> None:
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self._alive: dict[int, int] = {}
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == self.device and key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


@pytest.fixture
def live_memory() -> type[LiveMemory]:
    return LiveMemory
