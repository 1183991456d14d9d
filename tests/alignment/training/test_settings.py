"""Settings: TOML, flags over it, every key known and every value in range."""

from pathlib import Path

import pytest

from exaonepath.alignment.data.config import ModalitySource
from exaonepath.alignment.training.settings import build_settings, differing_keys, select_parts
from exaonepath.alignment.training.settings_file import read_settings
from exaonepath.alignment.training.typed_tables import build_typed
from exaonepath.errors import ConfigError, SettingsError

FILE = """
[data]
mudata = "molecules.h5mu"
slides = "/absolute/slides.csv"
[data.tables.cnv]
path = "cnv.tsv"
[model]
slide_weights = "someone/on-the-hub"
wsi = { depth = 2 }
[optimizer]
lr = 1e-3
betas = [0.9, 0.99]
[run]
epochs = 4
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(FILE)
    return path


def test_file_flags_and_where_paths_count_from(file, tmp_path):
    settings = read_settings(
        file, ["run.epochs=7", "data.stratify=subtype", "model.frozen=['wsi']", "loss.pos_weight=balanced"],
        values={"optimizer.lr": 2},
    )  # fmt: skip
    assert settings.data.mudata == str(tmp_path / "molecules.h5mu")
    assert settings.data.slides == "/absolute/slides.csv"
    assert settings.data.tables["cnv"]["path"] == str(tmp_path / "cnv.tsv")
    assert settings.model.slide_weights == "someone/on-the-hub"
    assert settings.model.wsi == {"depth": 2}
    assert settings.model.frozen == ("wsi",)
    assert (settings.run.epochs, settings.data.stratify, settings.optimizer.lr) == (7, "subtype", 2.0)
    assert settings.optimizer.betas == (0.9, 0.99)
    assert settings.loss.pos_weight == "balanced"
    assert read_settings(file, ["loss.pos_weight=none", "data.stratify=none"]).data.stratify is None
    # What is stored with a run builds the same settings again.
    assert build_settings(settings.as_dict()) == settings


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.epoch=3", "unknown setting run.'epoch'; did you mean 'epochs'"),
        ("rum.epochs=3", "unknown setting 'rum'; did you mean 'run'"),
        ("run.epochs=three", "run.epochs must be a whole number, got 'three'"),
        ("run.epochs=2.5", "run.epochs must be a whole number"),
        ("run.tensorboard=1", "run.tensorboard must be true or false"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be a list"),
        ("optimizer.lr=nan", "optimizer.lr must be a number"),
        ("model.preset=tiny", "auto, small, published"),
        ("model.start=pca", "auto, random, cca"),
        ("model.ffn_start=one", "random, zero"),
        ("optimizer.ffn_lr_share=-1.0", "ffn_lr_share must not be negative"),
        ("optimizer.lr=0.0", "optimizer.lr must be positive"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas must be in"),
        ("optimizer.ema=1.5", "optimizer.ema"),
        ("run.batch_size=1", "no negatives"),
        ("run.precision=int8", "run.precision must be one of"),
        ("run.select=best", "run.select must be"),
        ("loss.pos_weight=-1", "loss.pos_weight"),
        ("loss.kind=triplet", "sigmoid or softmax"),
        ("loss.pairs=rna", "all or wsi"),
        ("model.rope_mode=none", "model.rope_mode must be one of full"),
        ("model.wsi=3", "model.wsi must be a table"),
        ("data.modalities=['rna']", "at least two"),
        ("data.validation_share=0.9", "leave nothing to train on"),
        ("data.slides_per_step=some", "one, all"),
        ("data.max_patches=-1", "must not be negative"),
        ("epochs=3", "section.key=value"),
        ("run.epochs", "section.key=value"),
        ("run.epochs.more=3", "run.epochs.more: epochs is a value"),
        ("model.frozen=['wsi'", "not valid TOML"),
    ],
)
def test_what_cannot_be_used_is_named(file, override, named):
    with pytest.raises(SettingsError, match="(?s)" + named.replace("[", r"\[").replace("]", r"\]")):
        read_settings(file, [override])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("[data\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_settings(tmp_path / "bad.toml")
    (tmp_path / "both.toml").write_text('[model]\ninit = "x"\nwsi = {depth = 2}\n')
    with pytest.raises(ConfigError, match="defines the architecture"):
        read_settings(tmp_path / "both.toml")


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as raised:
        build_settings({"run": {"batch_size": 1, "precision": "x"}, "optimizer": {"lr": -1.0}})
    for part in ("batch_size", "precision", "optimizer.lr"):
        assert part in str(raised.value)


def test_differing_keys_leave_out_what_does_not_touch_the_weights():
    a = build_settings({"run": {"epochs": 3, "log_every": 1, "device": "cpu"}}).as_dict()
    b = build_settings({"run": {"epochs": 4, "log_every": 9}, "model": {"wsi": {"depth": 1}}}).as_dict()
    assert differing_keys(a, b) == ["model.wsi.depth", "run.epochs"]


def test_select():
    assert select_parts("wsi->rna@5") == ("wsi->rna", 5)
    for bad in ("wsi->rna", "x@7", "@"):
        with pytest.raises(SettingsError):
            select_parts(bad)


def test_the_reference_names_every_setting():
    text = (Path(__file__).resolve().parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    settings = build_settings({}).as_dict()
    missing = [f"{section}.{key}" for section, table in settings.items() for key in table if f"`{key}`" not in text]
    assert not missing


def test_a_modality_that_is_a_file_of_its_own():
    """Its table has choices, an optional text and paths."""
    table = {"path": "rna.csv", "orientation": "patients_by_features", "scale": "log", "format": "matrix"}
    source = build_typed(ModalitySource, table, "data.tables.rna.")
    assert source == ModalitySource("rna.csv", "matrix", "patients_by_features", "log")
    with pytest.raises(ConfigError, match=r"data\.tables\.rna\.orientation must be one of auto, patients_by_features"):
        build_typed(ModalitySource, {**table, "orientation": "sideways"}, "data.tables.rna.")
