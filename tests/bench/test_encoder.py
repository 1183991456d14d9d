"""The encoder's benchmark: checked against the dense mask, honest about what did not run."""

import pytest
import torch
from harness import encoder
from harness.problems import Problem
from harness.shares import time_shares

from exaonepath import ExaonePathSlideEncoderConfig, ExaonePathSlideEncoderModel
from exaonepath.encoders.loading import randomize


class SmallSlide(encoder.Slide):
    """The same slide, read by an encoder of two narrow blocks."""

    def load(self):
        config = {"input_dim": 768, "embed_dim": 64, "depth": 2, "num_heads": 2, "n_storage_tokens": 7}
        model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=config)).eval()
        randomize(model, 0)
        return model


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(encoder, "Slide", SmallSlide)


@pytest.fixture
def problem():
    return Problem(60, 4, "lognormal", torch.float32, "cpu")


@pytest.mark.parametrize(("training", "checkpointing"), [(False, False), (True, False), (True, True)])
def test_ours_beside_the_dense_mask(session, problem, training, checkpointing, fake_benchmark):
    encoder.hold(problem, training, session, fake_benchmark, checkpointing=checkpointing, budget=0.01)
    rows = {row["impl"]: row for _, row in session.rows}
    assert set(rows) == {"exaonepath", "dense_mask"}
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows.values())
    # float32 in both: six roundings of 6e-8 a block, far from another function's distance.
    assert 0 < rows["exaonepath"]["error_norm"] < 1e-5
    assert rows["exaonepath"]["checkpointing"] is checkpointing
    assert (rows["exaonepath"]["shares"] is None) is training


def test_a_mask_that_does_not_fit_is_a_row(session, problem, monkeypatch, fake_benchmark):
    monkeypatch.setattr(encoder, "_CPU_BYTES", 100)
    encoder.hold(problem, False, session, fake_benchmark, budget=0.01)
    rows = {row["impl"]: row for _, row in session.rows}
    assert rows["dense_mask"]["status"] == "not available"
    assert "GB" in rows["dense_mask"]["reason"]
    assert rows["exaonepath"]["error_norm"] is None


def test_a_wrong_embedding_prints_no_speed(session, problem, monkeypatch, fake_benchmark):
    right = SmallSlide.ours
    monkeypatch.setattr(SmallSlide, "ours", lambda self: right(self) * 1.01)
    with pytest.raises(AssertionError, match="dense mask's embedding"):
        encoder.hold(problem, False, session, fake_benchmark, budget=0.01)
    rows = {row["impl"]: row for _, row in session.rows}
    assert (rows["exaonepath"]["status"], rows["exaonepath"]["ms"]) == ("wrong", None)
    assert rows["dense_mask"]["status"] == "ok"


def test_streaming_gives_the_same_embedding(problem):
    slide = SmallSlide(problem, False)
    torch.testing.assert_close(slide.streamed(), slide.ours(), rtol=1e-5, atol=1e-6)


def test_shares_add_up_and_see_attention(problem):
    slide = SmallSlide(problem, False)
    slide.ours()
    shares = time_shares(slide.ours, "cpu")
    # Each is rounded to three digits.
    assert sum(shares.values()) == pytest.approx(1, abs=0.004)
    assert shares["attention"] > 0
    assert shares["matrix products"] > 0
    assert shares["norms"] > 0
