"""Validation: embeddings of held-out patients, and retrieval between their modalities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exaonepath.alignment.batch import PatientBatch
from exaonepath.alignment.metrics.retrieval import (
    PairEmbeddings,
    RetrievalScores,
    cross_modal_retrieval,
    rank_queries,
)
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.training.distributed import Processes
from exaonepath.alignment.training.settings import select_parts
from exaonepath.device import evaluating


@dataclass(frozen=True)
class EmbeddedPatients:
    """Embeddings of some patients, on the host.

    Attributes:
        patients: their ids.
        modality: name to float32 [n, E_m]. available: name to bool [n].
        fused: float32 [n, P d].
        pairs: trained pairs in their shared spaces, only rows that have the modality.
    """

    patients: tuple[str, ...]
    modality: dict[str, np.ndarray]
    available: dict[str, np.ndarray]
    fused: np.ndarray
    pairs: tuple[PairEmbeddings, ...]


def embed_patients(
    model: ExaonePathAlignmentModel,
    batches: Iterable[tuple[Sequence[int], PatientBatch]],
    patients: Sequence[str],
    *,
    autocast: Callable[[], AbstractContextManager[None]],
    processes: Processes,
) -> EmbeddedPatients:
    """Embed patients in evaluation mode.

    Args:
        model: the model; its training mode is not changed.
        batches: (rows, batch) pairs; those of all processes together contain every row of `patients` once.
        patients: ids of all patients.
        autocast: context of the encoders.
        processes: the processes that share the work; each of them gets all embeddings.
    """
    widths, device = model.config.widths, model.loss_device
    # Each row is computed by one process and is zero on the others. So the sum over processes contains all rows.
    embeddings = {name: torch.zeros(len(patients), width, device=device) for name, width in widths.items()}
    available = {name: torch.zeros(len(patients), device=device) for name in widths}
    with evaluating(model), torch.no_grad():
        for rows, batch in batches:
            at = torch.tensor(rows, device=device)
            with autocast():
                found = model.embed(batch.to(device))
            for name in widths:
                embeddings[name][at] = found[name].float()
                flags = batch.available.get(name)
                if flags is not None:
                    available[name][at] = flags.to(device).float()
        for name in widths:
            processes.sum(embeddings[name])
            processes.sum(available[name])
        available_all = {name: total > 0 for name, total in available.items()}
        fused = model.fuse(embeddings, available_all)
        pairs = shared_spaces(model, embeddings, available_all, patients)
    return EmbeddedPatients(
        tuple(patients),
        {name: h.cpu().numpy() for name, h in embeddings.items()},
        {name: flags.cpu().numpy() for name, flags in available_all.items()},
        fused.float().cpu().numpy(),
        pairs,
    )


def shared_spaces(
    model: ExaonePathAlignmentModel,
    embeddings: dict[str, Tensor],
    available: dict[str, Tensor],
    patients: Sequence[str],
) -> tuple[PairEmbeddings, ...]:
    """The trained pairs of `model` as inputs of the retrieval; pairs with a side without rows are left out."""
    out = []
    ids = np.asarray(patients)
    for a, b in model.trained_pairs:
        rows_a, rows_b = available[a], available[b]
        if rows_a.any() and rows_b.any():
            u, v = model.project(embeddings[a][rows_a], a, b), model.project(embeddings[b][rows_b], b, a)
            # Converted to numpy: it would treat a tensor with one flag as an index.
            ids_a, ids_b = (ids[rows.cpu().numpy()] for rows in (rows_a, rows_b))
            out.append(PairEmbeddings(a, b, u.float().cpu().numpy(), v.float().cpu().numpy(), ids_a, ids_b))
    return tuple(out)


def retrieval_metrics(pairs: Sequence[PairEmbeddings]) -> tuple[dict[str, float], dict[str, RetrievalScores]]:
    """Retrieval in every direction, as flat numbers for the log ("wsi->rna@1", "mean_recall@1", ...) and as scores."""
    scores = cross_modal_retrieval(pairs)
    flat = {}
    for direction, score in scores.items():
        for k, recall in score.recall.items():
            flat[f"{direction}@{k}"] = recall.value
            flat[f"{direction}@{k}/chance"] = score.chance[k]
    for k in (1, 5, 10):
        values = [score.recall[k].value for score in scores.values()]
        flat[f"mean_recall@{k}"] = float(np.mean(values)) if values else float("nan")
    return flat, scores


def score_parts(pairs: Sequence[PairEmbeddings], select: str) -> dict[str, float]:
    """Patient to what it adds to the metric `select` of `retrieval_metrics`; the sum over patients is the metric."""
    name, k = select_parts(select)
    ranks = []
    for pair in pairs:
        forward = f"{pair.left}->{pair.right}", pair.u, pair.v, pair.left_patients, pair.right_patients
        backward = f"{pair.right}->{pair.left}", pair.v, pair.u, pair.right_patients, pair.left_patients
        for direction, u, v, queries, gallery in (forward, backward):
            if name in ("mean_recall", direction):
                found = rank_queries(u, v, queries, gallery, recall_at=(k,))
                ranks += [(found, queries)] if len(found.query) else []
    parts: dict[str, float] = {}
    for found, queries in ranks:
        share = 1 / (len(ranks) * len(found.query))
        for patient, hit in zip(np.asarray(queries)[found.query].tolist(), found.hits[k].tolist(), strict=True):
            parts[patient] = parts.get(patient, 0.0) + hit * share
    return parts
