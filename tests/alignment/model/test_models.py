"""The alignment model: any subset of modalities, ragged slides, save and load, foreign features, foundation models."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from exaonepath.alignment.batch import PatientBatch, SlidePatches
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.model.configuration import ExaonePathAlignmentConfig, ExaonePathOmicsEncoderConfig
from exaonepath.alignment.model.features import match_features, take_features
from exaonepath.alignment.model.fusion import fuse
from exaonepath.alignment.model.objective import AlignmentObjective
from exaonepath.alignment.model.omics import ExaonePathOmicsEncoderModel
from exaonepath.alignment.model.softmax import softmax_pair_loss
from exaonepath.device import evaluating
from exaonepath.encoders.loading import randomize, weights_fingerprint
from exaonepath.errors import ConfigError, SettingsError, WeightsError

WSI = {"input_dim": 24, "embed_dim": 32, "depth": 3, "num_heads": 2, "ffn_layer": "swiglu", "n_storage_tokens": 3}
OMICS = {
    "rna": {"feature_names": [f"G{i}" for i in range(10)], "embed_dim": 16, "transform": "log1p", "clip": 10.0},
    "snp": {"feature_names": [f"M{i}" for i in range(5)], "embed_dim": 12},
    "methylation": {"feature_names": [f"cg{i}" for i in range(7)], "embed_dim": 12},
}


def build(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"wsi_cfg": WSI, "omics": OMICS, "projection_dim": 8, **changes}
    model = ExaonePathAlignmentModel(ExaonePathAlignmentConfig(**settings)).eval()
    if settings["wsi_cfg"] is not None:
        randomize(model.slide_encoder, seed)  # peaked attention: fresh weights hardly look at positions
    return model


def slide(n, seed=0, fragments=3):
    g = torch.Generator().manual_seed(seed)
    coords = torch.randint(0, 50, (n, 2), generator=g) * 256
    return SlidePatches(torch.randn(n, 24, generator=g), coords, torch.randint(0, fragments, (n,), generator=g))


def profiles(size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, len(cfg["feature_names"]), generator=g) for name, cfg in OMICS.items()}


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def batch():
    """Four patients: two slides, none, one without patches and a real one, one."""
    slides = [[slide(9, 1), slide(4, 2)], [], [slide(0, 3), slide(6, 4)], [slide(5, 5)]]
    there = {"snp": torch.tensor([True, False, True, True])}
    return PatientBatch.build(4, slides, profiles(4), there)


def test_slides_without_padding_equal_each_slide_alone(model, batch):
    """Packed together or encoded one by one by the published forward: the same to float32 rounding."""
    with torch.no_grad():
        together = model.encode_slides(batch.slides, 4)
        alone = [
            model.slide_encoder(s.features[None], None, s.coords[None], s.contour_index[None]).slide_embedding[0]
            for s in (slide(9, 1), slide(4, 2), slide(6, 4), slide(5, 5))
        ]
    expected = torch.stack([(alone[0] + alone[1]) / 2, torch.zeros(56), alone[2], alone[3]])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


def test_a_missing_modality_changes_nothing_else(model, batch):
    """Rows that are not there may hold NaN; every other row, and every other modality, keeps its bits."""
    with torch.no_grad():
        whole = model.encode_patients(batch)
        holed = dict(batch.profiles)
        holed["snp"] = torch.where(batch.available["snp"][:, None], holed["snp"], torch.nan)
        again = model.encode_patients(PatientBatch(4, batch.slides, holed, batch.available))
    for name in model.modalities:
        assert torch.equal(whole.modality[name], again.modality[name])
        assert torch.equal(
            whole.modality[name][~whole.available[name]], torch.zeros_like(whole.modality[name][~whole.available[name]])
        )
    assert torch.isfinite(again.fused).all()


@pytest.mark.parametrize(
    "names", [("wsi",), ("rna",), ("snp", "methylation"), ("wsi", "rna", "snp", "methylation")], ids="-".join
)
def test_one_patient_from_any_subset(model, names):
    given = {name: x[0].abs() for name, x in profiles(1).items() if name in names}
    found = model.encode_patient(wsi=slide(6) if "wsi" in names else None, **given)
    assert {name for name, there in found.available.items() if there} == set(names)
    assert found.fused.shape == (1, 6 * 8)
    assert found.fused.norm().item() == pytest.approx(1, abs=1e-5)
    # A pair is filled where one of its two is there.
    blocks = found.fused.view(6, 8).norm(dim=1) > 0
    assert blocks.tolist() == [bool({a, b} & set(names)) for a, b in model.trained_pairs]


def test_a_patient_of_nothing_is_refused(model):
    with pytest.raises(SettingsError, match=r"rows \[0\]"):
        model.encode_patient()
    with pytest.raises(SettingsError, match="has rna, snp, methylation"):
        model.encode_patient(proteins=torch.zeros(3))


def test_fusion_takes_the_mean_direction_of_what_is_there():
    u, v = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)
    available = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False, True, False])}
    fused = fuse({("a", "b"): (u, v)}, available)
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [1, 0], [0, 1], [0, 0]])
    torch.testing.assert_close(fused, expected)
    opposite = fuse({("a", "b"): (u, -u)}, {"a": torch.ones(4, dtype=torch.bool), "b": torch.ones(4, dtype=torch.bool)})
    assert torch.equal(opposite, torch.zeros(4, 2))
    with pytest.raises(SettingsError):
        fuse({}, {})


def test_measured_values_are_standardised_by_the_model(model):
    """`encode_patient` takes what was measured; the same numbers by hand, in numpy."""
    encoder = build(3).omics_encoder("rna")
    mean, std = torch.linspace(0, 2, 10), torch.linspace(0.5, 1.5, 10)
    encoder.set_statistics(mean, std)
    values = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) * 1e6
    values[0, 4] = torch.nan
    expected = (np.log1p(values.numpy()) - mean.numpy()) / std.numpy()
    expected[0, 4] = 0
    # One rounding of log1p in float32 (1e-6 of 14) over the smallest deviation, 0.5.
    np.testing.assert_allclose(encoder.standardize(values), np.clip(expected, -10, 10), atol=4e-6)
    encoder.transform = "cpm_log1p"
    total = torch.tensor([1e7, 2e7, 3e7])
    expected = (np.log1p(values.numpy() * (1e6 / total.numpy())[:, None]) - mean.numpy()) / std.numpy()
    expected[0, 4] = 0
    np.testing.assert_allclose(encoder.standardize(values, total), np.clip(expected, -10, 10), atol=4e-6)
    with pytest.raises(SettingsError, match="positive"):
        encoder.set_statistics(mean, std * 0)
    with pytest.raises(SettingsError, match="9 and 10 features for 10"):
        encoder.set_statistics(mean[:9], std)


def test_counts_of_one_patient_are_divided_by_what_training_divides_by(caplog):
    """A model that reads some of the genes: the sum of those alone is another million, and is warned of."""
    model = build(3).eval()
    encoder = model.omics_encoder("rna")
    encoder.transform = "cpm_log1p"
    counts = torch.randint(1, 500, (10,), generator=torch.Generator().manual_seed(0)).float()
    total = 4 * float(counts.sum())
    with torch.no_grad():
        expected = encoder(encoder.standardize(counts[None], torch.tensor([total])))
    given = model.encode_patient(rna=counts, totals={"rna": total}).modality["rna"]
    assert torch.equal(given, expected)
    assert not caplog.records
    assert not torch.allclose(model.encode_patient(rna=counts).modality["rna"], expected, atol=1e-2)
    assert "the 10 features that the model reads" in caplog.text


def test_statistics_stay_wide_in_a_half_precision_model():
    model = build()
    model.omics_encoder("rna").set_statistics(torch.full((10,), 1.0009765), torch.ones(10))
    model = model.bfloat16()
    assert model.omics_encoder("rna").mean.dtype == torch.float32
    assert model.omics_encoder("rna").mean[0].item() == pytest.approx(1.0009765)
    assert model.omics_encoder("rna").proj.weight.dtype == torch.bfloat16


def test_round_trip_keeps_every_bit(tmp_path, batch):
    model = build(5, rope_mode="no_rotation", pair_weights={"wsi-rna": 2.0}, pos_weight="balanced")
    model.omics_encoder("snp").set_statistics(torch.arange(5.0), torch.arange(1.0, 6.0))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(str(tmp_path))
    assert type(again) is ExaonePathAlignmentModel
    assert type(AutoConfig.from_pretrained(str(tmp_path))) is ExaonePathAlignmentConfig
    assert weights_fingerprint(again) == weights_fingerprint(model)
    assert again.omics_encoder("snp").feature_names == tuple(OMICS["snp"]["feature_names"])
    assert again.config.rope_mode == "no_rotation"
    assert again.loss.pos_weight == "balanced"
    assert again.pair_weight(("wsi", "rna")) == 2
    with torch.no_grad():
        assert torch.equal(again.encode_patients(batch).fused, model.encode_patients(batch).fused)
    eager = AutoModel.from_pretrained(str(tmp_path), attn_implementation="eager")
    assert eager.slide_encoder.config._attn_implementation == "eager"


def test_loading_is_strict(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["omics"]["rna"]["feature_names"].append("G10")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"omics\.rna\.(mean|proj)"):
        ExaonePathAlignmentModel.from_pretrained(str(tmp_path))


def test_an_omics_encoder_on_its_own(tmp_path):
    torch.manual_seed(0)
    encoder = ExaonePathOmicsEncoderModel(ExaonePathOmicsEncoderConfig("cnv", OMICS["snp"])).eval()
    encoder.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(str(tmp_path))
    x = torch.randn(3, 5)
    assert type(again) is ExaonePathOmicsEncoderModel
    with torch.no_grad():
        assert torch.equal(again(x), encoder(x))
        x[1, 2] = torch.nan  # not measured counts as the training mean, which is 0
        filled = x.nan_to_num(0.0)
        assert torch.equal(encoder(x), encoder(filled))
    with pytest.raises(SettingsError, match=r"\[B, 5\]"):
        encoder(torch.zeros(3, 4))


def test_importing_is_enough_and_no_network_is_touched(warm_torch, tmp_path):
    build().save_pretrained(tmp_path / "m")
    code = """
