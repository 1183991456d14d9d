"""Labels from few labelled patients: ours and the baselines from the same draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exaonepath.alignment.analyses.context import Context
from exaonepath.alignment.baselines.comparison import FUSED, standardised, whole_parts, whole_profiles
from exaonepath.alignment.baselines.profiles import PARTS, parts_of
from exaonepath.alignment.metrics.few_shot import REPEATS, SHOTS, draw_shots, few_shot_hits, scaled_by, score_draws
from exaonepath.alignment.metrics.intervals import one_thread
from exaonepath.alignment.metrics.transfer_probes import LabelTask
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.subject import Subject
from exaonepath.errors import SettingsError

_COMPONENTS = 100


def few_shot(context: Context) -> dict[str, Any]:
    """Balanced accuracy by the number of labelled patients a class, from everything and from the slide."""
    out: dict[str, Any] = {}
    modalities = context.subject.modalities
    names = [FUSED, *(name for name in modalities[:1] if len(modalities) > 1)]
    inputs = {}
    for label, predicted in context.each_label().items():
        for name in names:
            if name not in context.views[0]:
                context.note(f"{label} from {name}", "no training patient has it")
                continue
            if name not in inputs:
                inputs[name] = _inputs(context, name)
            method, ours, theirs, flags = inputs[name]
            try:
                task = predicted.task if name == FUSED else predicted.task.restricted(flags)
                points = _curve(context, label, name, task, ours, theirs)
            except SettingsError as exc:
                context.note(f"{label} from {name}", exc)
                continue
            chance = 1 / len(task.classes)
            out.setdefault(label, {})[name] = {"baseline": method, "chance": chance, "points": points}
    return out


def _curve(
    context: Context, label: str, name: str, task: LabelTask, ours: list[np.ndarray], theirs: list[np.ndarray]
) -> list[dict[str, Any]]:
    y, seed = task.train.y, context.seed
    counts = np.bincount(y, minlength=len(task.classes))
    if (counts == 0).any():
        raise SettingsError(f"no labelled training patient of class {task.classes[int(counts.argmin())]}")
    points = []
    for shots in (*SHOTS, 0):  # 0: all
        if shots > counts.min():
            missing = ", ".join(str(k) for k in SHOTS if k > counts.min())
            rare = task.classes[int(counts.argmin())]
            context.note(
                f"{label} from {name}, {missing} a class", f"{rare} has {counts.min()} labelled training patients"
            )
            continue
        draws = draw_shots(y, shots, REPEATS, seed) if shots else [np.arange(len(y))]
        hits = [
            few_shot_hits(draws, x[task.train.rows], y, test[task.test.rows], task.test.y) for x, test in (ours, theirs)
        ]
        points.append(
            {
                "shots": shots or None,
                "patients": len(draws[0]),
                "draws": len(draws),
                "ours": score_draws(hits[0], task.test.y, seed=seed).as_dict(),
                "baseline": score_draws(hits[1], task.test.y, seed=seed).as_dict(),
                "difference": score_draws(hits[0] - hits[1], task.test.y, shares=False, seed=seed).as_dict(),
            }
        )
    return points


def _inputs(context: Context, name: str) -> tuple[str, list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The baseline's name; train and test inputs of ours and of the baseline; who has the modality, by part."""
    values, flags = whole_parts(name, context.views)
    ours = scaled_by(values[0][flags[0]], (values[0], values[2]))
    method, theirs = baseline_inputs(context.subject, name)
    return method, ours, scaled_by(theirs[0][flags[0]], (theirs[0], theirs[2])), flags


@one_thread()
def baseline_inputs(subject: Subject, name: str) -> tuple[str, list[np.ndarray]]:
    """Inputs of train, validation and test patients without the model: the method's name, and [n, d] of each part.

    Mean patch features for the slide; else at most 100 principal components of the training patients, whose labels are
    not used.
    """
    blocks: list[Sequence[np.ndarray]] = []
    for modality in subject.modalities if name == FUSED else (name,):
        profiles = [whole_profiles(part, modality) for part in parts_of(subject.data).values()]
        part = standardised([values for values, _ in profiles], [has for _, has in profiles])
        blocks.append([block / np.sqrt(max(block.shape[1], 1)) for block in part])
    joined = [np.concatenate([block[at] for block in blocks], 1) for at in range(len(PARTS))]
    if name == WSI:
        return "mean patch features", joined
    u, s, vt = np.linalg.svd(joined[0] - joined[0].mean(0), full_matrices=False)
    del u, s
    axes = vt[:_COMPONENTS].T
    return f"PCA ({'all' if name == FUSED else name})", [part @ axes for part in joined]
