"""MAF, GISTIC tables, MuData and AnnData files, and TCGA barcodes."""

import gzip

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from exaonepath.alignment.data.formats import read_anndata, read_gistic, read_maf, read_mudata, sparse_where_smaller
from exaonepath.alignment.data.patient_ids import tcga_patient, to_patients
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.errors import DataFileError

MAF_HEADER = ["Hugo_Symbol", "Entrez_Gene_Id", "Tumor_Sample_Barcode", "Variant_Classification", "Note"]


def maf_file(path, rows, comment="#version 2.4\n#annotated # twice\n"):
    lines = ["\t".join(MAF_HEADER)] + ["\t".join([g, "1", s, c, "a # sign"]) for g, s, c in rows]
    path.write_text(comment + "\n".join(lines) + "\n")
    return path


def test_maf_holds_non_silent_mutations(tmp_path):
    rows = [
        ("TP53", "S1", "Missense_Mutation"),
        ("TP53", "S1", "Nonsense_Mutation"),  # twice mutated is mutated
        ("KRAS", "S2", "Frame_Shift_Del"),
        ("TTN", "S2", "Silent"),
        ("MUC16", "S3", "Intron"),
    ]
    report = CohortReport()
    table = read_maf(maf_file(tmp_path / "m.maf", rows), report)
    assert table.patients == ("S1", "S2", "S3")
    assert table.features == ("KRAS", "TP53")
    assert table.is_sparse
    assert table.values.toarray().tolist() == [[0, 1], [1, 0], [0, 0]]
    assert table.scale == "indicator"
    assert not report.warnings
    assert "2 of 5 rows left out" in report.findings[0].message


def test_maf_names_unknown_classes_and_lacking_columns(tmp_path):
    report = CohortReport()
    table = read_maf(maf_file(tmp_path / "m.maf", [("A", "S1", "Bizarre"), ("B", "S1", "Splice_Site")]), report)
    assert table.features == ("B",)
    assert [f.code for f in report.warnings] == ["unknown-variant-class"]
    assert "Bizarre" in report.warnings[0].message
    (tmp_path / "n.maf").write_text("Hugo_Symbol\tSample\nA\tS\n")
    with pytest.raises(DataFileError, match="Tumor_Sample_Barcode, Variant_Classification"):
        read_maf(tmp_path / "n.maf", CohortReport())


@pytest.mark.parametrize("second", ["Locus ID", "Gene ID"])
def test_gistic_tables(tmp_path, second):
    (tmp_path / "all_thresholded.by_genes.txt").write_text(
        f"Gene Symbol\t{second}\tCytoband\tS1\tS2\nACAP3\t116983\t1p36.33\t-1\t2\nTP53\t7157\t17p13.1\t0\t-2\n"
    )
    table = read_gistic(tmp_path / "all_thresholded.by_genes.txt")
    assert table.patients == ("S1", "S2")
    assert table.features == ("ACAP3", "TP53")
    assert table.values.tolist() == [[-1, 0], [2, -2]]
    assert table.scale == "copy-number"
    (tmp_path / "other.txt").write_text("x\ty\nA\t1\n")
    with pytest.raises(DataFileError, match="first column"):
        read_gistic(tmp_path / "other.txt")


def annotated(values, patients, features):
    return anndata.AnnData(values, obs=pd.DataFrame(index=patients), var=pd.DataFrame(index=features))


def test_mudata_and_anndata_agree_with_what_was_written(tmp_path):
    dense = np.array([[1.0, np.nan], [3, 4]])
    csc = sparse.csc_matrix(np.array([[0, 2.0, 0]], np.float64))
    with mudata.set_options(pull_on_update=False):
        data = mudata.MuData(
            {"rna": annotated(dense, ["p1", "p2"], ["A", "B"]), "snp": annotated(csc, ["p2"], ["X", "Y", "Z"])}
        )
        data.obs["site"] = ["north", "south"]
        data.write(tmp_path / "c.h5mu")
    found, labels = read_mudata(tmp_path / "c.h5mu")
    assert set(found) == {"rna", "snp"}
    np.testing.assert_array_equal(found["rna"].values, dense.astype(np.float32))
    assert found["rna"].values.dtype == np.float32
    assert isinstance(found["snp"].values, sparse.csr_matrix)
    assert found["snp"].values.toarray().tolist() == [[0, 2, 0]]
    assert labels.loc["p2", "site"] == "south"
    one = read_anndata(tmp_path / "c.h5mu", "snp")
    assert one.features == ("X", "Y", "Z")
    with pytest.raises(DataFileError, match=r"\['rna', 'snp'\]"):
        read_anndata(tmp_path / "c.h5mu", "cnv")
    annotated(dense, ["p1", "p2"], ["A", "B"]).write_h5ad(tmp_path / "c.h5ad")
    assert read_anndata(tmp_path / "c.h5ad").patients == ("p1", "p2")
    with pytest.raises(DataFileError, match="no MuData file"):
        read_mudata(tmp_path / "c.h5ad")


