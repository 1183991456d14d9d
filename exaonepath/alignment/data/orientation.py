"""Find out whether the rows or the columns of a matrix are the patients: from settings, known ids, or shared ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from exaonepath.alignment.data.matrices import RawMatrix
from exaonepath.alignment.data.patient_ids import tcga_patient
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.text import few

Orientation = Literal["auto", "patients_by_features", "features_by_patients"]

# Two of these modalities may have the same feature names, so shared ids do not imply that they are patients.
_NAMED_BY_GENES = frozenset({"rna", "snp", "cnv"})
# Ensembl ids, probes of methylation arrays, variants, positions on a chromosome, "TP53|7157" of TCGA.
_FEATURE = re.compile(
    r"ENS[A-Z]*[GTP]\d{11}(\.\d+)?|cg\d{8}|ch\.[\dXY]+\.\d+[FR]?|rs\d{3,}|chr[\dXYM]+[:_-]\d+\S*|[\w.-]+\|\d+"
)
# Every genome-wide table, and nearly every panel of cancer genes, contains some of these.
_GENE = re.compile(
    "TP53|KRAS|EGFR|ERBB2|BRAF|PTEN|PIK3CA|MYC|RB1|BRCA1|BRCA2|APC|CDKN2A|NRAS|IDH1|VHL|ATM|ARID1A|SMAD4|STK11|ESR1|"
    "PGR|GATA3|FOXA1|MKI67|CDH1|CTNNB1|NOTCH1|KIT|MET|ALK|TERT|FGFR3|CCND1|MDM2|JAK2|FLT3|NPM1|DNMT3A|TTN|MUC16|"
    "GAPDH|ACTB|B2M|CD4|CD8A|CD3E|CD19|CD274|PTPRC|EPCAM|VIM|KRT5|KRT8|KRT18|COL1A1|TSPAN6|A1BG|A2M"
)


def is_feature_name(name: str) -> bool:
    """Whether an id has the form of a gene, a probe or a variant. Many other feature names have no recognisable
    form."""
    return (_FEATURE.fullmatch(name) or _GENE.fullmatch(name)) is not None


def orient(
    matrices: Mapping[str, RawMatrix],
    declared: Mapping[str, Orientation],
    report: CohortReport,
    *,
    patients: Iterable[str] = (),
    features: Iterable[str] = (),
) -> dict[str, ModalityTable]:
    """Matrices as patients x features.

    The orientation is decided by, in this order: the user's setting; known ids (patients of slides, labels and other
    tables, TCGA barcodes, names of genes and probes) in rows or columns; ids that two tables share on exactly one side
    each. If none of these decides, the matrix is left out, and the report gets an error: a cohort that is aligned by
    the names of genes would train without any error.

    Args:
        matrices: modality to matrix.
        declared: modality to the user's setting; "auto" if a modality is missing.
        report: receives for each matrix a note with the reason for its orientation, or the error.
        patients, features: ids that are known to be patients or features.
    """
    known_patients, known_features = set(patients), set(features)
    tables: dict[str, ModalityTable] = {}

    def settle(name: str, transposed: bool, why: str) -> None:
        table = matrices[name].table(transposed)
        side = "columns" if transposed else "rows"
        report.add(
            "note",
            "read",
            name,
            f"{table.source}: {len(table.patients)} patients x {len(table.features)} features, patients in {side} "
            f"({', '.join(filter(None, [why, matrices[name].dialect]))})",
        )
        known_patients.update(table.patients)
        known_features.update(table.features)
        tables[name] = table

    for name in matrices:
        if declared.get(name, "auto") != "auto":
            settle(name, declared[name] == "features_by_patients", "from the settings")
    sides = {name: (_Side.of(m.rows), _Side.of(m.columns)) for name, m in matrices.items() if name not in tables}
    while open_ := [name for name in matrices if name not in tables]:
        votes = {name: _vote(sides[name], known_patients, known_features) for name in open_}
        # The clearest matrix first: its patients and features are then known ids for the others.
        clearest = max(open_, key=lambda name: abs(votes[name][0]))
        if votes[clearest][0]:
            settle(clearest, votes[clearest][0] < 0, votes[clearest][1])
            continue
        shared = [found for pair in combinations(open_, 2) if (found := _shared_side(sides, *pair))]
        if not shared:
            break
        count, found_in = max(shared, key=lambda found: found[0])
        for name, transposed in found_in.items():
            others = " and ".join(other for other in found_in if other != name)
            settle(name, transposed, f"{count} ids shared with {others}")
    for name, matrix in matrices.items():
        if name not in tables:
            report.add(
                "error",
                "unknown-orientation",
                name,
                f"{matrix.source}: it is not clear whether its {len(matrix.rows)} rows ({few(matrix.rows, 3)}) or its "
                f"{len(matrix.columns)} columns ({few(matrix.columns, 3)}) are the patients: neither slides, labels "
                "nor another table names only one side; set its `orientation` to patients_by_features (patients in "
                "rows) or features_by_patients",
            )
    return tables


@dataclass(frozen=True)
class _Side:
    """Distinct ids of one side of a matrix, and those that are recognised as patients or features by their form."""

    ids: frozenset[str]
    patients: frozenset[str]
    features: frozenset[str]

    @staticmethod
    def of(names: Iterable[str]) -> _Side:
        ids = frozenset(names)
        barcodes = frozenset(name for name in ids if tcga_patient(name) is not None)
        return _Side(ids, barcodes, frozenset(name for name in ids if is_feature_name(name)))


_Sides = tuple[_Side, _Side]  # rows, columns


def _vote(sides: _Sides, patients: Set[str], features: Set[str]) -> tuple[int, str]:
    """Number of ids that indicate patients in rows minus those that indicate columns, and the reason in words."""
    people = [len(side.patients | (side.ids & patients)) for side in sides]
    named = [side.features | (side.ids & features) for side in sides]
    margin = people[0] + len(named[1]) - people[1] - len(named[0])
    known, names = (people[0], named[1]) if margin > 0 else (people[1], named[0])
    if known:
        return margin, f"{known} ids known to be patients"
    return margin, f"{len(names)} names on the other side are of features, such as {few(sorted(names)[:2])}"


def _shared_side(sides: Mapping[str, _Sides], a: str, b: str) -> tuple[int, dict[str, bool]] | None:
    """(shared ids, modality to whether they are in its columns) of two matrices that share ids on one side only."""
    if {a, b} <= _NAMED_BY_GENES:
        return None
    shared = {(i, j): len(sides[a][i].ids & sides[b][j].ids) for i in (0, 1) for j in (0, 1)}
    best = max(shared, key=lambda at: shared[at])
    tied = sum(count == shared[best] for count in shared.values()) > 1
    if not shared[best] or tied or shared[1 - best[0], 1 - best[1]]:
        return None
    return shared[best], {a: bool(best[0]), b: bool(best[1])}
