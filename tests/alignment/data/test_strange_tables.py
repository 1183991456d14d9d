"""Tables as other programs write them: read for what they are, or refused by name."""

import gzip

import anndata
import numpy as np
import pandas as pd
import pytest

from exaonepath.alignment.data.cohort import load_cohort
from exaonepath.alignment.data.config import CohortConfig
from exaonepath.alignment.data.frames import read_frame
from exaonepath.alignment.data.matrices import read_matrix
from exaonepath.alignment.data.names import gene_of_date
from exaonepath.alignment.data.report import CohortError
from exaonepath.errors import DataFileError, SettingsError

PATIENTS = [f"P{i:03}" for i in range(12)]
GENES = ["TP53", "EGFR", "KRAS", "MYC", "PTEN"]
RNG = np.random.default_rng(0)
EXPRESSION = RNG.lognormal(4, 1.5, (5, 12)).round(3)
COPIES = RNG.integers(-2, 3, (5, 12))
ENTREZ = [7157, 1956, 3845, 4609, 5728]


def write(path, values, *, genes=GENES, patients=PATIENTS, **annotation):
    """A matrix of genes x patients as cBioPortal lays it out, columns of annotation first."""
    frame = pd.DataFrame(values, columns=patients)
    for name, column in reversed(annotation.items()):
        frame.insert(0, name, column)
    frame.insert(0, "Hugo_Symbol", genes)
    frame.to_csv(path, sep="\t", index=False)
    return path


def load(rna, cnv=None, *, scale="tpm", **settings):
    sources = {"rna": rna if isinstance(rna, dict) else {"path": rna}}
    sources["rna"].setdefault("scale", scale)
    if cnv is not None:
        sources["cnv"] = cnv if isinstance(cnv, dict) else {"path": cnv}
    return load_cohort(CohortConfig.from_dict({"modalities": sources, **settings}))


def codes(cohort, level="warning"):
    return [f.code for f in cohort.report.findings if f.level == level]


# Annotation


@pytest.mark.parametrize("min_modalities", [1, 2])
@pytest.mark.parametrize("name", ["Entrez_Gene_Id", "entrez gene id", "Gene Length", "start", "END", "Locus ID"])
def test_numbers_that_belong_to_genes_are_never_a_patient(tmp_path, name, min_modalities):
    rna = write(tmp_path / "data_mrna.txt", EXPRESSION, **{name: ENTREZ})
    cnv = write(tmp_path / "data_cna.txt", COPIES, **{name: ENTREZ})
    cohort = load(rna, cnv, min_modalities=min_modalities)
    assert cohort.patients == tuple(PATIENTS)
    assert cohort.modalities["rna"].features == tuple(GENES)
    np.testing.assert_allclose(cohort.modalities["rna"].rows(range(12)), EXPRESSION.T, rtol=1e-6)
    assert any(name in f.message and "annotation left out" in f.message for f in cohort.report.findings)


def test_text_and_numbers_of_annotation_are_left_out_of_every_kind_of_matrix(tmp_path):
    more = {"Entrez_Gene_Id": ENTREZ, "Cytoband": ["17p13"] * 5, "Description": ["a, b"] * 5}
    rna = write(tmp_path / "rna.txt", EXPRESSION, **more)
    turned = pd.read_csv(rna, sep="\t", index_col=0)[["Entrez_Gene_Id", *PATIENTS]].T
    turned.to_csv(tmp_path / "turned.csv")
    pd.read_csv(rna, sep="\t", index_col=0).to_parquet(tmp_path / "rna.parquet")
    cnv = write(tmp_path / "cnv.txt", COPIES)
    for file in ("rna.txt", "turned.csv", "rna.parquet"):
        cohort = load(tmp_path / file, cnv, min_modalities=1)
        assert cohort.patients == tuple(PATIENTS)
        assert sorted(cohort.modalities["rna"].features) == sorted(GENES)
    clinical = pd.read_csv(tmp_path / "turned.csv", index_col=0).loc[PATIENTS]
    clinical.insert(0, "AGE", 60)
    clinical.to_csv(tmp_path / "clinical.csv")
    assert sorted(load(tmp_path / "clinical.csv", cnv).modalities["rna"].features) == sorted(GENES)


