"""Manifests: what is understood, and that every problem is reported at once and before any work."""

import sys

import pytest

from exaonepath.errors import MissingDependencyError, SlideListError
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.inputs import cohort_inputs
from exaonepath.slides.cohort.manifest import read_manifest
from exaonepath.slides.cohort.slide_ids import why_not_an_id


@pytest.fixture
def folder(tmp_path):
    """Slides that exist (nothing opens them), a mask, and a folder of weights."""
    for name in ("a.svs", "b.svs", "sub/a.svs", "mask.png", "weights/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.fixture
def write(folder):
    def manifest(text, name="m.csv", encoding="utf-8"):
        (folder / name).write_bytes(text.encode(encoding))
        return folder / name

    return manifest


def problems_of(path):
    with pytest.raises(SlideListError) as caught:
        read_manifest(path)
    assert str(path) in caught.value.head
    return caught.value.problems


def test_every_column(write, folder):
    path = write(
        "slide,id,patient,mpp,mask,weights\n"
        "a.svs,one,P1,0.25,mask.png,weights\n"
        f"{folder}/b.svs,,,,,\n"
        "sub/a.svs,two,NA,nan,None,random:3\n"
    )
    found = read_manifest(path)
    assert found.slides == (
        CohortSlide(folder / "a.svs", "one", "P1", 0.25, folder / "mask.png", str(folder / "weights")),
        CohortSlide(folder / "b.svs", "b"),
        CohortSlide(folder / "sub" / "a.svs", "two", weights="random:3"),
    )
    assert not found.unknown


@pytest.mark.parametrize(
    "text",
    [
        "slide\tpatient\na.svs\tP 1\n",
        "slide;patient\r\na.svs;P 1\r\n",
        "\ufeffslide,patient\na.svs,P 1",
        'slide,patient\n"a.svs","P 1"\n\n',
        "slide , patient\n a.svs , P 1 \n",
        "\n\nslide,patient\na.svs,P 1\n",
    ],
)
def test_kinds_of_text(write, folder, text):
    assert read_manifest(write(text)).slides == (CohortSlide(folder / "a.svs", "a", "P 1"),)


def test_usual_names_are_understood_and_stated(write, folder, caplog):
    path = write("Slide Path,slide_id,case-id,MPP,stain\na.svs,x,P,0.5,HE\n")
    assert cohort_inputs(manifest=path).slides == (CohortSlide(folder / "a.svs", "x", "P", 0.5),)
    note = cohort_inputs(manifest=path).note
    assert "slide = column 'Slide Path'" in note
    assert "patient = column 'case-id'" in note
    assert "'stain'" in caplog.text
    assert cohort_inputs(manifest=write("slide,id\na.svs,x\n")).note == ""


def test_the_documented_name_wins(write, folder):
    found = read_manifest(write("slide,path,id\na.svs,nonsense,x\n"))
    assert found.slides[0].path == folder / "a.svs"
    assert found.unknown == ("path",)


def test_every_problem_at_once(write, folder):
    path = write(
        "slide,id,mpp,mask\n"
        "a.svs,one,0.25,\n"
        "gone.svs,two,,\n"
        ",three,,\n"
        "b.svs,a/b,,\n"
        "b.svs,CON.1,,\n"
        "b.svs,one,,\n"
        "b.svs,x,-1,\n"
        "b.svs,y,0.25um,\n"
        "b.svs,z,,nomask.png\n"
        "b.svs,w,inf,\n"
        "b.svs,v,,weights\n"
        "b.svs,only three fields,\n"
        "b.svs,One,,\n"
        "b.svs,one_features,,\n"
    )
    problems = problems_of(path)
    wanted = [
        "line 3: ",
        "line 4: the slide is not given",
        "line 5: the id 'a/b' has /",
        "line 6: the id 'CON.1' is a name that Windows reserves",
        "line 8: mpp is '-1'",
        "line 9: mpp is '0.25um'",
        "line 10: the mask ",
        "line 11: mpp is 'inf'",
        "line 12: the mask ",
        "line 13: 3 fields, and the header has 4",
        "the id one is given twice: line 2, line 7",
        "the features of one (line 2) and the patches of one_features (line 15) would be one file",
        "the ids one and One differ only in upper and lower case",
    ]
    assert len(problems) == len(wanted)
    for problem, beginning in zip(problems, wanted, strict=True):
        assert problem.startswith(beginning)
    assert f"{folder / 'gone.svs'} does not exist" in problems[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the column slide"),
        ("\n\n", "lacks the column slide"),
        ("id,patient\nx,y\n", "lacks the column slide (the path of the slide file); it has 'id', 'patient'"),
        ("slide\n", "lists no slide"),
        ("slide,Slide\na.svs,b.svs\n", "could both be the slide"),
        ("slide,slide\na.svs,b.svs\n", "occur more than once"),
        ("path,file\na.svs,b.svs\n", "the columns 'path' and 'file' could both be the slide; call one of them slide"),
        ('slide\n"a.svs\n', "line 2: unexpected end of data"),
        ("slide\nweights\n", "is a folder, and holds no DICOM slide"),
        ("slide\na\0.svs\n", "line"),
    ],
)
def test_tables_that_cannot_be_used(write, text, message):
    assert any(message in problem for problem in problems_of(write(text)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04rest", "Excel"),
        ("slide\na.svs\n".encode("utf-16"), "UTF-16"),
        ("slide,patient\na.svs,Müller\n".encode("latin-1"), "not UTF-8"),
        (b"PAR1 and nothing else", ""),
    ],
)
def test_other_kinds_of_files(folder, data, message):
    (folder / "m.csv").write_bytes(data)
    assert message in problems_of(folder / "m.csv")[0]


