"""How far the slide encoder is from float64, on the golden files, compared with the published arithmetic in the same
dtype.

The time is that of one forward pass of ours; what counts here are the errors in the extra info and in the table.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from exaonepath import ExaonePathSlideEncoderConfig, ExaonePathSlideEncoderModel
from exaonepath.reference.slide_encoder import sdpa_dense_mask
from exaonepath.reference.slide_encoder import slide_encoder as reference

PREFIX = "slide_encoder.wsi_encoder.transformer."
DATA = Path(os.environ.get("EXAONEPATH_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
GOLDENS = sorted(path.stem for path in (DATA / "golden").glob("slide_encoder_*.npz")) or ["(no golden data found)"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GOLDENS)
def test_accuracy(benchmark, session, name, dtype):
    session.need_dtype("cpu", dtype)
    if not DATA.is_dir():
        pytest.skip(f"golden data not found at {DATA} (set EXAONEPATH_TEST_DATA)")
    spec = importlib.util.spec_from_file_location("golden_weights", DATA / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    with np.load(DATA / "golden" / f"{name}.npz", allow_pickle=False) as archive:
        data = {key: archive[key] for key in archive.files}
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=json.loads(str(data["config"])))).eval()
    filled = weights.fill({k: tuple(v.shape) for k, v in model.state_dict().items()}, int(data["weight_seed"]))
    model.load_state_dict({k: torch.from_numpy(v) for k, v in filled.items()}, strict=False)
    state = {k.removeprefix(PREFIX): torch.from_numpy(v) for k, v in filled.items()}
    config = {**model.config.wsi, "norm_eps": 1e-5, "periods": model.transformer.rope_embed()}
    inputs = [torch.from_numpy(data[k]) for k in ("patch_features", "patch_mask")]
    inputs += [torch.from_numpy(data[k]) if k in data else None for k in ("patch_coords", "patch_contour_index")]

    def run(call):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return call()

    def errors(patches, slide):
        tail = patches.double().numpy()[..., -config["embed_dim"] :] * data["patch_mask"][..., None]
        pairs = ((slide.double().numpy(), data["slide_embedding"]), (tail, data["patch_embedding_tail"]))
        return [float(f"{np.linalg.norm(a - b) / np.linalg.norm(b):.2g}") for a, b in pairs]

    benchmark.group = f"accuracy {dtype}"
    ours = errors(*benchmark(lambda: run(lambda: model(*inputs).to_tuple())))
    dense = errors(*run(lambda: reference(state, config, *inputs, dtype=torch.float32, attention=sdpa_dense_mask)))
    benchmark.extra_info.update(
        golden=name, slide_error=ours[0], patch_error=ours[1], dense_slide_error=dense[0], dense_patch_error=dense[1]
    )