@pytest.mark.parametrize("min_modalities", [1, 2])
def test_numbers_of_an_unusual_name_are_asked_about(tmp_path, min_modalities):
    """Also where two tables of one program share them, and so each finds them in the other."""
    rna = write(tmp_path / "rna.txt", EXPRESSION, KnownDrugs=ENTREZ)
    cnv = write(tmp_path / "cnv.txt", COPIES, KnownDrugs=ENTREZ)
    with pytest.raises(
        CohortError, match=r"KnownDrugs may be patients or annotation.*`annotation` to \['KnownDrugs'\]"
    ):
        load(rna, cnv, min_modalities=min_modalities)
    out = {"annotation": ["KnownDrugs"]}
    cohort = load({"path": rna, **out}, {"path": cnv, **out}, min_modalities=min_modalities)
    assert cohort.patients == tuple(PATIENTS)
    kept = load({"path": rna, "annotation": []}, {"path": cnv, "annotation": []}, min_modalities=min_modalities)
    assert set(kept.patients) == {*PATIENTS, "KnownDrugs"}


def test_numbers_far_from_those_of_patients_are_asked_about_whatever_their_name(tmp_path):
    people = ["Ann", "Bob", "Cy", "Dee", "Eve", "Fay", "Gus", "Hal", "Ivy", "Jon", "Kim", "Lou"]
    rna = write(tmp_path / "rna.txt", EXPRESSION, patients=people, Zed=[10**8] * 5)
    with pytest.raises(CohortError, match="Zed may be patients or annotation"):
        load(rna, write(tmp_path / "cnv.txt", COPIES, patients=people), min_modalities=1)


def test_patients_that_one_table_lacks_are_not_asked_about(tmp_path):
    rna = write(tmp_path / "rna.txt", EXPRESSION)
    cnv = write(tmp_path / "cnv.txt", COPIES[:, :9], patients=PATIENTS[:9])
    cohort = load(rna, cnv)
    assert cohort.patients == tuple(PATIENTS[:9])
    odd = [*PATIENTS[:11], "Control"]
    pd.DataFrame({"patient": odd, "group": "a"}).to_csv(tmp_path / "labels.csv", index=False)
    rna = write(tmp_path / "odd.txt", EXPRESSION, patients=odd)
    assert "Control" in load(rna, cnv, labels=tmp_path / "labels.csv", min_modalities=1).patients


def test_a_feature_that_is_a_label_is_asked_about_but_not_a_gene(tmp_path):
    frame = pd.DataFrame(EXPRESSION.T, PATIENTS, GENES)
    frame.assign(relapse_score=1.5).to_csv(tmp_path / "rna.csv")
    labels = pd.DataFrame({"patient": PATIENTS, "relapse_score": 1.5, "TP53": "mutated"})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    cnv = write(tmp_path / "cnv.txt", COPIES)
    with pytest.raises(CohortError, match="relapse_score may be features or annotation"):
        load(tmp_path / "rna.csv", cnv, labels=tmp_path / "labels.csv")
    source = {"path": tmp_path / "rna.csv", "annotation": ["relapse_score"]}
    assert load(source, cnv, labels=tmp_path / "labels.csv").modalities["rna"].features == tuple(GENES)
    with pytest.raises(SettingsError, match="list of names"):
        load({"path": tmp_path / "rna.csv", "annotation": "relapse_score"}, cnv)


def test_a_feature_written_unlike_the_others_and_in_no_other_table_is_asked_about(tmp_path):
    frame = pd.DataFrame(EXPRESSION.T, PATIENTS, GENES)
    frame.assign(known_rank=1.5).to_csv(tmp_path / "rna.csv")
    cnv = write(tmp_path / "cnv.txt", COPIES)
    with pytest.raises(
        CohortError, match=r"known_rank may be features or annotation.*`annotation` to \['known_rank'\]"
    ):
        load(tmp_path / "rna.csv", cnv)
    # Nor does it speak for one that another table of the same program has it too.
    pd.DataFrame(COPIES.T, PATIENTS, GENES).assign(known_rank=1).to_csv(tmp_path / "cnv.csv")
    with pytest.raises(CohortError, match="known_rank may be features or annotation"):
        load(tmp_path / "rna.csv", tmp_path / "cnv.csv")
    source = {"path": tmp_path / "rna.csv", "annotation": []}
    assert "known_rank" in load(source, cnv).modalities["rna"].features
    # A gene that other tables lack is a gene.
    frame.assign(C1orf112=1.5, GAPDH=2.0).to_csv(tmp_path / "rna.csv")
    assert len(load(tmp_path / "rna.csv", cnv).modalities["rna"].features) == 7


