"""Every format, written and read again: the same numbers, bit for bit."""

import shutil

import h5py
import numpy as np
import pytest
from stand_in_encoders import WIDTH

from exaonepath.errors import DataFileError, OutputCollisionError, SettingsError, SlideListError
from exaonepath.files.embeddings import read_embedding
from exaonepath.files.features import read_features
from exaonepath.files.patches import read_patches
from exaonepath.slides.embed import embed_features_file
from exaonepath.slides.exporting import FORMATS, export_slides
from exaonepath.slides.importing import import_features
from exaonepath.slides.outputs import choose_layout, output_paths
from exaonepath.slides.patches.fragments import fragments_of_grid

from .conftest import FIRST, SECOND, tool

FOREIGN = ("trident", "clam", "slide2vec")  # no fragments in their files
OWN = {"anndata": ".h5ad", "parquet": ".parquet", "zarr": ".zarr"}
NEEDS = {"anndata": "anndata", "parquet": "pyarrow", "zarr": "zarr"}


def needs(format):
    for name in filter(None, (NEEDS.get(format), "pandas" if format == "anndata" else None)):
        pytest.importorskip(name, reason="needs the extra `exchange`")


def given(format):
    """What has to be stated of a format's files."""
    options = {} if format in OWN else {"fragments": "grid"}
    return {**options, "encoder": "enc"} if format == "clam" else options


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("format", [*FOREIGN, *OWN])
def test_features_come_back_bit_for_bit(made, tmp_path, format, dtype):
    needs(format)
    written = export_slides(made, tmp_path / "there", format, dtype=dtype)
    assert all(path.exists() for path in written)
    done = import_features(tmp_path / "there", tmp_path / "back", format, **given(format))
    assert sorted(slide.id for slide in done) == sorted([FIRST, SECOND])
    for name in (FIRST, SECOND):
        before = read_features(output_paths(made, name).features)
        after = read_features(output_paths(tmp_path / "back", name).features)
        wanted = before.features if dtype is None else before.features.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(after.features, wanted)
        np.testing.assert_array_equal(after.coords, before.coords)
        assert after.attrs["feature_dtype"] == (dtype or "float32")
        assert after.attrs["patch_size"] == before.attrs["patch_size"]
        patches = read_patches(output_paths(tmp_path / "back", name).patches)
        assert patches.patch_size == before.attrs["patch_size"]
        np.testing.assert_array_equal(patches.contour_index, after.contour_index)
        if format in OWN:
            np.testing.assert_array_equal(after.contour_index, before.contour_index)
        else:
            np.testing.assert_array_equal(
                after.contour_index, fragments_of_grid(before.coords, before.attrs["patch_size"])
            )


@pytest.mark.parametrize("format", list(OWN))
def test_one_file_holds_all_slides(made, tmp_path, format):
    needs(format)
    to = tmp_path / f"all{OWN[format]}"
    assert export_slides(made, to, format, vectors="embeddings") == [to]
    done = import_features(to, tmp_path / "back", format)
    assert {slide.id for slide in done} == {FIRST, SECOND}
    for name in (FIRST, SECOND):
        before = read_embedding(output_paths(made, name).embedding)
        after = read_features(output_paths(tmp_path / "back", name).features)
        np.testing.assert_array_equal(after.features, before.patch_embedding)
        np.testing.assert_array_equal(after.contour_index, before.contour_index)


def test_an_imported_file_says_what_it_is(made, tmp_path, slide_encoder, caplog):
    export_slides(made, tmp_path / "there", "trident")
    import_features(tmp_path / "there", tmp_path / "back", "trident", fragments="one", mpp=0.5)
    features = read_features(output_paths(tmp_path / "back", FIRST).features)
    attrs = features.attrs
    assert attrs["imported_from"] == "TRIDENT"
    assert attrs["weights"] == "encoder-1"  # the name of the folder
    assert attrs["weights_fingerprint"] == "imported:encoder-1"
    assert attrs["fragments"] == "one for the whole slide"
    assert attrs["mpp"] == 0.5
    assert "settings_hash" not in attrs
    assert "slide_fingerprint" not in attrs
    assert not features.contour_index.any()
    # It is a features file like any other to the stages that follow, which tell the user.
    path, _ = embed_features_file(
        output_paths(tmp_path / "back", FIRST).features, tmp_path / "back" / "embeddings" / "x.h5", slide_encoder
    )
    assert "encoder-1" in caplog.text
    stored = read_embedding(path)
    assert stored.attrs["patch_weights_fingerprint"] == "imported:encoder-1"
    assert (stored.attrs["patch_size"], stored.attrs["feature_width"]) == (128, WIDTH)


