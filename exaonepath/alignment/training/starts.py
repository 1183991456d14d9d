"""What a run sets in closed form: its start, the start of the slide encoder, and the linear parts after the last step.

All functions change the model of a `Trainer` in place, in all of its processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exaonepath.alignment.baselines.profiles import Profiles
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.training.closed_form_start import ClosedForm, chosen_patients
from exaonepath.alignment.training.slide_start import SlideTargets, can_learn, teach_slide_encoder
from exaonepath.alignment.training.stop_request import StopRequest

if TYPE_CHECKING:
    from exaonepath.alignment.training.trainer import Trainer

logger = logging.getLogger(__name__)

# A slide encoder that does not clearly help is taught once more, for so many times the steps. Of 16 draws of the
# synthetic cohort, two need this to find what only the arrangement of patches shows; longer for all is no better.
_LONGER = 2
# Noise on the slide encoder's output of training patients, relative to its variation. On eight draws of the synthetic
# cohort, 0, 0.7, 1 and 1.4 find 0.327, 0.330, 0.330 and 0.328 of the validation patients.
_NOISE = 1.0


def start_in_closed_form(trainer: Trainer, report: Callable[[str], None] | None, stop: StopRequest) -> None:
    """Set the start of the linear parts, and validate it: it may be the best model of the run.

    Then the slide encoder gets what it has to learn: with that, but before it has learned it, a model is worse. Nothing
    of this is stored before the first checkpoint: a run that is stopped before it does all of it again.

    Args:
        trainer: the run, before its first step.
        report: called with lines of text during the start of the slide encoder.
        stop: a signal ends the start of the slide encoder.
    """
    model, processes = trainer.model, trainer.processes
    names = [name for name in model.modalities if name != WSI]
    noise = torch.zeros(len(names), device=processes.device)
    start = None
    if processes.is_main:
        start = ClosedForm(model, trainer.data, trainer.settings.model)
        start.apply()
        noise += torch.tensor([start.noise.get(name, 0.0) for name in names], device=noise.device)
    trainer.set_noise(dict(zip(names, processes.sum(noise).tolist(), strict=True)))
    _share_weights(trainer)
    trainer.restart_average()
    if trainer.data.validation:
        trainer.validate()
    if start is not None:
        start.apply(further=True)
    _share_weights(trainer)
    if can_learn(model, trainer.settings):
        _start_slide_encoder(trainer, start, report, stop)
    trainer.restart_average()


def refit(trainer: Trainer) -> None:
    """Set the linear parts in closed form once more, now with what the slide encoder has learned; the weights stay as
    they were if that does not find more validation patients."""
    optimizer, model = trainer.settings.optimizer, trainer.model
    kept = not optimizer.omics_lr_share and (
        not optimizer.ffn_lr_share or all(model.omics_encoder(name).is_linear for name in model.omics)
    )
    closed = trainer.settings.model.start == "cca" and WSI in model.modalities and trainer.averaged is None
    if not closed or not kept or not trainer.data.validation:
        return
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    before, _ = trainer.selection.score_and_margin()
    if _set_closed_form_of_slides(trainer) and trainer.selection.score_and_margin()[0] > before:
        trainer.validate("refitted")
    else:
        model.load_state_dict(trained)


def _start_slide_encoder(
    trainer: Trainer, start: ClosedForm | None, report: Callable[[str], None] | None, stop: StopRequest
) -> None:
    """Teach the slide encoder what the molecular modalities share beyond the mean features, and compute the closed form
    with it; once more and longer if that does not clearly find more validation patients. The weights are those of the
    better attempt, or stay as they were if that is no better."""
    model, data, settings, selection = trainer.model, trainer.data, trainer.settings, trainer.selection
    if not data.validation:
        logger.info("no validation patients can decide on a start of the slide encoder: left out")
        return
    targets = SlideTargets.of(start, data, trainer.processes)
    if targets is None:
        logger.info("the molecular modalities share nothing beyond the mean patch features: no slide start")
        return
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def after_step(row: Mapping[str, Any]) -> bool:
        done, steps = row["slide_step"], row["slide_steps"]
        if done % settings.run.log_every == 0 or done == steps:
            trainer.log.row(row)
        if report is not None and done % max(1, steps // 4) == 0:
            report(f"start of the slide encoder: step {done}/{steps}  loss {row['loss']:.4f}")
        return trainer.processes.any_true(stop.asked)

    found, best = None, math.nan if selection.best is None else selection.best
    for length in (1, _LONGER):
        steps = length * (settings.model.slide_start_steps or 0)
        done = teach_slide_encoder(
            model, data, targets, settings, trainer.processes, steps=steps,
            autocast=trainer.autocast, half=trainer.scaler.is_enabled(), after_step=after_step,
        )  # fmt: skip
        score = margin = math.nan
        if done and _set_closed_form_of_slides(trainer):
            score, margin = selection.score_and_margin()
        row = {"kind": "slide_start", "step": 0, "slide_steps": steps, "finished": done, "kept": score > best}
        trainer.log.row({**row, "score": score, "score_before": best, "margin": margin})
        text = "slide start, %d steps: %s of validation patients %.4f, before %.4f"
        logger.info(text, steps, settings.run.select, score, best)
        clear = score > best + margin
        if score > best:
            found, best = {name: value.clone() for name, value in model.state_dict().items()}, score
        model.load_state_dict(before)
        if clear or not done:
            break
    if found is not None:
        model.load_state_dict(found)
        trainer.restart_average()
        trainer.validate("slide_start")


def _set_closed_form_of_slides(trainer: Trainer) -> bool:
    """Set the linear parts in closed form, with the slide encoder's output as a part of the slides' profiles.

    The encoder was taught on the training patients, so that on them, its output agrees with the molecular profiles
    better than on others, and would get too much weight. Noise on the output of these patients corrects this, as noise
    on inputs does in a training: the output's variance rises, and its covariance with everything else does not.

    Returns:
        False, on all processes, if the output of a patient is not finite (it may overflow in float16): nothing is set.
    """
    slides = []
    for patients in chosen_patients(trainer.data):  # training and validation patients
        found = trainer.selection.embed(patients)
        has = found.available[WSI]
        known = tuple(patient for patient, flag in zip(patients, has, strict=True) if flag)
        slides.append(Profiles(known, found.modality[WSI][has]))
    if not all(np.isfinite(profiles.values).all() for profiles in slides):
        logger.warning("the slide encoder's output is not finite for all patients: no closed form with it")
        return False
    if trainer.processes.is_main:
        noisy = with_noise(slides[0], trainer.data.cohort.slides.dim or 0, trainer.data.seed)
        ClosedForm(trainer.model, trainer.data, trainer.settings.model, (noisy, slides[1])).apply()
    _share_weights(trainer)
    return True


def with_noise(profiles: Profiles, width: int, seed: int) -> Profiles:
    """Profiles [n, width + E] with noise on the last E columns, whose covariance is `_NOISE` squared times theirs."""
    values = profiles.values.copy()
    output = values[:, width:].astype(np.float64)
    if len(output) > 1 and output.size:
        # The symmetric root: that with eigenvectors alone would change completely with a rounding error.
        variance, axes = np.linalg.eigh(np.cov(output, rowvar=False).reshape(output.shape[1], -1))
        root = (axes * np.sqrt(variance.clip(0))) @ axes.T
        values[:, width:] = output + _NOISE * np.random.default_rng((seed, 4)).normal(size=output.shape) @ root
    return Profiles(profiles.patients, values)


def _share_weights(trainer: Trainer) -> None:
    """Copy the weights of the first process to all: they need the same bits, so only it computes them."""
    if trainer.processes.count > 1:
        for parameter in trainer.model.parameters():
            with torch.no_grad():
                trainer.processes.sum(parameter if trainer.processes.is_main else parameter.zero_())