import socket
def refuse(*a, **k): raise AssertionError("network touched")
socket.socket.connect = refuse
import exaonepath
from transformers import AutoModel
print(type(AutoModel.from_pretrained("m")).__name__)
"""
    done = warm_torch.run(code, cwd=tmp_path)
    assert done.stdout.strip() == "ExaonePathAlignmentModel", done.stderr


class Foundation(nn.Module):
    """Stands for a frozen RNA model: anything that maps profiles to vectors."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Sequential(nn.Linear(10, 6), nn.Dropout(0.5))

    def forward(self, x):
        return self.layer(x)


def test_a_frozen_foundation_model_in_the_rna_slot(tmp_path):
    omics = {**OMICS, "rna": {"feature_names": OMICS["rna"]["feature_names"], "foundation": {"dim": 6}}}
    model = build(omics=omics)
    x = profiles(3)
    batch = PatientBatch.build(3, None, x)
    with pytest.raises(SettingsError, match="attach_foundation"):
        model.encode_patients(batch)
    foundation = Foundation(0)
    model.omics_encoder("rna").attach_foundation(foundation)
    model.train()
    with evaluating(model), torch.no_grad():
        expected = model.encode_patients(batch)
    assert model.training
    # Frozen, whatever train() says, and neither trained nor saved.
    assert not foundation.training
    assert not any(p.requires_grad for p in foundation.parameters())
    assert not any("foundation.layer" in name for name in model.state_dict())
    assert not {id(p) for p in foundation.parameters()} & {id(p) for p in model.parameters()}
    model.save_pretrained(tmp_path)
    again = ExaonePathAlignmentModel.from_pretrained(str(tmp_path), foundation={"rna": Foundation(0)})
    with torch.no_grad():
        assert torch.equal(again.encode_patients(batch).fused, expected.fused)
    with pytest.raises(WeightsError, match="trained on a foundation model of fingerprint"):
        ExaonePathAlignmentModel.from_pretrained(str(tmp_path), foundation={"rna": Foundation(1)})
    with pytest.raises(SettingsError, match="no foundation model"):
        model.omics_encoder("snp").attach_foundation(Foundation(0))


