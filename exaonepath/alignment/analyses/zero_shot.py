"""Labels of slides without a labelled slide: prototypes of the classes from another modality, in the shared space."""

from __future__ import annotations

from typing import Any

import numpy as np

from exaonepath.alignment.analyses.context import Context
from exaonepath.alignment.baselines.cca import fit_cca
from exaonepath.alignment.baselines.profiles import Profiles, read_profiles
from exaonepath.alignment.metrics.intervals import one_thread
from exaonepath.alignment.metrics.retrieval import unit_rows
from exaonepath.alignment.metrics.transfer_probes import LabelTask, Prediction, paired_difference
from exaonepath.alignment.modalities import WSI
from exaonepath.errors import SettingsError

ALL = "all"
SUPERVISED = "mean patch features + logistic regression"
_USUAL_TEMPERATURE = 10.0  # has no effect on the order of classes


def zero_shot(context: Context) -> dict[str, Any]:
    """For each label and each modality that is aligned with the slide: prototypes, compared with CCA and with probes
    that know labelled slides."""
    subject = context.subject
    context.need_transfer()
    if WSI not in subject.modalities:
        raise SettingsError("the cohort has no slides that the model reads")
    others = [a if b == WSI else b for a, b in subject.model.trained_pairs if WSI in (a, b)]
    others = [name for name in others if name in subject.modalities]
    if not others:
        raise SettingsError("no modality of the cohort is aligned with the slide")
    spaces = {name: _spaces(context, name) for name in others}
    cca = {name: space for name in others if (space := _cca_spaces(context, name)) is not None}
    out: dict[str, Any] = {}
    for label, predicted in context.each_label().items():
        task, entry = predicted.task, {}
        for name in (*others, *((ALL,) if len(others) > 1 else ())):
            names = others if name == ALL else [name]
            try:
                ours = _classify(context, task, {n: spaces[n] for n in names})
            except SettingsError as exc:
                context.note(f"{label} by prototypes from {name}", exc)
                continue
            entry[name] = {"ours": ours.scores(context.seed).as_dict()}
            if all(n in cca for n in names):
                theirs = _classify(context, task, {n: cca[n] for n in names})
                entry[name]["CCA"] = theirs.scores(context.seed).as_dict()
                entry[name]["difference"] = paired_difference(ours, theirs, context.seed).as_dict()
        if not entry:
            continue
        known = {
            "linear probe of the slide": predicted.ours.get(WSI),
            SUPERVISED: predicted.baselines.get(SUPERVISED, ("", None))[1],
        }
        out[label] = {
            "chance": 1 / len(task.classes),
            "classes": task.classes.tolist(),
            "prototypes": entry,
            "with_labelled_slides": {
                name: prediction.scores(context.seed).as_dict() for name, prediction in known.items() if prediction
            },
        }
    return out


# Slides of the test patients [n, d] and the other modality of the training patients [m, d], both in the shared space.
Space = tuple[np.ndarray, np.ndarray]


def _classify(context: Context, task: LabelTask, spaces: dict[str, Space]) -> Prediction:
    """The class whose prototypes are most similar to the slide, by the mean cosine over the modalities."""
    parts, total = context.parts, 0.0
    rows = task.test.rows[parts["test"].available[WSI][task.test.rows]]
    if not len(rows):
        raise SettingsError("no labelled test patient has a slide")
    for name, (slides, profiles) in spaces.items():
        has = parts["train"].available[name][task.train.rows]
        y, known = task.train.y[has], unit_rows(profiles[task.train.rows[has]], name)
        counts = np.bincount(y, minlength=len(task.classes))
        if (counts == 0).any():
            raise SettingsError(f"no labelled training patient of {task.classes[int(counts.argmin())]} has {name}")
        prototypes = np.stack([known[y == c].mean(0) for c in range(len(task.classes))])
        total = total + unit_rows(slides[rows], "slides") @ unit_rows(prototypes, "prototypes").T / len(spaces)
    scores = np.exp(_USUAL_TEMPERATURE * (total - np.max(total, axis=1, keepdims=True)))
    place = {row: at for at, row in enumerate(task.test.rows.tolist())}
    y_test = task.test.y[[place[row] for row in rows.tolist()]]
    return Prediction(rows, scores / scores.sum(1, keepdims=True), y_test, task.classes)


def _spaces(context: Context, name: str) -> Space:
    """The shared space of the model."""
    subject = context.subject
    test, train = subject.shared_spaces(context.parts["test"]), subject.shared_spaces(context.parts["train"])
    pair = (WSI, name) if (WSI, name) in test else (name, WSI)
    side = pair.index(WSI)
    return test[pair][side], train[pair][1 - side]


@one_thread()
def _cca_spaces(context: Context, name: str) -> Space | None:
    """The shared space of canonical correlation analysis of mean patch features and the modality."""
    data, parts = context.subject.data, context.parts
    ids = {part: data.split[part] for part in ("train", "val", "test")}
    read = {part: {m: read_profiles(data, ids[part], m) for m in (WSI, name)} for part in ids}
    train, held_out = (Profiles.common(read[part][WSI], read[part][name]) for part in ("train", "val"))
    try:
        place = fit_cca(train, held_out)
    except SettingsError as exc:
        context.note(f"CCA of the slide and {name}", exc)
        return None
    slides, profiles = read["test"][WSI], read["train"][name]
    u = place(slides.values, np.zeros((0, profiles.values.shape[1])))[0]
    v = place(np.zeros((0, slides.values.shape[1])), profiles.values)[1]
    whole = np.zeros((len(parts["test"].patients), u.shape[1])), np.zeros((len(parts["train"].patients), v.shape[1]))
    for out, part, profile, values in ((whole[0], "test", slides, u), (whole[1], "train", profiles, v)):
        at = {patient: row for row, patient in enumerate(parts[part].patients)}
        out[[at[patient] for patient in profile.patients]] = values
    return whole