def test_barcodes_of_other_centres_are_not_asked_about(tmp_path):
    people = [f"TCGA-02-{i:04}" for i in range(11)] + ["TCGA-A8-A08B"]
    rna = write(tmp_path / "rna.txt", EXPRESSION, patients=people)
    cnv = write(tmp_path / "cnv.txt", COPIES[:, :11], patients=people[:11])
    assert load(rna, cnv).patients == tuple(people[:11])


# Separators and numbers

WRITTEN = {
    "semicolons, decimal commas": (";", "{:.3f}", ","),
    "semicolons, points": (";", "{:.3f}", "."),
    "tabs, decimal commas": ("\t", "{:.3f}", ","),
    "commas, points": (",", "{:.3f}", "."),
    "tabs, thousands": ("\t", "{:,.3f}", "."),
    "semicolons, European thousands": (";", "{:,.3f}", "european"),
    "tabs, exponents": ("\t", "{:.6e}", ","),
    "commas, quoted decimal commas": (",", '"{:.3f}"', ","),
}


def written(style, values):
    separator, form, mark = WRITTEN[style]
    table = str.maketrans({"european": {",": ".", ".": ","}, ",": {".": ","}, ".": {}}[mark])
    rows = [[gene, *(form.format(v).translate(table) for v in row)] for gene, row in zip(GENES, values, strict=True)]
    return "\n".join(separator.join(row) for row in [["gene", *PATIENTS], *rows]) + "\n"


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.txt", "m.csv.gz"])
@pytest.mark.parametrize("style", WRITTEN)
def test_separators_and_marks_are_found_whatever_the_name(tmp_path, style, name):
    values = EXPRESSION * 100  # into the thousands
    text = written(style, values).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    matrix = read_matrix(tmp_path / name)
    assert (matrix.rows, matrix.columns) == (tuple(GENES), tuple(PATIENTS))
    np.testing.assert_allclose(matrix.values, values, rtol=1e-5)


def test_integers_with_marks_between_thousands(tmp_path):
    (tmp_path / "m.tsv").write_text("g\tp1\tp2\nA\t1,234,567\t12\nB\t1,234\t999\n")
    assert read_matrix(tmp_path / "m.tsv").values.tolist() == [[1234567, 12], [1234, 999]]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["1,234", "2,500"], r"'1,234'.*thousands separator.*`decimal`"),
        (["1,5", "2.5"], r"'1,5' has a decimal comma and '2.5' a decimal point"),
        (["1,5", "1,234,567"], r"decimal comma and '1,234,567'"),
        (["1'234", "2"], r"\"1'234\" has marks between thousands"),
        (["1 234,5", "2"], r"'1 234,5' has marks between thousands"),
    ],
)
def test_numbers_that_can_be_read_in_two_ways_are_refused(tmp_path, cells, said):
    (tmp_path / "m.tsv").write_text("g\tp1\tp2\nA\t" + "\t".join(cells) + "\n")
    with pytest.raises(DataFileError, match=said):
        read_matrix(tmp_path / "m.tsv")


def test_the_option_says_what_a_comma_is(tmp_path):
    (tmp_path / "m.tsv").write_text("g\tp1\tp2\nA\t1,234\t2\n")
    assert read_matrix(tmp_path / "m.tsv", decimal=",").values.tolist() == [[np.float32(1.234), 2]]
    assert read_matrix(tmp_path / "m.tsv", decimal=".").values.tolist() == [[1234, 2]]
    with pytest.raises(SettingsError, match="decimal is 'comma'"):
        load({"path": tmp_path / "m.tsv", "decimal": "comma"})


