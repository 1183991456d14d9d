"""A cohort as a whole: every problem in one report, patients chosen, rows sorted."""

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from exaonepath.alignment.data.cohort import load_cohort
from exaonepath.alignment.data.config import CohortConfig, ModalitySource
from exaonepath.alignment.data.report import CohortError
from exaonepath.alignment.modalities import MODALITIES
from exaonepath.errors import ExaonePathError, SettingsError
from exaonepath.files.features import read_features


def rna_file(write_csv, patients, name="rna.csv", genes=4, value=lambda i, j: 10.5 + 40 * i + j):
    rows = [[p, *(value(i, j) for j in range(genes))] for i, p in enumerate(patients)]
    return write_csv(name, ["id", *(f"G{j}" for j in range(genes))], rows)


def cnv_file(write_csv, patients, name="cnv.csv"):
    return write_csv(name, ["id", "A", "B", "C"], [[p, i % 3 - 1, 1, -1] for i, p in enumerate(patients)])


def test_the_synthetic_cohort_is_read_as_written(small, small_folder):
    assert small.patients == tuple(sorted(small.patients))
    assert set(small.modalities) == {"rna", "snp", "cnv", "methylation"}
    assert small.modalities["snp"].is_sparse
    assert small.modalities["rna"].scale == "counts"
    assert not small.report.warnings
    available = small.availability()
    assert available.shape == (40, len(MODALITIES))
    assert (available.sum(1) >= 2).all()
    labels = pd.read_csv(small_folder / "labels.csv").set_index("patient")
    assert small.labels.loc["P00003", "subtype"] == labels.loc["P00003", "subtype"]
    assert small.labels["time"].dtype.kind == "f"
    assert small.slides.dim == 8
    assert small.slides.patients == small.patients


def test_files_of_single_modalities_make_a_cohort(write_csv, write_slide, tmp_path):
    people = ["c", "a", "b", "lonely"]
    for name in "abc":
        write_slide(f"{name}.h5")
    slides = write_csv("slides.csv", ["Patient", "slide", "features"], [(p, f"s{p}", f"{p}.h5") for p in "cab"])
    labels = write_csv("labels.tsv", ["patient", "age", "site"], [("a", "61", "lung"), ("b", "", "liver")])
    config = CohortConfig.from_dict(
        {
            "modalities": {
                "rna": {"path": rna_file(write_csv, people).name, "scale": "tpm"},
                "cnv": cnv_file(write_csv, ["a", "c"]).name,
            },
            "slides": slides.name,
            "labels": labels.name,
        },
        base=tmp_path,
    )
    cohort = load_cohort(config)
    assert cohort.patients == ("a", "b", "c")
    assert cohort.modalities["rna"].patients == ("a", "b", "c")
    assert cohort.modalities["rna"].values[:, 0].tolist() == [50.5, 90.5, 10.5]
    assert cohort.availability().tolist() == [
        [True, True, False, True, False],
        [True, True, False, False, False],
        [True, True, False, True, False],
    ]
    assert [f.patients for f in cohort.report.findings if f.code == "too-few-modalities"] == [("lonely",)]
    assert cohort.labels["age"].tolist()[0] == 61
    assert np.isnan(cohort.labels["age"]["b"])
    assert cohort.labels["site"].isna()["c"]


def test_features_in_half_precision_are_read_as_any_other(write_csv, write_slide, tmp_path):
    for name in "ab":
        write_slide(f"{name}.h5", feature_dtype="float16")
    slides = write_csv("slides.csv", ["patient", "slide", "features"], [(p, p, f"{p}.h5") for p in "ab"])
    config = CohortConfig.from_dict(
        {"modalities": {"rna": {"path": rna_file(write_csv, ["a", "b"]).name, "scale": "tpm"}}, "slides": slides.name},
        base=tmp_path,
    )
    cohort = load_cohort(config)
    assert cohort.slides.dim == 4
    stored = read_features(tmp_path / "a.h5").features
    full = read_features(write_slide("full.h5")).features
    assert stored.dtype == np.float32
    assert np.array_equal(stored, full.astype(np.float16).astype(np.float32))
    assert not np.array_equal(stored, full)


