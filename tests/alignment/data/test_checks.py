"""What is said of one modality's numbers: scale, missing values, duplicates."""

import numpy as np
import pytest
from scipy import sparse

from exaonepath.alignment.data import tables
from exaonepath.alignment.data.checks import check_table, measure
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable

RNG = np.random.default_rng(0)
SHAPE = (20, 50)


def table(values, scale="any"):
    values = np.asarray(values, np.float32)
    patients = tuple(f"p{i}" for i in range(values.shape[0]))
    return ModalityTable(patients, tuple(f"g{i}" for i in range(values.shape[1])), values, scale)


def check(modality, values, **settings):
    report = CohortReport()
    return check_table(modality, table(values), report, **settings), report


COUNTS = RNG.poisson(200, SHAPE)
TPM = RNG.lognormal(3, 1.5, SHAPE) * 10
LOG = np.log1p(TPM)
BETA = RNG.random(SHAPE)
M_VALUES = RNG.normal(0, 3, SHAPE)
CALLS = RNG.integers(-2, 3, SHAPE)
MUTATIONS = RNG.integers(0, 2, SHAPE)


@pytest.mark.parametrize(
    ("modality", "values", "scale", "taken"),
    [
        ("rna", COUNTS, None, "counts"),
        ("rna", TPM, None, "tpm"),
        ("rna", LOG, None, "log"),
        ("rna", LOG - 4, None, "log"),
        ("rna", COUNTS, "tpm", "tpm"),
        ("methylation", BETA, None, "beta"),
        ("methylation", M_VALUES, "m-value", "m-value"),
        ("cnv", CALLS, None, "copy-number"),
        ("cnv", M_VALUES, None, "copy-number"),
        ("snp", MUTATIONS, None, "indicator"),
        ("snp", MUTATIONS + MUTATIONS, None, "indicator"),
        ("rna", M_VALUES * 1000, "any", "any"),
    ],
)
def test_good_numbers_pass_without_a_word_of_warning(modality, values, scale, taken):
    checked, report = check(modality, values, scale=scale)
    assert checked.scale == taken
    assert not report.warnings
    assert not report.errors


@pytest.mark.parametrize(
    ("modality", "values", "scale", "said"),
    [
        ("methylation", COUNTS, None, "1000 of 1000 values.*look like counts"),
        ("methylation", M_VALUES, None, "look like M-values"),
        ("methylation", BETA * 1.2, None, r"of 1000 values \(.*%\) lie outside 0..1.*range from .* to 1\."),
        ("methylation", BETA, "m-value", "look like beta values"),
        ("methylation", TPM, "m-value", r"exceed \+-30"),
        ("rna", LOG, "tpm", "look like log values"),
        ("rna", LOG, "counts", "look like log values"),
        ("rna", LOG - 5, "tpm", "are negative"),
        ("rna", TPM, "counts", "no integers: possibly TPM"),
        ("rna", TPM, "log", "look like TPM or counts"),
        ("snp", COUNTS, None, "0 and 1"),
        ("snp", BETA, None, "0 and 1"),
        ("cnv", COUNTS, None, r"exceed \+-50"),
    ],
)
def test_a_wrong_scale_is_warned_of_with_its_figures(modality, values, scale, said):
    _, report = check(modality, values, scale=scale)
    assert [f.code for f in report.warnings] == ["wrong-scale"]
    assert not report.errors
    warning = report.warnings[0]
    assert warning.where == modality
    import re

    assert re.search(said, warning.message), warning.message
    assert f"{np.asarray(values, np.float32).max():.4g}" in warning.message


def test_missing_values_are_named_with_patients_and_features():
    values = BETA.copy()
    values[3, 7] = values[3, 8] = values[5, 7] = np.nan
    _, report = check("methylation", values)
    assert [(f.code, f.patients, f.features) for f in report.errors] == [("missing-values", ("p3", "p5"), ("g7", "g8"))]
    assert "3 value(s) missing" in report.errors[0].message
    checked, report = check("methylation", values, missing="mean")
    assert [f.code for f in report.findings] == ["missing-values"]
    assert not report.errors
    assert np.isnan(checked.values[3, 7])  # filled later, with what is fitted


def test_patients_without_any_value_are_patients_without_the_modality():
    values = BETA.copy()
    values[[0, 4]] = np.nan
    values[6, 2] = np.nan
    checked, report = check("methylation", values)
    assert len(checked.patients) == 18
    assert "p4" not in checked.patients
    assert [(f.code, f.patients) for f in report.findings if f.level == "note"] == [("no-values", ("p0", "p4"))]
    assert report.errors[0].patients == ("p6",)


def test_infinite_values_are_an_error_also_where_missing_ones_are_filled():
    values = LOG.copy()
    values[1, 2] = -np.inf
    _, report = check("rna", values, missing="mean")
    assert [(f.code, f.patients, f.features) for f in report.errors] == [("infinite-values", ("p1",), ("g2",))]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_duplicate_features_are_an_error_or_averaged(kind):
    values = np.array([[1, 0, 3], [2, 5, 4]], np.float32)
    twice = ModalityTable(("p", "q"), ("A", "B", "A"), sparse.csr_matrix(values) if kind == "sparse" else values)
    report = CohortReport()
    check_table("rna", twice, report)
    assert [(f.code, f.features) for f in report.errors] == [("duplicate-features", ("A",))]
    report = CohortReport()
    checked = check_table("rna", twice, report, duplicate_features="mean")
    assert not report.errors
    assert checked.features == ("A", "B")
    assert checked.rows([0, 1]).tolist() == [[2, 0], [3, 5]]


def test_figures_do_not_depend_on_the_size_of_blocks(monkeypatch):
    values = M_VALUES.copy()
    values[2, 3], values[9, 1], values[4] = np.nan, np.inf, np.nan
    whole = measure(table(values))
    monkeypatch.setattr(tables, "BLOCK_VALUES", 3 * SHAPE[1])
    parts = measure(table(values))
    sparse_table = ModalityTable(table(values).patients, table(values).features, sparse.csr_matrix(values.astype("f4")))
    for other in (parts, measure(sparse_table)):
        for name, value in vars(whole).items():
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)
    assert whole.rows_missing.tolist() == [2]
    assert whole.all_missing_rows.tolist() == [4]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_tallies_of_unassigned_reads_are_no_features(kind):
    values = np.array([[5, 900, 3, 70], [2, 800, 4, 60]], np.float32)
    values = sparse.csr_matrix(values) if kind == "sparse" else values
    table = ModalityTable(("p1", "p2"), ("A", "__no_feature", "B", "N_unmapped"), values)
    report = CohortReport()
    found = check_table("rna", table, report, scale="counts")
    assert found.features == ("A", "B")
    assert found.rows([0, 1]).tolist() == [[5, 3], [2, 4]]
    assert [(f.level, f.features) for f in report.findings if f.code == "no-features"] == [
        ("note", ("__no_feature", "N_unmapped"))
    ]
    assert check_table("cnv", table, CohortReport(), scale="any").features == table.features
