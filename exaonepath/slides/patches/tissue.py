"""Where the tissue of a slide comes from: the segmentation, a mask that the user gives, or a plug-in."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np

from exaonepath.errors import MissingDependencyError, SettingsError
from exaonepath.files.outlines import KINDS, Excluded
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.artefacts import check_kinds, find_artefacts
from exaonepath.slides.patches.given_regions import (
    RegionFile,
    bounds_origin,
    check_exists,
    find_region_file,
    mask_and_exclusions,
)
from exaonepath.slides.patches.rings import is_degenerate
from exaonepath.slides.patches.segmentation import Tissue, segment_tissue
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.slides.patches.shrinking import WANTED_DOWNSAMPLE

logger = logging.getLogger(__name__)

GROUP = "exaonepath.segmenters"
BUILT_IN = ("exaone", "otsu", "mask")

Segmenter = Callable[[SlideImage, SegmentationSettings], Tissue]


@dataclass(frozen=True)
class TissueSource:
    """Where the tissue of one slide comes from.

    Attributes:
        segmenter: "exaone", "otsu", "mask", or the name of a plug-in.
        plugin: name and version of the package that a plug-in comes from; empty for the others.
        mask, mask_classes: regions of tissue, and the classes of them that are used; none: all.
        exclude, exclude_classes: regions to leave out, in the same way.
        remove: kinds of artefacts to look for and to leave out, "pen" and "blur".
        exclude_given: whether a file or folder of regions to leave out was given, also if it has none for this slide.
        origin: level-0 position from which the coordinates of GeoJSON files count.
    """

    segmenter: str = "exaone"
    plugin: str = ""
    mask: RegionFile | None = None
    mask_classes: tuple[str, ...] = ()
    exclude: RegionFile | None = None
    exclude_classes: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    exclude_given: bool = False
    origin: tuple[int, int] = (0, 0)

    def as_json(self) -> dict[str, Any]:
        """Plain values of what decides the result, without the defaults: files count by their content."""
        values: dict[str, Any] = {}
        if self.plugin:
            values["segmenter"] = f"{self.segmenter} ({self.plugin})"
        for name, file, classes in (
            ("mask", self.mask, self.mask_classes),
            ("exclude", self.exclude, self.exclude_classes),
        ):
            if file is not None:
                values[name] = file.sha256
            if classes and (name == "mask" or file is not None or not self.exclude_given):
                values[f"{name}_classes"] = sorted({text.casefold() for text in classes})
        if self.origin != (0, 0) and (self.mask or self.exclude):
            values["geojson_origin"] = list(self.origin)
        if self.remove:
            values["remove"] = sorted(set(self.remove))
        return values


def check_source(
    segmenter: str | None = None,
    mask: str | os.PathLike[str] | None = None,
    mask_class: str | Iterable[str] = (),
    exclude: str | os.PathLike[str] | None = None,
    exclude_class: str | Iterable[str] = (),
    remove: str | Iterable[str] = (),
    geojson_origin: str = "slide",
) -> TissueSource:
    """The source that the arguments of `patchfy` describe, as far as it does not depend on the slide: without files.

    Raises:
        SettingsError: the segmenter is not known, or the arguments contradict each other.
        MaskError: a file or folder does not exist.
    """
    if segmenter is None:
        segmenter = "exaone" if mask is None else "mask"
    if (segmenter == "mask") != (mask is not None):
        raise SettingsError(
            f"segmenter {segmenter!r} takes no mask"
            if mask is not None
            else 'segmenter "mask" needs a mask (mask=..., or --mask FILE)'
        )
    plugin = "" if segmenter in BUILT_IN else _package(_entry_point(segmenter))
    classes, excluded_classes = _names(mask_class, "mask_class"), _names(exclude_class, "exclude_class")
    if classes and mask is None:
        raise SettingsError("mask_class selects regions of a mask, and there is none (mask=..., or --mask FILE)")
    if excluded_classes and exclude is None and mask is None:
        raise SettingsError("exclude_class selects regions of a file, and there is none (exclude=... or mask=...)")
    if geojson_origin not in ("slide", "bounds"):
        raise SettingsError(f'geojson_origin must be "slide" or "bounds", not {geojson_origin!r}')
    kinds = _names(remove, "remove")
    check_kinds(kinds)
    for path in (mask, exclude):
        check_exists(path)
    return TissueSource(segmenter, plugin, None, classes, None, excluded_classes, kinds, exclude is not None)


def tissue_source(
    slide: SlideImage,
    *,
    mask: str | os.PathLike[str] | None = None,
    exclude: str | os.PathLike[str] | None = None,
    geojson_origin: str = "slide",
    **others: Any,
) -> TissueSource:
    """The source for a slide: files are found and hashed, and not yet read.

    Raises:
        SettingsError, MaskError: as `check_source`; or there is no mask for the slide.
    """
    source = check_source(mask=mask, exclude=exclude, geojson_origin=geojson_origin, **others)
    return replace(
        source,
        mask=find_region_file(mask, slide, required=True),
        exclude=find_region_file(exclude, slide, required=False),
        origin=bounds_origin(slide) if geojson_origin == "bounds" else (0, 0),
    )


def _names(value: str | Iterable[str], argument: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(name, str) for name in names):
        raise SettingsError(f"{argument} must be a name or several, not {value!r}")
    return names


def find_tissue(slide: SlideImage, settings: SegmentationSettings, source: TissueSource) -> Tissue:
    """The tissue of a slide, with the regions to leave out.

    Raises:
        The errors of `segment_tissue` and `mask_and_exclusions`; SettingsError if a plug-in returns no tissue of the
        expected form, and whatever error it raises itself.
    """
    regions, excluded, notes = mask_and_exclusions(
        slide,
        source.mask,
        source.mask_classes,
        source.exclude,
        source.exclude_classes,
        source.origin,
        exclude_given=source.exclude_given,
    )
    if source.mask is not None:
        level = slide.get_best_level_for_downsample(WANTED_DOWNSAMPLE)
        tissue = Tissue([region.rings[0] for region in regions], [region.rings[1:] for region in regions], level)
    elif source.plugin:
        tissue = _checked(source.segmenter, _load(source.segmenter)(slide, settings), slide)
    else:
        otsu = settings.use_otsu or source.segmenter == "otsu"
        tissue = segment_tissue(slide, replace(settings, use_otsu=otsu))
    if source.remove and tissue.contours:
        excluded += find_artefacts(slide, tissue.seg_level, tissue.shrink, source.remove)
    segmenter = "otsu" if settings.use_otsu and source.segmenter == "exaone" else source.segmenter
    return tissue._replace(excluded=[*tissue.excluded, *excluded], segmenter=segmenter, notes=(*notes, *tissue.notes))


def segmenter_plugins() -> list[str]:
    """Names of the installed plug-ins (entry points of the group `exaonepath.segmenters`)."""
    return sorted({point.name for point in entry_points(group=GROUP)} - set(BUILT_IN))


def _entry_point(name: str) -> EntryPoint:
    found = [point for point in entry_points(group=GROUP) if point.name == name]
    if not found:
        known = ", ".join((*BUILT_IN, *segmenter_plugins()))
        raise SettingsError(
            f"there is no segmenter {name!r}; known: {known} (others are entry points of the group {GROUP})"
        )
    if len({point.value for point in found}) > 1:
        packages = ", ".join(sorted(map(_package, found)))
        raise SettingsError(f"several packages have a segmenter {name!r}: {packages}; uninstall all but one")
    return found[0]


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def _load(name: str) -> Segmenter:
    point = _entry_point(name)
    try:
        segmenter = point.load()
    except (ImportError, AttributeError) as exc:
        raise MissingDependencyError(f"segmenter {name!r} of {_package(point)} cannot be imported: {exc}") from exc
    if not callable(segmenter):
        raise SettingsError(f"segmenter {name!r} of {_package(point)} is no function: {point.value}")
    return segmenter


def _checked(name: str, tissue: Any, slide: SlideImage) -> Tissue:
    """The tissue of a plug-in, with rings as int32 arrays; every part of it is checked."""

    def wrong(what: str) -> SettingsError:
        return SettingsError(f"segmenter {name!r} returned {what} for {slide.path}")

    def rings(value: Any, where: str) -> list[np.ndarray]:
        checked = []
        for ring in _listed(value, where):
            points = np.asarray(ring)
            if points.ndim != 2 or points.shape[1] != 2 or points.dtype.kind not in "iu":
                raise wrong(f"{where} that are not integers [P, 2]")
            if (points < 0).any() or (points >= slide.dimensions).any() or is_degenerate(points):
                raise wrong(f"{where} that reach beyond the slide or have no area")
            checked.append(points.astype(np.int32))
        return checked

    def _listed(value: Any, where: str) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise wrong(f"{where} that are not a list")
        return value

    if not isinstance(tissue, Tissue):
        raise wrong(f"{type(tissue).__name__} in place of exaonepath.patches.Tissue")
    contours = rings(tissue.contours, "contours")
    holes = [rings(group, "holes") for group in _listed(tissue.holes, "holes")]
    if len(holes) != len(contours):
        raise wrong(f"{len(contours)} contours with {len(holes)} lists of holes")
    if tissue.seg_level not in range(len(slide.level_dimensions)):
        raise wrong(f"the level {tissue.seg_level!r}")
    excluded = []
    for region in _listed(tissue.excluded or [], "excluded regions"):
        if not isinstance(region, Excluded) or region.reason not in KINDS[1:] or not region.rings:
            raise wrong(f"an excluded region that is not Excluded(rings, reason), with a reason of {KINDS[1:]}")
        excluded.append(Excluded(rings(region.rings, "excluded regions"), region.reason))
    nothing = "" if contours else str(tissue.nothing) or f"segmenter {name!r} found no tissue"
    notes = tuple(str(note) for note in tissue.notes)
    return Tissue(contours, holes, int(tissue.seg_level), nothing=nothing, excluded=excluded, notes=notes)