def test_the_same_embedding_from_imported_features(made, tmp_path, slide_encoder):
    """With fragments that are kept (Zarr), nothing of the slide encoder's input is lost."""
    pytest.importorskip("zarr", reason="needs the extra `exchange`")
    export_slides(made, tmp_path / "there", "zarr")
    import_features(tmp_path / "there", tmp_path / "back", "zarr")
    path, _ = embed_features_file(output_paths(tmp_path / "back", SECOND).features, tmp_path / "e.h5", slide_encoder)
    before, after = read_embedding(output_paths(made, SECOND).embedding), read_embedding(path)
    np.testing.assert_array_equal(after.slide_embedding, before.slide_embedding)


@pytest.mark.parametrize("format", FOREIGN)
def test_what_is_not_stated_has_to_be_given(made, tmp_path, format):
    export_slides(made, tmp_path / "there", format, slides=[FIRST])
    with pytest.raises(SettingsError, match="--encoder" if format == "clam" else "--fragments grid"):
        import_features(tmp_path / "there", tmp_path / "back", format)
    assert not (tmp_path / "back").exists()
    with pytest.raises(SettingsError, match="states patches of 128 pixels, and 256 were given"):
        import_features(tmp_path / "there", tmp_path / "back", format, patch_size=256, **given(format))


def test_features_are_found_in_patch_embeddings(results, tmp_path):
    """`--keep` may have removed the features file; the same numbers are the first columns of the patch embeddings."""
    before = read_features(output_paths(results, FIRST).features).features
    output_paths(results, FIRST).features.unlink()
    export_slides(results, tmp_path / "there", "trident", slides=[FIRST])
    (path,) = (tmp_path / "there").rglob("features_*/*.h5")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:], before)


def test_vectors_that_were_not_kept_are_an_error(results, tmp_path):
    from exaonepath.slides.embed import remove_patch_embeddings

    paths = output_paths(results, FIRST)
    remove_patch_embeddings(paths.embedding)
    with pytest.raises(DataFileError, match=r"embeddings of the patches of first were not kept; .* --keep all"):
        export_slides(results, tmp_path / "there", "clam", vectors="embeddings", slides=[FIRST])
    with pytest.raises(SlideListError, match="1 of 2 slides cannot be exported"):
        export_slides(results, tmp_path / "there", "clam", vectors="embeddings")
    paths.features.unlink()
    with pytest.raises(DataFileError, match="features of the patches of first were not kept"):
        export_slides(results, tmp_path / "there", "clam", slides=[FIRST])
    assert not (tmp_path / "there").exists()
    assert export_slides(results, tmp_path / "there", "qupath", slides=[FIRST])  # needs no vectors


def test_single_files(made, tmp_path):
    paths = output_paths(made, FIRST)
    for number, path in enumerate((paths.features, paths.embedding)):
        to = tmp_path / str(number)
        export_slides(path, to, "trident")
        (found,) = to.rglob("features_*/*.h5")
        assert found.name == f"{FIRST}.h5"
        import_features(found, to / "back", "trident", fragments="one")
        np.testing.assert_array_equal(
            read_features(output_paths(to / "back", FIRST).features).features, read_features(paths.features).features
        )
    alone = tmp_path / "alone_features.h5"
    shutil.copyfile(paths.features, alone)
    with pytest.raises(SettingsError, match="--target-size"):
        export_slides(alone, tmp_path / "t", "trident")
    export_slides(alone, tmp_path / "t", "trident", target_size=128)
    assert (tmp_path / "t/20x_128px_0px_overlap/patches/alone_patches.h5").is_file()


