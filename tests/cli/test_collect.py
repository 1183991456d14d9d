"""`exaonepath collect`, and the table that `encode` keeps up to date."""

import builtins

import numpy as np
import pytest

from exaonepath import read_slide_vectors
from exaonepath.cli import collect as command
from exaonepath.files.embeddings import read_slide_embedding
from exaonepath.slides.outputs import output_paths
from exaonepath.synthetic import make_slide

pytest.importorskip("pyarrow", reason="needs the extra `cohort`")


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate("ab"):
        make_slide(folder / f"{name}.svs", 2500, 2000, fragments=2, holes=False, seed=seed)
    (folder / "m.csv").write_text("slide,patient\na.svs,P1\nb.svs,P2\n")
    return folder


def test_encode_keeps_the_table(run, slides, tmp_path):
    out = tmp_path / "out"
    encode = ("encode", "--out", out, "--weights", "random:0", "--keep", "slide")
    assert run(*encode, slides / "a.svs").exit_code == 0
    assert not (out / "slides.parquet").exists()  # a run on one slide costs no table
    assert run(*encode, "--manifest", slides / "m.csv").exit_code == 0
    vectors = read_slide_vectors(out)
    assert vectors.ids == ("a", "b")
    assert vectors.columns["patient"] == ["P1", "P2"]
    for name, vector in zip(vectors.ids, vectors.vectors, strict=True):
        assert np.array_equal(vector, read_slide_embedding(output_paths(out, name).embedding)[0])
    done = run("collect", out)
    assert done.exit_code == 0
    assert done.stdout == f"{out / 'slides.parquet'}  2 slides, vectors of 1536\n"
    assert "0 embeddings were read, 2 are unchanged" in done.stderr


def test_a_slide_that_fails_does_not_cost_the_table(run, slides, tmp_path):
    (tmp_path / "c.svs").write_bytes(b"not a slide")
    done = run("encode", slides, tmp_path / "c.svs", "--out", tmp_path / "out", "--weights", "random:0")
    assert done.exit_code == 1
    assert read_slide_vectors(tmp_path / "out").ids == ("a", "b")


def test_encode_needs_no_pyarrow(run, slides, tmp_path, monkeypatch):
    find = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    real = builtins.__import__

    def refuse(name, *rest):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    done = run("encode", slides, "--out", tmp_path / "out", "--weights", "random:0")
    assert (done.exit_code, "parquet" in done.stderr) == (0, False)
    done = run("collect", tmp_path / "out")
    assert done.exit_code == 1
    assert "pip install 'exaonepath[cohort]'" in done.stderr


def test_a_table_that_cannot_be_written_does_not_cost_the_run(run, slides, tmp_path):
    out = tmp_path / "out"
    (out / "slides.parquet").mkdir(parents=True)
    done = run("encode", slides, "--out", out, "--weights", "random:0")
    assert done.exit_code == 0
    assert "warning: the table of slide embeddings is not up to date" in done.stderr


def test_damaged_embeddings_are_errors(run, slides, tmp_path):
    out = tmp_path / "out"
    assert run("encode", slides, "--out", out, "--weights", "random:0").exit_code == 0
    path = output_paths(out, "a").embedding
    path.write_bytes(path.read_bytes()[:-100])
    done = run("collect", out, "--manifest", slides / "m.csv")
    assert done.exit_code == 1
    assert f"error: {path}" in done.stderr
    assert read_slide_vectors(out).columns["patient"] == ["P2"]


def test_a_full_disk_leaves_the_earlier_table(run, warm_package, slides, tmp_path):
    """A limit on the size of files stands for the full disk: the kernel refuses the write that passes it."""
    out = tmp_path / "out"
    assert run("encode", slides, "--out", out, "--weights", "random:0", "--keep", "slide").exit_code == 0
    before = (out / "slides.parquet").read_bytes()
    again = ("encode", slides / "a.svs", "--out", out, "--weights", "random:0", "--keep", "slide", "--overwrite")
    assert run(*again).exit_code == 0
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
    code = f"import sys; sys.argv[1:] = ['collect', {str(out)!r}]; from exaonepath.cli.app import main; {limit}main()"
    done = warm_package.run(code, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {out / 'slides.parquet'}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (out / "slides.parquet").read_bytes() == before
    assert [path.name for path in out.glob(".*")] == []
    assert run("collect", out).exit_code == 0