def test_broken_hdf5_is_a_typed_error(tmp_path):
    (tmp_path / "c.h5mu").write_bytes(b"\x89HDF\r\n\x1a\n" + b"broken" * 50)
    with pytest.raises(DataFileError, match="corrupt or half written"):
        read_mudata(tmp_path / "c.h5mu")
    with h5py.File(tmp_path / "d.h5mu", "w") as file:
        file.create_group("mod/rna")
        file.create_group("obs")
    with pytest.raises(DataFileError, match="lacks X, obs, var"):
        read_mudata(tmp_path / "d.h5mu")


def test_values_take_the_form_that_is_smaller():
    few = np.zeros((10, 10), np.float32)
    few[0] = np.nan
    table = sparse_where_smaller(ModalityTable(tuple("abcdefghij"), tuple("klmnopqrst"), few))
    assert table.is_sparse
    np.testing.assert_array_equal(table.rows(range(10)), few)
    many = sparse_where_smaller(ModalityTable(("a",), ("x", "y"), sparse.csr_matrix(np.ones((1, 2), np.float32))))
    assert not many.is_sparse


@pytest.mark.parametrize(
    ("barcode", "patient"),
    [
        ("TCGA-02-0001", ("TCGA-02-0001", 0)),
        ("TCGA-02-0001-01C-01D-0182-01", ("TCGA-02-0001", 1)),
        ("tcga.a8.a08b.11", ("TCGA-A8-A08B", 11)),
        ("TCGA-02-0001-06", ("TCGA-02-0001", 6)),
        ("TCGA-02-00012", None),
        ("P17", None),
    ],
)
def test_barcodes(barcode, patient):
    assert tcga_patient(barcode) == patient


def barcode_table(patients, values, scale="any"):
    return ModalityTable(tuple(patients), ("A", "B"), values, scale)


def test_normal_and_later_samples_are_left_out_and_named():
    samples = ["TCGA-AA-0002-06A", "TCGA-AA-0001-01A", "TCGA-AA-0001-11A", "TCGA-AA-0002-01A"]
    report = CohortReport()
    table = to_patients(barcode_table(samples, np.arange(8.0).reshape(4, 2)), "tcga", "rna", report)
    assert table.patients == ("TCGA-AA-0001", "TCGA-AA-0002")
    assert table.values.tolist() == [[2, 3], [6, 7]]
    assert {f.code: f.patients for f in report.findings} == {
        "normal-samples": ("TCGA-AA-0001-11A",),
        "further-samples": ("TCGA-AA-0002-06A",),
    }


def test_two_samples_of_one_type_are_an_error_but_mutations_are_united():
    samples = ["TCGA-AA-0001-01A", "TCGA-AA-0001-01B"]
    report = CohortReport()
    to_patients(barcode_table(samples, np.eye(2, dtype=np.float32)), "tcga", "rna", report)
    assert [(f.code, f.patients) for f in report.errors] == [("duplicate-patients", ("TCGA-AA-0001",))]
    report = CohortReport()
    mutations = barcode_table(samples, sparse.csr_matrix(np.array([[1, 0], [1, 1]], np.float32)), "indicator")
    table = to_patients(mutations, "tcga", "snp", report)
    assert not report.errors
    assert table.patients == ("TCGA-AA-0001",)
    assert table.values.toarray().tolist() == [[1, 1]]


def test_ids_that_are_no_barcodes_are_named():
    report = CohortReport()
    to_patients(barcode_table(["TCGA-AA-0001", "P1"], np.eye(2)), "tcga", "rna", report)
    assert [(f.code, f.patients) for f in report.errors] == [("no-tcga-barcode", ("P1",))]