def test_every_problem_is_told_at_once(write_csv, write_slide, tmp_path):
    write_slide("good.h5")
    write_slide("wide.h5", dim=7)
    write_slide("good2.h5")
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    rows = [
        ("p1", "s1", "good.h5"),
        ("p2", "s2", "missing.h5"),
        ("p3", "s3", "broken.h5"),
        ("p4", "s4", "wide.h5"),
        ("p5", "s1", "good2.h5"),
        ("", "s6", "good.h5"),
    ]
    slides = write_csv("slides.csv", ["patient", "slide", "features"], rows)
    rna = rna_file(write_csv, ["p1", "p2", "p1"], value=lambda i, j: "" if i == j == 1 else 30.5 + i)
    config = CohortConfig(
        modalities={
            "rna": ModalitySource(rna, orientation="patients_by_features"),
            "cnv": ModalitySource(tmp_path / "none.csv"),
        },
        slides=slides,
    )
    with pytest.raises(CohortError) as caught:
        load_cohort(config)
    assert isinstance(caught.value, ExaonePathError)
    found = {(f.where, f.code) for f in caught.value.report.errors}
    assert found == {
        ("cnv", "unreadable"),
        ("rna", "duplicate-patients"),
        ("rna", "missing-values"),
        ("slides", "no-features-file"),
        ("slides", "unreadable"),
        ("slides", "feature-width"),
        ("slides", "duplicate-slides"),
        ("slides", "empty-cell"),
    }
    text = str(caught.value)
    for part in ("s2 (patient p2)", "missing.h5", "s3 (patient p3)", "s4 (7)", "none.csv", "p1", "line 7"):
        assert part in text
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - an error comes back from a worker process so
    assert str(again) == text
    assert len(again.report.as_dict()) == len(caught.value.report.findings)


def test_no_common_patients_shows_ids_of_both_sides(write_csv):
    config = CohortConfig(
        modalities={
            "rna": ModalitySource(rna_file(write_csv, ["TCGA-AA-0001-01A", "TCGA-AA-0002-01A"])),
            "cnv": ModalitySource(cnv_file(write_csv, ["TCGA-AA-0001", "TCGA-AA-0002"])),
        }
    )
    with pytest.raises(CohortError, match="no patient has 2 modalities") as caught:
        load_cohort(config)
    assert "TCGA-AA-0001-01A" in str(caught.value)
    assert "patient_ids: tcga" in str(caught.value)

    assert load_cohort(replace(config, patient_ids="tcga")).patients == ("TCGA-AA-0001", "TCGA-AA-0002")


def test_slides_without_patches_and_odd_encoders_are_warned_of(write_csv, write_slide):
    write_slide("a.h5", weights="random:0", weights_fingerprint="x")
    write_slide("b.h5", weights_fingerprint="y")
    write_slide("c.h5", n=0, weights_fingerprint="y")
    slides = write_csv("slides.csv", ["patient", "features"], [(p, f"{p}.h5") for p in "abc"])
    rna = ModalitySource(rna_file(write_csv, "abc"))
    cohort = load_cohort(CohortConfig(modalities={"rna": rna}, slides=slides))
    assert {f.code: f.patients for f in cohort.report.warnings} == {
        "random-weights": (),
        "mixed-features": (),
        "empty-slide": ("c",),
    }
    assert cohort.patients == ("a", "b")
    assert [slide.slide for slide in cohort.slides.slides] == ["a", "b"]
    with pytest.raises(CohortError, match="slide encoder needs"):
        load_cohort(CohortConfig(modalities={"rna": rna}, slides=slides, feature_dim=768))


def test_features_with_nan_are_found_by_the_full_check_only(write_csv, write_slide, drop_checksums):
    import h5py

    with h5py.File(write_slide("a.h5"), "r+") as file:
        file["features"][2, 1] = np.nan
        drop_checksums(file)
    write_slide("b.h5")
    slides = write_csv("slides.csv", ["patient", "features"], [("a", "a.h5"), ("b", "b.h5")])
    config = {"modalities": {"rna": ModalitySource(rna_file(write_csv, "ab"))}, "slides": slides}
    with pytest.raises(CohortError, match="NaN"):
        load_cohort(CohortConfig(**config))
    assert len(load_cohort(CohortConfig(**config, check_features="header")).slides) == 2


def test_row_order_of_the_files_changes_nothing(write_csv):
    people = [f"p{i}" for i in range(6)]

    def cohort(order):
        def value(i, j):
            return 10.5 + 40 * int(order[i][1:]) + j

        rna = rna_file(write_csv, order, value=value)
        cnv = write_csv("cnv.csv", ["id", "A", "B"], [[p, int(p[1:]) % 3 - 1, 1] for p in order])
        rows = {"orientation": "patients_by_features"}
        sources = {"rna": ModalitySource(rna, **rows), "cnv": ModalitySource(cnv, **rows)}
        return load_cohort(CohortConfig(modalities=sources))

    first, second = cohort(people), cohort(people[::-1])
    assert first.fingerprint == second.fingerprint
    assert first.subset(people[:3]).fingerprint != first.fingerprint