def test_rope_modes_do_what_they_say():
    """Which of positions and fragments the slide embedding depends on, in each mode."""
    n = 24
    given = slide(n, 7)
    coords = given.coords.clone()
    moved = SlidePatches(
        given.features, coords[torch.randperm(n, generator=torch.Generator().manual_seed(1))], given.contour_index
    )
    merged = SlidePatches(given.features, coords, torch.zeros(n, dtype=torch.int64))
    depends = {}
    for mode in ("full", "no_rotation", "no_fragments", "off", "shuffled"):
        model = build(rope_mode=mode)
        with torch.no_grad():
            base, by_place, by_fragment = (
                model.encode_slides(PatientBatch.build(1, [[s]]).slides, 1)[0] for s in (given, moved, merged)
            )
            again = model.encode_slides(PatientBatch.build(2, [[slide(3)], [given]]).slides, 2)[1]
        # Not by whom it is encoded with, to float32 rounding.
        torch.testing.assert_close(again, base, rtol=1e-5, atol=1e-5)
        depends[mode] = [not torch.allclose(base, other, atol=1e-5) for other in (by_place, by_fragment)]
    assert depends["full"] == [True, True]
    assert depends["no_rotation"] == [False, True]
    assert depends["no_fragments"] == [True, False]
    assert depends["off"] == [False, False]
    # The same places, dealt out to other patches: not the slide's own arrangement.
    with torch.no_grad():
        full, shuffled = (
            build(rope_mode=m).encode_slides(PatientBatch.build(1, [[given]]).slides, 1) for m in ("full", "shuffled")
        )
    assert not torch.allclose(full, shuffled, atol=1e-5)


