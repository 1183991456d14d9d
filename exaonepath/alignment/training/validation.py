"""How well patients who were held out find themselves across modalities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exaonepath.alignment.batch import PatientBatch
from exaonepath.alignment.metrics.retrieval import PairEmbeddings, RetrievalScores, cross_modal_retrieval
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel, evaluating
from exaonepath.alignment.training.distributed import Processes


@dataclass(frozen=True)
class EmbeddedPatients:
    """Embeddings of some patients, on the host.

    Attributes:
        patients: their ids.
        modality: name to float32 [n, E_m]. available: name to bool [n].
        fused: float32 [n, P d].
        pairs: trained pairs in their shared spaces, rows that have the modality only.
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
        model: in any mode; it is left in that mode.
        batches: (rows, batch) pairs; over all processes together, every row of `patients` once.
        patients: ids of all.
        autocast: what the encoders run under.
        processes: who shares the work; each of them gets all embeddings.
    """
    widths, device = model.config.widths, model.loss_device
    # A row is filled by one process and zero on the others, so that the sum over processes is a copy.
    embeddings = {name: torch.zeros(len(patients), width, device=device) for name, width in widths.items()}
    available = {name: torch.zeros(len(patients), device=device) for name in widths}
    with evaluating(model), torch.no_grad():
        for rows, batch in batches:
            at = torch.tensor(rows, device=device)
            with autocast():
                found = model.embed(batch.to(device))
            for name in widths:
                embeddings[name][at] = found[name].float()
                there = batch.available.get(name)
                if there is not None:
                    available[name][at] = there.to(device).float()
        for name in widths:
            processes.sum(embeddings[name])
            processes.sum(available[name])
        there_all = {name: flags > 0 for name, flags in available.items()}
        fused = model.fuse(embeddings, there_all)
        pairs = shared_spaces(model, embeddings, there_all, patients)
    return EmbeddedPatients(
        tuple(patients),
        {name: h.cpu().numpy() for name, h in embeddings.items()},
        {name: flags.cpu().numpy() for name, flags in there_all.items()},
        fused.float().cpu().numpy(),
        pairs,
    )


def shared_spaces(
    model: ExaonePathAlignmentModel,
    embeddings: dict[str, Tensor],
    available: dict[str, Tensor],
    patients: Sequence[str],
) -> tuple[PairEmbeddings, ...]:
    """The trained pairs of `model` as retrieval takes them; pairs without a row on one side are left out."""
    out = []
    ids = np.asarray(patients)
    for a, b in model.trained_pairs:
        rows_a, rows_b = available[a], available[b]
        if rows_a.any() and rows_b.any():
            u, v = model.project(embeddings[a][rows_a], a, b), model.project(embeddings[b][rows_b], b, a)
            # As numpy's flags: it takes a tensor of one flag for an index.
            ids_a, ids_b = (ids[rows.cpu().numpy()] for rows in (rows_a, rows_b))
            out.append(PairEmbeddings(a, b, u.float().cpu().numpy(), v.float().cpu().numpy(), ids_a, ids_b))
    return tuple(out)


def retrieval_metrics(pairs: Sequence[PairEmbeddings]) -> tuple[dict[str, float], dict[str, RetrievalScores]]:
    """Retrieval in every direction, as flat numbers for the log ("wsi->rna@1", "mean_recall@1", ...) and in full."""
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
