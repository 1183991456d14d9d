"""Pictures of the slides in an output folder: values of patches over the slide, as an overlay, as example patches."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from exaonepath.errors import DataFileError, OutputError, SettingsError, SlideChangedError
from exaonepath.files.artifact import refuse_input_as_output
from exaonepath.files.atomic import ensure_folder
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.image import SlideImage
from exaonepath.viz.contact_sheet import MOST_EACH, draw_contact_sheet
from exaonepath.viz.heatmap import draw_heatmap
from exaonepath.viz.overlay import write_overlay
from exaonepath.viz.palettes import Palette, colour_map
from exaonepath.viz.values.attention import Attention
from exaonepath.viz.values.library import Entry, Library
from exaonepath.viz.values.patch_values import Question as Question
from exaonepath.viz.values.patch_values import patch_values, values_name
from exaonepath.viz.values.results import load_results
from exaonepath.viz.values.table import PatchTable
from exaonepath.viz.values.vectors import VectorStore

logger = logging.getLogger(__name__)

Form = Literal["png", "ome-tiff", "contact-sheet"]
FOLDER = "figures"
_ENDINGS = {"png": ".png", "ome-tiff": ".ome.tif", "contact-sheet": "-patches.png"}


@dataclass(frozen=True)
class Look:
    """How pictures are drawn.

    Attributes:
        forms: "png" (over the slide), "ome-tiff" (see `write_overlay`), "contact-sheet" (see `draw_contact_sheet`).
        palette: colour map of numbers: "viridis", "cividis" or "magma".
        opacity: of the patches on the picture, 0 to 1.
        longest: longer side of the slide on the picture, in pixels.
        each: patches in a row of the contact sheet.

    Raises:
        SettingsError: a value cannot be used.
        MissingDependencyError: matplotlib is not installed.
    """

    forms: Sequence[Form] = ("png",)
    palette: Palette = "viridis"
    opacity: float = 0.6
    longest: int = 1600
    each: int = 8

    def __post_init__(self) -> None:
        unknown = [form for form in self.forms if form not in get_args(Form)]
        if unknown or not self.forms:
            raise SettingsError(f"pictures are {', '.join(get_args(Form))}, not {', '.join(unknown) or 'none'}")
        if not 0 <= self.opacity <= 1:
            raise SettingsError(f"opacity is a number from 0 to 1, not {self.opacity!r}")
        if not 1 <= self.each <= MOST_EACH:
            raise SettingsError(f"a row of the contact sheet can have 1 to {MOST_EACH} patches, not {self.each!r}")
        colour_map(self.palette)


class FigureMaker:
    """Makes pictures of the slides in an output folder; a context manager, which removes temporary files at its end.

    Args:
        out: output folder of `encode_slide` or `exaonepath encode`.
        slides: where slides are now, if not where the results state.
        table: a CSV or Parquet file with a row for each patch.
        weights, device: of the slide encoder, for attention; None: the weights that the embeddings state.

    Raises:
        SettingsError: there is no such folder, it holds no results, or the table cannot be used.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        slides: Iterable[CohortSlide] = (),
        *,
        table: str | os.PathLike[str] | None = None,
        weights: str | None = None,
        device: str = "auto",
    ) -> None:
        self.out = Path(out)
        self._library = Library(out, slides)
        self._table = None if table is None else PatchTable(table)
        self._attention = Attention(weights, device, most_on_cpu=None)
        self._store = VectorStore()

    def __enter__(self) -> FigureMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def slides(self, ids: Sequence[str] = ()) -> list[Entry]:
        """The slides with results, or those with these ids.

        Raises:
            SettingsError: an id is unknown.
        """
        entries = {entry.id: entry for entry in self._library.entries()}
        unknown = [name for name in ids if name not in entries]
        if unknown:
            known = ", ".join(list(entries)[:20])
            raise SettingsError(f"{self.out} has no slide {', '.join(unknown)}; it has {known}")
        if ids:
            return [entries[name] for name in dict.fromkeys(ids)]
        return [entry for entry in entries.values() if entry.state not in ("slide", "skipped")]

    def make(
        self,
        entry: Entry,
        question: Question,
        look: Look | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
    ) -> list[Path]:
        """Make the pictures of one slide.

        Args:
            entry: one of `slides()`.
            question: what is shown of the patches.
            look: which pictures, and how they look.
            folder: where they are written, as `<id>-<what>.png`, `.ome.tif`, `-patches.png`; None: `figures` in the
                output folder.
            overwrite: replace pictures that exist.

        Returns:
            The files, in the order of `look.forms`.

        Raises:
            SlideOpenError: the slide is gone, or is no slide.
            SlideChangedError: the slide is not the one that the results were computed from.
            DataFileError: results are damaged, or what is needed of them was not kept.
            SettingsError: there is no such patch, block, column, or nothing of this slide in the table.
            OutputError: a file exists (without `overwrite`), or cannot be written.
            ExaonePathError: see `patch_values`, `draw_heatmap`, `write_overlay` and `draw_contact_sheet`.
        """
        look = look or Look()
        if entry.state in ("slide", "skipped"):
            raise DataFileError(f"{self.out} holds no patches of {entry.id}; encode the slide with exaonepath encode")
        results = load_results(entry)
        with SlideImage(entry.slide_file(), mpp=entry.mpp(), name=entry.id) as slide:
            if results.slide_fingerprint not in (None, slide.fingerprint()):
                raise SlideChangedError(
                    f"{slide.path} is not the slide that the results of {entry.id} were computed from: its content is "
                    "another one. Name the right file, or encode this one"
                )
            name = values_name(results, question)
            target = self.out / FOLDER if folder is None else Path(folder)
            paths = {form: target / f"{entry.id}-{name}{_ENDINGS[form]}" for form in dict.fromkeys(look.forms)}
            for path in paths.values():
                refuse_input_as_output(path, [slide.path])
                if path.exists() and not overwrite:
                    raise OutputError(f"{path} exists already; --overwrite (overwrite=True) replaces it")
            ensure_folder(target)
            values = patch_values(
                entry, results, question, store=self._store, attention=self._attention, table=self._table
            )
            for form, path in paths.items():
                if form == "png":
                    draw_heatmap(
                        slide, results, values, path, palette=look.palette, opacity=look.opacity, longest=look.longest
                    )
                elif form == "ome-tiff":
                    write_overlay(slide, results, values, path, palette=look.palette)
                else:
                    draw_contact_sheet(slide, results, values, path, each=look.each, palette=look.palette)
                logger.info("%s is written", path)
        return list(paths.values())
