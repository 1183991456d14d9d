"""The status of a folder, against runs as they are and against files that nobody would expect."""

import html.parser
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from exaonepath.errors import DataFileError, SlideReadError
from exaonepath.files.embeddings import SlideEmbedding, write_embedding
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.failures import Failures
from exaonepath.slides.cohort.lease import Leases
from exaonepath.slides.cohort.run import encode_cohort
from exaonepath.slides.cohort.status import cohort_status
from exaonepath.slides.cohort.status_page import write_status_page
from exaonepath.slides.outputs import choose_layout, output_paths
from exaonepath.slides.stages import EncodeSettings


@pytest.fixture
def embed(tmp_path):
    """Write the embedding of a slide whose file exists, and return its id."""

    def write(name, n_patches=3, n_failed=0, **attrs):
        slide = tmp_path / "slides" / f"{name}.svs"
        slide.parent.mkdir(exist_ok=True)
        slide.write_bytes(b"slide")
        path = output_paths(tmp_path / "out", name).embedding
        path.parent.mkdir(parents=True, exist_ok=True)
        stated = {
            "n_patches": n_patches,
            "n_failed": n_failed,
            "slide_path": str(slide),
            "slide_mtime_ns": slide.stat().st_mtime_ns,
            "weights": "w",
        }
        none = np.zeros((0, 2), np.int32)
        write_embedding(path, SlideEmbedding(np.ones(4, np.float32), None, none, none[:, 0]), {**stated, **attrs})
        return name

    (tmp_path / "out").mkdir()
    return write


def states(out):
    return {one.state.id: one.state.state for one in cohort_status(out).slides}


@pytest.mark.parametrize("layout", ["flat", "hashed"])
def test_a_run_as_it_was(slides, tmp_path, stand_ins, layout):
    out = tmp_path / "out"
    choose_layout(out, 1, layout)
    broken = tmp_path / "e.svs"
    broken.write_bytes(b"not a slide")
    pair = stand_ins.load("stand-in", torch.device("cpu"))
    cohort = [*slides, CohortSlide(broken, "e")]
    outcomes = list(encode_cohort(cohort, out, pair, EncodeSettings(**stand_ins.SETTINGS)))
    assert len(outcomes) == 5
    found = cohort_status(out, [*cohort, CohortSlide(tmp_path / "f.svs", "f", "P9")])
    by_id = {one.state.id: one for one in found.slides}
    assert {name: one.state.state for name, one in by_id.items()} == {
        "a": "finished", "b": "finished", "c": "empty", "d": "finished", "e": "failed", "f": "new",
    }  # fmt: skip
    assert set(by_id["a"].stages) == {"patches", "features", "slide"}
    assert by_id["a"].stages["features"].device == "cpu"
    assert by_id["a"].stages["features"].reader == "tiff"
    assert by_id["e"].state.failure.tries == 1
    assert "not a slide" in by_id["e"].state.reason
    assert by_id["f"].as_json()["slide"] == str(tmp_path / "f.svs")
    assert by_id["f"].as_json()["patient"] == "P9"
    (run,) = found.runs
    assert (run.ended, run.exit_status, run.n_slides, run.pid) == (True, 1, 5, os.getpid())
    assert run.counts == {"finished": 3, "empty": 1, "failed": 1}
    assert found.counts["finished"] == 3
    assert sum(outcome.result.n_patches for outcome in outcomes if outcome.result) == found.as_json()["patches"]
    # A second run uses everything again: the times are still those of the computation.
    list(encode_cohort(slides, out, pair, EncodeSettings(**stand_ins.SETTINGS)))
    again = cohort_status(out)
    assert len(again.runs) == 2
    assert {one.state.id: one.stages for one in again.slides if one.state.id == "a"} == {"a": by_id["a"].stages}