def test_a_quote_in_a_maf_is_a_character_like_any_other(tmp_path):
    header = "Hugo_Symbol\tTumor_Sample_Barcode\tVariant_Classification\tNote\n"
    rows = [f"G{i}\tS{i}\tMissense_Mutation\t" + ('"5 prime' if i in (1, 4) else "x") for i in range(6)]
    (tmp_path / "m.maf").write_text(header + "\n".join(rows) + "\n")
    table = read_maf(tmp_path / "m.maf", CohortReport())
    assert table.patients == tuple(f"S{i}" for i in range(6))
    # As R writes a table of text: everything in quotes.
    quoted = ["\t".join(f'"{cell}"' for cell in line.split("\t")) for line in [header.strip(), rows[0]]]
    (tmp_path / "r.maf").write_text("\n".join(quoted) + "\n")
    table = read_maf(tmp_path / "r.maf", CohortReport())
    assert (table.patients, table.features) == (("S0",), ("G0",))


def test_a_quote_in_a_gistic_table_swallows_no_row(tmp_path):
    rows = ['"A\t1\t1p36\t-1\t2', "B\t2\t1p36\t0\t1", '"C"\t3\t1p36\t1\t1', '"D\t4\t1p36\t2\t2']
    (tmp_path / "x.by_genes.txt").write_text('Gene Symbol\tLocus ID\tCytoband\tS1\t"S2"\n' + "\n".join(rows) + "\n")
    table = read_gistic(tmp_path / "x.by_genes.txt")
    assert (table.patients, table.features) == (("S1", "S2"), ("A", "B", "C", "D"))
    assert table.values.tolist() == [[-1, 0, 1, 2], [2, 1, 1, 2]]


@pytest.mark.parametrize("ending", ["maf.gz", "by_genes.txt.gz"])
def test_cut_off_and_damaged_gzip_are_typed_errors(tmp_path, ending):
    read = {"maf.gz": lambda path: read_maf(path, CohortReport()), "by_genes.txt.gz": read_gistic}[ending]
    header = {"maf.gz": MAF_HEADER, "by_genes.txt.gz": ["Gene Symbol", "Cytoband", "S1", "S2", "S3"]}[ending]
    rows = [["A", "1", str(i), str(i * 7919 % 1000), str(i * 31)] for i in range(3000)]
    whole = gzip.compress("\n".join("\t".join(row) for row in [header, *rows]).encode())
    for broken in (whole[: len(whole) // 2], whole[:100] + b"\xff" * 40 + whole[140:], whole[:12]):
        (tmp_path / f"x.{ending}").write_bytes(broken)
        with pytest.raises(DataFileError, match="cannot be read as"):
            read(tmp_path / f"x.{ending}")


def sparse_h5ad(path):
    values = sparse.random(40, 30, 0.2, format="csr", dtype=np.float32, random_state=0)
    annotated(values, [f"p{i}" for i in range(40)], [f"g{i}" for i in range(30)]).write_h5ad(path)
    return path


@pytest.mark.parametrize(
    ("dataset", "at", "value"),
    [("indices", 5, 1 << 28), ("indices", 5, -7), ("indptr", 3, 1 << 28), ("indptr", 3, 0), ("indptr", -1, 3)],
)
@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_indices_that_point_outside_a_sparse_matrix_are_found_before_they_are_followed(
    tmp_path, dataset, at, value, kind
):
    values = sparse.random(40, 30, 0.2, format=kind, dtype=np.float32, random_state=0)
    annotated(values, [f"p{i}" for i in range(40)], [f"g{i}" for i in range(30)]).write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        file["X"][dataset][at] = value
    with pytest.raises(DataFileError, match=r"x\.h5ad.*X"):
        read_anndata(tmp_path / "x.h5ad")


@pytest.mark.filterwarnings("ignore:.*without encoding metadata")
@pytest.mark.parametrize("part", ["X", "obs", "var", "obs/_index"])
def test_parts_without_their_encoding_are_a_typed_error_or_read(tmp_path, part):
    sparse_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        for name in list(file[part].attrs):
            del file[part].attrs[name]
    if part == "obs/_index":
        assert read_anndata(tmp_path / "x.h5ad").patients[1] == "p1"
        return
    with pytest.raises(DataFileError, match=rf"x\.h5ad.*/{part}\b"):
        read_anndata(tmp_path / "x.h5ad")


def test_a_file_that_came_from_elsewhere_is_not_to_be_deleted(tmp_path):
    sparse_h5ad(tmp_path / "x.h5ad")
    whole = (tmp_path / "x.h5ad").read_bytes()
    (tmp_path / "x.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataFileError, match="corrupt or half written: copy or download it again") as caught:
        read_anndata(tmp_path / "x.h5ad")
    assert "run the stage again" not in str(caught.value)
