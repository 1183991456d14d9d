"""The slide encoder (EXAONE Path 2.5, arXiv 2512.14019): patch features to patch and slide embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from exaonepath.encoders.base import ExaonePathPreTrainedModel
from exaonepath.encoders.block import compute_dtype, stream_dtype
from exaonepath.encoders.configuration import ExaonePathSlideEncoderConfig
from exaonepath.encoders.exporting import encode_padded
from exaonepath.encoders.memory_plan import MemoryPlan, Workload, available_memory, parse_memory, plan_memory
from exaonepath.encoders.slide_transformer import SlideTransformer, TokenOrder
from exaonepath.encoders.slide_transformer import ffn_hidden as ffn_hidden
from exaonepath.encoders.streaming import RowReader, RowWriter
from exaonepath.encoders.unmodified import execution_device, is_unmodified, own
from exaonepath.errors import SettingsError
from exaonepath.ops.attention.layout import FragmentLayout, Segments, build_fragment_layout
from exaonepath.ops.attention.rotary import Rotation


@dataclass
class SlideEncoderOutput(ModelOutput):
    """Embeddings of a batch of slides; readable as attributes, as keys, and as a tuple.

    Attributes:
        patch_embedding: [B, N, C + E], features and encoder output, concatenated; at padded patches the encoder output
            is 0.
        slide_embedding: [B, C + E], mean over valid patches; 0 for a slide without valid patches.
    """

    patch_embedding: Tensor | None = None
    slide_embedding: Tensor | None = None


@own
class _WsiEncoder(nn.Module):
    """One level of the published parameter names (`wsi_encoder.transformer`); it calls its child."""

    def __init__(self, transformer: SlideTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, features: Tensor, layout: FragmentLayout, coords: Tensor | None, backend: str) -> Tensor:
        out: Tensor = self.transformer(features, layout, coords, backend)
        return out


@own
class _SlideEncoder(nn.Module):
    """One level of the published parameter names (`slide_encoder.wsi_encoder`); it calls its child."""

    def __init__(self, transformer: SlideTransformer) -> None:
        super().__init__()
        self.wsi_encoder = _WsiEncoder(transformer)

    def forward(self, features: Tensor, layout: FragmentLayout, coords: Tensor | None, backend: str) -> Tensor:
        out: Tensor = self.wsi_encoder(features, layout, coords, backend)
        return out


class ExaonePathSlideEncoderModel(ExaonePathPreTrainedModel):
    """Slide encoder under the published parameter names (`slide_encoder.wsi_encoder.transformer.*`)."""

    config_class = ExaonePathSlideEncoderConfig
    base_model_prefix = "slide_encoder"
    main_input_name = "patch_features"
    component_names = ("slide", "slide-encoder", "slide_encoder", "wsi")
    _no_split_modules = ["Block"]  # noqa: RUF012
    # Blocks, and the row-wise layers inside them, are computed again in the backward pass. `use_reentrant` in
    # transformers' `gradient_checkpointing_kwargs` has no effect: it is always False for this model.
    supports_gradient_checkpointing = True

    def __init__(self, config: ExaonePathSlideEncoderConfig) -> None:
        super().__init__(config)
        self.slide_encoder = _SlideEncoder(SlideTransformer(config.wsi))
        self.post_init()

    @property
    def transformer(self) -> SlideTransformer:
        """The transformer inside the published nesting of names."""
        return self.slide_encoder.wsi_encoder.transformer

    def forward(
        self,
        patch_features: Tensor,
        patch_mask: Tensor | None = None,
        patch_coords: Tensor | None = None,
        patch_contour_index: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SlideEncoderOutput | tuple[Tensor, Tensor]:
        """Encode a batch of slides.

        Args:
            patch_features: [B, N, C], features of the patch encoder. Values at padded patches have no influence.
            patch_mask: [B, N], bool or number (0 is padding); None: every patch is valid.
            patch_coords: [B, N, 2], (x, y) of each patch's top left corner in level-0 pixels; None: no rotation.
            patch_contour_index: [B, N], tissue fragment of each patch (-1 joins the prefix tokens); None: no fragment
                restriction.
            return_dict: False returns a plain tuple.

        Returns:
            `SlideEncoderOutput`, in the wider dtype of features and weights.

        Raises:
            SettingsError: shapes, dtypes or devices do not match, or coordinates are not finite or not exact.
            MemoryLimitError: without autograd, the slide cannot fit into the GPU's free memory.
        """
        mask = self._check(patch_features, patch_mask, patch_coords, patch_contour_index)
        if torch.is_grad_enabled() or not is_unmodified(self.slide_encoder):
            output = self._forward_whole(patch_features, mask, patch_coords, patch_contour_index)
        else:
            device = patch_features.device
            output = self._infer(patch_features, mask, patch_coords, patch_contour_index, device, None)
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def encode_streamed(
        self,
        patch_features: Tensor | np.ndarray,
        patch_mask: Tensor | np.ndarray | None = None,
        patch_coords: Tensor | np.ndarray | None = None,
        patch_contour_index: Tensor | np.ndarray | None = None,
        *,
        max_memory: int | str | None = None,
    ) -> SlideEncoderOutput:
        """Encode slides whose features, and embeddings, stay in the host's memory.

        Only the data of one chunk of rows is copied to the model's device at a time, while the previous chunk is
        computed. The result equals that of `forward` up to rounding.

        Args:
            patch_features, patch_mask, patch_coords, patch_contour_index: as for `forward`, arrays or tensors on the
                host (features may also be on the model's device).
            max_memory: memory that may be used on the model's device, weights included, in bytes or as "12GB"; None:
                the free memory of a GPU, no limit on a CPU. A lower limit leads to smaller chunks.

        Returns:
            `SlideEncoderOutput` on the host.

        Raises:
            SettingsError: as for `forward`.
            MemoryLimitError: the slides cannot fit; raised before anything is allocated, and states the needed memory.
        """
        inputs = [
            torch.from_numpy(t) if isinstance(t, np.ndarray) else t
            for t in (patch_features, patch_mask, patch_coords, patch_contour_index)
        ]
        features, coords, contour = inputs[0], inputs[2], inputs[3]
        assert features is not None
        mask = self._check(features, inputs[1], coords, contour, streamed=True)
        limit = None if max_memory is None else parse_memory(max_memory)
        host = torch.device("cpu")
        if is_unmodified(self.slide_encoder):
            return self._infer(features, mask, coords, contour, host, limit)
        if limit is not None:
            raise SettingsError(
                "max_memory cannot be planned for an encoder with hooks, replaced, quantised or offloaded layers; "
                "leave it out"
            )
        device = execution_device(self.slide_encoder)
        moved = [None if t is None else t.to(device) for t in (coords, contour)]
        output = self._forward_whole(features.to(device), mask.to(device), *moved)
        return SlideEncoderOutput(*(t.to(host) for t in output.to_tuple()))

    def plan_memory(
        self,
        n_patches: int,
        *,
        max_memory: int | str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        streamed: bool = True,
    ) -> MemoryPlan:
        """The memory that inference of one slide needs, without running it.

        Args:
            n_patches: N.
            max_memory: as for `encode_streamed`.
            device: device of the inference; None: the model's device.
            dtype: dtype of the matrix products, as autocast would set it; None: the current one.
            backend: attention backend; None: "triton" for a GPU, "sdpa" for the CPU.
            streamed: whether to plan for `encode_streamed`; else for `forward`.

        Raises:
            MemoryLimitError: the slide does not fit into `max_memory`.
        """
        where = self.device if device is None else torch.device(device)
        backend = backend or ("triton" if where.type == "cuda" else "sdpa")
        tokens = n_patches + self.transformer.n_prefix
        on_device = (not streamed, not streamed) if where.type != "cpu" else (True, True)
        work = self._workload(tokens, n_patches, torch.float32, dtype, backend, tokens, where, on_device, True)
        return plan_memory(work, None if max_memory is None else parse_memory(max_memory), where=str(where))

    def _infer(
        self,
        features: Tensor,
        mask: Tensor,
        coords: Tensor | None,
        contour: Tensor | None,
        out_device: torch.device,
        limit: int | None,
    ) -> SlideEncoderOutput:
        transformer, device = self.transformer, self.transformer.weight.device
        batch, n, channels = features.shape
        flat = features.reshape(batch * n, channels)
        layout = build_fragment_layout(transformer.n_prefix, mask, contour)
        order = TokenOrder.of(layout)
        rotation = transformer.rotation(order, coords)
        layout, rotation = _to_device(layout, rotation, device)

        backend = self.config._attn_implementation
        resolved = {name for _, name in transformer.backends(layout, backend, device).values()}
        # NoPE and RoPE blocks may use different backends. The slowest of them also needs the most memory.
        slowest = next(name for name in ("eager", "sdpa", "cudnn", "triton") if name in resolved)
        longest = max(layout.slides.lengths, default=0)
        on_device = features.device == device, out_device == device
        work = self._workload(
            order.n_tokens, batch * n, features.dtype, None, slowest, longest, device, on_device, coords is not None
        )
        allocated = work.weights + (features.nbytes if on_device[0] else 0)
        plan = plan_memory(work, _limit(limit, allocated, device), where=str(device))

        reader = RowReader(flat, device, plan.rows)
        x = transformer.encode(reader, layout, order, rotation, backend, plan.rows, plan.attention_rows)
        del rotation, reader
        return self._collect(x, features, mask, order, plan.rows, out_device)

    def _collect(
        self, x: Tensor, features: Tensor, mask: Tensor, order: TokenOrder, rows: int, out_device: torch.device
    ) -> SlideEncoderOutput:
        """Embeddings from the residual stream [T, E], by chunks of patches; the sums of the means are in float64."""
        batch, n, channels = features.shape
        dtype, width = torch.promote_types(features.dtype, self.dtype), x.shape[1]
        patches = torch.empty((batch, n, channels + width), dtype=dtype, device=out_device)
        feature_sums = torch.zeros((batch, channels), dtype=torch.float64, device=features.device)
        encoded_sums = torch.zeros((batch, width), dtype=torch.float64, device=x.device)
        writer = RowWriter(x.device, out_device, max(rows, 1), width, dtype)
        for slides, part, values in self.transformer.leave(x, order, (batch, n), rows):
            encoded_sums[slides] += values.sum(1)
            target = patches[slides, part]
            writer.put(values.to(dtype).flatten(0, 1), target[..., channels:].view(-1, width))
            own = features[slides, part]
            if not order.all_valid:
                valid = mask[slides, part][..., None]
                feature_sums[slides] += _sum_valid(own, valid)
                own = torch.where(valid | torch.isfinite(own), own, 0)  # NaN and inf of padding are not returned
            else:
                feature_sums[slides] += own.sum(1, dtype=torch.promote_types(own.dtype, torch.float32))
            target[..., :channels] = own
        writer.finish()
        count = mask.sum(1, keepdim=True).clamp(min=1)
        means = (feature_sums / count).to(out_device), (encoded_sums / count.to(x.device)).to(out_device)
        return SlideEncoderOutput(patch_embedding=patches, slide_embedding=torch.cat(means, -1).to(dtype))

    def _forward_whole(
        self, features: Tensor, mask: Tensor, coords: Tensor | None, contour: Tensor | None
    ) -> SlideEncoderOutput:
        """The forward pass by calls of all modules; it supports gradients."""
        if torch.compiler.is_exporting():
            encoded, all_valid = encode_padded(self.transformer, features, mask, coords, contour), False
        else:
            layout = build_fragment_layout(self.transformer.n_prefix, mask, contour)
            order = TokenOrder.of(layout)
            packed = self.slide_encoder(features.flatten(0, 1), layout, coords, self.config._attn_implementation)
            encoded = packed.index_select(0, order.positions().clamp(min=0)).unflatten(0, mask.shape)
            del packed
            all_valid = order.all_valid
        valid = mask[:, :, None]
        if not all_valid:
            encoded = torch.where(valid, encoded, 0)

        dtype = torch.promote_types(features.dtype, self.dtype)
        count = mask.sum(1, keepdim=True).clamp(min=1)
        features_mean = _sum_valid(features, valid) / count
        encoded_mean = encoded.sum(1) / count  # padded rows are 0
        slide_embedding = torch.cat([features_mean.to(encoded.dtype), encoded_mean], -1).to(dtype)
        if not all_valid:
            features = torch.where(valid | torch.isfinite(features), features, 0)
        patch_embedding = torch.cat([features.to(dtype), encoded.to(dtype)], -1)
        return SlideEncoderOutput(patch_embedding=patch_embedding, slide_embedding=slide_embedding)

    def _workload(
        self,
        tokens: int,
        patches: int,
        features: torch.dtype,
        compute: torch.dtype | None,
        backend: str,
        longest: int,
        device: torch.device,
        on_device: tuple[bool, bool],
        positions: bool,
    ) -> Workload:
        transformer = self.transformer
        weight = transformer.weight
        compute = compute_dtype(weight) if compute is None else compute
        cast = 0
        if compute != weight.dtype and len(transformer.blocks):
            cast = sum(p.numel() for p in transformer.blocks[0].parameters()) * compute.itemsize
        return Workload(
            tokens=tokens,
            patches=patches,
            input_dim=transformer.cfg["input_dim"],
            embed_dim=transformer.cfg["embed_dim"],
            hidden_dim=transformer.hidden,
            heads=transformer.cfg["num_heads"],
            compute=compute,
            stream=stream_dtype(weight),
            weights=sum(t.nbytes for t in (*self.parameters(), *self.buffers())),
            cast_weights=cast,
            features=features,
            output=torch.promote_types(features, self.dtype),
            features_on_device=on_device[0],
            output_on_device=on_device[1],
            positions=positions,
            backend=backend,
            longest=longest,
            device=device.type,
        )

    def _check(
        self,
        features: Tensor,
        mask: Tensor | None,
        coords: Tensor | None,
        contour: Tensor | None,
        streamed: bool = False,
    ) -> Tensor:
        width = self.config.wsi["input_dim"]
        if features.ndim != 3 or features.shape[-1] != width or not features.is_floating_point():
            raise SettingsError(
                f"patch_features must be floating point [B, N, {width}], got {features.dtype} {list(features.shape)}"
            )
        device = self.transformer.weight.device
        if features.device != device and device.type != "meta" and not (streamed and features.device.type == "cpu"):
            raise SettingsError(
                f"patch_features is on {features.device}, but the encoder is on {device}; move one of them, or leave "
                "the features on the host and call encode_streamed"
            )
        shape = features.shape[:2]
        for name, tensor, wanted in (
            ("patch_mask", mask, shape),
            ("patch_coords", coords, (*shape, 2)),
            ("patch_contour_index", contour, shape),
        ):
            if tensor is not None and tensor.shape != wanted:
                raise SettingsError(f"{name} must be {list(wanted)} to match patch_features, got {list(tensor.shape)}")
            if tensor is not None and tensor.device != features.device:
                raise SettingsError(f"{name} is on {tensor.device}, but patch_features is on {features.device}")
            if tensor is not None and tensor.is_complex():
                raise SettingsError(f"{name} must be real, got {tensor.dtype}")
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=features.device)
        return mask if mask.dtype == torch.bool else mask != 0


def _to_device(
    layout: FragmentLayout, rotation: Rotation | None, device: torch.device
) -> tuple[FragmentLayout, Rotation | None]:
    """Copy layout and rotation to the encoder's device."""
    if layout.source.device == device:
        return layout, rotation
    slides = Segments(layout.slides.offsets.to(device), layout.slides.lengths)
    fragments = slides
    if layout.fragments is not layout.slides:
        fragments = Segments(layout.fragments.offsets.to(device), layout.fragments.lengths)
    layout = replace(layout, slides=slides, fragments=fragments)
    if rotation is not None:
        rotation = Rotation(rotation.positions.to(device), rotation.periods.to(device))
    return layout, rotation


def _limit(limit: int | None, allocated: int, device: torch.device) -> int | None:
    """Bytes that may be used, including `allocated` (weights, and features on the device): the plan counts them too."""
    free = available_memory(device)
    if free is None:
        return limit
    return allocated + free if limit is None else min(limit, allocated + free)


def _sum_valid(x: Tensor, valid: Tensor) -> Tensor:
    """Sum over valid patches of x [B, N, C], valid [B, N, 1], in float32 or wider.

    `where` ignores padded values that are NaN or inf; a product with the mask would not, because 0 * NaN is NaN.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.where(valid, x, 0).sum(1, dtype=wide)