def test_marks_after_the_lines_that_were_looked_at_are_never_misread(tmp_path):
    many = "".join(f"G{i}\t{i}\t{i}.5\n" for i in range(2000))
    (tmp_path / "m.tsv").write_text("g\tp1\tp2\n" + many + "A\t1,5\t2\n")
    with pytest.raises(DataFileError, match=r"'1,5' in row 'A'.*set `decimal` to ','"):
        read_matrix(tmp_path / "m.tsv")
    (tmp_path / "n.tsv").write_text("g\tp1\tp2\nB\t1,234.5\t2\n" + many + "A\t1,5\t2\n")
    with pytest.raises(DataFileError, match="'1,5' in row 'A'"):
        read_matrix(tmp_path / "n.tsv")


def test_what_commas_cannot_separate_is_said(tmp_path):
    (tmp_path / "m.csv").write_text("g,p1,p2\nA,1,5,2,5\n")
    with pytest.raises(DataFileError, match="commas are decimal separators and column separators"):
        read_matrix(tmp_path / "m.csv")
    (tmp_path / "m.txt").write_text("g p1 p2\nA 1 2\n")
    with pytest.raises(DataFileError, match="blanks are no column separators"):
        read_matrix(tmp_path / "m.txt")


def test_labels_with_semicolons_decimal_commas_and_comments(tmp_path):
    rows = "\n".join(f"{p};{n},5;x, y" for n, p in enumerate(PATIENTS))
    (tmp_path / "labels.csv").write_text(f"#Patient;Months;Note\n#STRING;NUMBER;STRING\nPatient_ID;time;note\n{rows}\n")
    cohort = load(
        write(tmp_path / "rna.txt", EXPRESSION), write(tmp_path / "cnv.txt", COPIES), labels=tmp_path / "labels.csv"
    )
    assert cohort.labels["time"].tolist() == [n + 0.5 for n in range(12)]
    assert cohort.labels["note"].iloc[0] == "x, y"


def test_labels_that_are_not_available_are_missing_and_no_class(tmp_path):
    kinds = [*"abababababa", "[Not Available]"]
    labels = pd.DataFrame({"patient": PATIENTS, "time": ["NA", *range(11)], "kind": kinds})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    rna, cnv = write(tmp_path / "rna.txt", EXPRESSION), write(tmp_path / "cnv.txt", COPIES)
    cohort = load(rna, cnv, labels=tmp_path / "labels.csv")
    assert cohort.labels["time"].tolist()[1:] == list(range(11))
    assert cohort.labels["time"].isna().tolist() == [True, *[False] * 11]
    assert sorted(cohort.labels["kind"].dropna().unique()) == ["a", "b"]
    assert ["time (1), kind (1)" in f.message for f in cohort.report.findings if f.code == "na-labels"] == [True]


