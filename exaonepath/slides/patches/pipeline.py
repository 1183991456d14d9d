"""patchfy: computes the coordinates of the tissue patches of a slide file, writes them and returns them."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exaonepath.errors import OutputError, ScaleError, SettingsError, SlideSkippedError
from exaonepath.files.artifact import MadeFrom, refuse_input_as_output, reuse, settings_hash
from exaonepath.files.atomic import ensure_folder, write_text
from exaonepath.files.geojson import geojson_made_from, refuse_changed_geojson, write_outlines_geojson
from exaonepath.files.patches import KIND, Outcome, PatchSet, parse_patches, read_contours, write_patches
from exaonepath.log_once import warn_once
from exaonepath.slides.image import SlideImage, opened
from exaonepath.slides.outputs import output_paths
from exaonepath.slides.patches.exclusion import region_of_patches
from exaonepath.slides.patches.grid import PatchGrid, patch_grid
from exaonepath.slides.patches.picture import draw_tissue, write_picture
from exaonepath.slides.patches.segmentation import Tissue, about_missing
from exaonepath.slides.patches.settings import AUTO, MAX_SEG_PIXELS, SegmentationSettings
from exaonepath.slides.patches.tissue import TissueSource, find_tissue, tissue_source
from exaonepath.slides.scale import GIVEN

logger = logging.getLogger(__name__)

REFERENCE_MPP = 0.5
_SOURCE = ("segmenter", "mask", "mask_class", "exclude", "exclude_class", "remove", "geojson_origin")
_MAX_PATCH = 1 << 24  # pixels; the largest slides have 2^18 along a side


@dataclass(frozen=True)
class PatchSettings:
    """All settings that decide which patches a slide yields. Defaults are EXAONE Path's.

    Attributes:
        patch_size, step_size: side of a patch and distance between patches, in pixels at 0.5 micrometres per pixel.
        patch_level: pyramid level that the grid is computed for.
        segmentation: settings of the tissue segmentation.
        source: where the tissue of the slide comes from.
        mpp: the pixel size if the user states it, in micrometres.
        reader: what the slide's reader adds to the settings (see `SlideImage.reader_settings`).
    """

    patch_size: int = 256
    step_size: int = 256
    patch_level: int = 0
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)
    source: TissueSource = field(default_factory=TissueSource)
    mpp: float | None = None
    reader: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("patch_size", "step_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value <= 0:
                raise SettingsError(f"{name} must be a positive whole number of pixels, not {value!r}")
        if isinstance(self.patch_level, bool) or not isinstance(self.patch_level, int | np.integer):
            raise SettingsError(f"patch_level must be a whole number, not {self.patch_level!r}")

    def as_json(self) -> dict[str, Any]:
        """Plain values of the settings on which the result depends; the size limit is not included."""
        values = {"patch_size": int(self.patch_size), "step_size": int(self.step_size)}
        values |= {"patch_level": int(self.patch_level)}
        seg = asdict(self.segmentation)
        del seg["max_seg_pixels"]
        # 1, 1.0 and numpy's scalars must give equal settings, so each value is converted to the type of its default.
        kinds = {name: type(value) for name, value in asdict(SegmentationSettings()).items()}
        kinds |= {"a_t": float, "a_h": float}
        values |= {name: value if value == AUTO else kinds[name](value) for name, value in seg.items()}
        values |= {"use_otsu": values["use_otsu"] or self.source.segmenter == "otsu"} | self.source.as_json()
        # The file's own pixel size follows from its content. So the settings of earlier results stay equal.
        return values | ({} if self.mpp is None else {"mpp": float(self.mpp)}) | dict(self.reader)

    def effective(self, slide: SlideImage) -> tuple[int, int]:
        """(patch size, step) in level-0 pixels of this slide.

        Raises:
            ScaleError: the slide's pixel size is so small that the patch would be too large.
        """
        factor = REFERENCE_MPP / slide.mpp
        largest = max(self.patch_size, self.step_size) * factor
        if not largest <= _MAX_PATCH:
            raise ScaleError(
                f"{slide.path}: with pixels of {slide.mpp:g} um ({slide.mpp_source}) a patch would be {largest:.3g} "
                "pixels wide; the pixel size is wrong, state the right one (mpp =, or --mpp)"
            )
        patch, step = int(self.patch_size * factor), int(self.step_size * factor)
        return patch if patch > 0 else int(self.patch_size), step if step > 0 else int(self.step_size)


def patchfy(
    wsi: str | os.PathLike[str] | SlideImage,
    out: str | os.PathLike[str],
    patch_size: int = 256,
    step_size: int = 256,
    patch_level: int = 0,
    save_h5: bool = True,
    save_mask: bool = True,
    auto_skip: bool = True,
    sthresh: int = 8,
    mthresh: int = 7,
    use_otsu: bool = False,
    close: int = 4,
    a_t: float = 1,
    a_h: float = 1,
    max_n_holes: int = 100,
    line_thickness: int = 100,
    seg_downsample: float | Literal["auto"] = 1.0,
    max_seg_pixels: int | None = MAX_SEG_PIXELS,
    overwrite: bool = False,
    strict_scale: bool = False,
    mpp: float | None = None,
    save_contours: bool | None = None,
    segmenter: str | None = None,
    mask: str | os.PathLike[str] | None = None,
    mask_class: str | Sequence[str] = (),
    exclude: str | os.PathLike[str] | None = None,
    exclude_class: str | Sequence[str] = (),
    remove: str | Sequence[str] = (),
    geojson_origin: Literal["slide", "bounds"] = "slide",
) -> tuple[Path | None, np.ndarray, np.ndarray]:
    """Find the tissue of a slide and compute the patches on it.

    Writes `<out>/patches/<id>.h5`, `<out>/masks/<id>.jpg` and `<out>/contours/<id>.geojson`, or in deeper folders (see
    `exaonepath.slides.outputs`), where the id is the slide's file stem, or the `name` of an opened slide; each is
    written whole or not at all. If a finished result with the same settings exists, its stored patches are returned.
    The slide is processed again if the settings or the content of the slide have changed.

    Args:
        wsi: slide file, or an opened slide (which stays open).
        out: output folder; created if needed.
        patch_size, step_size: in pixels at 0.5 micrometres per pixel.
        patch_level: pyramid level that the grid is computed for.
        save_h5: write the HDF5 file.
        save_mask: write the picture of the contours.
        auto_skip: use a finished result from disk.
        sthresh, mthresh, use_otsu, close, a_t, a_h, max_n_holes, seg_downsample, max_seg_pixels: see
            `SegmentationSettings`.
        line_thickness: of the contours in the picture, in level-0 pixels.
        overwrite: process finished slides again, and replace the result of a different slide of the same name.
        strict_scale: raise an error if the pixel size is assumed, implausible or differs between the axes; otherwise a
            warning is logged.
        mpp: micrometres per pixel at level 0, in place of what the file states; None: as the file states.
        save_contours: store the contours in the HDF5 file (see `read_contours`), and write them as GeoJSON for QuPath;
            None: as `save_h5`.
        segmenter: "exaone", "otsu" (as `use_otsu`), "mask", or the name of an installed plug-in; None: "mask" with a
            mask, otherwise "exaone".
        mask: tissue to use in place of a segmentation, as GeoJSON or as an image of the slide's shape; or a folder of
            such files, named by the id of the slide. The order of the regions is that of the contours. See
            docs/masks.md.
        mask_class: class or classes of the mask's annotations that are tissue; default: all.
        exclude: regions whose patches are left out, in the same forms. A patch is left out if its centre lies in one.
        exclude_class: class or classes to exclude, of `exclude` if it is given, otherwise of `mask`.
        remove: "pen", "blur" or both: pen marks and areas that are out of focus are looked for and left out, by simple
            rules with limits (docs/masks.md).
        geojson_origin: from where GeoJSON counts, in and out: "slide", level-0 pixels as everywhere in this package; or
            "bounds", as in QuPath, which shows only the recorded area of MIRAX and Leica slides.

    Returns:
        The path of the HDF5 file (None without `save_h5`), coords int32 [N, 2] as (x, y) at level 0, and contour_index
        int32 [N]. A slide without tissue gives N = 0.

    Raises:
        SettingsError: a setting is invalid, in general or for this slide. Nothing has been written.
        MaskError: a file of regions is missing or damaged, selects no tissue, or does not fit the slide.
        SlideOpenError, SlideReadError: the slide cannot be opened or read.
        SlideSkippedError: the slide exceeds `max_seg_pixels`; the reason is in `<out>/skipped/<id>.txt`.
        ScaleError: the pixel size is doubtful and `strict_scale` is set; or a patch of this size would be too large.
        SlideChangedError: the file was replaced while it was read; nothing has been written.
        MemoryLimitError: segmenting the slide, or reading a mask, needs more memory than is available.
        OutputError: the output cannot be written.
        OutputCollisionError: the output of a different slide with the same stem exists.
    """
    segmentation = SegmentationSettings(
        sthresh, mthresh, use_otsu, close, a_t, a_h, max_n_holes, seg_downsample, max_seg_pixels
    )
    settings = PatchSettings(patch_size, step_size, patch_level, segmentation)
    if not isinstance(line_thickness, Real) or not 0 < line_thickness < math.inf:
        raise SettingsError(f"line_thickness must be a positive number, not {line_thickness!r}")
    save_contours = save_h5 if save_contours is None else save_contours
    with opened(wsi, mpp=mpp) as slide:
        settings = settings_of_slide(
            slide,
            settings,
            strict_scale,
            segmenter=segmenter,
            mask=mask,
            mask_class=mask_class,
            exclude=exclude,
            exclude_class=exclude_class,
            remove=remove,
            geojson_origin=geojson_origin,
        )
        source = settings.source
        folder = Path(out)
        paths = output_paths(folder, slide.name)
        h5_path, mask_path, geojson_path = paths.patches, paths.mask, paths.contours
        made_from = {"slide_fingerprint": slide.fingerprint(), "settings_hash": settings_hash(settings.as_json())}
        if source.origin != (0, 0):
            made_from["origin"] = f"{source.origin[0]},{source.origin[1]}"
        stored = _stored(h5_path, slide, settings, overwrite) if save_h5 or save_mask or save_contours else None
        if stored is not None and auto_skip and save_h5 and not overwrite:
            if not save_mask or mask_path.is_file():
                logger.info("%s: %d patches taken from %s", slide.path, len(stored), h5_path)
                _repeat_warnings(slide, stored)
                if save_contours:
                    _complete_geojson(geojson_path, h5_path, stored, made_from)
                return h5_path, stored.coords, stored.contour_index
            logger.info("%s: finished, but %s is missing: patching again", slide.path, mask_path)
        if save_contours:
            refuse_input_as_output(geojson_path, [file.path for file in (source.mask, source.exclude) if file])
        if save_contours and not overwrite:
            refuse_changed_geojson(geojson_path)
        ensure_folder(folder)
        outputs = ((h5_path, save_h5), (mask_path, save_mask), (geojson_path, save_contours))
        for path in (path for path, wanted in outputs if wanted):
            ensure_folder(path.parent)
        tissue = _segment(slide, settings, paths.skipped)
        grid, left_out = _grid(slide, tissue, settings)
        slide.check_unchanged()
        if left_out:
            logger.info("%s: patches left out: %s", slide.path, _counts(left_out))
        no_patch = "" if len(grid.coords) else _why_no_patch(tissue, left_out)
        if no_patch:
            logger.warning("%s has no patch: %s", slide.path, no_patch)
        # The HDF5 file is written last: if it exists, all other outputs exist too.
        if save_mask:
            write_picture(mask_path, draw_tissue(slide, tissue, line_thickness))
        if save_contours:
            write_outlines_geojson(geojson_path, tissue.outlines, made_from)
        if save_h5:
            size, _ = settings.effective(slide)
            write_patches(
                h5_path,
                slide,
                *grid,
                patch_size=size,
                patch_level=int(patch_level),
                settings=settings.as_json(),
                missing=tissue.missing,
                outlines=tissue.outlines if save_contours else None,
                outcome=Outcome(
                    tissue.segmenter,
                    tissue.seg_level,
                    tissue.shrink,
                    len(tissue.contours),
                    tissue.tries,
                    no_patch,
                    tissue.notes,
                    left_out,
                ),
            )
        logger.info("%s: %d patches on %d contours", slide.path, len(grid.coords), len(tissue.contours))
        return (h5_path if save_h5 else None), grid.coords, grid.contour_index


def settings_of_slide(
    slide: SlideImage, settings: PatchSettings, strict_scale: bool = False, **source: Any
) -> PatchSettings:
    """The settings, with what the slide adds to them: its masks, a pixel size that was given, its reader.

    Args:
        slide: an open slide.
        settings: without these.
        strict_scale: a doubtful pixel size is an error.
        source: the arguments of `tissue_source`.

    Raises:
        SettingsError, ScaleError, MaskError: see `patchfy`.
    """
    if not 0 <= settings.patch_level < len(slide.level_dimensions):
        raise SettingsError(
            f"{slide.path} has no level {settings.patch_level}: levels are 0 to {len(slide.level_dimensions) - 1}"
        )
    if strict_scale and slide.scale_doubts:
        raise ScaleError(f"{slide.path} {'; '.join(slide.scale_doubts)} (strict_scale)")
    settings.effective(slide)
    return replace(
        settings,
        source=tissue_source(slide, **source),
        mpp=slide.mpp if slide.mpp_source == GIVEN else None,
        reader=slide.reader_settings(),
    )


def planned_settings(slide: SlideImage, arguments: Mapping[str, Any]) -> PatchSettings:
    """The settings that `patchfy` would use for a slide with these keyword arguments; nothing is written.

    Raises:
        SettingsError, ScaleError, MaskError: see `patchfy`.
    """
    known = {each.name for each in fields(SegmentationSettings)}
    segmentation = SegmentationSettings(**{name: value for name, value in arguments.items() if name in known})
    grid = {name: arguments[name] for name in ("patch_size", "step_size", "patch_level") if name in arguments}
    source = {name: arguments[name] for name in _SOURCE if name in arguments}
    return settings_of_slide(
        slide, PatchSettings(**grid, segmentation=segmentation), arguments.get("strict_scale", False), **source
    )


def _stored(path: Path, slide: SlideImage, settings: PatchSettings, overwrite: bool) -> PatchSet | None:
    """The patches on disk if they belong to this slide and these settings; None if the slide must be processed."""
    values = settings.as_json()
    made_from = MadeFrom(settings_hash(values), slide.fingerprint(), slide.stored_path, slide.mtime_ns, values)
    return reuse(path, KIND, made_from, lambda file: parse_patches(path, file), overwrite=overwrite)


def _counts(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in left_out.items())


def _why_no_patch(tissue: Tissue, left_out: Mapping[str, int]) -> str:
    if left_out:
        total = sum(left_out.values())
        return (
            f"all {total} patches on its {len(tissue.contours)} contours lie in excluded regions ({_counts(left_out)})"
        )
    return tissue.nothing or f"no patch of the grid lies on the {len(tissue.contours)} contours"


def _repeat_warnings(slide: SlideImage, stored: PatchSet) -> None:
    """Log what was logged when a stored result was made: it still holds."""
    if stored.missing:
        logger.warning("%s %s", slide.path, about_missing(stored.missing))
    if stored.outcome is not None:
        for note in stored.outcome.notes:
            logger.warning("%s %s", slide.path, note)
        if stored.outcome.no_patch:
            logger.warning("%s has no patch: %s", slide.path, stored.outcome.no_patch)


def _complete_geojson(path: Path, h5_path: Path, stored: PatchSet, made_from: Mapping[str, str]) -> None:
    """Write the GeoJSON of a stored result if it is missing or belongs to an earlier one; its contours are stored."""
    if not stored.has_outlines:
        warn_once(
            logger,
            "results of earlier runs hold no contours, such as %s; they are used all the same (ask to overwrite them "
            "to get their contours)",
            h5_path,
        )
        return
    written = geojson_made_from(path)
    if written != made_from and (written is not None or not path.exists()):  # a file that the user changed is left
        try:
            ensure_folder(path.parent)
            write_outlines_geojson(path, read_contours(h5_path), made_from)
        except OutputError as exc:  # a folder of finished results may be read-only
            logger.warning("%s; the contours are stored in %s all the same", exc, h5_path)


def _segment(slide: SlideImage, settings: PatchSettings, reason: Path) -> Tissue:
    try:
        tissue = find_tissue(slide, settings.segmentation, settings.source)
    except SlideSkippedError as exc:
        ensure_folder(reason.parent)
        write_text(reason, f"{exc}\n")
        raise
    reason.unlink(missing_ok=True)
    return tissue


def plan_grid(slide: SlideImage, tissue: Tissue, settings: PatchSettings) -> PatchGrid:
    """The patches that `patchfy` computes for tissue that was found already; nothing is written."""
    return _grid(slide, tissue, settings)[0]


def _grid(slide: SlideImage, tissue: Tissue, settings: PatchSettings) -> tuple[PatchGrid, dict[str, int]]:
    """The patches, and how many were left out because they lie in excluded regions, for each reason."""
    patch, step = settings.effective(slide)
    scale_x, scale_y = (int(d) for d in slide.level_downsamples[settings.patch_level])
    grid = patch_grid(tissue.contours, tissue.holes, patch * scale_x, (step * scale_x, step * scale_y))
    region = region_of_patches(grid.coords, patch * scale_x, tissue.excluded)
    left_out = Counter(tissue.excluded[index].reason for index in region[region >= 0])
    kept = region < 0
    return PatchGrid(grid.coords[kept], grid.contour_index[kept]), dict(sorted(left_out.items()))
