"""Load an encoder from the value of `--weights`.

The value is a Hub id, a directory, or `random:SEED`: reproducible random weights, to try the pipeline without a
checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from exaonepath.device import resolve_device, resolve_dtype
from exaonepath.encoders.base_configuration import read_config
from exaonepath.encoders.composite import ExaonePathModel
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.encoders.repository import Repository
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import SettingsError, WeightsError
from exaonepath.files.strict_json import shown

logger = logging.getLogger(__name__)

_RANDOM = "random:"

M = TypeVar("M", bound=PreTrainedModel)


@dataclass(frozen=True)
class LoadedEncoder(Generic[M]):
    """An encoder in eval mode on its device.

    Attributes:
        model: the encoder.
        weights: the value that the user gave.
        fingerprint: hash of the parameters; equal fingerprints give equal embeddings.
        is_random: the weights are random, so the embeddings have no meaning.
    """

    model: M
    weights: str
    fingerprint: str
    is_random: bool

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device


def load_patch_encoder(
    weights: str = DEFAULT_WEIGHTS,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> LoadedEncoder[ExaonePathPatchEncoderModel]:
    """Load the patch encoder.

    Args:
        weights: Hub id, directory (a repository with a `patch-encoder` subfolder, or that subfolder itself), or
            "random:SEED".
        device: see `resolve_device`.
        dtype: of the parameters; None keeps float32 (use autocast for half precision).
        attn_implementation: "sdpa" or "eager" (the same here); None: "auto".

    Raises:
        WeightsError: `weights` has no usable files, or their keys do not match. DeviceError: the device does not exist.
    """
    return _load(ExaonePathPatchEncoderModel, "patch", weights, device, dtype, attn_implementation)


def load_slide_encoder(
    weights: str = DEFAULT_WEIGHTS,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> LoadedEncoder[ExaonePathSlideEncoderModel]:
    """Load the slide encoder; arguments as for `load_patch_encoder`.

    `attn_implementation` may also be "triton". None or "auto": triton on a GPU that supports the kernels, else sdpa.
    """
    return _load(ExaonePathSlideEncoderModel, "slide", weights, device, dtype, attn_implementation)


def _load(
    cls: type[M],
    component: str,
    weights: str,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None,
) -> LoadedEncoder[M]:
    target = resolve_device(device)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    is_random = weights.startswith(_RANDOM)
    model = _random_model(cls, weights, options) if is_random else _pretrained(cls, component, weights, options)
    fingerprint = weights_fingerprint(model)
    if dtype is not None:
        model = model.to(resolve_dtype(dtype, target))
    return LoadedEncoder(model.to(target).eval(), weights, fingerprint, is_random)


def _pretrained(cls: type[M], component: str, weights: str, options: dict[str, Any]) -> M:
    expanded = os.path.expanduser(weights)  # noqa: PTH111  Path.expanduser raises an error if the user does not exist
    repository = Repository(expanded if os.path.lexists(expanded) else weights)
    options = {**options, "dtype": torch.float32}
    config = read_config(repository)
    if repository.unreachable:
        options["local_files_only"] = True  # a second request would only wait for the same timeout
    if config is None:
        return cls.from_pretrained(repository.where, subfolder=f"{component}-encoder", **options)
    if config.get("model_type") == cls.config_class.model_type:
        return cls.from_pretrained(repository.where, **options)
    if config.get("model_type") == ExaonePathModel.config_class.model_type:
        return ExaonePathModel.from_pretrained(repository.where, component=component, **options)
    raise WeightsError(
        f"{weights} holds a model of type {shown(config.get('model_type'))}, not a {component} encoder of this family"
    )


def _random_model(cls: type[M], weights: str, options: dict[str, Any]) -> M:
    text = weights[len(_RANDOM) :]
    if not (text.isascii() and text.isdigit()):
        raise SettingsError(f"random weights are written random:SEED with a whole number, got {weights!r}")
    model: M = cls._from_config(cls.config_class(), **options)
    randomize(model, int(text))
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Fill all parameters from `seed` and their names alone: the same numbers in every process and version.

    The scale keeps the size of activations constant through the layers. Then even a random encoder gives different
    embeddings for different tissue, as a random projection does.
    """
    for name, parameter in model.named_parameters():
        # torch's CPU generator uses only 32 bits of a seed. A checksum mixes the seed and the name into 32 bits.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        leaf = name.rsplit(".", 1)[-1]
        if parameter.ndim == 1:
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
            continue
        values = torch.randn(parameter.shape, generator=generator)
        scale = 0.02 if "token" in leaf or leaf == "pos_embed" else 1 / math.sqrt(math.prod(parameter.shape[1:]))
        parameter.copy_(values * scale)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which show the shards of a model while it is read or written."""
    from transformers.utils import logging as verbosity

    shown_before = verbosity.is_progress_bar_enabled()
    verbosity.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            verbosity.enable_progress_bar()


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