def test_running_and_killed(embed, tmp_path):
    out = tmp_path / "out"
    leases = Leases(out / "claims", run="r1")
    lease = leases.claim("one")
    (one,) = cohort_status(out).slides
    assert (one.state.state, one.state.holder.pid, one.state.holder.run) == ("running", os.getpid(), "r1")
    assert 0 <= one.state.heartbeat_s < 60
    assert one.as_json()["holder"]["since"]
    os.utime(out / "claims" / "one.json", (time.time() + 1000, time.time() + 1000))  # another machine's clock
    assert cohort_status(out).slides[0].state.heartbeat_s == 0
    lease.release()
    assert cohort_status(out).slides == ()
    code = (
        "import os, signal, sys; from exaonepath.slides.cohort.lease import Leases; "
        "Leases(sys.argv[1]).claim('dead'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(out / "claims")], cwd=tmp_path, check=False)
    (dead,) = cohort_status(out).slides
    assert (dead.state.state, dead.state.heartbeat_s) == ("new", None)
    assert "was killed" in dead.state.reason
    leases.close()


def test_failures_and_quarantine(tmp_path):
    out, slide = tmp_path / "out", CohortSlide(tmp_path / "x.svs", "x", "P")
    slide.path.write_bytes(b"1")
    out.mkdir()
    failures = Failures(out / "failures", "settings", "run")
    for tries in (1, 2, 3):
        failures.add(slide, SlideReadError(f"reason {tries}"))
        (one,) = cohort_status(out).slides
        assert (one.state.state, one.state.failure.tries, one.state.reason) == ("failed", tries, f"reason {tries}")
        assert one.state.quarantined == (tries == 3)
    slide.path.write_bytes(b"another slide")
    assert not cohort_status(out).slides[0].state.quarantined
    assert cohort_status(out).counts["failed"] == 1


def test_a_finished_slide_that_failed_before(embed, tmp_path):
    name = embed("x")
    Failures(tmp_path / "out" / "failures", "s", "r").add(CohortSlide(tmp_path / "x.svs", name), SlideReadError("old"))
    assert states(tmp_path / "out") == {"x": "finished"}


def test_what_is_stale(embed, tmp_path):
    out = tmp_path / "out"
    for name in "abcd":
        embed(name)
    os.utime(tmp_path / "slides" / "a.svs", (2e9, 2e9))
    (tmp_path / "slides" / "b.svs").unlink()  # archived: the result is as good as before
    path = output_paths(out, "c").embedding
    path.write_bytes(path.read_bytes()[:-20])
    found = {one.state.id: one.state for one in cohort_status(out).slides}
    assert {name: state.state for name, state in found.items()} == {
        "a": "stale", "b": "finished", "c": "stale", "d": "finished",
    }  # fmt: skip
    assert "written to since" in found["a"].reason
    assert "damaged" in found["c"].reason


def test_unreadable_empty_partial_skipped(embed, tmp_path):
    out = tmp_path / "out"
    embed("unreadable", n_failed=2)
    embed("empty", n_patches=0)
    for path in (output_paths(out, "part").features, output_paths(out, "token").features):
        path.parent.mkdir(exist_ok=True)
    (out / "patches" / ".part_features.h5.part").write_bytes(b"")
    (out / "patches" / ".token_features.h5.0123456789abcdef.part").write_bytes(b"")
    (out / "patches" / ".temporary_features.h5.0123.tmp").write_bytes(b"")
    (out / "skipped").mkdir()
    (out / "skipped" / "large.txt").write_text("5e10 pixels are too many\nmore")
    assert states(out) == {
        "unreadable": "finished", "empty": "empty", "part": "partial", "token": "partial", "large": "failed",
    }  # fmt: skip
    found = cohort_status(out)
    assert (found.counts["unreadable"], found.counts["partial"]) == (1, 2)
    assert next(one.state.reason for one in found.slides if one.state.id == "large") == "5e10 pixels are too many"


HOSTILE_ROWS = [
    b'{"event": "stage", "slide": "x", "stage": "features", "seconds": "many", "time": 5}',
    b'{"event": "stage", "slide": ["x"], "stage": {}, "seconds": -1}',
    b'{"event": "stage", "slide": "x", "stage": "features", "seconds": 1e999}',
    b'{"event": "run", "pid": true, "n_slides": -5, "host": null}',
    b'{"event": "end", "exit_status": "none"}',
    b'{"event": 7}',
    b"[]",
    b"\xff\xfe not text",
    b"[" * 100_000,
    b'{"event": "slide", "slide": "x", "outcome": ["f"]}',
    b'{"event": "stage", "slide": "x", "stage": "slide", "seconds": 2.5, "device": "cpu", "time": "t"}',
    b'{"event": "stage", "slide": "x", "stage": "sl',
]


def test_hostile_records_do_no_harm(embed, tmp_path):
    out = tmp_path / "out"
    embed("x")
    for folder in ("runs", "claims", "failures"):
        (out / folder).mkdir()
    (out / "runs" / "r.jsonl").write_bytes(b"\n".join(HOSTILE_ROWS))
    (out / "runs" / "folder.jsonl").mkdir()
    (out / "runs" / "empty.jsonl").write_bytes(b"")
    (out / "claims" / "torn.json").write_bytes(b'{"token": ')
    (out / "claims" / "binary.json").write_bytes(os.urandom(999))
    (out / "claims" / "link.json").symlink_to(out / "embeddings" / "x.h5")
    (out / "failures" / "y.json").write_bytes(b"[" * 100_000)
    (out / "failures" / "z.json").mkdir()
    (out / "failures" / "notes.txt").write_text("no record")
    found = cohort_status(out)
    by_id = {one.state.id: one for one in found.slides}
    assert by_id["x"].state.state == "finished"
    assert by_id["x"].stages["slide"].seconds == 2.5
    assert (by_id["torn"].state.state, by_id["binary"].state.state, by_id["link"].state.state) == (
        "running", "running", "failed",
    )  # fmt: skip
    assert set(by_id) == {"x", "y", "z", "torn", "binary", "link"}
    json.loads(json.dumps(found.as_json(), allow_nan=False))
    write_status_page(found, tmp_path / "page.html")


def test_no_folder(tmp_path):
    with pytest.raises(DataFileError, match="no such folder"):
        cohort_status(tmp_path / "gone")
    assert cohort_status(tmp_path).slides == ()


class Page(html.parser.HTMLParser):
    """Checks that tags are nested and closed, and collects what a browser would load."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.text, self.tags = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "action", "background")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page(embed, tmp_path):
    out = tmp_path / "out"
    names = [embed("one"), embed("two", n_failed=1), embed('<script>alert("x")</script>'.replace("/", "|"))]
    (out / "masks").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (300, 900, 3), np.uint8)
    Image.fromarray(noise).save(out / "masks" / "one.jpg")
    (out / "masks" / "two.jpg").write_bytes(b"no picture")
    Failures(out / "failures", "s", "r").add(CohortSlide(tmp_path / "b.svs", "bad"), SlideReadError("<b>&'\"</b>"))
    leases = Leases(out / "claims")
    leases.claim("busy")
    write_status_page(cohort_status(out), tmp_path / "page.html")
    leases.close()
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 1
    assert all(load.startswith("data:image/jpeg;base64,") for load in page.loads)
    assert "script" not in page.tags
    assert page.tags.count("b") == 5  # the ids; not that of the reason
    for expected in (*names, "<b>&'\"</b>", "bad", "busy", "3 finished", "1 running"):
        assert expected in page.text
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|//[a-z]", text)
    one = text.split("base64,")[1].split('"')[0]
    assert len(one) < 20_000


def test_pictures_are_limited(embed, tmp_path):
    out = tmp_path / "out"
    for at in range(5):
        embed(f"s{at}")
    (out / "masks").mkdir()
    for at in range(5):
        Image.new("RGB", (50, 40)).save(out / "masks" / f"s{at}.jpg")
    write_status_page(cohort_status(out), tmp_path / "page.html", pictures=2)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<img") == 2
    assert "the first 2 of 5" in text
