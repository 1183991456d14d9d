"""Exports results to the file layouts of other tools (`exaonepath.exchange`): one slide, or a whole cohort."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from exaonepath.errors import ExaonePathError, OutputCollisionError, SettingsError, SlideListError
from exaonepath.exchange import clam, h5ad, parquet, patho_bench, qupath, slide2vec, spatial_data, trident, zarr_store
from exaonepath.exchange.slide_patches import SlidePatches, Source, Values, Vectors, file_name, refuse_existing
from exaonepath.files.atomic import output_error
from exaonepath.slides.stored_results import Reading, SlideFiles, find_results, open_results
from exaonepath.text import close_to

ExportFormat = Literal[
    "qupath", "anndata", "spatialdata", "trident", "clam", "patho-bench", "slide2vec", "parquet", "zarr"
]
FORMATS: tuple[str, ...] = get_args(ExportFormat)

PatchValues = Callable[[SlidePatches], Mapping[str, Values]]

# Layouts with files for each slide: (plan, write).
_PER_SLIDE: Mapping[str, tuple[Callable[..., dict[str, Path]], Callable[..., list[Path]]]] = {
    "qupath": (qupath.plan, qupath.write),
    "trident": (trident.plan, trident.write),
    "clam": (clam.plan, clam.write),
    "patho-bench": (patho_bench.plan, patho_bench.write),
    "slide2vec": (slide2vec.plan, slide2vec.write),
}
# Formats of which a file may hold many slides: (ending, write).
_TABLES: Mapping[str, tuple[str, Callable[[Sequence[Source], Path], None]]] = {
    "anndata": (h5ad.ENDING, h5ad.write),
    "spatialdata": (spatial_data.ENDING, spatial_data.write),
    "parquet": (parquet.ENDING, parquet.write),
    "zarr": (zarr_store.ENDING, zarr_store.write),
}
_WITH_PICTURES = ("anndata", "spatialdata")
_STORE_MARKS = (".zgroup", "zarr.json")


def export_slides(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    format: ExportFormat,
    *,
    slides: Iterable[str] = (),
    vectors: Vectors = "features",
    dtype: Literal["float32", "float16"] | None = None,
    values: PatchValues | None = None,
    classify: str | None = None,
    batch_axis: bool = False,
    encoder: str | None = None,
    patch_size: int | None = None,
    target_size: int | None = None,
    slide_files: Mapping[str, Path] | None = None,
    pictures: bool = True,
    overwrite: bool = False,
    progress: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write results in the layout of another tool (docs/exchange.md describes what each gets).

    All slides are checked before the first file is written. Each file appears whole or not at all.

    Args:
        source: an output folder of `encode_slide`, or one features, embeddings or patches file.
        to: the folder to write. For "anndata", "spatialdata", "parquet" and "zarr", a path that ends with .h5ad, .zarr
            or .parquet is one file with all slides; in a folder, each slide gets its own. "qupath": a folder, or for
            one slide a path that ends with .geojson.
        format: the tool, or the kind of file.
        slides: ids of the slides; none: all of the folder.
        vectors: of each patch, "features" of the patch encoder [N, C], or "embeddings" [N, C + E].
        dtype: of the vectors; None: as stored.
        values: called with each slide, whose vectors can be read then; returns more values of its patches by name.
        classify: "qupath": the value that becomes the class of a tile ("fragment", or one of `values`).
        batch_axis: "trident", "clam": features as [1, N, C].
        encoder: name of the encoder, as a part of folder names and metadata; None: the weights as results state them.
        patch_size: side of a patch in level-0 pixels, for files that do not state it.
        target_size: the same in pixels at 0.5 um, for files that do not state it.
        slide_files: where slides are now, by id, for their pictures.
        pictures: "anndata", "spatialdata": add a small picture of each slide whose file is at hand.
        overwrite: replace files that exist. Results of this package are never replaced.
        progress: called with each file that is finished.

    Returns:
        The files, in the order in which they were written.

    Raises:
        SettingsError: an argument cannot be used, or results do not state what the layout needs.
        SlideListError: some slides cannot be exported; nothing was written.
        DataFileError: a file is damaged, or vectors were not kept.
        OutputCollisionError: a file exists, or is a result.
        OutputError: a file cannot be written.
        MissingDependencyError: a library is not installed.
    """
    if format not in FORMATS:
        raise SettingsError(f"unknown format {format!r}{close_to(str(format), FORMATS)}")
    if vectors not in get_args(Vectors):
        raise SettingsError(f"vectors are features or embeddings, not {vectors!r}")
    for name, value in (("patch_size", patch_size), ("target_size", target_size)):
        if value is not None and value <= 0:
            raise SettingsError(f"{name} must be a positive number of pixels, not {value}")
    if classify is not None and format != "qupath":
        raise SettingsError(f"classify is for qupath, not for {format}")
    if batch_axis and format not in ("trident", "clam"):
        raise SettingsError(f"a batch axis is for trident and clam, not for {format}")
    source, target = Path(source), Path(to)
    _check_ending(target, format)
    everything = find_results(source)
    found = find_results(source, tuple(slides)) if slides else everything
    wanted = Reading(
        None if format == "qupath" and vectors == "features" else vectors,
        dtype,
        encoder,
        patch_size,
        target_size,
        slide_files or {},
        pictures and format in _WITH_PICTURES,
    )
    run = _Export(found, wanted, values)
    results = {path.resolve() for slide in everything for path in slide.files.values()}
    written: list[Path] = []

    def done(paths: Iterable[Path]) -> None:
        for path in paths:
            written.append(path)
            if progress is not None:
                progress(path)

    if format in _PER_SLIDE:
        plan, write = _PER_SLIDE[format]
        if format == "qupath" and target.suffix.lower() == qupath.ENDING and len(found) > 1:
            raise SettingsError(f"{target} is one file, and there are {len(found)} slides; name a folder")
        options: dict[str, Any] = {"classify": classify} if format == "qupath" else {}
        options |= {"batch_axis": True} if batch_axis else {}
        plans = run.each(lambda slide: list(plan(slide, target).values()))
        _check_targets([path for paths in plans for path in paths], results, overwrite)
        for number in range(len(found)):
            with run.opened(number) as slide:
                done(write(slide, target, **options))
        return written
    ending, write_table = _TABLES[format]
    whole = target.suffix.lower() == ending
    names = run.each(lambda slide: file_name(_needed(slide).id))
    folder = target / "patches" if format == "parquet" else target
    targets = [target] if whole else [folder / f"{name}{ending}" for name in names]
    table = [] if whole or format != "parquet" else [target / parquet.SLIDES]
    stores = ending == zarr_store.ENDING
    _check_targets([*targets, *table], results, overwrite, stores=stores)
    sources = [run.source(number) for number in range(len(found))]
    for at, path in enumerate(targets):
        write_table(sources if whole else [sources[at]], path)
        run.forget()
        done([path])
    if table:
        parquet.write_slides(run.each(lambda slide: slide), table[0])
        done(table)
    return written


