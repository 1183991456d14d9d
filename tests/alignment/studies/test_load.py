"""What the front door offers for a trained run: embeddings of any cohort, and a report, by its folder."""

import numpy as np
import pytest

import exaonepath
from exaonepath.alignment.subject import open_subject
from exaonepath.errors import SettingsError
from exaonepath.files.embeddings import read_embedding
from exaonepath.synthetic import make_slide

QUICK = exaonepath.EvaluationSettings(labels=("subtype",), missing=False, baselines=False, analyses=())


@pytest.fixture(scope="module")
def alignment(run):
    return exaonepath.load_alignment(run, device="cpu")


def test_patients_of_the_runs_own_cohort_are_embedded_as_evaluation_does(alignment, run):
    subject = open_subject(run, device="cpu")
    everyone = alignment.embed()
    assert everyone.patients == subject.cohort.patients
    held_out = subject.held_out[:5]
    expected, found = subject.embed(held_out), alignment.embed(patients=held_out)
    assert found.patients == held_out
    np.testing.assert_array_equal(found.fused, expected.fused)


def test_another_cohort_and_a_model_without_a_run(alignment, run, cohort_folder):
    model = exaonepath.load_alignment(str(run / "model"), device="cpu")
    assert model.run is None
    ours, theirs = alignment.embed(cohort_folder), model.embed(str(cohort_folder))
    assert ours.patients == theirs.patients
    np.testing.assert_array_equal(ours.fused, theirs.fused)
    with pytest.raises(SettingsError, match="a model without a run has no cohort"):
        model.embed()
    with pytest.raises(SettingsError, match="no patient nobody"):
        alignment.embed(patients=["nobody"])


def test_evaluation_and_report_by_the_runs_folder(run, tmp_path):
    report = exaonepath.evaluate(run, QUICK)
    written = exaonepath.write_report(str(run), tmp_path / "report", QUICK, figures=False)
    assert written["parts"] == report["parts"]
    assert (tmp_path / "report" / "evaluation.md").is_file()


def test_train_takes_a_file_or_its_tables(tmp_path, cohort_folder):
    tables = {"data": {"mudata": str(cohort_folder / "nothing.h5mu")}, "run": {"device": "cpu"}}
    (tmp_path / "s.toml").write_text(f'[data]\nmudata = "{cohort_folder}/nothing.h5mu"\n')
    for settings in (tables, tmp_path / "s.toml", str(tmp_path / "s.toml")):
        with pytest.raises(exaonepath.ExaonePathError, match=r"nothing\.h5mu"):
            exaonepath.train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_many_slides_are_encoded_and_one_that_fails_is_a_failure(tmp_path, monkeypatch):
    import torch

    from exaonepath.encoders.loading import LoadedEncoder, load_slide_encoder

    class Colours(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)).repeat(1, 256)

    monkeypatch.setattr(LoadedEncoder, "device", torch.device("cpu"))
    (tmp_path / "slides").mkdir()
    make_slide(tmp_path / "slides" / "b.svs", 1200, 1000, fragments=1, holes=False)
    (tmp_path / "slides" / "a.svs").write_bytes(b"no slide")
    patches = LoadedEncoder(Colours(), "random:0", "colours", True)
    encoded = exaonepath.encode_slides(
        tmp_path / "slides", tmp_path / "out", patches, load_slide_encoder("random:0", device="cpu")
    )
    failure, result = encoded
    assert isinstance(failure, exaonepath.EncodeFailure)
    assert failure.slide.name == "a.svs"
    assert isinstance(failure.error, exaonepath.ExaonePathError)
    assert read_embedding(result.embedding_path).slide_embedding.shape == (1536,)
    with pytest.raises(exaonepath.ExaonePathError):
        next(exaonepath.encode_slides(tmp_path / "nowhere", tmp_path / "out", patches, "random:0"))