@pytest.mark.parametrize("format", FORMATS)
def test_existing_outputs_are_refused(made, tmp_path, format):
    needs(format)
    if format == "spatialdata":
        tool("spatialdata")
    first = export_slides(made, tmp_path / "there", format, slides=[FIRST])
    with pytest.raises(OutputCollisionError, match="exist"):
        export_slides(made, tmp_path / "there", format)
    # Nothing of the other slide was written, and nothing unfinished remains.
    left = {path for path in (tmp_path / "there").rglob("*") if SECOND in path.name or path.name.startswith(".")}
    assert not {path for path in left if path.name not in (".zgroup", ".zattrs", ".zarray", ".zmetadata")}
    again = export_slides(made, tmp_path / "there", format, overwrite=True)
    assert set(first) <= set(again)


def test_existing_imports_are_refused(made, tmp_path):
    export_slides(made, tmp_path / "there", "trident")
    import_features(tmp_path / "there", tmp_path / "back", "trident", fragments="one")
    with pytest.raises(OutputCollisionError, match="exist"):
        import_features(tmp_path / "there", tmp_path / "back", "trident", fragments="grid")
    import_features(tmp_path / "there", tmp_path / "back", "trident", fragments="grid", overwrite=True)
    assert read_features(output_paths(tmp_path / "back", FIRST).features).contour_index.any()


def test_results_are_never_replaced(results):
    """CLAM's `patches/<slide>.h5` has the name of our patches file."""
    before = output_paths(results, FIRST).patches.read_bytes()
    for format in ("clam", "patho-bench"):
        with pytest.raises(OutputCollisionError, match="is a result of exaonepath"):
            export_slides(results, results, format, overwrite=True)
    assert output_paths(results, FIRST).patches.read_bytes() == before


def test_coordinates_alone(made, tmp_path):
    """TRIDENT and CLAM patch first; `exaonepath features` reads what is made of their coordinates."""
    for format in ("trident", "clam"):
        export_slides(made, tmp_path / format, format)
        (folder,) = (path.parent for path in (tmp_path / format).rglob(f"patches/{FIRST}*.h5"))
        done = import_features(folder, tmp_path / f"{format}-back", format, fragments="grid")
        assert [slide.features_path for slide in done] == [None, None]
        patches = read_patches(output_paths(tmp_path / f"{format}-back", FIRST).patches)
        np.testing.assert_array_equal(patches.coords, read_patches(output_paths(made, FIRST).patches).coords)


def test_a_slide_without_patches(made, tmp_path):
    """N = 0 passes through every format."""
    source = tmp_path / "empty_features.h5"
    from exaonepath.files.features import write_features

    write_features(source, [], np.empty((0, 2), np.int32), np.empty(0, np.int32), 5, (), {"patch_size": 256})
    for format in (*FOREIGN, *OWN):
        needs(format)
        export_slides(source, tmp_path / format, format, target_size=256, encoder="enc")
        (done,) = import_features(tmp_path / format, tmp_path / f"{format}-back", format, **given(format))
        assert (done.id, done.n_patches, done.n_fragments) == ("empty", 0, 0)
        assert read_features(done.features_path).features.shape[0] == 0


def test_folders_with_the_hashed_layout(made, tmp_path):
    export_slides(made, tmp_path / "there", "trident")
    choose_layout(tmp_path / "back", 2, "hashed")
    done = import_features(tmp_path / "there", tmp_path / "back", "trident", fragments="one")
    assert len(done[0].features_path.relative_to(tmp_path / "back").parts) == 4
    with pytest.raises(OutputCollisionError, match="exist"):
        import_features(tmp_path / "there", tmp_path / "back", "trident", fragments="one")
    assert export_slides(tmp_path / "back", tmp_path / "again", "clam", slides=[SECOND])