class _Export:
    """The slides of one export.

    Args:
        found: their files.
        wanted: what is read of them.
        values: more values of the patches.
    """

    def __init__(self, found: Sequence[SlideFiles], wanted: Reading, values: PatchValues | None) -> None:
        self._found, self._wanted, self._values = found, wanted, values
        self._computed: dict[int, tuple[Mapping[str, Values], Any]] = {}

    def each(self, look: Callable[[SlidePatches], Any]) -> list[Any]:
        """What `look` returns for every slide, opened without values and pictures; all problems are one error."""
        results, problems = [], []
        for slide in self._found:
            try:
                with open_results(slide, replace(self._wanted, picture=False)) as patches:
                    results.append(look(patches))
            except ExaonePathError as exc:
                if len(self._found) == 1:
                    raise
                problems.append(f"{slide.id}: {exc}")
        if problems:
            raise SlideListError(f"{len(problems)} of {len(self._found)} slides cannot be exported:", problems)
        return results

    @contextmanager
    def opened(self, number: int) -> Iterator[SlidePatches]:
        """A slide with everything that is wanted of it."""
        with open_results(self._found[number], self._wanted) as slide:
            yield replace(slide, values={} if self._values is None else self._values(slide))

    def source(self, number: int) -> Source:
        """A slide that is opened several times: values and pictures are made once."""

        @contextmanager
        def source() -> Iterator[SlidePatches]:
            if number not in self._computed:
                with self.opened(number) as slide:
                    self._computed[number] = slide.values, slide.picture
                    yield slide
                return
            with open_results(self._found[number], replace(self._wanted, picture=False)) as slide:
                values, picture = self._computed[number]
                yield replace(slide, values=values, picture=picture)

        return source

    def forget(self) -> None:
        """Free what was made for the slides of a finished file."""
        self._computed.clear()


def _check_ending(target: Path, format: str) -> None:
    """Refuse a name that other formats give to a file, and this one would give to a folder."""
    endings = {"qupath": qupath.ENDING, **{name: ending for name, (ending, _) in _TABLES.items()}}
    others = [name for name, ending in endings.items() if target.suffix.lower() == ending]
    if others and format not in others:
        raise SettingsError(
            f"{target} is named like a file of {' or '.join(others)}, and the format is {format}; name a folder"
            + (f", or a path that ends with {endings[format]}" if format in endings else "")
        )


def _needed(slide: SlidePatches) -> SlidePatches:
    _ = slide.matrix
    return slide


def _check_targets(targets: list[Path], results: set[Path], overwrite: bool, *, stores: bool = False) -> None:
    """Refuse targets that exist, and those that would replace something else than an earlier export of this kind."""
    for path in targets:
        try:
            path.lstat()
        except FileNotFoundError:
            continue
        except OSError as exc:  # a name that is too long, a folder that may not be searched
            raise output_error(path, exc) from exc
        if path.resolve() in results:
            raise OutputCollisionError(
                f"{path} is a result of exaonepath, which no export replaces; name another folder"
            )
        store = path.is_dir() and any((path / mark).is_file() for mark in _STORE_MARKS)
        if path.exists() and (not store if stores else path.is_dir()):
            raise OutputCollisionError(
                f"{path} is no earlier export of this format, and is not replaced; name another path"
            )
    refuse_existing(targets, overwrite)
