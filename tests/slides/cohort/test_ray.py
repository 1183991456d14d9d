"""The Ray engine on a real cluster of this machine: a head without processors, and two nodes with one each.

So an encoder and the tasks that read for it are always on different nodes, and every slide's batches pass from one to
the other. A new process imports torch first, which takes seconds: the tests share one connection and few processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cohort_stand_ins import load_noting, results

from exaonepath.errors import ClusterError, DeviceError, MissingDependencyError, SettingsError, WeightsError
from exaonepath.files.features import read_features
from exaonepath.files.processes import is_running
from exaonepath.slides.cohort import ray_cluster, ray_reading, ray_tasks
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.dispatch import CohortWork
from exaonepath.slides.cohort.lease import Leases
from exaonepath.slides.cohort.ray_cluster import RayOptions, check_nodes, connected, ray_options
from exaonepath.slides.cohort.ray_encoder import EncoderActor
from exaonepath.slides.cohort.ray_engine import encode_on_ray
from exaonepath.slides.cohort.run_log import read_run_log
from exaonepath.slides.cohort.run_options import RunOptions
from exaonepath.slides.stages import EncodeSettings
from exaonepath.version import __version__

ray = pytest.importorskip("ray", reason="needs ray (pip install 'exaonepath[cluster]'; make test-cluster)")

HERE = Path(__file__).parent
PATIENCE = 60
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(**NODE)
            with connected(RayOptions(cluster.address)):
                yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture
def encode(cluster, stand_ins, slides, tmp_path):
    """Run the engine on the slides: an iterator of outcomes."""

    def encode(slides=slides, out=tmp_path / "out", load=stand_ins.load, options=None, wait=20.0, **arguments):
        settings, options = EncodeSettings(**stand_ins.SETTINGS), options or RunOptions(poll=(0.05, 0.2))
        work = CohortWork(slides, out, "stand-in", settings, options, load)
        return encode_on_ray(work, RayOptions(cluster.address, wait=wait), **arguments)

    return encode


def kinds(outcomes) -> dict[str, str]:
    return {outcome.slide.id: outcome.outcome for outcome in outcomes}


def rows(out: Path, event: str, engine: str) -> list[dict]:
    logs = [list(read_run_log(path)) for path in sorted((out / "runs").iterdir())]
    return [row for log in logs if log[0]["engine"] == engine for row in log if row["event"] == event]


def kill_node(cluster, node_id: str) -> None:
    """SIGKILL to a node: its raylet, and all processes that it has started."""
    (node,) = [node for node in cluster.worker_nodes if node.node_id == node_id]
    (raylet,) = [info.process.pid for info in node.all_processes["raylet"]]
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == raylet:
                children.append(int(status.parent.name))
    for pid in (raylet, *children):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def test_the_files_are_those_of_one_process(encode, slides, tmp_path, reference):
    """And another process holds a slide for a while, and one slide cannot be opened."""
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"no slide")
    seen = []
    leases = Leases(tmp_path / "out" / "claims", run="another process")
    lease = leases.claim("d")

    def outcomes():
        for outcome in encode(
            [*slides, CohortSlide(broken, "broken")], progress=lambda slide, done, total: seen.append(slide.id)
        ):
            yield outcome
            if outcome.slide.id == "broken":
                lease.release()

    found = list(outcomes())
    leases.close()
    assert kinds(found) == {"a": "finished", "b": "finished", "c": "empty", "d": "finished", "broken": "failed"}
    assert found[-1].slide.id == "d"
    (error,) = [outcome.error for outcome in found if outcome.error]
    assert "broken.svs" in str(error)
    assert results(tmp_path / "out") == reference
    assert list((tmp_path / "out" / "claims").iterdir()) == []
    assert set(seen) == set("abcd")
    (driver,) = rows(tmp_path / "out", "end", "ray")
    assert driver["exit_status"] == 1
    (encoder,) = rows(tmp_path / "out", "run", "ray-encoder")
    assert encoder["host"] == socket.gethostname()
    read = rows(tmp_path / "out", "reading", "ray")
    assert {row["slide"] for row in read if row["stage"] == "features"} == set("abd")
    assert {row["slide"] for row in read if row["stage"] == "patches"} == set("abcd")
    assert encoder["node"] not in {row["node"] for row in read}, "read on another node than encoded"
    stages = rows(tmp_path / "out", "stage", "ray-encoder")
    assert sorted(row["stage"] for row in stages if row["slide"] == "a") == ["features", "patches", "slide"]


def test_nodes_that_are_killed_cost_nothing_but_unwritten_batches(encode, cluster, slides, tmp_path, reference):
    """Five times the encoder's node and once the reader's: every file is as ever, and hardly a batch is done twice."""
    out, noted = tmp_path / "out", tmp_path / "batches"
    victims = iter(["encoder", "encoder", "reading", "encoder", "encoder", "encoder", ""])
    victim, last = next(victims), {}

    def progress(slide, done, total):
        nonlocal victim
        if victim and last.get(slide.id, 0) + 8 <= done < total:
            node = rows(out, victim, "ray")[-1]["node"]
            if all(each.node_id != node for each in cluster.worker_nodes):
                return  # nobody has begun to read since the last one was killed
            last[slide.id] = done
            kill_node(cluster, node)
            cluster.add_node(**NODE)
            victim = next(victims)

    outcomes = list(encode(load=partial(load_noting, noted), progress=progress))
    assert not victim, "not all nodes were killed"
    assert kinds(outcomes) == {"a": "finished", "b": "finished", "c": "empty", "d": "finished"}
    assert results(out) == reference
    assert not list((out / "claims").iterdir())
    assert not list((out / "failures").glob("*"))
    patches = sum(len(read_features(out / f"patches/{name}_features.h5").features) for name in "abd")
    encoded = sum(map(int, noted.read_text().split()))
    # A batch that is being encoded, and the one before, which is being stored. (One patch more for the empty slide.)
    assert patches <= encoded <= patches + 1 + 5 * 2 * 4


def test_an_interrupted_run_is_continued(encode, tmp_path, reference, slides):
    out, noted = tmp_path / "out", tmp_path / "batches"

    def progress(slide, done, total):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(encode(slides[:1], load=partial(load_noting, noted), progress=progress))
    assert list((out / "claims").iterdir()) == []
    assert rows(out, "end", "ray")[-1]["exit_status"] == rows(out, "end", "ray-encoder")[-1]["exit_status"] == 130
    (encoder,) = rows(out, "run", "ray-encoder")
    end = time.monotonic() + PATIENCE
    while is_running(encoder["pid"]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(encoder["pid"])
    assert kinds(encode(slides[:1], load=partial(load_noting, noted))) == {"a": "finished"}
    for name, content in results(out).items():
        assert content == reference[name]
    patches = len(read_features(out / "patches/a_features.h5").features)
    assert sum(map(int, noted.read_text().split())) <= patches + 4, "only the batch in hand may be done twice"


def test_encoders_that_cannot_begin(encode, stand_ins, tmp_path):
    """What is sent cannot be read there; or the weights are missing."""
    with pytest.raises(ClusterError, match="cannot begin on the Ray cluster"):
        list(encode(load=Unreadable()))
    with pytest.raises(WeightsError, match="no such weights"):
        list(encode(load=stand_ins.no_weights))
    assert list((tmp_path / "out" / "claims").iterdir()) == []


class Unreadable:
    """An object that can be written, and not read."""

    def __reduce__(self):
        return (int, ("no number",))


def test_sigterm_ends_the_actors_and_releases_the_slides(cluster, tmp_path, slide_files):
    out = tmp_path / "out"
    process = subprocess.Popen(  # Ray's threads are not for a forked process
        [sys.executable, str(HERE / "cohort_stand_ins.py"), str(out), str(slide_files[0])],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "STAND_IN_RAY": cluster.address},
    )
    try:
        end = time.monotonic() + PATIENCE
        while not (tmp_path / "batches").exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert list((out / "claims").iterdir()) == []
    assert list(out.glob("patches/.*.part"))
    (encoder,) = rows(out, "run", "ray-encoder")
    assert not is_running(encoder["pid"])


def test_several_tasks_read_a_slide_in_order(cluster, slides, stand_ins):
    """Small groups of batches from three tasks, of which one has to wait until another one has ended."""
    from exaonepath.slides.features.preprocessing import PreprocessingConfig
    from exaonepath.slides.features.reader import PatchReader
    from exaonepath.slides.image import SlideImage

    preprocessing = PreprocessingConfig()
    with SlideImage(slides[0].path) as image:
        coords = np.stack(np.meshgrid(np.arange(5) * 200, np.arange(4) * 200), -1).reshape(-1, 2)
        request = ray_tasks.SlideRequest(
            slides[0].path, "a", None, "auto", image.fingerprint(), image.reader_settings()
        )
        expected = list(PatchReader(image, coords, 256, preprocessing, batch_size=3, num_workers=0))
        places = []
        reader = ray_reading.RayReader(
            request, coords, 256, preprocessing, np.arange(len(coords)), 3, False,
            ray_reading.ReaderOptions(1, 2, 2 * 3 * 224 * 224 * 3), ray_reading._Turns(), places.append,
        )  # fmt: skip
        assert reader.group == 1
        found = list(reader)
    assert len(places) == 2
    assert [batch.stop for batch in found] == [batch.stop for batch in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.indices == theirs.indices).all()
        assert (ours.images == theirs.images).all()
        assert ours.images.flags.writeable


def test_a_reader_gives_way_to_an_older_one(monkeypatch):
    turns = ray_reading._Turns()

    class Lane:
        waits_since = None
        ended = False

        def end(self):
            self.ended = True

    class Reader:
        def __init__(self):
            self.lanes = [Lane()]

    old, new = Reader(), Reader()
    with turns.member(old), turns.member(new):
        assert turns.allows(new)
        old.lanes[0].waits_since = time.monotonic()
        assert turns.allows(old)
        assert not turns.allows(new), "the older one waits for a processor"
        turns.make_way(old)
        assert not new.lanes[0].ended, "not at once"
        old.lanes[0].waits_since -= ray_reading._GIVES_WAY_AFTER + 1
        turns.make_way(old)
        assert new.lanes[0].ended
        assert not old.lanes[0].ended


def test_another_file_on_the_readers_node_is_an_error(slides):
    request = ray_tasks.SlideRequest(slides[0].path, "a", None, "auto", "another", {})
    with pytest.raises(Exception, match="another file"), request.opened():
        pass
    request = ray_tasks.SlideRequest(slides[0].path, "a", None, "auto", "", {}, version="9.9")
    with pytest.raises(ClusterError, match=r"has exaonepath .* started by 9\.9"), request.opened():
        pass
    with pytest.raises(ClusterError, match="install the same version"):
        EncoderActor("9.9")


def test_a_cluster_without_the_resources(encode, cluster, slides, tmp_path):
    for options, words in (
        (RayOptions(cluster.address, encoders=2, wait=1.5), "2 encoders ask for 1 CPU each, and a reader for"),
        (RayOptions(cluster.address, encoder_cpus=64, wait=0), "an encoder asks for a node with 64 CPU"),
        (RayOptions(cluster.address, device="cuda", wait=0), "1 GPU"),
    ):
        with pytest.raises(ClusterError, match=words) as error:
            list(encode_on_ray(CohortWork(slides, tmp_path / "out", "stand-in", EncodeSettings()), options))
        assert "1 CPU, 0 GPU" in str(error.value), "what is there"
    assert not (tmp_path / "out").exists(), "checked before work"


def test_nodes_that_see_other_paths_or_have_other_versions(cluster, tmp_path, slides, monkeypatch):
    with pytest.raises(ClusterError, match=r"does not see 1 of 2 slides looked at: /nowhere/x\.svs"):
        check_nodes(tmp_path, [slides[0].path, Path("/nowhere/x.svs")], RayOptions())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(ray_cluster, "__version__", "9.9")
    with pytest.raises(ClusterError, match=rf"has exaonepath {__version__}, this process 9\.9"):
        check_nodes(tmp_path, [], RayOptions())
    answer = {"version": None, "python": "2.7.1", "same": False, "writable": True, "missing": [], "n_missing": 0}
    problems = list(ray_cluster._problems("node1", answer, tmp_path, 0))
    assert ["no exaonepath" in problems[0], "Python 2.7.1" in problems[1], "output folder" in problems[2]] == [True] * 3
    assert len(problems) == 3
    answer |= {"version": "9.9", "python": sys.version.split()[0], "same": True, "writable": False}
    assert list(ray_cluster._problems("node1", answer, tmp_path, 0)) == [f"node1 cannot write to {tmp_path}"]


def test_addresses_that_cannot_be_used():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(ClusterError, match=f"nobody answers at {address}"):
            ray_cluster._connect(ray, address)
        assert time.monotonic() - begin < PATIENCE
    for wrong in ("host", "host:", ":6379", "host:99999"):
        with pytest.raises(ClusterError, match="local, auto or HOST:PORT"):
            ray_cluster._connect(ray, wrong)
    with pytest.raises(ClusterError, match="client protocol"):
        ray_cluster._connect(ray, "ray://host:10001")


def test_another_version_of_ray_on_the_cluster(cluster):
    program = (
        "import ray; ray.__version__ = '1.0.0'\n"
        "from exaonepath.slides.cohort.ray_cluster import *\n"
        f"with connected(RayOptions({cluster.address!r})): pass\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    assert "has another version of Ray or Python" in ended.stderr
    assert "Ray: 1.0.0" in ended.stderr


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"exaonepath\[cluster\]"), connected(RayOptions()):
        pass


def test_options_of_the_command():
    assert ray_options("local") is None
    assert ray_options("ray", encoders=2) == RayOptions("auto", None, 2)
    for wrong in (
        {"engine": "dask"}, {"engine": "local", "address": "auto"}, {"engine": "local", "readers": 2},
        {"engine": "ray", "devices": "all"}, {"engine": "ray", "jobs": 2},
    ):  # fmt: skip
        with pytest.raises(SettingsError):
            ray_options(**wrong)


def test_options_of_other_engines(slides, tmp_path):
    for options, cluster, error in (
        (RunOptions(stage=tmp_path), RayOptions(), SettingsError),
        (RunOptions(), RayOptions(device="cuda:1"), DeviceError),
    ):
        with pytest.raises(error):
            list(encode_on_ray(CohortWork(slides, tmp_path / "out", "random:0", EncodeSettings(), options), cluster))
