"""Modalities in addition to the five of the paper: named in the settings, trained, saved, loaded and evaluated."""

import json
from dataclasses import replace
from itertools import permutations

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from exaonepath.alignment.data.cohort import load_cohort
from exaonepath.alignment.data.config import CohortConfig
from exaonepath.alignment.data.report import CohortError
from exaonepath.alignment.data.standardizer import StandardizerSettings
from exaonepath.alignment.evaluate import EvaluationSettings, evaluate
from exaonepath.alignment.load import load_alignment
from exaonepath.alignment.modalities import check_further, columns_of, in_order
from exaonepath.alignment.model.configuration import ExaonePathAlignmentConfig
from exaonepath.alignment.subject import open_subject
from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.settings import build_settings
from exaonepath.errors import ConfigError, ExaonePathError, SettingsError
from exaonepath.synthetic.cohort import write_synthetic_cohort

NAMES = ("wsi", "rna", "methylation", "mirna", "protein")


@pytest.fixture(scope="module")
def folder(cohort_dials, tmp_path_factory):
    """The small cohort with `mirna` counts in its .h5mu file, and `protein` as a CSV; both miss some patients."""
    out = write_synthetic_cohort(tmp_path_factory.mktemp("further"), cohort_dials)
    with mudata.set_options(pull_on_update=False):
        found = mudata.read_h5mu(out / "cohort.h5mu")
        rna = found.mod["rna"]
        rng = np.random.default_rng(0)
        hidden = np.log1p(np.asarray(rna.X))[:, :8]
        counts = rng.poisson(np.exp(hidden @ rng.normal(size=(8, 12)) / 8 + 3)).astype(np.float32)
        keep = np.arange(len(counts)) % 5 > 0
        names = pd.DataFrame(index=[f"miR-{at}" for at in range(12)])
        mirna = anndata.AnnData(counts[keep], obs=pd.DataFrame(index=rna.obs_names[keep]), var=names)
        mudata.write_h5mu(out / "cohort.h5mu", mudata.MuData({**found.mod, "mirna": mirna}))
    protein = pd.DataFrame(hidden @ rng.normal(size=(8, 6)), index=rna.obs_names, columns=list("uvwxyz"))
    protein[np.arange(len(protein)) % 4 > 0].to_csv(out / "protein.csv", index_label="patient")
    return out


