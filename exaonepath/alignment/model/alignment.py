"""Slides and molecular profiles of patients in shared spaces: the alignment model of arXiv 2512.14019."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from exaonepath.alignment.batch import PatientBatch, SlideBatch, SlidePatches
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.model.configuration import ExaonePathAlignmentConfig, complete_omics_cfg
from exaonepath.alignment.model.features import match_features
from exaonepath.alignment.model.fusion import fuse
from exaonepath.alignment.model.loss import PairwiseSigmoidLoss
from exaonepath.alignment.model.omics import OmicsEncoder
from exaonepath.device import evaluating
from exaonepath.encoders.base import ExaonePathPreTrainedModel
from exaonepath.encoders.configuration import ExaonePathSlideEncoderConfig
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import ConfigError, SettingsError
from exaonepath.ops.attention.layout import build_ragged_layout

logger = logging.getLogger(__name__)


@dataclass
class PatientEmbeddings(ModelOutput):
    """Embeddings of B patients.

    Attributes:
        modality: name to [B, E_m], the encoder's output (for the slide: features and encoder output concatenated,
            averaged over the patient's slides); 0 if the patient lacks the modality.
        available: name to bool [B].
        fused: [B, P d], one unit vector per patient over the P trained pairs (see `fuse`).
    """

    modality: dict[str, Tensor] | None = None
    available: dict[str, Tensor] | None = None
    fused: Tensor | None = None


class ExaonePathAlignmentModel(ExaonePathPreTrainedModel):
    """Slide encoder, omics encoders, and the projections W_ij, temperatures and biases of their pairs.

    One row is one patient: several slides of a patient are averaged, because there is one molecular profile per
    patient.
    """

    config_class = ExaonePathAlignmentConfig
    base_model_prefix = "alignment"
    main_input_name = "batch"
    component_names = ("alignment", "multimodal")
    supports_gradient_checkpointing = True

    def __init__(self, config: ExaonePathAlignmentConfig) -> None:
        super().__init__(config)
        if len(config.modalities) < 2:
            raise ConfigError(f"alignment needs at least two modalities, got {', '.join(config.modalities) or 'none'}")
        if config.wsi_cfg is not None:
            slide_config = ExaonePathSlideEncoderConfig(wsi_cfg=config.wsi_cfg)
            slide_config._attn_implementation = self.config._attn_implementation
            self.slide_encoder = ExaonePathSlideEncoderModel(slide_config)
        self.omics = nn.ModuleDict(
            {
                name: OmicsEncoder(complete_omics_cfg(config.omics[name], name), name)
                for name in config.modalities
                if name != WSI
            }
        )
        self.loss = PairwiseSigmoidLoss(
            config.widths,
            config.projection_dim,
            pair_weights={pair: self.pair_weight(pair) for pair in config.modality_pairs},
            pos_weight=config.pos_weight,
        )
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        foundation: Mapping[str, nn.Module] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load strictly, like the other models; `foundation`: frozen foundation models by modality, to be attached."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, module in (foundation or {}).items():
            model.omics_encoder(name).attach_foundation(module)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; fingerprints of attached foundation models are written with the configuration."""
        for name in self.omics:
            if (foundation := self.omics_encoder(name).foundation_cfg) is not None:
                self.config.omics[name]["foundation"] = dict(foundation)
        return super().save_pretrained(*args, **kwargs)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the pairs."""
        modalities: tuple[str, ...] = self.config.modalities
        return modalities

    @property
    def trained_pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs whose loss has a weight above 0. Only their projections were trained."""
        return tuple(pair for pair in self.config.modality_pairs if self.pair_weight(pair) > 0)

    def pair_weight(self, pair: tuple[str, str]) -> float:
        """Factor on the loss of a pair (named in the order of the modalities); 0: not trained."""
        if self.config.pairs == WSI and WSI not in pair:
            return 0.0
        return float(self.config.pair_weights.get("-".join(pair), 1.0))

    def omics_encoder(self, modality: str) -> OmicsEncoder:
        """The encoder of a molecular modality; raises `SettingsError` if the model has none of that name."""
        if modality not in self.omics:
            raise SettingsError(f"the model has no molecular modality {modality!r}; it has {', '.join(self.omics)}")
        return self.omics[modality]  # type: ignore[return-value]

    def encoder(self, modality: str) -> nn.Module:
        """The encoder of any modality, the slide included."""
        if modality == WSI and hasattr(self, "slide_encoder"):
            return self.slide_encoder
        return self.omics_encoder(modality)

    def projection(self, modality: str, other: str) -> Tensor:
        """W_ij [E_i, d]: from `modality` into the space it shares with `other`."""
        return self.loss.projection(modality, other)

    def project(self, embedding: Tensor, modality: str, other: str) -> Tensor:
        """u = l2norm(h_i W_ij): [B, E_i] to unit vectors [B, d] in the space that both modalities share."""
        weight = self.projection(modality, other)
        return F.normalize(embedding.to(weight.dtype) @ weight, dim=-1)

    def match_features(self, modality: str, names: Sequence[str], *, by_name: bool = False) -> Tensor:
        """Columns of a table of `modality` in the order this model reads them: see `manifest.match_features`."""
        return match_features(modality, self.omics_encoder(modality).feature_names, names, by_name=by_name)

    def encode_slides(self, slides: SlideBatch, size: int) -> Tensor:
        """Slide embeddings averaged per patient: [size, C + E], 0 for patients without a slide; computed without
        padding."""
        encoder = self.slide_encoder
        coords, contours = self._alter_positions(slides)
        layout = build_ragged_layout(
            encoder.transformer.n_prefix, slides.lengths, contours, device=slides.features.device
        )
        backend = encoder.config._attn_implementation
        coords = None if coords is None else coords[None]
        encoded = layout.unpack_patches(encoder.slide_encoder(slides.features, layout, coords, backend))
        both = torch.cat([slides.features.to(encoded.dtype), encoded], -1)
        embeddings = torch.stack([part.mean(0) for part in both.split(slides.lengths)])
        # A product with a small matrix instead of index_add: on a GPU, index_add adds in an arbitrary order, so its
        # rounding would differ from run to run.
        owner = torch.tensor(slides.patients, device=embeddings.device)
        share = (owner == torch.arange(size, device=embeddings.device)[:, None]).to(embeddings.dtype)
        share = share / share.sum(1, keepdim=True).clamp(min=1)
        with torch.autocast(embeddings.device.type, enabled=False):
            return share @ embeddings

    def embed(self, batch: PatientBatch) -> dict[str, Tensor]:
        """Embedding of every modality: name to [B, E_m], 0 for rows that are not in `batch.available`.

        Raises:
            SettingsError: the batch has a modality that the model does not have, or shapes do not match.
        """
        if unknown := sorted(set(batch.available) - set(self.modalities)):
            raise SettingsError(f"the model has no modality {', '.join(unknown)}; it has {', '.join(self.modalities)}")
        out = {}
        device = self.loss_device
        for name in self.modalities:
            available = batch.available.get(name)
            rows = torch.zeros(0, dtype=torch.int64) if available is None else available.cpu().nonzero().view(-1)
            if not len(rows):
                out[name] = torch.zeros(batch.size, self.config.widths[name], device=device)
            elif name == WSI:
                assert batch.slides is not None
                embedding = self.encode_slides(batch.slides, batch.size)
                keep = torch.zeros(batch.size, 1, dtype=torch.bool)
                keep[rows] = True
                out[name] = torch.where(keep.to(device), embedding, 0)
            else:
                # Only available rows are encoded: a missing profile may have any values, and needs no computation.
                rows = rows.to(device)
                embedding = self.omics[name](batch.profiles[name][rows])
                empty = embedding.new_zeros(batch.size, embedding.shape[1])
                out[name] = empty.index_copy(0, rows, embedding)
        return out

    @property
    def loss_device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.loss.parameters()).device

    def encode_patients(self, batch: PatientBatch) -> PatientEmbeddings:
        """Embed patients from all modalities that are available.

        Returns:
            One embedding per modality, and the fused one; the model's training mode is not changed.

        Raises:
            SettingsError: a patient has no modality at all (rows are named), or shapes do not match.
        """
        available = {
            name: batch.available.get(name, torch.zeros(batch.size, dtype=torch.bool)).cpu() for name in self.modalities
        }
        nothing = ~torch.stack(list(available.values())).any(0)
        if nothing.any():
            rows = nothing.nonzero().view(-1).tolist()
            raise SettingsError(f"patients without any modality of the model, at rows {rows[:10]}: nothing to embed")
        embeddings = self.embed(batch.to(self.loss_device))
        return PatientEmbeddings(embeddings, available, self.fuse(embeddings, available))

    def encode_patient(
        self,
        wsi: SlidePatches | Sequence[SlidePatches] | None = None,
        *,
        totals: Mapping[str, float] | None = None,
        **profiles: Tensor,
    ) -> PatientEmbeddings:
        """Embed one patient from any subset of modalities; B = 1.

        Args:
            wsi: one slide, or several.
            totals: for modalities that are counts: the sum over all measured features, also of those that the model
                does not read; training divides by it. If missing: the sum of the profile is used, and a warning is
                logged.
            profiles: molecular profiles by modality, each [F] as measured (`OmicsEncoder.standardize` is applied), in
                the order of the model's feature names; NaN for missing values.
        """
        slides = None if wsi is None else [[wsi] if isinstance(wsi, SlidePatches) else list(wsi)]
        values = {name: torch.as_tensor(x)[None].to(self.loss_device) for name, x in profiles.items()}
        available = {name: ~torch.isnan(x).all(1).cpu() for name, x in values.items()}
        standardized = {}
        for name, x in values.items():
            encoder, total = self.omics_encoder(name), (totals or {}).get(name)
            if total is None and encoder.transform == "cpm_log1p":
                logger.warning(
                    "%s: counts are divided by their sum over the %d features that the model reads; training divided "
                    "by the sum over all measured features: pass it as totals={%r: ...}",
                    name,
                    x.shape[1],
                    name,
                )
            known = None if total is None else torch.tensor([float(total)], device=x.device)
            standardized[name] = encoder.standardize(x, known)
        batch = PatientBatch.build(1, slides, standardized, available)
        with evaluating(self), torch.no_grad():
            return self.encode_patients(batch)

    def fuse(self, embeddings: Mapping[str, Tensor], available: Mapping[str, Tensor]) -> Tensor:
        """One unit vector per patient from the available embeddings: see `fusion.fuse`."""
        return fuse(
            {
                (a, b): (self.project(embeddings[a], a, b), self.project(embeddings[b], b, a))
                for a, b in self.trained_pairs
            },
            available,
        )

    def forward(self, batch: PatientBatch) -> PatientEmbeddings:
        """The same as `encode_patients`."""
        return self.encode_patients(batch)

    def _alter_positions(self, slides: SlideBatch) -> tuple[Tensor | None, Tensor | None]:
        mode, coords, contours = self.config.rope_mode, slides.coords, slides.contour_index
        if mode in ("no_rotation", "off"):
            coords = None
        if mode in ("no_fragments", "off"):
            contours = None
        if mode == "shuffled" and coords is not None:
            parts = zip(coords.split(slides.lengths), slides.features.split(slides.lengths), strict=True)
            coords = torch.cat([part[_permutation(part, features)] for part, features in parts])
        return coords, contours


def _permutation(coords: Tensor, features: Tensor) -> Tensor:
    """A permutation that depends only on the slide: the same at every call, and a different one for every slide.

    The seed is a checksum of the coordinates and of the first four patches.
    """
    content = [x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data for x in (coords, features[:4])]
    seed = zlib.crc32(content[1], zlib.crc32(content[0]))
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(seed))
    return order.to(coords.device)
