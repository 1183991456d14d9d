"""Model inputs: transforms, what is fitted on whom, manifests, the file they are kept in."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from scipy import sparse

from exaonepath.alignment.data import tables
from exaonepath.alignment.data.cohort import Cohort
from exaonepath.alignment.data.manifest import FeatureManifest
from exaonepath.alignment.data.report import CohortError
from exaonepath.alignment.data.slides import SlideTable
from exaonepath.alignment.data.standardizer import Standardizer, StandardizerSettings
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.errors import ConfigError, DataFileError, SettingsError

PEOPLE = tuple(f"p{i:02d}" for i in range(12))
TRAIN = PEOPLE[:8]
RNG = np.random.default_rng(1)


def cohort(modality="methylation", values=None, scale="any", features=None, patients=PEOPLE):
    values = RNG.random((len(patients), 5)).astype(np.float32) if values is None else values
    features = features or tuple(f"f{i}" for i in range(values.shape[1]))
    table = ModalityTable(patients, features, values, scale)
    return Cohort(patients, {modality: table}, SlideTable(), pd.DataFrame(index=list(patients)))


def inputs(standardizer, of, modality="methylation"):
    rows, report = standardizer.align(of)
    return rows[modality].rows(range(len(of.modalities[modality].patients))), report


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_standardised_on_training_patients_only(kind):
    values = (RNG.random((12, 6)) * (RNG.random((12, 6)) < 0.7)).astype(np.float32)
    of = cohort(values=sparse.csr_matrix(values) if kind == "sparse" else values)
    standardizer, report = Standardizer.fit(of, TRAIN)
    assert not report.findings
    got, _ = inputs(standardizer, of)
    part = values[:8].astype(np.float64)
    # Float32 holds mean and deviation to 6e-8; the difference and quotient add as much again, times values near 3.
    np.testing.assert_allclose(got, (values - part.mean(0)) / part.std(0), atol=2e-6)
    other = values.copy()
    other[8:] *= 50
    again, _ = Standardizer.fit(cohort(values=other), TRAIN)
    np.testing.assert_array_equal(again.scalings["methylation"].mean, standardizer.scalings["methylation"].mean)
    np.testing.assert_array_equal(again.scalings["methylation"].std, standardizer.scalings["methylation"].std)


def test_rna_counts_lose_their_depth_and_tpm_keep_theirs():
    counts = RNG.poisson(50, (12, 6)).astype(np.float32)
    deeper = counts.copy()
    deeper[10] *= 4
    for scale, same in (("counts", True), ("tpm", False)):
        standardizer, _ = Standardizer.fit(cohort("rna", counts, scale), TRAIN)
        plain, _ = inputs(standardizer, cohort("rna", counts, scale), "rna")
        scaled, _ = inputs(standardizer, cohort("rna", deeper, scale), "rna")
        # Counts per million carry float32's relative 6e-8 into a logarithm near 12 over a spread of 0.1: some 1e-5.
        assert np.allclose(plain[10], scaled[10], atol=1e-4) == same
    logs = np.log1p(counts / counts.sum(1, keepdims=True) * 1e6)[:8].astype(np.float64)
    standardizer, _ = Standardizer.fit(cohort("rna", counts, "counts"), TRAIN)
    np.testing.assert_allclose(standardizer.scalings["rna"].mean, logs.mean(0), rtol=1e-6)


def test_constant_and_empty_features_are_dropped_and_named():
    values = RNG.random((12, 5)).astype(np.float32)
    values[:8, 1] = 0.1  # varies among the others only
    values[:8, 3] = np.nan
    standardizer, report = Standardizer.fit(cohort(values=values), TRAIN)
    assert standardizer.manifest.features == {"methylation": ("f0", "f2", "f4")}
    assert {f.code: f.features for f in report.findings} == {
        "constant-features": ("f1",),
        "all-missing-features": ("f3",),
    }
    with pytest.raises(CohortError, match="none of its 5 features varies"):
        Standardizer.fit(cohort(values=np.ones((12, 5), np.float32)), TRAIN)
    with pytest.raises(CohortError, match="1 training patient"):
        Standardizer.fit(cohort(), TRAIN[:1])


def test_a_missing_value_becomes_the_training_mean():
    values = RNG.random((12, 3)).astype(np.float32)
    values[2, 1] = values[10, 0] = np.nan
    standardizer, _ = Standardizer.fit(cohort(values=values), TRAIN)
    got, _ = inputs(standardizer, cohort(values=values))
    assert got[2, 1] == 0
    assert got[10, 0] == 0
    assert np.isfinite(got).all()
    np.testing.assert_allclose(standardizer.scalings["methylation"].mean[1], np.nanmean(values[:8, 1]), rtol=1e-6)


def test_features_are_matched_by_name_and_what_lacks_is_told():
    of = cohort()
    standardizer, _ = Standardizer.fit(of, TRAIN)
    whole, report = inputs(standardizer, of)
    assert not report.findings
    values = of.modalities["methylation"].values
    other = cohort(values=np.concatenate([values[:, [4, 2, 0]], values[:, :1]], 1), features=("f4", "f2", "f0", "new"))
    got, report = inputs(standardizer, other)
    np.testing.assert_array_equal(got[:, [0, 2, 4]], whole[:, [0, 2, 4]])
    assert (got[:, [1, 3]] == 0).all()
    assert {f.code: (f.level, f.features) for f in report.findings} == {
        "lacking-features": ("warning", ("f1", "f3")),
        "unused-features": ("note", ("new",)),
    }
    assert "2 of the model's 5 features" in report.warnings[0].message
    with pytest.raises(CohortError, match="none of the model's 5 features"):
        standardizer.align(cohort(features=tuple("vwxyz")))


def test_other_scales_and_modalities_are_told():
    standardizer, _ = Standardizer.fit(cohort(scale="beta"), TRAIN)
    with pytest.raises(CohortError, match="values are m-value, the model was trained on beta"):
        standardizer.align(cohort(scale="m-value"))
    rows, report = standardizer.align(cohort("cnv"))
    assert rows == {}
    assert [f.code for f in report.findings] == ["unused-modality", "absent-modality"]


def test_the_features_that_vary_most_whatever_the_order_of_columns():
    values = RNG.standard_normal((12, 6)).astype(np.float32) * np.array([1, 5, 2, 4, 3, 5], np.float32)
    settings = StandardizerSettings(top_variance={"methylation": 3})
    first, report = Standardizer.fit(cohort(values=values), TRAIN, settings)
    spread = values[:8].std(0)
    assert set(first.manifest.features["methylation"]) == {f"f{i}" for i in np.argsort(-spread)[:3]}
    assert [f.code for f in report.findings] == ["top-variance"]
    names = tuple(f"f{i}" for i in range(6))
    second, _ = Standardizer.fit(cohort(values=values[:, ::-1], features=names[::-1]), TRAIN, settings)
    assert set(second.manifest.features["methylation"]) == set(first.manifest.features["methylation"])
    equal, _ = Standardizer.fit(cohort(values=np.repeat(values[:, :1], 6, 1)), TRAIN, settings)
    assert equal.manifest.features["methylation"] == ("f0", "f1", "f2")


def test_clip_bounds_an_outlier():
    values = RNG.random((12, 2)).astype(np.float32)
    values[11, 0] = 1e6
    standardizer, _ = Standardizer.fit(cohort(values=values), TRAIN)
    assert inputs(standardizer, cohort(values=values))[0].max() == 10
    free, _ = Standardizer.fit(cohort(values=values), TRAIN, StandardizerSettings(clip=None))
    assert inputs(free, cohort(values=values))[0].max() > 1e4
    for wrong in ({"clip": 0}, {"top_variance": {"protein": 3}}, {"top_variance": {"rna": 0}}):
        with pytest.raises(SettingsError):
            StandardizerSettings(**wrong)


def test_blocks_do_not_change_what_is_fitted(small, monkeypatch):
    whole, _ = Standardizer.fit(small, small.patients)
    monkeypatch.setattr(tables, "BLOCK_VALUES", 200)
    parts, _ = Standardizer.fit(small, small.patients)
    for name, scaling in whole.scalings.items():
        assert scaling.features == parts.scalings[name].features
        # Sums in another order, in float64, rounded to float32 once.
        np.testing.assert_allclose(scaling.std, parts.scalings[name].std, rtol=1e-6)


def test_save_and_load_give_the_same_inputs(small, tmp_path):
    standardizer, _ = Standardizer.fit(small, small.patients[:30], StandardizerSettings({"methylation": 17}, clip=4))
    standardizer.save(tmp_path / "s.safetensors")
    again = Standardizer.load(tmp_path / "s.safetensors")
    assert again.manifest == standardizer.manifest
    assert again.manifest.fingerprint == standardizer.manifest.fingerprint
    assert again.manifest.dims["methylation"] == 17
    assert again.clip == 4
    for name in standardizer.scalings:
        np.testing.assert_array_equal(inputs(again, small, name)[0], inputs(standardizer, small, name)[0])


def test_files_that_are_no_standardizer(tmp_path):
    with pytest.raises(DataFileError, match="no such file"):
        Standardizer.load(tmp_path / "none")
    (tmp_path / "broken").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(DataFileError, match="cannot be read"):
        Standardizer.load(tmp_path / "broken")
    save_file({"a": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(DataFileError, match="no standardizer"):
        Standardizer.load(tmp_path / "other")
    save_file({}, tmp_path / "half", {"format": "exaonepath-standardizer-1", "settings": "{}"})
    with pytest.raises(DataFileError, match="cannot be read"):
        Standardizer.load(tmp_path / "half")


def test_manifests_go_through_json_and_refuse_nonsense():
    manifest = FeatureManifest({"rna": ("B", "A"), "cnv": ("X",)})
    assert FeatureManifest.from_dict(manifest.as_dict()) == manifest
    assert manifest.fingerprint != FeatureManifest({"rna": ("A", "B"), "cnv": ("X",)}).fingerprint
    for wrong in ({"rna": "AB"}, {"rna": [1]}, {"rna": ["A", "A"]}):
        with pytest.raises(ConfigError, match="rna"):
            FeatureManifest.from_dict(wrong)


def test_unknown_training_patients_are_refused(small):
    with pytest.raises(SettingsError, match="stranger"):
        Standardizer.fit(small, ["stranger"])


def counts(names, seed=2, depth=50):
    values = np.random.default_rng(seed).poisson(depth, (12, len(names))).astype(np.float32)
    return cohort("rna", values, "counts", tuple(names))


GENES = [f"f{i}" for i in range(20)]


def totals_told(standardizer, of):
    return [f for f in standardizer.align(of)[1].findings if f.code == "other-totals"]


def test_counts_of_other_columns_than_in_training_are_told(tmp_path):
    of = counts(GENES)
    standardizer, _ = Standardizer.fit(of, TRAIN, StandardizerSettings({"rna": 15}))
    standardizer.save(tmp_path / "s.safetensors")
    standardizer = Standardizer.load(tmp_path / "s.safetensors")
    assert not totals_told(standardizer, of)  # features left out by variance count in the totals of both
    spiked = counts([*GENES, "ERCC-1", "ERCC-2"])
    (finding,) = totals_told(standardizer, spiked)
    values = spiked.modalities["rna"].values
    share = f"{100 * values[:, 20:].sum() / values.sum():.2g}%"
    assert (finding.level, finding.where) == ("warning", "rna")
    assert finding.features == ("ERCC-1", "ERCC-2")
    assert f"2 are additional (ERCC-1, ERCC-2) and have {share} of the counts" in finding.message
    assert "top_variance" not in finding.message
    kept = standardizer.manifest.features["rna"]
    (finding,) = totals_told(standardizer, counts(kept))
    assert set(finding.features) == set(GENES) - set(kept)
    assert not totals_told(Standardizer.fit(cohort(), TRAIN)[0], cohort(features=(*"abcd", "f1")))


def test_a_model_that_does_not_tell_its_totals_is_held_against_its_features():
    of = counts(GENES)
    of.modalities["rna"].values[:, 3] = 0  # constant: dropped, and no part of any total
    fitted, _ = Standardizer.fit(of, TRAIN)
    model = Standardizer({"rna": replace(fitted.scalings["rna"], measured=())})
    assert not totals_told(model, of)
    (finding,) = totals_told(model, counts([*GENES, "ERCC-1"]))
    assert "top_variance" in finding.message
