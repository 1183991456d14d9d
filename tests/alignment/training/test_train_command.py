"""`exaonepath train` from the shell: a run, a dry run, and errors in one line."""

import json

import pytest
from typer.testing import CliRunner

from exaonepath.cli.app import app


@pytest.fixture
def file(cohort_folder, tmp_path):
    """Settings with paths that count from the file's folder."""
    for name in ("cohort.h5mu", "slides.csv", "features"):
        (tmp_path / name).symlink_to(cohort_folder / name)
    path = tmp_path / "settings.toml"
    path.write_text(
        """
[data]
mudata = "cohort.h5mu"
slides = "slides.csv"
[model]
projection_dim = 8
wsi = { embed_dim = 16, depth = 1, num_heads = 2, n_storage_tokens = 1, ffn_layer = "swiglu" }
omics = { embed_dim = 8 }
[run]
epochs = 2
batch_size = 10
device = "cpu"
monitor = false
"""
    )
    return path


def call(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_a_run_with_flags_over_the_file(file, tmp_path):
    out = tmp_path / "run"
    done = call(
        file, "-o", out, "--epochs", 1, "--lr", 2e-3, "--set", "loss.pos_weight=balanced", "--set", "run.seed=3"
    )
    assert done.exit_code == 0, done.output
    assert f"{out / 'model'}  2 steps, best mean_recall@1" in done.stdout
    assert "train: 21 patients (wsi" in done.stderr
    assert "step 2/2  loss" in done.stderr
    stored = json.loads((out / "settings.json").read_text())["settings"]
    assert (stored["run"]["epochs"], stored["run"]["seed"], stored["optimizer"]["lr"]) == (1, 3, 2e-3)
    assert stored["loss"]["pos_weight"] == "balanced"
    assert list((out / "tensorboard").iterdir())
    again = call(file, "-o", out, "-q")
    assert again.exit_code == 1
    assert "run of other settings (loss.pos_weight, optimizer.lr, run.epochs, run.seed)" in again.stderr


def test_a_dry_run_writes_nothing(file, tmp_path):
    done = call(file, "-o", tmp_path / "run", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "parameters to train" in done.stderr
    lines = done.stderr.splitlines()
    for beginning in ("train: 21 patients", "model: ", "first epoch: about ", "each validation, of ", "memory: about"):
        assert any(line.startswith(beginning) for line in lines), (beginning, lines)
    assert "estimated from 4 batches of 10 patients" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "run.epoch=2"], "did you mean 'epochs'"),
        (["--set", "data.mudata=nowhere.h5mu"], "nowhere.h5mu"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--batch-size", "1"], "no negatives"),
    ],
)
def test_errors_are_told_in_a_line(file, tmp_path, arguments, named):
    done = call(file, "-o", tmp_path / "run", *arguments)
    assert done.exit_code == 1
    assert "error: " in done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_tables_of_any_writing_and_the_column_of_ids(tmp_path):
    """What the settings and the flags say of tables reaches whoever reads them."""
    people = [f"P{i:02}" for i in range(12)]
    header = ";".join(["gene", "Rank", *people])
    rows = [";".join([f"G{g}", str(g), *(f"{g + i},{i}" for i in range(12))]) for g in range(5)]
    for name in ("rna", "cnv"):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "people.csv").write_text("Kennung,age\n" + "".join(f"{p},60\n" for p in people))
    path = tmp_path / "settings.toml"
    table = "{{ path = '{}.csv', decimal = ',', annotation = ['Rank'], orientation = 'features_by_patients' }}"
    path.write_text("[data.tables]\n" + "".join(f"{name} = {table.format(name)}\n" for name in ("rna", "cnv")))
    labels = ["--labels", tmp_path / "people.csv"]
    refused = call(path, "-o", tmp_path / "run", "--dry-run", *labels)
    assert refused.exit_code == 1
    assert "--patient-column" in refused.stderr
    done = call(path, "-o", tmp_path / "run", "--dry-run", *labels, "--id-column", "Kennung", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "train: 8 patients (rna 8, cnv 8)" in done.stderr