def test_a_folder_of_dicom_files_is_a_slide(write, folder, monkeypatch):
    """Its id is the name of the folder: the files in it are often named by long numbers."""
    from exaonepath.slides.cohort import manifest

    (folder / "case.12").mkdir()
    level0 = folder / "case.12" / "1.2.840.dcm"
    level0.write_bytes(b"")
    monkeypatch.setattr(manifest, "dicom_slide_in", lambda path: level0 if path.name == "case.12" else None)
    assert read_manifest(write("slide\ncase.12\n")).slides == (CohortSlide(level0, "case.12"),)


def test_links(write, folder):
    (folder / "good.svs").symlink_to(folder / "a.svs")
    (folder / "bad.svs").symlink_to(folder / "gone.svs")
    assert problems_of(write("slide\ngood.svs\nbad.svs\n")) == (
        f"line 3: {folder / 'bad.svs'} is a link to a file that does not exist",
    )


def test_no_manifest(folder):
    assert "No such file" in problems_of(folder / "nope.csv")[0]
    assert problems_of(folder / "sub")


def test_a_thousand_missing_slides_are_counted_and_not_all_shown(write):
    path = write("slide\n" + "".join(f"gone{i}.svs\n" for i in range(1000)))
    with pytest.raises(SlideListError) as caught:
        read_manifest(path)
    assert len(caught.value.problems) == 1000
    assert len(caught.value.lines) == 52
    assert caught.value.lines[-1] == "  ... and 950 more"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        "a\nb",
        "a\x1b[31m",
        "a\u202eb",
        "nul",
        "COM1.svs",
        "a:b",
        "a.",
        " a",
        ".a",
        "x" * 201,
    ],
)
def test_impossible_ids(text):
    assert why_not_an_id(text)


@pytest.mark.parametrize(
    "text", ["a", "TCGA-3C-AALI-01Z-00-DX1.F6E9", "Fall 12, Block A", "Größe_3", "console", "1.2.840"]
)
def test_possible_ids(text):
    assert why_not_an_id(text) == ""


def test_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table(
        {
            "slide": ["a.svs", "b.svs"],
            "id": [7, 8],
            "patient": pyarrow.array(["P1", None]),
            "mpp": [0.25, None],
        }
    )
    parquet.write_table(table, folder / "m.parquet")
    assert read_manifest(folder / "m.parquet").slides == (
        CohortSlide(folder / "a.svs", "7", "P1", 0.25),
        CohortSlide(folder / "b.svs", "8"),
    )


def test_parquet_without_pyarrow(folder, monkeypatch):
    (folder / "m.csv").write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"exaonepath\[cohort\]"):
        read_manifest(folder / "m.csv")
