"""Attention of patches to all others, computed exactly by the slide encoder that made the embeddings."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from exaonepath.errors import BackendError, SettingsError

if TYPE_CHECKING:
    from exaonepath.encoders.loading import LoadedEncoder
    from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel

_MOST_ON_CPU = 20_000  # patches: blocks without fragments take time quadratic in them
_KEPT = 8


class AttentionUnavailable(SettingsError):
    """Attention cannot be computed for this slide here; the message says why."""


class Attention:
    """Computes attention, one request at a time, and keeps the last results. Torch is imported at the first request.

    Args:
        weights: weights of the slide encoder; None: those that the embeddings state.
        device: as for `load_slide_encoder`.
        most_on_cpu: patches of the largest slide that is computed on a CPU; None: no limit.
    """

    def __init__(
        self, weights: str | None = None, device: str = "auto", *, most_on_cpu: int | None = _MOST_ON_CPU
    ) -> None:
        self._weights, self._device, self._most_on_cpu = weights, device, most_on_cpu
        self._lock = threading.Lock()
        self._encoders: dict[str, LoadedEncoder[ExaonePathSlideEncoderModel]] = {}
        self._kept: OrderedDict[tuple[str, int | None], np.ndarray] = OrderedDict()

    def of_patch(
        self,
        version: str,
        attrs: dict[str, Any],
        features: np.ndarray,
        coords: np.ndarray,
        fragments: np.ndarray,
        patch: int | None,
    ) -> np.ndarray:
        """Attention of a patch, or the mean over all patches, in every block, mean over heads: float32 [blocks, N]; a
        row and what falls on the prefix tokens add up to 1.

        Args:
            version: names the results of the slide.
            attrs: attributes of the embeddings file.
            features: float32 [N, C] as the slide encoder takes them.
            coords, fragments: int32 [N, 2] and [N].
            patch: index of the patch; None: the mean over all patches.

        Raises:
            AttentionUnavailable: the slide is too large for the CPU, or the weights are not those of the embeddings.
            WeightsError, DeviceError, BackendError: the encoder cannot be loaded, or runs out of memory.
        """
        with self._lock:  # one forward pass at a time: two would need twice the memory
            key = (version, patch)
            if key not in self._kept:
                encoder = self._encoder(attrs)
                limit = self._most_on_cpu
                if encoder.device.type == "cpu" and limit is not None and len(features) > limit:
                    raise AttentionUnavailable(
                        f"attention of {len(features):,} patches would take minutes on a CPU (up to {limit:,} are "
                        "computed); use --device cuda"
                    )
                self._kept[key] = _maps(encoder, features, coords, fragments, patch)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _encoder(self, attrs: dict[str, Any]) -> LoadedEncoder[ExaonePathSlideEncoderModel]:
        wanted = self._weights or attrs.get("weights")
        if not isinstance(wanted, str) or not wanted:
            raise AttentionUnavailable("the embeddings do not state their weights; name them with --weights")
        if wanted not in self._encoders:
            from exaonepath.encoders.loading import load_slide_encoder

            self._encoders = {wanted: load_slide_encoder(wanted, device=self._device)}
        encoder = self._encoders[wanted]
        stated = attrs.get("weights_fingerprint")
        if stated is not None and stated != encoder.fingerprint:
            raise AttentionUnavailable(
                f"the weights {wanted} are not those that these embeddings were computed with, so their attention "
                "would be another one; name the right ones with --weights"
            )
        return encoder


def _maps(
    encoder: LoadedEncoder[ExaonePathSlideEncoderModel],
    features: np.ndarray,
    coords: np.ndarray,
    fragments: np.ndarray,
    patch: int | None,
) -> np.ndarray:
    import torch

    from exaonepath.encoders.attention_map import attention_map, mean_attention

    width = encoder.model.config.wsi["input_dim"]
    if features.shape[1] != width:
        raise AttentionUnavailable(f"the features are {features.shape[1]} wide, the slide encoder takes {width}")
    on_device = [torch.from_numpy(array).to(encoder.device) for array in (features, coords, fragments)]
    given = (encoder.model, on_device[0], on_device[1], on_device[2])
    try:
        if patch is None:
            rows = [found.patches for found in mean_attention(*given)]
        else:
            rows = [found.patches[0] for found in attention_map(*given, [patch])]
    except torch.OutOfMemoryError as exc:
        raise BackendError(f"attention of {len(features)} patches does not fit into the memory of the device") from exc
    return np.stack([heads.mean(0).numpy() for heads in rows]).astype(np.float32, copy=False)