def test_imported_slides_in_the_viewer_and_in_cohorts(made, tmp_path):
    from exaonepath.alignment.data.report import CohortReport
    from exaonepath.alignment.data.slides import read_slides
    from exaonepath.viz.values.library import Library
    from exaonepath.viz.values.results import load_results

    export_slides(made, tmp_path / "there", "trident")
    done = import_features(tmp_path / "there", tmp_path / "back", "trident", fragments="grid", mpp=0.5)
    for entry in Library(tmp_path / "back").entries():
        results = load_results(entry)
        assert results.patch_size == read_features(output_paths(made, entry.id).features).attrs["patch_size"]
        assert results.made_by["appearance"] == "imported:encoder-1/"
        assert results.mpp == 0.5
    table = tmp_path / "slides.csv"
    table.write_text("patient,features\n" + "".join(f"{at},{slide.features_path}\n" for at, slide in enumerate(done)))
    report = CohortReport()
    assert read_slides(table, report).dim == WIDTH
    assert not report.errors


@pytest.mark.parametrize("format", [*FOREIGN, *OWN, "qupath", "patho-bench"])
def test_names_that_are_not_utf8(made, tmp_path, format):
    """From a file system that allows any bytes: exported under the escaped name, or as the same bytes."""
    import os

    needs(format)
    name = os.fsdecode(b"caf\xe9")
    source = tmp_path / "in" / f"{name}_features.h5"
    source.parent.mkdir()
    shutil.copyfile(output_paths(made, FIRST).features, source)
    if format == "zarr":
        with pytest.raises(SettingsError, match="not UTF-8 text"):
            export_slides(source, tmp_path / "out", format)
        return
    written = export_slides(source, tmp_path / "out", format, target_size=128, pictures=False)
    assert all(path.exists() for path in written)
    if format in (*FOREIGN, *OWN):
        with pytest.raises(SlideListError, match="cannot be used as ids"):
            import_features(tmp_path / "out", tmp_path / "back", format, **given(format))


def test_targets_that_are_something_else(made, tmp_path):
    """`--overwrite` replaces an earlier export, and nothing else."""
    for format in OWN:
        needs(format)
    (tmp_path / "notes.zarr").mkdir()
    (tmp_path / "notes.zarr" / "mine.txt").write_text("x")
    (tmp_path / "file.zarr").write_text("x")
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "folder.h5ad" / ".zgroup").write_text("x")
    for to, format in (("notes.zarr", "zarr"), ("file.zarr", "zarr"), ("folder.h5ad", "anndata")):
        with pytest.raises(OutputCollisionError, match="no earlier export"):
            export_slides(made, tmp_path / to, format, overwrite=True)
    assert (tmp_path / "notes.zarr" / "mine.txt").read_text() == (tmp_path / "file.zarr").read_text() == "x"


def test_the_command_knows_all_formats():
    from exaonepath.cli import export, import_features
    from exaonepath.slides import importing

    assert export.FORMATS == FORMATS
    assert import_features.FORMATS == importing.FORMATS


@pytest.mark.parametrize("format", ["anndata", "parquet", "zarr"])
def test_a_slide_that_was_taken_out_of_a_file(made, tmp_path, format):
    """The metadata still list it: it is no slide without patches."""
    needs(format)
    to = tmp_path / f"all{OWN[format]}"
    export_slides(made, to, format)
    if format == "anndata":
        anndata = pytest.importorskip("anndata")
        data = anndata.read_h5ad(to)
        data[data.obs["slide"] == SECOND].copy().write_h5ad(to)
    elif format == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(to)
        parquet.write_table(table.filter([name == SECOND for name in table["slide"].to_pylist()]), to)
    else:
        shutil.rmtree(to / FIRST)
        (to / ".zmetadata").unlink(missing_ok=True)
    done = import_features(to, tmp_path / "back", format)
    assert [slide.id for slide in done] == [SECOND]


def test_a_slide_called_like_the_table_of_slides(made, tmp_path):
    needs("parquet")
    source = tmp_path / "slides_features.h5"
    shutil.copyfile(output_paths(made, FIRST).features, source)
    export_slides(source, tmp_path / "there", "parquet")
    assert (tmp_path / "there" / "slides.parquet").is_file()
    for place in (tmp_path / "there", tmp_path / "there" / "patches"):
        done = import_features(place, tmp_path / "back", "parquet", overwrite=True)
        assert [slide.id for slide in done] == ["slides"]
