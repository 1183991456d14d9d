"""A run over the slides of a cohort in one process: claims, engine, run log."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaonepath.encoders.loading import LoadedEncoder, load_patch_encoder, load_slide_encoder
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import SlideOpenError
from exaonepath.slides.cohort.batch_system import begin_at
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.encoders import EncoderPair, Encoders, LoadEncoders, load_encoders
from exaonepath.slides.cohort.failures import Failures
from exaonepath.slides.cohort.finished_since import FinishedSince
from exaonepath.slides.cohort.inputs import cohort_inputs
from exaonepath.slides.cohort.job import Job, WorkContext, settings_key
from exaonepath.slides.cohort.local import LocalEngine, SlideProgress
from exaonepath.slides.cohort.local_copies import LocalCopies
from exaonepath.slides.cohort.outcome import SlideOutcome
from exaonepath.slides.cohort.overwriting import note_existing
from exaonepath.slides.cohort.run_log import RunLog, new_run_id
from exaonepath.slides.cohort.run_options import RunOptions, RunStatus, open_leases
from exaonepath.slides.cohort.schedule import Schedule
from exaonepath.slides.cohort.slide_settings import check_patching
from exaonepath.slides.outputs import FAILURES, RUNS, choose_layout, remove_leftovers
from exaonepath.slides.stages import EncodeResult, EncodeSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeFailure:
    """A slide that `encode_slides` could not encode, and the error; `slide` is None if no slide file was found."""

    slide: Path | None
    error: Exception


def encode_slides(
    slides: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    patch_encoder: LoadedEncoder[ExaonePathPatchEncoderModel] | str = DEFAULT_WEIGHTS,
    slide_encoder: LoadedEncoder[ExaonePathSlideEncoderModel] | str = DEFAULT_WEIGHTS,
    *,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> Iterator[EncodeResult | EncodeFailure]:
    """Encode several slides; if one slide fails, the others are still encoded.

    While the patches of one slide are encoded, the next one is opened and read, and the one before is finished. Other
    processes may work on the same folder at the same time: each slide is claimed by one of them.

    Args:
        slides: a slide file, a folder of slides or a pattern, or several of them.
        out: output folder, as for `encode_slide`; a new folder for more than 10,000 slides is hashed (see
            `exaonepath.slides.outputs`).
        patch_encoder, slide_encoder: as for `encode_slide`; loaded once.
        progress: called with (patches done, total patches) of the slide that is being encoded.
        arguments: the other keyword arguments of `encode_slide`, but those that are about one slide.

    Yields:
        The result or the failure of each slide, as soon as it is available. Paths that do not exist are yielded first.

    Raises:
        SlideOpenError: no slide was found.
        SettingsError: `patching` is wrong, or has one mask for several slides.
        OutputCollisionError: two slides would write the same files.
        OutputError: the folder of claims cannot be written.
        WeightsError, DeviceError: the encoders cannot be loaded.
    """
    paths = [slides] if isinstance(slides, str | os.PathLike) else list(slides)
    found = cohort_inputs(paths) if paths else None
    if found is None or not found.slides:
        raise found.problems[0] if found is not None and found.problems else SlideOpenError("no slide was named")
    settings = EncodeSettings(**arguments)
    check_patching(found.slides, settings.patching)
    choose_layout(out, len(found.slides))
    if isinstance(patch_encoder, str):
        patch_encoder = load_patch_encoder(patch_encoder, device="auto")
    if isinstance(slide_encoder, str):
        slide_encoder = load_slide_encoder(slide_encoder, device="auto")
    for problem in found.problems:
        yield EncodeFailure(None, problem)
    outcomes = encode_cohort(
        found.slides,
        out,
        EncoderPair(patch_encoder, slide_encoder),
        settings,
        progress=None if progress is None else lambda slide, done, total: progress(done, total),
    )
    for outcome in outcomes:
        if outcome.result is not None:
            yield outcome.result
        elif outcome.error is not None:
            yield EncodeFailure(outcome.slide.path, outcome.error)


def encode_cohort(
    slides: Sequence[CohortSlide],
    out: str | os.PathLike[str],
    encoders: EncoderPair,
    settings: EncodeSettings,
    options: RunOptions | None = None,
    *,
    load: LoadEncoders = load_encoders,
    arguments: Mapping[str, Any] | None = None,
    progress: SlideProgress | None = None,
    observe: Callable[[Job], None] = lambda job: None,
) -> Iterator[SlideOutcome]:
    """Work on the slides of a cohort in this process, together with other processes on the same folder.

    Args:
        slides: the slides.
        out: output folder.
        encoders: of the slides that do not state weights of their own.
        settings: of all slides.
        options: see `RunOptions`.
        load: loads the encoders of other weights.
        arguments: plain JSON that describes the run; written into the run log.
        progress: called with (slide, patches done, total patches) of the slide that is being encoded.
        observe: see `LocalEngine`.

    Yields:
        What became of each slide; exactly one outcome a slide, none of them "busy": slides that other processes work on
        are looked at until they are finished.

    Raises:
        OutputError: the folder of claims cannot be written, although there is something to do.
    """
    options = options or RunOptions()
    root, run = Path(out), new_run_id()
    with ExitStack() as stack:
        leases = open_leases(root, slides, run, settings, options)
        if leases is not None:
            stack.enter_context(leases)
        copies = None if options.stage is None else LocalCopies(options.stage)
        if copies is not None:
            stack.callback(copies.close)
        used = Encoders(encoders, settings, load)
        stack.callback(used.close)
        context = WorkContext(
            root,
            settings,
            used,
            Failures(root / FAILURES, settings_key(settings, encoders.patch.weights), run, retry=options.retry_failed),
            leases,
            note_existing(root, (slide.id for slide in slides), settings.overwrite),
            None if leases is None else FinishedSince(root, (slide.id for slide in slides)),
            copies,
            read_ahead_bytes=options.read_ahead_bytes,
        )
        log = RunLog(root / RUNS, run, arguments=arguments, n_slides=len(slides), devices=(str(used.device),))
        status = RunStatus()
        stack.callback(lambda: log.close(status.exit_status))
        schedule = Schedule(begin_at(slides, options.shard), leases, options.poll)
        engine = LocalEngine(context, schedule, progress, log.add, observe).run()
        stack.callback(engine.close)
        for outcome in engine:
            status.add(outcome)
            yield outcome
            if outcome.error is not None:
                # The traceback refers to the frames of the failed call and so keeps their arrays in memory.
                outcome.error.__traceback__ = None
        remove_leftovers(root, (slide.id for slide in slides))
        status.ended = True
