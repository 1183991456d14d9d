"""--dry-run: what it says is what a run then does, and nothing is written."""

import json
import os
import shutil

import pytest

from exaonepath.cli.console import byte_text
from exaonepath.slides.outputs import output_paths
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slides") / "one.svs", 2500, 2000, fragments=2, holes=False)


@pytest.fixture
def plan(run, tmp_path):
    def call(*slides, arguments=(), status=0):
        done = run(
            "encode", *slides, "--out", tmp_path / "out", "--weights", "random:0", "--dry-run", "--json", *arguments
        )
        assert done.exit_code == status, done.stderr
        return json.loads(done.stdout)

    return call


@pytest.fixture
def encode(run, tmp_path):
    def call(slide, *arguments):
        done = run("encode", slide, "--out", tmp_path / "out", "--weights", "random:0", *arguments)
        assert done.exit_code == 0, done.stderr
        return done

    return call


@pytest.fixture(scope="module")
def finished():
    """Output folders of finished runs by their arguments, to be copied."""
    return {}


def on_disk(folder, name):
    return sum(path.stat().st_size for path in vars(output_paths(folder, name)).values() if path.exists())


def test_nothing_is_written(plan, slide, tmp_path):
    (one,) = plan(slide)["slides"]
    assert (one["id"], one["width"], one["height"], one["state"]) == ("one", 2500, 2000, "new")
    assert (one["format"], one["reader"], one["mpp_source"]) == ("aperio", "tiff", "openslide.mpp-x")
    assert one["patches_from"] == "segmentation"
    assert list(tmp_path.iterdir()) == []


def test_the_patches_are_those_of_the_run(plan, encode, slide):
    (before,) = plan(slide)["slides"]
    assert f"  {before['patches']} patches" in encode(slide).stdout
    (after,) = plan(slide)["slides"]
    assert (after["patches"], after["patches_from"], after["state"]) == (before["patches"], "file", "finished")


@pytest.mark.parametrize("arguments", [(), ("--keep", "slide"), ("--keep", "features", "--feature-dtype", "float16")])
def test_the_disk_is_estimated(plan, encode, slide, tmp_path, arguments):
    arguments = ("--step-size", "64", *arguments)  # as many patches for their weight to count
    found = plan(slide, arguments=arguments)
    (one,) = found["slides"]
    encode(slide, *arguments)
    actual = on_disk(tmp_path / "out", "one")
    assert 0.7 * actual < one["disk_bytes"] < 1.4 * actual
    assert found["needed_bytes"] >= one["disk_bytes"]
    (after,) = plan(slide, arguments=arguments)["slides"]
    assert after["stored_bytes"] == actual
    assert plan(slide, arguments=arguments)["needed_bytes"] < 0.5 * found["needed_bytes"]


@pytest.mark.parametrize(
    "change",
    [
        (),
        ("--keep", "slide"),
        ("--keep", "all"),
        ("--step-size", "128"),
        ("--resize", "224"),
        ("--feature-dtype", "float16"),
        ("--dtype", "bfloat16"),
        ("--weights", "random:1"),
        ("--overwrite",),
    ],
)
@pytest.mark.parametrize("first", [(), ("--keep", "slide")])
def test_finished_means_that_nothing_is_computed_again(
    plan, encode, slide, finished, tmp_path, tmp_path_factory, first, change
):
    if first not in finished:
        encode(slide, *first)
        finished[first] = shutil.copytree(tmp_path / "out", tmp_path_factory.mktemp("finished") / "out")
    else:
        shutil.copytree(finished[first], tmp_path / "out")
    (one,) = plan(slide, arguments=change)["slides"]
    done = encode(slide, *change)
    assert (one["state"] == "finished") == ("already there" in done.stdout), one
    assert one["state"] in ("finished", "stale")
    assert (one["state"] == "stale") == bool(one["reason"])


def test_states_on_the_way(plan, run, slide, tmp_path):
    out = tmp_path / "out"
    run("patch", slide, "--out", out)
    (one,) = plan(slide)["slides"]
    assert (one["state"], one["patches_from"]) == ("partial", "file")
    paths = output_paths(out, "one")
    paths.patches.write_bytes(paths.patches.read_bytes()[:-100])
    (one,) = plan(slide)["slides"]
    assert (one["state"], one["patches_from"]) == ("stale", "segmentation")
    assert "damaged" in one["reason"]


def test_a_slide_that_was_replaced_is_stale_and_one_that_was_touched_is_not(plan, encode, slide, tmp_path):
    copy = tmp_path / "case.svs"
    copy.write_bytes(slide.read_bytes())
    encode(copy)
    os.utime(copy, (2_000_000_000, 2_000_000_000))
    assert plan(copy)["slides"][0]["state"] == "finished"
    make_slide(copy, 2500, 2000, seed=9)
    (one,) = plan(copy)["slides"]
    assert one["state"] == "stale"
    assert "other content" in one["reason"]
    (tmp_path / "elsewhere").mkdir()
    other = make_slide(tmp_path / "elsewhere" / "case.svs", 1500, 1500, seed=3)
    assert "different slide" in plan(other)["slides"][0]["reason"]


def test_slides_that_cannot_be_opened_are_rows(plan, run, slide, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "a.svs").write_bytes(b"not a slide")
    (folder / "b.svs").write_bytes(slide.read_bytes())
    (folder / "._c.svs").write_bytes(b"")
    make_slide(folder / "d.svs", 1000, 1000, fragments=0)
    found = plan(folder, tmp_path / "gone.svs", status=1)
    assert [bool(one["error"]) for one in found["slides"]] == [True, False, False]
    assert found["slides"][2]["patches"] == 0
    assert "no such file" in found["problems"][0]
    assert found["skipped"] == [{"path": str(folder / "._c.svs"), "reason": "a hidden file"}]
    done = run("encode", folder, "--out", tmp_path / "out", "--dry-run")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["id", "format", "reader", "size", "um/px", "scale", "from", "patches", "state", "disk"]
    assert lines[1].split()[-2:] == ["error", "-"]
    assert "2 new, 1 error" in done.stderr
    assert "a.svs is not a slide" in done.stderr
    assert f"skipped: {folder / '._c.svs'}" in done.stderr
    assert "are free" in done.stderr


def test_a_flat_slide_is_counted_by_its_area(plan, tmp_path, monkeypatch):
    from exaonepath.slides.cohort import plan as module

    monkeypatch.setattr(module, "_MOST_SEGMENTED", 1000)
    flat = make_slide(tmp_path / "flat.svs", 1100, 1000, fragments=1)
    (one,) = plan(flat)["slides"]
    assert one["patches_from"] == "area"
    assert one["patches"] >= 20


def test_names_cannot_control_the_terminal(run, tmp_path):
    bad = make_slide(tmp_path / "a\x1b[2J.svs", 1000, 1000, fragments=0)
    done = run("encode", bad, "--out", tmp_path / "out", "--dry-run")
    assert "\x1b" not in done.stdout + done.stderr
    assert "a\\x1b[2J" in done.stdout


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (9_600, "9.6 kB"),
        (1.4e12, "1.4 TB"),
        (999_600, "1 MB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes_for_people(count, text):
    assert byte_text(count) == text
