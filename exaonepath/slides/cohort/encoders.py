"""The encoders of a run: those of the run itself, and those that a slide asks for, each loaded once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch

from exaonepath.device import evaluating
from exaonepath.encoders import loading
from exaonepath.encoders.loading import LoadedEncoder
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.slides.cohort.encoder_pool import MOST_LOADED, EncoderPool
from exaonepath.slides.features.encoding import BatchEncoder
from exaonepath.slides.stages import EncodeSettings, batch_encoder

logger = logging.getLogger(__name__)


class EncoderPair(NamedTuple):
    """The two encoders of one set of weights."""

    patch: LoadedEncoder[ExaonePathPatchEncoderModel]
    slide: LoadedEncoder[ExaonePathSlideEncoderModel]


# (weights, device) -> the encoders; another function can be given for tests and for other engines.
LoadEncoders = Callable[[str, torch.device], EncoderPair]


def load_encoders(weights: str, device: torch.device) -> EncoderPair:
    """Load both encoders.

    Raises:
        WeightsError, DeviceError: they cannot be loaded.
    """
    patch = loading.load_patch_encoder(weights, device=device)
    return EncoderPair(patch, loading.load_slide_encoder(weights, device=device))


@dataclass
class _Loaded:
    pair: EncoderPair
    batches: BatchEncoder | None = None


class Encoders:
    """The encoders that a process uses; few at a time are in memory.

    Args:
        default: of the slides that do not state weights of their own.
        settings: of the run.
        load: loads those of the others, which are in evaluation mode then.
    """

    def __init__(self, default: EncoderPair, settings: EncodeSettings, load: LoadEncoders = load_encoders) -> None:
        self._settings = settings
        self._default = _Loaded(default)
        self._others = EncoderPool(lambda weights: _Loaded(load(weights, self.device)), MOST_LOADED - 1)
        self._stack = ExitStack()
        self._stack.enter_context(evaluating(default.patch.model))

    @property
    def device(self) -> torch.device:
        """Where patches are encoded."""
        return self._default.pair.patch.device

    def pair(self, weights: str | None) -> EncoderPair:
        """The encoders for these weights; None: those of the run."""
        return self._loaded(weights).pair

    def batch_encoder(self, weights: str | None, earlier_batch_size: int | None) -> BatchEncoder:
        """What encodes batches with these weights; made once, so that weights are converted once.

        Args:
            weights: see `pair`.
            earlier_batch_size: of the interrupted run that is continued: with the batch size "auto", it is used again,
                unless it does not fit.
        """
        settings, loaded = self._settings, self._loaded(weights)
        patch = loaded.pair.patch
        if loaded.batches is None:
            loaded.batches = batch_encoder(patch, settings)
        encoder = loaded.batches
        earlier = earlier_batch_size if settings.batch_size == "auto" else None
        if earlier is None or earlier == encoder.batch_size:
            return encoder
        if patch.device.type == "cuda" and earlier > encoder.batch_size:
            logger.warning(
                "the interrupted run used batches of %d patches, which may not fit into the memory now; with %d, "
                "features may differ from those of an uninterrupted run by rounding",
                earlier,
                encoder.batch_size,
            )
            return encoder
        return encoder.with_batch_size(earlier)

    def close(self) -> None:
        """Give the models the modes that they had before."""
        self._stack.close()

    def _loaded(self, weights: str | None) -> _Loaded:
        if weights is None or weights == self._default.pair.patch.weights:
            return self._default
        return self._others.get(weights)