def test_pairs_with_the_slide_only(batch):
    model = build(pairs="wsi")
    assert model.trained_pairs == (("wsi", "rna"), ("wsi", "snp"), ("wsi", "methylation"))
    output = AlignmentObjective(model)(model.embed(batch), batch.available, torch.arange(4))
    assert set(output.pair_losses) == set(model.trained_pairs)
    output.loss.backward()
    assert model.loss.projection("wsi", "rna").grad.abs().sum() > 0
    assert model.loss.projection("rna", "snp").grad is None or not model.loss.projection("rna", "snp").grad.any()
    with torch.no_grad():
        assert model.encode_patients(batch).fused.shape == (4, 3 * 8)


def test_softmax_loss_against_its_definition():
    g = torch.Generator().manual_seed(0)
    u, v = (nn.functional.normalize(torch.randn(5, 4, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    log_t, patients = torch.tensor(1.3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4])
    s = log_t.exp() * u @ v.T
    expected = (nn.functional.cross_entropy(s, patients) + nn.functional.cross_entropy(s.T, patients)) / 2
    # float64 rounding
    torch.testing.assert_close(softmax_pair_loss(u, v, log_t, patients), expected, rtol=1e-12, atol=0)
    twice = torch.tensor([0, 0, 1, 2, 3])
    p = s.log_softmax(1)
    row = -(p[0, 0] + p[0, 1]) / 2
    rest = s.log_softmax(0)
    loss = softmax_pair_loss(u, v, log_t, twice)
    assert loss < softmax_pair_loss(u, v, log_t, patients) + 10
    by_hand = [row, -(p[1, 0] + p[1, 1]) / 2, *[-p[i, i] for i in (2, 3, 4)]]
    by_hand_t = [-(rest[0, 0] + rest[1, 0]) / 2, -(rest[0, 1] + rest[1, 1]) / 2, *[-rest[i, i] for i in (2, 3, 4)]]
    torch.testing.assert_close(loss, (sum(by_hand) + sum(by_hand_t)) / 10, rtol=1e-12, atol=0)
    assert softmax_pair_loss(u[:0], v[:0], log_t, patients[:0]) == 0


def test_softmax_objective_leaves_missing_rows_out(batch):
    model = build(loss="softmax")
    output = AlignmentObjective(model)(model.embed(batch), batch.available, torch.arange(4))
    expected = sum(output.pair_losses.values()) / len(output.pair_losses)
    torch.testing.assert_close(output.loss.detach(), expected)
    with pytest.raises(SettingsError, match="one process"):
        AlignmentObjective(model, distributed=True)


def test_foreign_features_are_refused_unless_asked_for(model, caplog):
    names = [f"G{i}" for i in (3, 1, 0, 2, 4, 5, 6, 7, 8, 9)]
    assert model.match_features("rna", [*names, "EXTRA"]).tolist() == [2, 1, 3, 0, 4, 5, 6, 7, 8, 9]
    with pytest.raises(
        WeightsError, match=r"2 of 10 features of the model are not in the table: G8, G9; 1 of 9"
    ) as raised:
        model.match_features("rna", [*names[:8], "OTHER"])
    assert "matching by name to use the 8 in common" in str(raised.value)
    places = match_features("rna", ["a", "b", "c"], ["c", "a"], by_name=True)
    assert "b" in caplog.text
    taken = take_features(torch.tensor([[1.0, 2.0]]), places)
    assert taken[0, [0, 2]].tolist() == [2.0, 1.0]
    assert taken[0, 1].isnan()
    with pytest.raises(WeightsError, match="none is in common"):
        match_features("rna", ["a"], ["b"], by_name=True)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"omics": {}}, "at least two modalities, got wsi"),
        ({"rope_mode": "sideways"}, "rope_mode"),
        ({"loss": "triplet"}, "loss must be"),
        ({"pos_weight": -1.0}, "pos_weight"),
        ({"pos_weight": "heavy"}, "pos_weight"),
        ({"pair_weights": {"wsi-cnv": 1.0}}, "no pair 'wsi-cnv'"),
        ({"projection_dim": 0}, "projection_dim"),
        ({"projektion_dim": 8}, "projektion_dim"),
        ({"omics": {"rna": {"feature_names": ["a", "a"]}}}, "twice: a"),
        ({"omics": {"rna": {"feature_name": ["a"]}}}, "did you mean 'feature_names'"),
        ({"omics": {"rna": {}}}, "needs feature_names"),
        ({"omics": {"wsi": {"feature_names": ["a"]}}}, "'wsi' cannot name"),
        ({"omics": {"rna": {"feature_names": ["a"], "transform": "sqrt"}}}, "transform"),
        ({"omics": {"rna": {"feature_names": ["a"], "foundation": {"width": 3}}}}, "foundation"),
    ],
)
def test_settings_that_no_model_can_be_built_from(settings, named):
    with pytest.raises(ConfigError, match=named):
        build(**settings)


def test_batches_that_do_not_fit_are_named():
    with pytest.raises(SettingsError, match=r"coords must be \[5, 2\]"):
        SlidePatches(torch.zeros(5, 24), torch.zeros(4, 2))
    bare = SlidePatches(torch.zeros(3, 24))
    with pytest.raises(SettingsError, match="1 of 2 slides lack coords"):
        PatientBatch.build(2, [[slide(3)], [bare]])
    with pytest.raises(SettingsError, match="different widths"):
        PatientBatch.build(2, [[bare], [SlidePatches(torch.zeros(3, 20))]])
    with pytest.raises(SettingsError, match=r"rna: profiles must be \[2, F\]"):
        PatientBatch.build(2, None, {"rna": torch.zeros(3, 10)})
    with pytest.raises(SettingsError, match="available must be bool"):
        PatientBatch.build(2, None, {"rna": torch.zeros(2, 10)}, {"rna": torch.ones(2)})


def test_slides_without_positions_are_encoded(model):
    """Features alone, as other tools store them: no rotation, no fragments."""
    bare = PatientBatch.build(1, [[SlidePatches(torch.randn(5, 24))]])
    with torch.no_grad():
        assert torch.isfinite(model.encode_slides(bare.slides, 1)).all()
