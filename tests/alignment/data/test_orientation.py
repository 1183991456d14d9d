"""Which side of a matrix holds the patients: ids decide; the shape never does."""

import numpy as np
import pandas as pd
import pytest

from exaonepath.alignment.data.cohort import load_cohort
from exaonepath.alignment.data.config import CohortConfig, ModalitySource
from exaonepath.alignment.data.matrices import RawMatrix
from exaonepath.alignment.data.orientation import is_feature_name, orient
from exaonepath.alignment.data.report import CohortError, CohortReport

PEOPLE = tuple(f"p{n}" for n in range(30))
OTHERS = tuple(f"s{n}" for n in range(30))
GENES = tuple(f"G{n}" for n in range(8))  # fewer than patients, and in no form that tells
PROBES = tuple(f"site{n}" for n in range(12))


def matrix(patients, features, turned=False):
    values = np.arange(len(patients) * len(features), dtype=np.float32).reshape(len(patients), -1)
    if turned:
        return RawMatrix(features, patients, values.T, "m.csv")
    return RawMatrix(patients, features, values, "m.csv")


def oriented(matrices, **known):
    report = CohortReport()
    return orient(matrices, known.pop("declared", {}), report, **known), report


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_what_two_tables_share_is_patients_whatever_the_shape(turned):
    """With more patients than features the shorter side is not the patients'."""
    matrices = {"rna": matrix(PEOPLE, GENES, turned[0]), "methylation": matrix(PEOPLE, PROBES, turned[1])}
    tables, report = oriented(matrices)
    assert {name: (t.patients, t.features) for name, t in tables.items()} == {
        "rna": (PEOPLE, GENES),
        "methylation": (PEOPLE, PROBES),
    }
    np.testing.assert_array_equal(tables["rna"].values, matrix(PEOPLE, GENES).values)
    assert not report.errors


@pytest.mark.parametrize("patients", [PEOPLE, OTHERS])
def test_genes_that_two_tables_share_are_not_taken_for_patients(patients):
    """Both of the same genes: the patients may be shared too, or be written in another way; nothing tells which."""
    tables, report = oriented({"rna": matrix(PEOPLE, GENES), "cnv": matrix(patients, GENES)})
    assert not tables
    assert [(f.where, f.code) for f in report.errors] == [
        ("rna", "unknown-orientation"),
        ("cnv", "unknown-orientation"),
    ]
    for part in ("p0, p1, p2", "G0, G1, G2", "30 rows", "8 columns", "set its `orientation`"):
        assert part in report.errors[0].message


def test_a_third_table_tells_of_two_that_share_both_sides():
    matrices = {
        "rna": matrix(PEOPLE, GENES),
        "cnv": matrix(PEOPLE, GENES, turned=True),
        "methylation": matrix(PEOPLE[:20], PROBES, turned=True),
    }
    tables, _ = oriented(matrices)
    assert {name: table.features for name, table in tables.items()} == {
        "rna": GENES,
        "cnv": GENES,
        "methylation": PROBES,
    }


def test_names_of_genes_and_probes_tell_without_any_known_patient():
    real = (*GENES, "TP53", "KRAS")
    tables, report = oriented({"rna": matrix(PEOPLE, real, turned=True), "cnv": matrix(OTHERS, real)})
    assert (tables["rna"].patients, tables["cnv"].patients) == (PEOPLE, OTHERS)
    assert "such as KRAS, TP53" in report.findings[0].message
    for name in ("ENSG00000141510", "ENSG00000141510.18", "cg00000029", "TP53|7157", "chr7:140453136", "rs1042522"):
        assert is_feature_name(name)
    for name in ("TCGA-AA-0001", "P00003", "0012", "patient 7", "CPTAC-3_C3L-00001"):
        assert not is_feature_name(name)


def test_what_the_user_says_and_known_ids_come_first():
    tables, _ = oriented({"rna": matrix(GENES, PEOPLE)}, declared={"rna": "patients_by_features"}, patients=PEOPLE)
    assert tables["rna"].patients == GENES
    tables, report = oriented({"rna": matrix(GENES, PEOPLE), "cnv": matrix(PEOPLE, GENES)}, patients=PEOPLE[:1])
    assert tables["rna"].patients == tables["cnv"].patients == PEOPLE
    assert "1 ids known" in report.findings[0].message
    tables, _ = oriented({"cnv": matrix(OTHERS, GENES)}, features=GENES)
    assert tables["cnv"].patients == OTHERS


def test_numbers_as_ids_of_both_sides_go_by_the_majority():
    numbers = tuple(str(n) for n in range(30))
    entrez = ("1", "2", "9", "7157", "3845")
    matrices = {"rna": matrix(numbers, entrez), "methylation": matrix(numbers, PROBES)}
    tables, _ = oriented(matrices)
    assert tables["rna"].patients == tables["methylation"].patients == numbers


def test_a_cohort_never_meets_on_gene_names(tmp_path):
    rng = np.random.default_rng(0)
    for name, people in (("rna", PEOPLE), ("cnv", OTHERS)):
        pd.DataFrame(rng.normal(size=(30, 8)), list(people), list(GENES)).to_csv(tmp_path / f"{name}.csv")
    sources = {name: ModalitySource(tmp_path / f"{name}.csv") for name in ("rna", "cnv")}
    with pytest.raises(CohortError, match=r"rna\.csv: .* whether its 30 rows .*`orientation`"):
        load_cohort(CohortConfig(modalities=sources))