def test_subset_keeps_what_belongs_to_its_patients(small):
    chosen = small.patients[5:9]
    part = small.subset(reversed(chosen))
    assert part.patients == chosen
    assert set(part.slides.patients) == set(chosen)
    assert list(part.labels.index) == list(chosen)
    at = [small.patients.index(p) for p in chosen]
    np.testing.assert_array_equal(part.availability(), small.availability()[at])
    with pytest.raises(SettingsError, match="nobody"):
        small.subset(["nobody"])


def test_modalities_of_other_names_are_named(small_folder):
    config = CohortConfig(mudata=small_folder / "cohort.h5mu", min_modalities=1)
    renamed = ModalitySource(small_folder / "cohort.h5mu", key="methylation", scale="beta")
    cohort = load_cohort(CohortConfig(modalities={"methylation": renamed}, min_modalities=1))
    whole = load_cohort(config).modalities["methylation"]
    np.testing.assert_array_equal(cohort.modalities["methylation"].values, whole.values)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "at least one of"),
        ({"modalities": {"protein": "p.csv"}}, "unknown modality 'protein'"),
        ({"slides": "s.csv", "pateint_ids": "tcga"}, "unknown setting.*pateint_ids"),
        ({"modalities": {"rna": {"path": "r.csv", "scales": "tpm"}}}, "unknown setting.*scales"),
        ({"modalities": {"rna": {"scale": "tpm"}}}, "has no path"),
        ({"modalities": {"rna": {"path": "r.csv", "scale": "beta"}}}, "scale 'beta' of rna"),
        ({"modalities": {"rna": {"path": "r.csv", "orientation": "sideways"}}}, "sideways"),
        ({"slides": "s.csv", "missing": "zero"}, "missing is 'zero'"),
        ({"slides": "s.csv", "min_modalities": 9}, "min_modalities is 9"),
    ],
)
def test_settings_that_cannot_be_used(settings, said):
    with pytest.raises(SettingsError, match=said):
        CohortConfig.from_dict(settings)


def test_a_folder_without_a_cohort_is_said(tmp_path):
    with pytest.raises(SettingsError, match=r"neither cohort\.h5mu nor slides\.csv"):
        CohortConfig.from_folder(tmp_path)


def tcga_labels(write_csv, rows, **settings):
    people = ["TCGA-AA-0001-01A", "TCGA-AA-0002-01A", "TCGA-AA-0003-01A"]
    sources = {"rna": ModalitySource(rna_file(write_csv, people)), "cnv": ModalitySource(cnv_file(write_csv, people))}
    labels = write_csv("labels.csv", ["patient", "tissue", "age"], rows)
    return load_cohort(CohortConfig(modalities=sources, labels=labels, patient_ids="tcga", **settings))


def test_labels_of_barcodes_come_from_the_rows_that_tables_keep(write_csv):
    rows = [
        ("TCGA-AA-0001-11A", "normal", "61"),
        ("TCGA-AA-0001-01A", "tumour", ""),
        ("TCGA-AA-0002-06A", "metastasis", "50"),
        ("TCGA-AA-0002-01A", "primary", ""),
        ("TCGA-AA-0002-01B", "", "50"),
        ("TCGA-AA-0003-11A", "normal", "70"),
    ]
    cohort = tcga_labels(write_csv, rows)
    assert cohort.labels["tissue"].tolist()[:2] == ["tumour", "primary"]
    assert cohort.labels["tissue"].isna().tolist() == [False, False, True]
    assert np.isnan(cohort.labels["age"].tolist()[0])
    assert cohort.labels["age"].tolist()[1] == 50  # of two rows that agree, or of which one says nothing
    noted = {f.code: f.patients for f in cohort.report.findings if f.where == "labels"}
    assert noted == {
        "normal-samples": ("TCGA-AA-0001-11A", "TCGA-AA-0003-11A"),
        "further-samples": ("TCGA-AA-0002-06A",),
        "lacking-labels": ("TCGA-AA-0003",),
    }


def test_rows_of_one_patient_that_differ_are_an_error(write_csv):
    rows = [("TCGA-AA-0001-01A", "a", "61"), ("TCGA-AA-0001-01B", "b", "61"), ("TCGA-AA-0002-01A", "a", "50")]
    with pytest.raises(CohortError, match=r"1 patient\(s\) have rows that differ in 'tissue': TCGA-AA-0001") as caught:
        tcga_labels(write_csv, rows)
    assert [(f.code, f.patients) for f in caught.value.report.errors] == [("conflicting-labels", ("TCGA-AA-0001",))]


