"""The local engine: overlap that nobody can tell from the results, and every kind of failure of one slide."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cohort_stand_ins import results

from exaonepath.errors import DeviceMemoryError, OutputError, SlideOpenError
from exaonepath.files.embeddings import read_embedding
from exaonepath.files.features import read_features
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.lease import Leases
from exaonepath.slides.cohort.outcome import FailedBeforeError
from exaonepath.slides.cohort.run import RunOptions, encode_cohort
from exaonepath.slides.cohort.run_log import read_run_log
from exaonepath.slides.stages import EncodeSettings, SlideStages

PATIENCE = 30


@pytest.fixture
def pair(stand_ins):
    return stand_ins.load("stand-in", torch.device("cpu"))


@pytest.fixture
def run(slides, tmp_path, pair, stand_ins):
    """Run the engine; keywords replace its arguments and the settings."""

    def run(slides=slides, out="out", options=None, progress=None, observe=lambda job: None, encoders=pair, **settings):
        settings = EncodeSettings(**{**stand_ins.SETTINGS, **settings})
        options = options or RunOptions(poll=(0.02, 0.1))
        return list(
            encode_cohort(
                slides, tmp_path / out, encoders, settings, options, load=stand_ins.load, progress=progress,
                observe=observe,
            )
        )  # fmt: skip

    return run


def kinds(outcomes):
    return {outcome.slide.id: outcome.outcome for outcome in outcomes}


def log_rows(out: Path, event: str) -> list[dict]:
    return [row for path in sorted((out / "runs").iterdir()) for row in read_run_log(path) if row["event"] == event]


def test_the_files_are_those_of_encode_slide(run, reference, tmp_path):
    outcomes = run()
    assert kinds(outcomes) == {"a": "finished", "b": "finished", "c": "empty", "d": "finished"}
    assert [outcome.slide.id for outcome in outcomes] == list("abcd")
    assert results(tmp_path / "out") == reference
    assert list((tmp_path / "out" / "claims").iterdir()) == []
    again = run()
    assert set(kinds(again).values()) == {"reused"}
    assert results(tmp_path / "out") == reference


def test_a_part_that_encode_slide_left_is_continued(run, reference, tmp_path, slide_files, pair, stand_ins):
    from exaonepath.slides.encode import encode_slide

    def progress(done, total):
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_slide(slide_files[0], tmp_path / "out", *pair, **stand_ins.SETTINGS, progress=progress)
    pair.patch.model.batches.clear()
    run(run.__defaults__[0][:1])
    assert sum(pair.patch.model.batches) == len(read_features(tmp_path / "out/patches/a_features.h5").features) - 8
    for name, content in results(tmp_path / "out").items():
        assert content == reference[name]


def test_three_slides_are_worked_on_at_the_same_time(run, monkeypatch, pair):
    """While patches of b are encoded, a is being embedded, and c is being opened: none of it ends before all began."""
    met = threading.Barrier(3)
    embed, find, forward = SlideStages.embed, SlideStages.find_patches, type(pair.patch.model).forward
    first = threading.Event()

    def embedding(self):
        if self.image.name == "a":
            met.wait(PATIENCE)
        return embed(self)

    def opening(self):
        if self.image.name == "c":
            met.wait(PATIENCE)
        return find(self)

    def encoding(self, x):
        if current == ["b"] and not first.is_set():
            first.set()
            met.wait(PATIENCE)
        return forward(self, x)

    current = []

    def progress(slide, done, total):
        current[:] = [slide.id]

    monkeypatch.setattr(SlideStages, "embed", embedding)
    monkeypatch.setattr(SlideStages, "find_patches", opening)
    monkeypatch.setattr(type(pair.patch.model), "forward", encoding)
    assert len(run(progress=progress)) == 4
    assert first.is_set()


def test_reading_ahead_is_bounded(run, slides, monkeypatch):
    from exaonepath.slides.cohort.read_ahead import ReadAhead

    most = []
    put = ReadAhead._put

    def watched(self, batch):
        kept = put(self, batch)
        most.append(self.waiting_bytes)
        return kept

    monkeypatch.setattr(ReadAhead, "_put", watched)
    batch = 4 * 224 * 224 * 3
    run(slides[:2], options=RunOptions(read_ahead_bytes=2 * batch + 1))
    assert max(most) <= 2 * batch
    most.clear()
    run(slides[:2], options=RunOptions(read_ahead_bytes=0), overwrite=True)
    assert max(most) == batch


@pytest.mark.parametrize("stage", ["find_patches", "prepare", "encode", "write_features", "embed"])
@pytest.mark.parametrize("error", [MemoryError(), KeyError("tile")], ids=["MemoryError", "KeyError"])
def test_a_failed_slide_is_one_outcome_and_the_others_go_on(run, tmp_path, monkeypatch, stage, error, reference):
    original = getattr(SlideStages, stage)

    def failing(self, *arguments):
        if self.image.name == "b":
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(SlideStages, stage, failing)
    outcomes = run()
    assert kinds(outcomes) == {"a": "finished", "b": "failed", "c": "empty", "d": "finished"}
    assert type(outcomes[1].error) is type(error)
    assert list((tmp_path / "out" / "claims").iterdir()) == []
    record = json.loads((tmp_path / "out" / "failures" / "b.json").read_text())
    assert (record["tries"], record["error"]) == (1, type(error).__name__)
    monkeypatch.undo()
    assert kinds(run())["b"] == "finished"
    assert results(tmp_path / "out") == reference
    assert list((tmp_path / "out" / "failures").iterdir()) == []


def test_a_slide_that_always_fails_is_quarantined_after_three_tries(run, slides, tmp_path, slide_files):
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"II*\0 no slide")
    mixed = [CohortSlide(broken, "broken"), slides[0]]
    for tries in (1, 2, 3):
        outcomes = run(mixed)
        assert kinds(outcomes)["broken"] == "failed"
        assert isinstance(outcomes[0].error, SlideOpenError)
        assert json.loads((tmp_path / "out/failures/broken.json").read_text())["tries"] == tries
    for _ in range(2):
        outcomes = run(mixed)
        assert isinstance(outcomes[0].error, FailedBeforeError)
        assert "has failed 3 times" in str(outcomes[0].error)
        assert json.loads((tmp_path / "out/failures/broken.json").read_text())["tries"] == 3
    retried = run(mixed, options=RunOptions(retry_failed=True))
    assert isinstance(retried[0].error, SlideOpenError)
    assert json.loads((tmp_path / "out/failures/broken.json").read_text())["tries"] == 1
    run(mixed), run(mixed)
    assert isinstance(run(mixed)[0].error, FailedBeforeError)
    assert isinstance(run(mixed, batch_size=2)[0].error, SlideOpenError), "other settings: tried as if new"
    broken.write_bytes(slide_files[1].read_bytes())
    assert kinds(run(mixed))["broken"] == "finished", "another file: tried as if new"


def test_a_slide_that_fails_in_another_process_meanwhile_is_not_tried(run, slides, tmp_path, pair, stand_ins):
    from exaonepath.slides.cohort.failures import Failures
    from exaonepath.slides.cohort.job import settings_key

    key = settings_key(EncodeSettings(**stand_ins.SETTINGS), "stand-in")

    def progress(slide, done, total):
        if slide.id == "a" and not done:
            Failures(tmp_path / "out" / "failures", key, "another run").add(slides[3], OSError("no disk"))

    outcomes = run(progress=progress)
    assert kinds(outcomes)["d"] == "failed"
    assert "failed in another process" in str(outcomes[3].error)
    assert "no disk" in str(outcomes[3].error)
    assert kinds(run())["d"] == "finished"


class TestClaims:
    def test_a_busy_slide_is_left_and_looked_at_again(self, run, tmp_path, reference):
        with Leases(tmp_path / "out" / "claims") as other:
            lease = other.claim("a")
            done = []

            def progress(slide, done_patches, total):
                done.append(slide.id)
                if slide.id == "d":
                    lease.release()

            outcomes = run(progress=progress)
        assert [outcome.slide.id for outcome in outcomes] == list("bcda")
        assert results(tmp_path / "out") == reference

    def test_a_slide_that_another_process_finished_counts_as_finished(self, run, tmp_path, pair, slides):
        run(slides[:1], out="other")
        with Leases(tmp_path / "out" / "claims") as other:
            lease = other.claim("a")

            def progress(slide, done, total):
                if slide.id == "d" and not done:
                    for folder in ("patches", "embeddings", "masks", "contours"):
                        for path in (tmp_path / "other" / folder).iterdir():
                            target = tmp_path / "out" / folder
                            target.mkdir(exist_ok=True)
                            path.rename(target / path.name)
                    lease.release()

            assert kinds(run(progress=progress)) == {"a": "reused", "b": "finished", "c": "empty", "d": "finished"}

    def test_a_lost_claim_stops_the_slide_and_is_no_failure(self, run, tmp_path, reference):
        """Another process takes the slide over in mid-work; this one looks at it again later."""
        taken = []

        def progress(slide, done, total):
            if slide.id == "b" and done == 8 and not taken:
                path = tmp_path / "out" / "claims" / "b.json"
                path.unlink()
                taken.append(Leases(tmp_path / "out" / "claims").claim("b"))
            if slide.id == "d" and taken:
                taken[0].release()
                taken[0]._leases.close()

        outcomes = run(progress=progress)
        assert kinds(outcomes) == {"a": "finished", "b": "finished", "c": "empty", "d": "finished"}
        assert [outcome.slide.id for outcome in outcomes] == list("acdb")
        assert results(tmp_path / "out") == reference
        assert not (tmp_path / "out" / "failures").exists()
        assert [row["slide"] for row in log_rows(tmp_path / "out", "slide")] == list("acdb")

    def test_an_interrupted_run_releases_its_claims_and_is_continued(self, run, tmp_path, reference, pair):
        def progress(slide, done, total):
            if slide.id == "b" and done >= 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(progress=progress)
        assert list((tmp_path / "out" / "claims").iterdir()) == []
        assert log_rows(tmp_path / "out", "end")[0]["exit_status"] == 130
        assert list((tmp_path / "out" / "patches").glob(".b_features.h5.*.part"))
        pair.patch.model.batches.clear()
        run()
        n = len(read_features(tmp_path / "out/patches/b_features.h5").features)
        m = len(read_features(tmp_path / "out/patches/d_features.h5").features)
        assert sum(pair.patch.model.batches) in (n - 8 + m, n - 12 + m, n - 8 + m + 1, n - 12 + m + 1)
        assert results(tmp_path / "out") == reference

    def test_a_consumer_that_stops_ends_everything(self, slides, tmp_path, pair, stand_ins):
        outcomes = encode_cohort(slides, tmp_path / "out", pair, EncodeSettings(**stand_ins.SETTINGS))
        assert next(outcomes).slide.id == "a"
        outcomes.close()
        assert list((tmp_path / "out" / "claims").iterdir()) == []

    def test_a_folder_of_claims_that_cannot_be_written(self, run, tmp_path, pair):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "claims").write_text("")
        with pytest.raises(OutputError, match="claims"):
            run()
        assert pair.patch.model.batches == []

    def test_a_finished_folder_may_be_read_only(self, run, tmp_path, monkeypatch):
        run()
        claims = tmp_path / "out" / "claims"
        claims.rmdir()
        claims.write_text("")
        assert set(kinds(run()).values()) == {"reused"}
        with pytest.raises(OutputError):
            run(overwrite=True)


def test_overwriting_replaces_what_is_older_than_the_run(run, tmp_path, slides, pair, monkeypatch):
    """Another process of the same run finishes d while this one works on a: d is not computed a third time."""
    run()
    before = {path: path.stat().st_ino for path in (tmp_path / "out" / "embeddings").iterdir()}

    def progress(slide, done, total):
        if slide.id == "a" and not done:
            for folder, name in (("patches", "d.h5"), ("patches", "d_features.h5"), ("embeddings", "d.h5")):
                path = tmp_path / "out" / folder / name
                copy = path.with_suffix(".new")
                copy.write_bytes(path.read_bytes())
                copy.replace(path)

    outcomes = run(overwrite=True, progress=progress)
    assert kinds(outcomes) == {"a": "finished", "b": "finished", "c": "empty", "d": "reused"}
    assert all(path.stat().st_ino != inode for path, inode in before.items())


class Hungry(torch.nn.Module):
    """Runs out of memory with more than so many patches in a batch."""

    def __init__(self, encoder, most):
        super().__init__()
        self.encoder, self.most, self.tried = encoder, most, []

    def forward(self, x):
        self.tried.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("tried to allocate 20.00 MiB")
        return self.encoder(x)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_out_of_memory_halves_the_batch_once(run, tmp_path, pair, slides, reference, most):
    hungry = Hungry(pair.patch.model, most)
    outcomes = run(slides[:1], encoders=pair._replace(patch=replace(pair.patch, model=hungry)))
    if most == 1:
        assert isinstance(outcomes[0].error, DeviceMemoryError)
        assert "a batch of 2 patches does not fit" in str(outcomes[0].error)
        return
    assert kinds(outcomes) == {"a": "finished"}
    assert Counter(hungry.tried)[4] == 1, "the next batches are not tried whole"
    got = read_features(tmp_path / "out/patches/a_features.h5").features
    run(slides[:1], out="whole")
    # The products of smaller batches may be summed in another order.
    assert torch.allclose(
        torch.from_numpy(got),
        torch.from_numpy(read_features(tmp_path / "whole/patches/a_features.h5").features),
        rtol=1e-5,
        atol=1e-6,
    )


def test_slides_with_settings_of_their_own(run, slides, tmp_path, stand_ins):
    changed = [
        replace(slides[0], id="first", patient="p1", mpp=0.4),
        replace(slides[1], weights="other weights"),
        slides[3],
    ]
    outcomes = run(changed)
    assert set(kinds(outcomes)) == {"first", "b", "d"}
    first = read_embedding(tmp_path / "out/embeddings/first.h5")
    assert first.attrs["patient"] == "p1"
    assert read_embedding(tmp_path / "out/embeddings/b.h5").attrs["weights"] == "other weights"
    assert read_embedding(tmp_path / "out/embeddings/d.h5").attrs["weights"] == "stand-in"


class TestLocalCopies:
    def test_slides_are_read_from_copies_and_stored_under_their_own_paths(self, run, tmp_path, reference, monkeypatch):
        read = []
        find = SlideStages.find_patches

        def watched(self):
            read.append((self.image.path, self.image.path.exists()))
            return find(self)

        monkeypatch.setattr(SlideStages, "find_patches", watched)
        run(options=RunOptions(stage=tmp_path / "local"))
        assert all(path.is_relative_to(tmp_path / "local") and existed for path, existed in read)
        assert results(tmp_path / "out") == reference
        assert list((tmp_path / "local").iterdir()) == []

    def test_without_space_slides_are_read_where_they_are(self, run, tmp_path, monkeypatch, slides, caplog):
        import shutil

        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert kinds(run(slides[:1], options=RunOptions(stage=tmp_path / "local"))) == {"a": "finished"}
        assert "is read where it is" in caplog.text

    def test_copies_of_killed_processes_are_removed(self, run, tmp_path, slides, abandoned):
        left = tmp_path / "local" / abandoned("exaonepath")
        left.mkdir(parents=True)
        run(slides[:1], options=RunOptions(stage=tmp_path / "local"))
        assert not left.exists()


def test_the_run_log(run, tmp_path, slides, slide_files):
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"no slide")
    run([*slides, CohortSlide(broken, "broken")])
    (path,) = (tmp_path / "out" / "runs").iterdir()
    rows = list(read_run_log(path))
    first, last = rows[0], rows[-1]
    assert (first["format"], first["n_slides"], first["engine"]) == (1, 5, "local")
    assert first["run"] == first["group"] == path.stem
    assert (last["counts"], last["exit_status"]) == ({"finished": 3, "empty": 1, "failed": 1}, 1)
    stages = [(row["slide"], row["stage"]) for row in rows if row["event"] == "stage"]
    assert stages == [(name, stage) for name in "abcd" for stage in ("patches", "features", "slide")]
    features = next(row for row in rows if row.get("stage") == "features")
    n = len(read_features(tmp_path / "out/patches/a_features.h5").features)
    assert (features["patches"], features["failures"], features["reused"]) == (n, 0, False)
    assert (features["reader"], features["device"]) == ("tiff", "cpu")
    assert features["peak_memory"] > 1 << 20
    assert features["seconds"] > 0
    failed = [row for row in rows if row["event"] == "slide" and row["outcome"] == "failed"]
    assert [(row["slide"], row["error"]) for row in failed] == [("broken", "UnsupportedSlideError")]
    with path.open("ab") as file:
        file.write(b'{"event": "slide", "slid')
    assert list(read_run_log(path)) == rows


def test_a_shard_begins_elsewhere_and_does_everything(run, tmp_path, reference):
    from exaonepath.slides.cohort.batch_system import parse_shard

    outcomes = run(options=RunOptions(shard=parse_shard("2/2")))
    assert [outcome.slide.id for outcome in outcomes] == list("cdab")
    assert results(tmp_path / "out") == reference


class TestFinishedMeanwhile:
    """Slides that another process finished since this one began: not verified again, if they are what is wanted."""

    @pytest.fixture
    def other_finishes_d(self, run, tmp_path, slides):
        """A progress function: while this process encodes a, another one finishes d (with these settings)."""

        def make(**changes):
            run(slides[3:], out="other", **changes)

            def progress(slide, done, total):
                if slide.id == "a" and not done:
                    for path in sorted((tmp_path / "other").rglob("d*.*")):
                        if path.parent.name in ("patches", "embeddings", "masks", "contours"):
                            target = tmp_path / "out" / path.relative_to(tmp_path / "other")
                            target.parent.mkdir(parents=True, exist_ok=True)
                            path.replace(target)

            return progress

        return make

    @pytest.fixture
    def opened_slides(self, monkeypatch):
        found, find = [], SlideStages.find_patches
        monkeypatch.setattr(SlideStages, "find_patches", lambda self: (found.append(self.image.name), find(self))[1])
        return found

    def test_the_slide_is_not_opened(self, run, tmp_path, other_finishes_d, opened_slides, reference):
        progress = other_finishes_d()
        opened_slides.clear()
        outcomes = run(progress=progress)
        assert kinds(outcomes) == {"a": "finished", "b": "finished", "c": "empty", "d": "reused"}
        assert opened_slides == ["a", "b", "c"]
        assert outcomes[3].result.n_patches == len(read_features(tmp_path / "out/patches/d_features.h5").features)
        assert results(tmp_path / "out") == reference

    @pytest.mark.parametrize("change", ["settings", "slide", "damaged"])
    def test_what_is_not_wanted_is_made_again(self, run, tmp_path, other_finishes_d, opened_slides, slides, change):
        own = tmp_path / "d.svs"
        own.write_bytes(slides[3].path.read_bytes())
        slides[3] = replace(slides[3], path=own)
        progress = other_finishes_d(**({"feature_dtype": "float16"} if change == "settings" else {}))
        opened_slides.clear()

        def also(slide, done, total):
            progress(slide, done, total)
            path = tmp_path / "out" / "embeddings" / "d.h5"
            if change == "slide":
                own.touch()
            if change == "damaged" and slide.id == "a" and not done:
                path.write_bytes(path.read_bytes()[:-500])

        outcomes = run(slides, progress=also)
        assert opened_slides == list("abcd")
        assert kinds(outcomes)["d"] == {"slide": "reused"}.get(change, "finished")

    def test_what_lay_there_before_is_verified(self, run, opened_slides):
        run()
        opened_slides.clear()
        assert set(kinds(run()).values()) == {"reused"}
        assert opened_slides == list("abcd")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", ["leases", "prepare", "finish", "ahead"])
def test_an_interrupt_while_a_thread_starts(run, reference, tmp_path, monkeypatch, name, moment):
    """Ctrl-C may come between the making of a thread and its start, or while the start waits for it to be alive."""
    start = threading.Thread.start

    def interrupted(self):
        if self.name != f"exaonepath-{name}":
            start(self)
            return
        if moment == "after":
            start(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    for thread in threading.enumerate():
        if thread.name.startswith("exaonepath-"):
            thread.join(PATIENCE)
            assert not thread.is_alive()
    claims = tmp_path / "out" / "claims"
    assert not claims.is_dir() or list(claims.iterdir()) == []
    assert set(kinds(run()).values()) <= {"finished", "empty", "reused"}
    assert results(tmp_path / "out") == reference