# Files of other kinds


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("g\tp1\nA\t1\n".encode("utf-16"), "UTF-16.*iconv"),
        ("g\tp1\nA\t1\n".encode("utf-16-le"), "UTF-16"),
        ("g\tp1\nGr\xf6\xdfe\t1\n".encode("cp1252"), "not UTF-8.*cp1252"),
        (b"#1.2\n1\t1\nName\tDescription\tp1\nA\tx\t1\n", "GCT; remove its first two lines"),
        (b"PK\x03\x04rest of a workbook", "Excel workbook.*CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Excel workbook"),
        (b"\x1f\x8b\x08\x00\x00", "gzip.*rename"),
        (b"##fileformat=VCFv4.2\n#CHROM\n", "VCF.*MAF"),
        (b"<!DOCTYPE html>", "HTML"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(tmp_path, content, said):
    (tmp_path / "m.txt").write_bytes(content)
    for read in (read_matrix, read_frame):
        with pytest.raises(DataFileError, match=said):
            read(tmp_path / "m.txt")


# MAF, and terms of VEP

MAF = "Hugo_Symbol\tEntrez_Gene_Id\tTumor_Sample_Barcode\tVariant_Classification\n"


def calls(*rows):
    return MAF + "".join(f"{gene}\t1\t{patient}\t{term}\n" for gene, patient, term in rows)


@pytest.mark.parametrize("name", ["data_mutations.txt", "calls.tsv", "calls.maf"])
def test_a_maf_is_known_by_its_header_and_vep_terms_are_mapped(tmp_path, name):
    rows = [
        ("EGFR ", "P000", "missense_variant"),
        ("KRAS", "P000", "synonymous_variant"),
        (" TP53", "P001 ", "Missense_Mutation"),
        ("PTEN", "P002", "splice_region_variant&intron_variant"),
        ("MYC", "P003", "frameshift_variant,splice_region_variant"),
        ("MYC", "P004", " stop_gained"),
    ]
    (tmp_path / name).write_text("#version 2.4\n" + calls(*rows))
    rna = write(tmp_path / "rna.txt", EXPRESSION)
    sources = {"rna": {"path": rna, "scale": "tpm"}, "snp": tmp_path / name}
    cohort = load_cohort(CohortConfig.from_dict({"modalities": sources}))
    table = cohort.modalities["snp"]
    assert table.patients == ("P000", "P001", "P002", "P003", "P004")
    assert table.features == ("EGFR", "MYC", "TP53")
    assert table.rows(range(5)).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert not codes(cohort)


def test_unknown_terms_are_named_with_their_counts(tmp_path):
    (tmp_path / "calls.maf").write_text(calls(("A", "P0", "odd"), ("B", "P0", "odd"), ("C", "P1", "exonic")))
    with pytest.raises(CohortError, match=r"odd \(2\), exonic \(1\).*no others"):
        load_cohort(CohortConfig.from_dict({"modalities": {"snp": tmp_path / "calls.maf"}, "min_modalities": 1}))
    with pytest.raises(CohortError, match="is a MAF, which contains mutations"):
        load(tmp_path / "calls.maf")


def test_gistic_tables_are_known_by_their_header(tmp_path):
    frame = pd.DataFrame(COPIES, columns=PATIENTS)
    for name, column in (("Cytoband", "1p36"), ("Locus ID", ENTREZ), ("Gene Symbol", GENES)):
        frame.insert(0, name, column)
    frame.to_csv(tmp_path / "calls.tsv", sep="\t", index=False)
    cohort = load(write(tmp_path / "rna.txt", EXPRESSION), tmp_path / "calls.tsv")
    assert cohort.modalities["cnv"].features == tuple(GENES)


# Names


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("turned", [False, True])
def test_na_and_nan_are_names_by_one_rule_in_rows_and_columns(tmp_path, ending, turned):
    genes = ["TP53", "NA", "nan", "KRAS ", "\u200bMYC\u00a0"]
    frame = pd.DataFrame(EXPRESSION, genes, PATIENTS)
    frame = frame if turned else frame.T
    getattr(frame, f"to_{ending}")(tmp_path / f"rna.{ending}")
    cohort = load(tmp_path / f"rna.{ending}", write(tmp_path / "cnv.txt", COPIES))
    assert cohort.modalities["rna"].features == ("TP53", "NA", "nan", "KRAS", "MYC")
    assert [f.features for f in cohort.report.warnings if f.code == "na-names"] == [("NA", "nan")]


def test_names_in_anndata_are_trimmed_alike(tmp_path):
    values = EXPRESSION.T.astype(np.float32)
    names = pd.DataFrame(index=["TP53 ", "NA", "KRAS", "MYC", "PTEN"])
    anndata.AnnData(values, pd.DataFrame(index=PATIENTS), names).write_h5ad(tmp_path / "rna.h5ad")
    cohort = load(tmp_path / "rna.h5ad", write(tmp_path / "cnv.txt", COPIES))
    assert cohort.modalities["rna"].features[:2] == ("TP53", "NA")


@pytest.mark.parametrize(
    ("name", "gene"),
    [
        ("1-Mar", "MARCH1 (MARCHF1)"),
        ("Mar-01", "MARCH1 (MARCHF1)"),
        ("2-Sep", "SEPT2 (SEPTIN2)"),
        ("02-Sept-22", "SEPT2 (SEPTIN2)"),
        ("1-Dec", "DEC1 (DELEC1)"),
        ("2022-03-01", "MARCH1 (MARCHF1)"),
        ("44621", "MARCH1 (MARCHF1)"),
        ("MARCH1", None),
        ("SEPT2", None),
        ("12-Mar", None),
        ("1-Feb", None),
        ("44600", None),
        ("MARC1", None),
        ("DECR1", None),
    ],
)
def test_dates_tell_of_what_gene_they_were(name, gene):
    assert gene_of_date(name) == gene


def test_dates_for_genes_are_warned_of_and_entrez_ids_are_not(tmp_path):
    rna = write(tmp_path / "rna.txt", EXPRESSION, genes=["TP53", "1-Mar", "2-Sep", "44621", "KRAS"])
    cohort = load(rna, write(tmp_path / "cnv.txt", COPIES))
    (warning,) = [f for f in cohort.report.warnings if f.code == "dates-for-genes"]
    assert warning.features == ("1-Mar", "2-Sep", "44621")
    assert "1-Mar for MARCH1 (MARCHF1), 2-Sep for SEPT2 (SEPTIN2)" in warning.message
    rna = write(tmp_path / "ids.txt", EXPRESSION, genes=["7157", "44621", "3845", "4609", "5728"])
    assert "dates-for-genes" not in codes(
        load({"path": rna, "orientation": "features_by_patients"}, tmp_path / "cnv.txt")
    )


# Beta values


@pytest.mark.parametrize("mostly_zero", [False, True])
def test_beta_values_a_hair_outside_are_clipped_and_told(tmp_path, mostly_zero):
    beta = RNG.random((5, 12)) * (RNG.random((5, 12)) < (0.2 if mostly_zero else 1))
    beta[0, 0], beta[1, 1] = -1e-6, 1.0000001
    sites = [f"cg{i:08}" for i in range(5)]
    methylation = write(tmp_path / "beta.txt", beta, genes=sites)
    sources = {"cnv": write(tmp_path / "cnv.txt", COPIES), "methylation": methylation}
    cohort = load_cohort(CohortConfig.from_dict({"modalities": sources}))
    assert not codes(cohort)
    assert codes(cohort, "note").count("clipped") == 1
    values = cohort.modalities["methylation"].rows(range(12))
    assert (values.min(), values.max()) == (0, 1)
    beta[0, 0] = -0.01
    sources["methylation"] = write(tmp_path / "beta.txt", beta, genes=sites)
    assert codes(load_cohort(CohortConfig.from_dict({"modalities": sources}))) == ["wrong-scale"]
    # M-values all near 0..1 are none of our rounding.
    source = {"path": methylation, "scale": "m-value"}
    kept = load_cohort(CohortConfig.from_dict({"modalities": {**sources, "methylation": source}}))
    assert kept.modalities["methylation"].rows(range(12)).min() < 0


# Ids in the labels


@pytest.mark.parametrize(
    "column", ["patient", "Patient", "Patient_ID", "PATIENT_ID", "case_submitter_id", "Subject ID"]
)
def test_ids_of_labels_are_found_by_usual_names(tmp_path, column):
    pd.DataFrame({"age": 60, column: PATIENTS}).to_csv(tmp_path / "labels.csv", index=False)
    cohort = load(
        write(tmp_path / "rna.txt", EXPRESSION), write(tmp_path / "cnv.txt", COPIES), labels=tmp_path / "labels.csv"
    )
    assert list(cohort.labels) == ["age"]


def test_ids_under_another_name_or_two_are_asked_about(tmp_path):
    rna, cnv = write(tmp_path / "rna.txt", EXPRESSION), write(tmp_path / "cnv.txt", COPIES)
    labels = pd.DataFrame({"case_id": range(12), "Kennung": PATIENTS, "age": 60})
    labels.drop(columns="case_id").to_csv(tmp_path / "none.csv", index=False)
    labels.assign(submitter_id=PATIENTS).to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(CohortError, match=r"lacks the column patient; it has 'Kennung', 'age'.*--patient-column"):
        load(rna, cnv, labels=tmp_path / "none.csv")
    with pytest.raises(CohortError, match=r"'case_id' and 'submitter_id' may both be.*--patient-column"):
        load(rna, cnv, labels=tmp_path / "two.csv")
    for file, column in (("none.csv", "kennung"), ("two.csv", "submitter_id")):
        assert "age" in load(rna, cnv, labels=tmp_path / file, id_column=column).labels
    with pytest.raises(CohortError, match="no column 'Nummer'"):
        load(rna, cnv, labels=tmp_path / "none.csv", id_column="Nummer")
