"""What it costs to look at a folder of many slides: its status, and its table of slide embeddings.

The baseline opens every embeddings file with plain h5py and reads what is needed: the least that a program without an
index can do. Collecting again after one slide has changed must not cost as much.
"""

from __future__ import annotations

import h5py
import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="needs the extra `cohort`")

from exaonepath.files.embeddings import SlideEmbedding, write_embedding
from exaonepath.files.slide_vectors import read_slide_vectors
from exaonepath.slides.cohort.collect import collect_slide_vectors
from exaonepath.slides.cohort.status import cohort_status
from exaonepath.slides.outputs import choose_layout, output_paths, stored_ids

SLIDES, WIDTH = 1000, 1536


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    choose_layout(out, SLIDES, "hashed")
    for at in range(SLIDES):
        write(out, at)
    return out


def write(out, at):
    path = output_paths(out, f"s{at:04}").embedding
    path.parent.mkdir(parents=True, exist_ok=True)
    none = np.zeros((0, 2), np.int32)
    embedding = SlideEmbedding(np.full(WIDTH, at, np.float32), None, none, none[:, 0])
    write_embedding(path, embedding, {"n_patches": 1, "weights_fingerprint": "w", "slide_path": f"/data/{at}.svs"})


def attributes(out):
    found = {}
    for name, path in stored_ids(out, "embedding"):
        with h5py.File(path) as file:
            found[name] = file.attrs["n_patches"]
    return found


def vectors(out):
    rows = []
    for _, path in sorted(stored_ids(out, "embedding")):
        with h5py.File(path) as file:
            rows.append(file["slide_embedding"][:])
    return np.stack(rows)


def test_status(compare, out):
    status = {one.state.id: one.state.n_patches for one in cohort_status(out).slides}
    assert status == attributes(out)
    compare("status of 1000 slides", lambda: cohort_status(out), lambda: attributes(out), rounds=3)


def test_collect_again(compare, out):
    collect_slide_vectors(out)
    assert np.array_equal(read_slide_vectors(out).vectors, vectors(out))

    def one_changed():
        write(out, 500)
        assert collect_slide_vectors(out).n_read == 1

    compare("collect 1000 slides, one changed", one_changed, lambda: vectors(out), rounds=3)
