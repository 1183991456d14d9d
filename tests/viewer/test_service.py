"""What is computed of patches: arrays equal what the files hold, searches are exact, versions are never mixed."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest

from exaonepath import read_contours, read_embedding, read_features, read_patches
from exaonepath.encoders import loading
from exaonepath.encoders.attention_map import attention_map
from exaonepath.files.embeddings import write_embedding
from exaonepath.viewer import service as service_module
from exaonepath.viz.values.library import key_of
from exaonepath.viz.values.table import PatchTable

FIRST, SECOND = key_of("CMU-1-Small-Region"), key_of("second")


@pytest.fixture(scope="module")
def embedding(made):
    return read_embedding(made / "embeddings" / "CMU-1-Small-Region.h5")


def cosines(rows: np.ndarray, row: int) -> np.ndarray:
    rows = rows.astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit[row]


def test_the_list_of_slides_and_their_states(client):
    listed = client.json("api/slides")
    assert [(s["key"], s["id"], s["state"]) for s in listed["slides"]] == [
        (FIRST, "CMU-1-Small-Region", "embedded"),
        (SECOND, "second", "embedded"),
    ]


def test_arrays_are_those_of_the_files(client, made, embedding):
    detail = client.slide()
    assert detail["patches"]["count"] == len(embedding.coords)
    assert detail["patches"]["size"] == read_patches(made / "patches" / "CMU-1-Small-Region.h5").patch_size
    assert detail["vectors"] == ["context", "appearance"]
    assert (client.array("coords", "<i4").reshape(-1, 2) == embedding.coords).all()
    assert (client.array("fragments", "<i4") == embedding.contour_index).all()
    assert client.array("colours", "u1").shape == (3 * len(embedding.coords),)
    assert np.isfinite(client.array("scatter", "<f4")).all()


def test_outlines_are_complete(client, made):
    packed = client.array("outlines", "<i4")
    outlines = read_contours(made / "patches" / "CMU-1-Small-Region.h5")
    rings = [(n, 0, ring) for n, ring in enumerate(outlines.contours)]
    rings += [(n, 1, ring) for n, holes in enumerate(outlines.holes) for ring in holes]
    count, at = int(packed[0]), 1 + 3 * int(packed[0])
    found = []
    for number, kind, points in packed[1:at].reshape(-1, 3):
        found.append((int(number), int(kind), packed[at : at + 2 * points].reshape(-1, 2)))
        at += 2 * points
    assert at == len(packed)
    assert count == len(rings)
    for number, kind, ring in rings:
        assert any(n == number and k == kind and np.array_equal(ring, r) for n, k, r in found)


@pytest.mark.parametrize("kind", ["context", "appearance"])
def test_similarity_is_exact(client, made, embedding, kind):
    width = read_features(made / "patches" / "CMU-1-Small-Region_features.h5").features.shape[1]
    rows = embedding.patch_embedding[:, :width] if kind == "appearance" else embedding.patch_embedding[:, width:]
    for patch in (0, 7, len(rows) - 1):
        expected = cosines(rows, patch)
        found = client.array("similarity", "<f4", vectors=kind, patch=patch)
        assert np.abs(found - expected).max() < 64 * np.finfo(np.float32).eps  # sums of `width` products in float32
        best = client.json(
            f"api/slides/{FIRST}/similar", v=client.slide()["version"], vectors=kind, patch=patch, count=5
        )
        order = np.argsort(-np.where(np.arange(len(rows)) == patch, -2, expected), kind="stable")[:5]
        assert [m["patch"] for m in best["matches"]] == order.tolist()
        assert [m["cosine"] for m in best["matches"]] == pytest.approx(expected[order].tolist(), abs=1e-5)
        assert [m["x"] for m in best["matches"]] == embedding.coords[order, 0].tolist()


def test_the_search_of_all_slides_is_exact_too(client, made, embedding):
    second = read_embedding(made / "embeddings" / "second.h5")
    both = np.concatenate([embedding.patch_embedding[:, 24:], second.patch_embedding[:, 24:]]).astype(np.float64)
    unit = both / np.linalg.norm(both, axis=1, keepdims=True)
    expected = unit @ unit[3]
    expected[3] = -2
    order = np.argsort(-expected, kind="stable")[:20]
    found = client.json(f"api/slides/{FIRST}/similar", v=client.slide()["version"], patch=3, scope="cohort")
    assert (found["slides"], found["left_out"], found["patches"]) == (2, 0, len(both))
    n = len(embedding.coords)
    assert [(m["id"], m["patch"]) for m in found["matches"]] == [
        ("CMU-1-Small-Region", i) if i < n else ("second", i - n) for i in order.tolist()
    ]


def test_the_search_says_how_far_it_is_while_vectors_are_read(results, view, monkeypatch):
    monkeypatch.setattr(service_module, "_INDEXING_SECONDS", -1.0)
    for n in range(2):
        shutil.copyfile(results / "embeddings" / "second.h5", results / "embeddings" / f"third{n}.h5")
    with view(results, [results / "slides"]) as client:
        query = {"v": client.slide()["version"], "patch": 0, "scope": "cohort"}
        assert client.json(f"api/slides/{FIRST}/similar", **query) == {"pending": {"done": 1, "total": 4}}
        monkeypatch.setattr(service_module, "_INDEXING_SECONDS", 100.0)
        assert client.json(f"api/slides/{FIRST}/similar", **query)["slides"] == 4


def test_vectors_of_other_weights_are_left_out(results, view, drop_checksums):
    with h5py.File(results / "embeddings" / "second.h5", "r+") as file:
        drop_checksums(file)
        file.attrs["weights_fingerprint"] = "other"
    (results / "embeddings" / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\nbroken")
    with view(results, [results / "slides"]) as client:
        query = {"v": client.slide()["version"], "patch": 0, "scope": "cohort"}
        found = client.json(f"api/slides/{FIRST}/similar", **query)
        assert (found["slides"], found["left_out"]) == (1, 2)
        assert {m["key"] for m in found["matches"]} == {FIRST}
        found = client.json(f"api/slides/{FIRST}/similar", **query, vectors="appearance")
        assert found["slides"] == 2  # the patch encoder is the same


def test_clusters_are_numbered_by_size_and_the_same_each_time(client, embedding):
    for k in (2, 5, 12):
        labels = client.array("clusters", "u1", k=k)
        counts = np.bincount(labels)
        assert len(labels) == len(embedding.coords)
        assert len(counts) <= k
        assert (np.diff(counts) <= 0).all()
        assert (client.array("clusters", "u1", k=k) == labels).all()


def test_attention_is_that_of_the_encoder(client, made, embedding, slide_encoder, monkeypatch):
    import torch

    monkeypatch.setattr(loading, "load_slide_encoder", lambda weights, device: slide_encoder)
    features = read_features(made / "patches" / "CMU-1-Small-Region_features.h5")
    maps = attention_map(
        slide_encoder.model,
        *(torch.from_numpy(a) for a in (features.features, features.coords, features.contour_index)),
        [5],
    )
    for block, expected in enumerate(maps):
        found = client.array("attention", "<f4", patch=5, block=block)
        assert (found == expected.patches[0].mean(0).numpy()).all()
    version = client.slide()["version"]
    _, headers, body = client.get(f"api/slides/{FIRST}/attention", v=version, patch=5)
    assert (headers["x-blocks"], headers["x-block"]) == ("2", "1")
    assert np.frombuffer(body, "<f4").sum() <= 1 + 1e-5
    assert client.get(f"api/slides/{FIRST}/attention", v=version, patch=5, block=2)[0] == 404


def test_attention_of_other_weights_is_refused(results, view, slide_encoder, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(loading, "load_slide_encoder", lambda weights, device: replace(slide_encoder, fingerprint="x"))
    with view(results, [results / "slides"]) as client:
        status, _, body = client.get(f"api/slides/{FIRST}/attention", v=client.slide()["version"], patch=5)
        assert status == 409
        assert b"not those that these embeddings were computed with" in body


def test_results_of_another_version_are_never_returned(results, view, encode):
    with view(results, [results / "slides"]) as client:
        slide = client.slide()
        assert client.get(f"api/slides/{FIRST}/coords", v="0" * 16)[0] == 409
        assert client.get(f"api/slides/{FIRST}/coords")[0] == 409
        _, headers, _ = client.get(f"api/slides/{FIRST}/coords", v=slide["version"])
        assert "immutable" in headers["cache-control"]
        encode(results / "slides" / "CMU-1-Small-Region.svs", results, 512, overwrite=True)
        assert client.get(f"api/slides/{FIRST}/coords", v=slide["version"])[0] == 409
        again = client.slide()
        assert again["version"] != slide["version"]
        assert again["version"] == client.json(f"api/slides/{FIRST}/state")["version"]
        assert 0 < again["patches"]["count"] < slide["patches"]["count"]
        assert len(client.array("similarity", "<f4", patch=0)) == again["patches"]["count"]


def test_a_file_that_is_replaced_between_two_reads_is_not_mixed(results, view, encode, monkeypatch):
    original = service_module.VectorStore.get

    def get(self, name, source):
        unit = original(self, name, source)
        encode(results / "slides" / "CMU-1-Small-Region.svs", results, 512, overwrite=True)
        return unit

    with view(results, [results / "slides"]) as client:
        version = client.slide()["version"]
        monkeypatch.setattr(service_module.VectorStore, "get", get)
        assert client.get(f"api/slides/{FIRST}/colours", v=version)[0] == 409


def test_damaged_results_do_not_hide_the_slide(results, view):
    path = results / "embeddings" / "CMU-1-Small-Region.h5"
    path.write_bytes(path.read_bytes()[:-2000])
    with view(results, [results / "slides"]) as client:
        detail = client.slide()
        assert detail["slide"]["width"] == 2220
        assert "damaged" in detail["results_error"]
        assert client.slide(SECOND)["results_error"] is None


def test_a_flipped_bit_in_the_vectors_is_an_error_not_a_picture(results, view):
    path = results / "embeddings" / "CMU-1-Small-Region.h5"
    with h5py.File(path) as file:
        offset = file["patch_embedding"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + 1001] ^= 4
    path.write_bytes(data)
    with view(results, [results / "slides"]) as client:
        status, _, body = client.get(f"api/slides/{FIRST}/colours", v=client.slide()["version"])
        assert status == 500
        assert b"checksum" in body


def test_embeddings_of_earlier_versions(results, view):
    """They do not state the size of a patch nor the width of the features: the distance of patches is shown instead."""
    path = results / "embeddings" / "CMU-1-Small-Region.h5"
    old = read_embedding(path)
    for name in ("patches/CMU-1-Small-Region.h5", "patches/CMU-1-Small-Region_features.h5"):
        (results / name).unlink()
    with view(results, [results / "slides"]) as client:
        assert client.slide()["patches"]["size"] == old.attrs["patch_size"]
    write_embedding(path, old, {k: v for k, v in old.attrs.items() if k not in ("patch_size", "feature_width")})
    with view(results, [results / "slides"]) as client:
        detail = client.slide()
        assert detail["vectors"] == ["context"]
        assert any("distance" in note for note in detail["notes"])


@pytest.mark.parametrize(
    ("removed", "state", "vectors"),
    [
        (["embeddings/{}.h5"], "features", ["appearance"]),
        (["embeddings/{}.h5", "patches/{}_features.h5"], "patches", []),
        (["embeddings/{}.h5", "patches/{}_features.h5", "patches/{}.h5"], "slide", []),
        (["patches/{}.h5", "patches/{}_features.h5"], "embedded", ["context", "appearance"]),
    ],
)
def test_slides_at_every_stage(results, view, removed, state, vectors):
    for name in removed:
        (results / name.format("CMU-1-Small-Region")).unlink()
    with view(results, [results / "slides"]) as client:
        detail = client.slide()
        assert (detail["state"], detail["vectors"]) == (state, vectors)
        assert detail["slide"]["width"] == 2220
        assert detail["patches"]["count"] == 0 if state == "slide" else detail["patches"]["count"] > 0
        if not vectors:
            assert client.get(f"api/slides/{FIRST}/colours", v=detail["version"])[0] == 404


def test_slides_are_found_where_the_results_say(made, view):
    with view(made) as client:
        assert client.slide()["slide"]["width"] == 2220


def test_banners(results, view, encode):
    with view(results, [results / "slides"]) as client:
        assert [b["kind"] for b in client.slide()["banners"]] == ["random"]
        assert client.slide()["weights"] == "random:0"
    from exaonepath.synthetic import make_slide

    slide = make_slide(results / "slides" / "plain.tif", 700, 600, fragments=1, holes=False, mpp=None)
    encode(slide, results, 128)
    with view(results, [results / "slides"]) as client:
        assert [b["kind"] for b in client.slide(key_of("plain"))["banners"]] == ["random", "scale"]


def test_failed_patches_are_listed_with_their_reasons(results, view, monkeypatch, encode):
    from exaonepath.errors import SlideReadError
    from exaonepath.slides.image import SlideImage

    original = SlideImage.read_rgb

    def read_rgb(self, location, level, size):
        if location[0] < 500:
            raise SlideReadError("tile\nis damaged")
        return original(self, location, level, size)

    shutil.rmtree(results / "patches")
    shutil.rmtree(results / "embeddings")
    monkeypatch.setattr(SlideImage, "read_rgb", read_rgb)
    encode(results / "slides" / "second.svs", results, 128)
    with view(results, [results / "slides"]) as client:
        detail = client.slide(SECOND)
        failed = client.json(f"api/slides/{SECOND}/failed", v=detail["version"])
        assert len(failed) == detail["patches"]["failed"] > 0
        assert all(f["x"] < 500 and "damaged" in f["reason"] and "\n" not in f["reason"] for f in failed)
        assert client.array("coords", "<i4", SECOND).reshape(-1, 2)[:, 0].min() >= 500


def test_columns_reach_the_page(made, view, tmp_path):
    with view(made, [made / "slides"]) as client:
        coords = client.array("coords", "<i4", key_of("second")).reshape(-1, 2)
    text = "slide,x,y,depth,kind\n" + "".join(f"second,{x},{y},{x + y},{'ab'[x % 2]}\n" for x, y in coords.tolist())
    path = tmp_path / "t.csv"
    path.write_text(text)
    with view(made, [made / "slides"], table=PatchTable(path)) as client:
        detail = client.slide(key_of("second"))
        assert [c["name"] for c in detail["columns"]] == ["depth", "kind"]
        assert (client.array("column", "<f4", key_of("second"), name="depth") == coords.sum(1)).all()
        assert client.get(f"api/slides/{detail['key']}/column", v=detail["version"], name="../x")[0] == 404
        other = client.slide()
        assert client.get(f"api/slides/{other['key']}/column", v=other["version"], name="depth")[0] == 404
