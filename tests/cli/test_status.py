"""`exaonepath status` as scripts and people see it."""

import json

import pytest

from exaonepath.errors import SlideReadError
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.failures import Failures
from exaonepath.slides.cohort.lease import Leases
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    make_slide(folder / "a.svs", 2500, 2000, fragments=2, holes=False)
    make_slide(folder / "b.svs", 1000, 1000, fragments=0)
    (folder / "c\x1b[2J.svs").write_bytes(b"")
    return folder


@pytest.fixture
def out(run, slides, tmp_path):
    out = tmp_path / "out"
    for name in "ab":
        assert run("encode", slides / f"{name}.svs", "--out", out, "--weights", "random:0").exit_code == 0
    return out


def test_a_table(run, slides, out):
    done = run("status", out)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "2 slides: 1 finished, 1 empty" in done.stderr
    done = run("status", out, "--all")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["id", "state", "patches", "seconds", "about"]
    assert [line[:2] for line in lines[1:]] == [["a", "finished"], ["b", "empty"]]
    failures = Failures(out / "failures", "s", "r")
    for _ in range(3):
        failures.add(CohortSlide(slides / "gone.svs", "bad"), SlideReadError("it is broken"))
    with Leases(out / "claims") as leases:
        leases.claim("busy")
        done = run("status", out, slides)
    assert "bad" in done.stdout
    assert "it is broken (3 tries, given up)" in done.stdout
    assert "heartbeat 0 s ago" in done.stdout
    assert "c\\x1b[2J" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "1 finished, 1 empty, 1 running, 1 failed, 1 new (1 given up after three tries)" in done.stderr


def test_json(run, slides, out):
    done = run("status", out, slides, "--json")
    found = json.loads(done.stdout)
    assert found["format"] == 1
    assert found["counts"] == {
        "finished": 1, "empty": 1, "running": 0, "failed": 0, "stale": 0, "partial": 0, "new": 1,
        "unreadable": 0, "quarantined": 0,
    }  # fmt: skip
    one = found["slides"][0]
    assert set(one) == {
        "id", "state", "reason", "slide", "patient", "patches", "unreadable", "weights", "random_weights", "holder",
        "heartbeat_s", "failure", "quarantined", "stages",
    }  # fmt: skip
    assert (one["id"], one["state"], one["weights"], one["random_weights"]) == ("a", "finished", "random:0", True)
    assert found["patches"] == one["patches"] > 0


def test_a_page(run, out, tmp_path):
    done = run("status", out, "--html", tmp_path / "page.html", "--pictures", "1")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'page.html'}  2 slides\n")
    assert (tmp_path / "page.html").read_text().count("<img") == 1
    both = run("status", out, "--html", tmp_path / "page.html", "--json")
    assert json.loads(both.stdout)["format"] == 1


def test_no_folder(run, tmp_path):
    done = run("status", tmp_path / "gone")
    assert done.exit_code == 1
    assert "no such folder" in done.stderr