def tables(folder, **data):
    """Settings of a short training with the further modalities."""
    return {
        "data": {
            "mudata": str(folder / "cohort.h5mu"),
            "slides": str(folder / "slides.csv"),
            "labels": str(folder / "labels.csv"),
            "tables": {"protein": {"path": str(folder / "protein.csv"), "orientation": "patients_by_features"}},
            "further_modalities": ["protein", "mirna"],
            "scales": {"mirna": "counts"},
            "modalities": list(NAMES),
            **data,
        },
        "model": {
            "preset": "published", "projection_dim": 8,
            "wsi": {"embed_dim": 16, "depth": 2, "num_heads": 1, "n_storage_tokens": 1, "ffn_layer": "swiglu"},
            "omics": {"embed_dim": 16, "ffn_ratio": 1.0, "mirna": {"embed_dim": 24}},
        },
        "run": {"steps": 6, "batch_size": 40, "device": "cpu", "tensorboard": False, "validate_every": 0},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(build_settings(tables(folder)), out)
    return out


def test_all_pairs_are_trained_and_stored_under_their_names(run):
    subject = open_subject(run, device="cpu")
    assert subject.model.modalities == NAMES
    assert subject.model.config.widths["mirna"] == 24
    assert len(subject.model.trained_pairs) == 10
    with safe_open(run / "model" / "model.safetensors", "pt") as file:
        stored = {name.removeprefix("loss.projections."): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for a, b in permutations(NAMES, 2):
        assert stored[f"{a}_to_{b}"] == [subject.model.config.widths[a], 8]
    assert stored["omics.mirna.proj.weight"] == [24, 12]
    assert json.loads((run / "settings.json").read_text())["settings"]["data"]["further_modalities"] == [
        "protein", "mirna"
    ]  # fmt: skip


def test_counts_are_counts_and_missing_patients_are_missing(run):
    subject = open_subject(run, device="cpu")
    assert subject.model.omics_encoder("mirna").transform == "cpm_log1p"
    assert subject.model.omics_encoder("protein").transform == "none"
    embedded = subject.embed(subject.cohort.patients)
    for name in ("mirna", "protein"):
        held = set(subject.cohort.modalities[name].patients)
        assert 0 < len(held) < len(embedded.patients)
        np.testing.assert_array_equal(embedded.available[name], [p in held for p in embedded.patients])
        assert not embedded.modality[name][~embedded.available[name]].any()


def test_an_evaluation_covers_them(run):
    report = evaluate(run, EvaluationSettings(labels=("subtype",), missing=False, probes="held-out", analyses=()))
    assert {"mirna->protein", "protein->mirna", "wsi->mirna"} <= set(report["parts"]["test"]["retrieval"])
    assert "mirna->protein" in report["baselines"]["retrieval"]["CCA"]
    assert set(report["probes"]["subtype"]) == {*NAMES, "fused"}


def test_another_cohort_needs_no_settings(run, folder):
    """The folder of a cohort does not name its modalities or their scales; the model does."""
    found = load_alignment(run, device="cpu").embed(folder)
    assert found.available["mirna"].any()
    assert not found.available["protein"].any()  # a table that the folder's usual files do not contain


def test_a_cohort_without_them_is_unchanged(cohort_folder):
    """The five modalities are the default: the same settings, hashes and columns as without this feature."""
    assert "further_modalities" not in build_settings({}).as_dict()["data"]
    cohort = load_cohort(CohortConfig.from_folder(cohort_folder))
    assert cohort.columns == ("wsi", "rna", "snp", "cnv", "methylation")
    assert cohort.availability().shape[1] == 5


def test_names_that_are_not_listed_are_left_out(folder, caplog):
    cohort = load_cohort(CohortConfig.from_folder(folder))
    assert "mirna" not in cohort.modalities
    assert "mirna" in str(cohort.report)
    assert "further_modalities" in str(cohort.report)


def test_counts_without_a_scale_are_reported(folder):
    config = CohortConfig.from_folder(folder, further_modalities=("mirna",))
    found = [f for f in load_cohort(config).report.warnings if f.code == "no-scale"]
    assert [f.where for f in found] == ["mirna"]
    assert "data.scales.mirna to counts, tpm" in found[0].message
    stated = replace(config, scales={"mirna": "any"})
    assert not [f for f in load_cohort(stated).report.warnings if f.code == "no-scale"]


def test_a_listed_name_that_no_file_has_is_an_error(folder):
    with pytest.raises(CohortError, match="further_modalities names lipids"):
        load_cohort(CohortConfig.from_folder(folder, further_modalities=("lipids",)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wsi"], "another meaning"),
        (["fused"], "another meaning"),
        (["rna"], "has it anyway"),
        (["a_to_b"], "names of parameters"),
        (["to_b"], "names of parameters"),
        (["mi-rna"], "must be a word"),
        ([""], "must be a word"),
        (["RNA"], "more than case"),
        (["mirna", "miRNA"], "more than case"),
    ],
)
def test_names_that_cannot_be_used(names, message):
    with pytest.raises(SettingsError, match=message):
        check_further(names)
    with pytest.raises(ConfigError, match=message):
        build_settings({"data": {"further_modalities": names}})


@pytest.mark.parametrize("name", ["keys", "train", "a_to_b", "self"])
def test_a_model_refuses_ambiguous_names(name):
    with pytest.raises(ConfigError, match="cannot name a molecular modality"):
        ExaonePathAlignmentConfig(omics={name: {"feature_names": ["a"]}, "rna": {"feature_names": ["a"]}})


def test_projections_cannot_be_confused():
    """`a_to_b` to `c`, and `a` to `b_to_c`, would be one parameter."""
    with pytest.raises(ExaonePathError, match="cannot name"):
        ExaonePathAlignmentConfig(omics={name: {"feature_names": ["x"]} for name in ("a", "c", "a_to_b", "b_to_c")})


def test_a_typing_error_is_no_modality(folder):
    with pytest.raises(SettingsError, match=r"unknown modality 'methylaton'.*further_modalities"):
        CohortConfig(slides=folder / "slides.csv", modalities={"methylaton": "x.csv"})
    with pytest.raises(SettingsError, match="top_variance of 'mirna'"):
        StandardizerSettings({"mirna": 3})
    assert StandardizerSettings({"mirna": 3}, further_modalities=("mirna",)).top_variance == {"mirna": 3}
    with pytest.raises(SettingsError, match="must be a list"):
        CohortConfig(slides=folder / "slides.csv", further_modalities="mirna")


def test_order():
    assert in_order(["protein", "cnv", "mirna", "wsi", "rna", "rna"]) == ("wsi", "rna", "cnv", "mirna", "protein")
    assert columns_of(["protein"]) == ("wsi", "rna", "snp", "cnv", "methylation", "protein")
