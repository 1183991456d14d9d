"""The options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from exaonepath.encoders.published import DEFAULT_WEIGHTS

if TYPE_CHECKING:
    from exaonepath.slides.cohort.cohort_slide import CohortSlide
    from exaonepath.slides.cohort.inputs import CohortInputs

__all__ = ["DEFAULT_WEIGHTS"]


def _batch_size(value: str) -> str:
    if value != "auto" and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise typer.BadParameter(f"{value!r} is neither a positive whole number nor auto")
    return value


def _seg_downsample(value: str) -> str:
    if value != "auto":
        try:
            float(value)
        except ValueError as exc:
            raise typer.BadParameter(f"{value!r} is neither a number nor auto") from exc
    return value


def seg_downsample(value: str) -> float | Literal["auto"]:
    """The value of `--seg-downsample` as the argument of `patchfy`."""
    return "auto" if value == "auto" else float(value)


def batch_size(value: str) -> int | Literal["auto"]:
    """The value of `--batch-size` as the argument of `extract_features`."""
    return "auto" if value == "auto" else int(value)


Slides = Annotated[
    list[Path] | None, typer.Argument(help="Slide files, folders of slides, or quoted patterns such as 'data/*.svs'.")
]
Manifest = Annotated[
    Path | None,
    typer.Option(
        help="A table of slides, in place of SLIDES (CSV, TSV, Parquet): column slide; id, patient, mpp, mask, weights "
        "if wanted."
    ),
]
Recursive = Annotated[
    bool, typer.Option("--recursive", "-r", help="Also take the slides in the folders of a folder, at any depth.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder.")]
Weights = Annotated[str, typer.Option(help="Hub id, directory, or random:SEED (random weights, for tests).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16.")]
Resize = Annotated[int, typer.Option(help="Shorter side of a patch before the centre crop, in pixels.")]
BatchSize = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        callback=_batch_size,
        help="Patches in one call of the patch encoder. auto: on a GPU as many as fit, up to 256; else 32.",
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the patch encoder: a minute once, then faster batches on a GPU.")
]
Workers = Annotated[int | None, typer.Option("--num-workers", min=0, help="Reading threads; default: one per core.")]
FeatureDtype = Annotated[
    str,
    typer.Option(
        metavar="float32|float16", help="How features are stored. float16: half the disk, 11 significant bits a number."
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        metavar="slide|features|all",
        help="What remains of a finished slide, apart from small files: its embedding; also its features; also its "
        "patch embeddings. Default: all, and finished slides stay as they are.",
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        metavar="flat|hashed",
        help="Folders of the output. hashed: two more levels, named by a hash of the id, as by default above 10,000 "
        "slides. The first run on a folder decides.",
    ),
]
PatchSize = Annotated[int, typer.Option(help="Side of a patch, in pixels at 0.5 um per pixel.")]
StepSize = Annotated[int | None, typer.Option(help="Distance between patches; default: the patch size.")]
PatchLevel = Annotated[
    int, typer.Option(help="Pyramid level that the grid is computed for; an option of the original, rarely needed.")
]
Otsu = Annotated[bool, typer.Option("--otsu", help="Use Otsu's threshold instead of a fixed one: --segmenter otsu.")]
SegDownsample = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        callback=_seg_downsample,
        help="Shrink the image that is segmented. auto: to about 64x, on slides without a level near it (flat slides).",
    ),
]
FailOnEmpty = Annotated[
    bool, typer.Option("--fail-on-empty", help="A slide without a patch is an error (exit status 1, after all slides).")
]
Mpp = Annotated[
    float | None,
    typer.Option(metavar="UM", help="Pixel size of level 0 in micrometres, in place of what the slide files state."),
]
StrictScale = Annotated[
    bool, typer.Option("--strict-scale", help="An assumed or implausible pixel size is an error, not a warning.")
]
Reader = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How slide files are read: auto, openslide, tiff, image, or a plug-in's name. auto: OpenSlide, a faster "
        "reader where it gives the same bytes, and others for what OpenSlide does not read.",
    ),
]
Segmenter = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="How tissue is found: exaone (default), otsu, mask, or the name of an installed plug-in."
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(
        help="Tissue to use: GeoJSON (QuPath, TRIDENT) or an image of the slide's shape (PNG, TIFF); or a folder of "
        "such files, named by slide."
    ),
]
MaskClass = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Class of the mask that is tissue; may be repeated.")
]
Exclude = Annotated[
    Path | None,
    typer.Option(help="Regions to leave out, as for --mask; a patch is left out if its centre lies in one."),
]
ExcludeClass = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Class to leave out, of --exclude or of --mask; may be repeated."),
]
GeojsonOrigin = Annotated[
    str,
    typer.Option(
        metavar="slide|bounds",
        help="Where GeoJSON counts from: the slide's corner, or (QuPath, for MIRAX and Leica) the recorded area.",
    ),
]
Remove = Annotated[
    list[str] | None,
    typer.Option(
        metavar="pen|blur", help="Leave out pen marks, or areas out of focus; may be given again. See docs/masks.md."
    ),
]
Contours = Annotated[
    bool, typer.Option("--contours/--no-contours", help="Store the contours, also as GeoJSON for QuPath.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory that the slide encoder may use on its device, such as 12GB; a slide that needs more is refused "
        "beforehand. Default: what is free on a GPU, no limit on a CPU."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Open every slide and print what would be done: format, size, scale, patches, state, disk; nothing is "
        "written.",
    ),
]
PrintSbatch = Annotated[
    bool, typer.Option("--print-sbatch", help="Print this command as a job script for SLURM (an array), and end.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of a table.")]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="all|NAMES",
        help="A process for each GPU: all, or names with commas between them, such as cuda:0,cuda:1.",
    ),
]
Jobs = Annotated[int, typer.Option(min=1, metavar="N", help="Processes on the device, or on each of --devices.")]
Engine = Annotated[
    str,
    typer.Option(
        metavar="local|ray", help="Work on this machine, or on a Ray cluster, whose nodes share the slides and --out."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Of the Ray cluster: auto (this machine is one of its nodes), HOST:PORT, or local (one is started here). "
        "Default: auto.",
    ),
]
Readers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tasks that read slides on the Ray cluster. Default: all its processors."),
]
EncodersOption = Annotated[
    int | None,
    typer.Option(
        "--encoders", min=1, metavar="N", help="Encoders on the Ray cluster. Default: one for each GPU, or node."
    ),
]
WaitForNodes = Annotated[
    float,
    typer.Option(min=0.0, metavar="S", help="Seconds to wait for nodes of the Ray cluster, which may start them."),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="K/N",
        help="Begin with the K-th of N parts of the slides, then take whatever is free. Default: from the variables of "
        "SLURM, LSF or PBS, if there are any.",
    ),
]
Stage = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Copy each slide to this folder, on a local disk, before it is read."),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Try slides again that failed three times and are left out since.")
]
StaleAfter = Annotated[
    float,
    typer.Option(
        min=1.0,
        metavar="S",
        help="Seconds after which a slide is taken over from a process of another machine that gives no sign of life.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Compute finished results again.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More output; repeat for debug output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]


def one_of(*choices: str) -> Callable[[str], str]:
    """A callback that refuses any other value."""

    def check(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}")
        return value

    return check


PatientColumn = Annotated[
    str | None,
    typer.Option("--patient-column", "--id-column", help="Column of patient ids in the labels; data.id_column."),
]
Labels = Annotated[list[str] | None, typer.Option("--label", help="Column to probe; may be repeated.")]


def layout(value: str | None) -> Literal["flat", "hashed"] | None:
    """The value of `--layout` as the argument of `choose_layout`."""
    if value not in (None, "flat", "hashed"):
        raise typer.BadParameter(f"--layout is flat or hashed, not {value!r}")
    return value  # type: ignore[return-value]


def inputs(slides: list[Path] | None, manifest: Path | None, recursive: bool, quiet: bool) -> CohortInputs:
    """The slides that a command is to work on; how a manifest was understood is noted.

    Raises:
        ExaonePathError: see `cohort_inputs`.
    """
    if not slides and manifest is None:
        raise typer.BadParameter("name slides, folders of slides, or a table of slides (--manifest)")
    from exaonepath.cli.console import say
    from exaonepath.slides.cohort.inputs import cohort_inputs

    found = cohort_inputs(slides or (), manifest, recursive=recursive)
    if found.note and not quiet:
        say(f"note: {found.note}")
    return found


def patching(
    patch_size: int,
    step_size: int | None,
    tissue: dict[str, Any],
    slides: Sequence[CohortSlide] = (),
    **others: Any,
) -> dict[str, Any]:
    """The options as keyword arguments of `patchfy`; without a step, patches are adjacent.

    Those in `tissue`, which say where tissue comes from, are checked here: before any slide is opened.
    """
    from exaonepath.slides.cohort.slide_settings import check_patching

    check_patching(slides, tissue)
    step_size = patch_size if step_size is None else step_size
    return {"patch_size": patch_size, "step_size": step_size, **tissue, **others}