def test_labels_of_nobody_are_an_error_and_of_some_a_warning(write_csv):
    people = ["p1", "p2", "p3"]
    sources = {"rna": ModalitySource(rna_file(write_csv, people), orientation="patients_by_features")}
    sources["cnv"] = ModalitySource(cnv_file(write_csv, people))
    labels = write_csv("labels.csv", ["patient", "site"], [("P-1", "lung"), ("P-2", "liver")])
    config = CohortConfig(modalities=sources, labels=labels)
    with pytest.raises(CohortError, match=r"none of the cohort's 3 patients \(such as p1, p2, p3\); it names P-1, P-2"):
        load_cohort(config)
    write_csv("labels.csv", ["patient", "site"], [("p1", "lung"), ("p9", "liver")])
    report = load_cohort(config).report
    assert [(f.code, f.patients) for f in report.warnings] == [("lacking-labels", ("p2", "p3"))]
    assert "2 of 3 patients" in report.warnings[0].message


def mudata_file(path, patients):
    """A MuData file of `patients` (modality to ids) whose obs holds a label."""
    anndata, mudata = pytest.importorskip("anndata"), pytest.importorskip("mudata")

    def part(name, ids):
        values = np.linspace(0.1, 0.9, 2 * len(ids)).reshape(len(ids), 2)
        names = pd.DataFrame(index=[f"{name}1", f"{name}2"])
        return anndata.AnnData(values, pd.DataFrame(index=list(ids)), names)

    with mudata.set_options(pull_on_update=False):
        data = mudata.MuData({name: part(name, ids) for name, ids in patients.items()})
        data.obs["site"] = ["north"] * data.n_obs
        data.write(path)
    return path


def test_labels_of_the_mudata_file_are_held_against_the_cohort_too(tmp_path):
    (tmp_path / "labels.csv").write_text("patient,age\nq,3\n")
    config = CohortConfig(mudata=mudata_file(tmp_path / "c.h5mu", {"rna": "abc", "cnv": "abc"}))
    cohort = load_cohort(config)
    assert cohort.labels["site"].tolist() == ["north"] * 3
    assert not [f for f in cohort.report.findings if f.where == "labels"]
    with pytest.raises(CohortError, match=r"labels\.csv names none of the cohort's 3 patients"):
        load_cohort(replace(config, labels=tmp_path / "labels.csv"))


def test_a_table_of_other_patients_is_an_error_where_the_user_named_it(write_csv, tmp_path):
    path = mudata_file(tmp_path / "c.h5mu", {"rna": "abc", "cnv": "abc", "methylation": "xyz"})
    report = load_cohort(CohortConfig(mudata=path)).report
    found = [(f.where, f.code, f.patients) for f in report.warnings]
    assert found == [("methylation", "unused-modality", ("x", "y", "z"))]
    assert "3 patients (x, y, z)" in report.warnings[0].message
    assert "such as a, b, c; left out" in report.warnings[0].message
    own = {"methylation": ModalitySource(path, key="methylation")}
    with pytest.raises(CohortError, match=r"none of its 3 patients \(x, y, z\) .*such as a, b, c; correct the ids"):
        load_cohort(CohortConfig(mudata=path, modalities=own))


def test_empty_cells_of_a_parquet_table_of_slides_are_empty(write_csv, write_slide, tmp_path):
    rows = [("a", "s1", "a.h5"), (None, "s2", "b.h5"), ("c", None, "c.h5"), ("d", np.nan, None)]
    for name in "abc":
        write_slide(f"{name}.h5")
    pd.DataFrame(rows, columns=["patient", "slide", "features"]).to_parquet(tmp_path / "slides.parquet")
    rna = ModalitySource(rna_file(write_csv, "abcd"))
    with pytest.raises(CohortError) as caught:
        load_cohort(CohortConfig(modalities={"rna": rna}, slides=tmp_path / "slides.parquet"))
    assert [f.code for f in caught.value.report.errors] == ["empty-cell", "empty-cell"]
    assert "line 3" in str(caught.value)
    assert "line 5" in str(caught.value)
    pd.DataFrame([rows[0], rows[2]], columns=["patient", "slide", "features"]).to_parquet(tmp_path / "slides.parquet")
    cohort = load_cohort(CohortConfig(modalities={"rna": rna}, slides=tmp_path / "slides.parquet"))
    assert [(slide.patient, slide.slide) for slide in cohort.slides.slides] == [("a", "s1"), ("c", "c")]
