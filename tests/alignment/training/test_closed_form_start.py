"""The start in closed form: it is the analysis, it sees training patients alone, and a resumed run goes on from it."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from exaonepath.alignment.baselines.cca import Principal, choose_directions, choose_weights
from exaonepath.alignment.baselines.profiles import Profiles, read_profiles
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.training import joint_directions
from exaonepath.alignment.training.closed_form_start import ClosedForm
from exaonepath.alignment.training.presets import LARGE_COHORT, choose_preset, resolve_settings
from exaonepath.alignment.training.run import prepare, train
from exaonepath.alignment.training.run_folder import RunFolder
from exaonepath.alignment.training.settings import build_settings
from exaonepath.alignment.training.trainer import Trainer
from exaonepath.alignment.training.validation import embed_patients, retrieval_metrics, score_parts
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort

WSI_CFG = {"embed_dim": 16, "depth": 1, "num_heads": 2, "n_storage_tokens": 1, "ffn_layer": "swiglu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    dials = SyntheticCohortSettings(
        patients=120, patches_per_slide=16, feature_dim=8, rna=30, snp=10, cnv=12, methylation=20,
        missing={"snp": 0.2, "wsi": 0.1},
    )  # fmt: skip
    return write_synthetic_cohort(tmp_path_factory.mktemp("start"), dials)


def settings(folder, **tables):
    base = {
        "data": {
            "mudata": str(folder / "cohort.h5mu"),
            "slides": str(folder / "slides.csv"),
            "labels": str(folder / "labels.csv"),
        },
        "model": {"wsi": WSI_CFG, "projection_dim": 16, "slide_start_steps": 0},  # `test_slide_start` is about these
        "run": {"epochs": 2, "device": "cpu", "tensorboard": False, "monitor": False},
    }
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table}
    return build_settings(base)


def start_in_closed_form(model, data, model_settings, further=True):
    """Every pair by itself: `joint_directions` has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_directions, "RANKS", ())
        found = ClosedForm(model, data, model_settings)
    found.apply(further=further)
    return found


@pytest.fixture(scope="module")
def started(folder):
    prepared = prepare(settings(folder))
    start_in_closed_form(prepared.model, prepared.data, prepared.settings.model)
    prepared.model.eval()
    return prepared


def similarities(prepared, a, b, patients):
    """Cosine similarities of the model, and of the analysis done apart from it."""
    model, data = prepared.model, prepared.data
    rows = list(range(len(patients)))
    _, batch = next(iter(data.evaluation_batches(patients, rows, len(rows))))
    with torch.no_grad():
        h = model.embed(batch)
        both = batch.available[a] & batch.available[b]
        ours = (model.project(h[a][both], a, b) @ model.project(h[b][both], b, a).T).double().numpy()
    known, held_out, asked = (
        {name: read_profiles(data, ids, name) for name in (a, b)}
        for ids in (data.train, data.validation, tuple(patients))
    )
    left, right = Principal.of(known[a].values), Principal.of(known[b].values)
    pairs = [Profiles.common(found[a], found[b]) for found in (known, held_out)]
    most = model.config.projection_dim
    directions = choose_weights(left, right, *pairs, choose_directions(left, right, *pairs, most))
    x, y = Profiles.common(asked[a], asked[b])
    u, v = left.scores(x) @ directions.left, right.scores(y) @ directions.right
    u, v = (w / np.linalg.norm(w, axis=1, keepdims=True) for w in (u, v))
    return ours, u @ v.T


@pytest.mark.parametrize("pair", [("rna", "methylation"), ("rna", "snp"), ("snp", "cnv")])
def test_the_model_starts_with_the_similarities_of_the_analysis(started, pair):
    """To float32: an embedding of 512 and a product of two layers in single precision."""
    assert started.model.omics_encoder("rna").is_linear
    ours, expected = similarities(started, *pair, started.data.split["test"])
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_the_slide_encoder_gets_something_to_learn_in_the_same_columns_of_every_pair(folder, started):
    """Without the further columns, similarities are exactly those of the analysis; with them, the encoder's weights are
    small, and the same ones in all pairs."""
    plain = prepare(settings(folder))
    start_in_closed_form(plain.model, plain.data, plain.settings.model, further=False)
    plain.model.eval()
    ours, expected = similarities(plain, "wsi", "rna", plain.data.split["test"])
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    width, moved = plain.data.cohort.slides.dim, []
    for other in ("rna", "methylation"):
        key = f"loss.projections.wsi_to_{other}"
        difference = started.model.state_dict()[key] - plain.model.state_dict()[key] * (
            started.model.state_dict()[key][:width].norm() / plain.model.state_dict()[key][:width].norm()
        )
        assert difference[:width].abs().max() < 1e-5
        columns = difference[width:].norm(dim=0) > 1e-4
        assert 0 < columns.sum() <= 8
        moved.append(difference[width:, columns] / difference[width:, columns].norm())
    shared = min(part.shape[1] for part in moved)
    first, second = (part[:, :shared] / part[:, :shared].norm() for part in moved)
    assert torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize(
    ("learned", "helped"),
    [
        (("rna", "methylation"), {"rna": True, "methylation": True}),
        (("rna",), {"rna": True, "snp": False}),
        ((), {"rna": False, "methylation": False}),  # one in six pairs is helped by chance: one standard error
    ],
    ids=["rna and methylation", "rna", "nothing"],
)
def test_a_trained_slide_encoder_is_part_of_the_closed_form_of_the_pairs_that_it_helps(folder, learned, helped):
    """After any change of the encoder, its last norm included, the model has the similarities of an analysis in which
    its output is a part of the slide's profile; where that does not find more validation patients, those of the mean
    features alone."""
    prepared = prepare(settings(folder))
    model, data = prepared.model, prepared.data
    norm = model.slide_encoder.transformer.norm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 16))
        norm.bias.copy_(torch.linspace(0.2, 1.5, 16))
    model.eval()
    axes = {name: Principal.of(read_profiles(data, data.train, name).values, 7) for name in learned}

    def slides(part):
        """What the encoder would give if it had learned the first principal axes of a modality."""
        mean = read_profiles(data, data.split[part], "wsi")
        hidden = 0.3 * np.random.default_rng(0).standard_normal((len(mean.patients), 16))
        for at, name in enumerate(learned):
            known = read_profiles(data, data.split[part], name)
            scores = axes[name].scores(known.values) / np.sqrt(axes[name].variance)
            place = {patient: row for row, patient in enumerate(known.patients)}
            for row, patient in enumerate(mean.patients):
                if patient in place:
                    hidden[row, 8 * at : 8 * at + 7] += scores[place[patient]]
        with torch.no_grad():
            output = norm(torch.from_numpy(hidden).float()).numpy()
        return Profiles(mean.patients, np.concatenate([mean.values, output], 1))

    known, held_out, asked = (slides(part) for part in ("train", "val", "test"))
    found = ClosedForm(model, data, prepared.settings.model, (known, held_out))
    found.apply()
    start = ClosedForm(prepare(settings(folder)).model, data, prepared.settings.model)
    width = data.cohort.slides.dim
    for name, helps in helped.items():
        other = read_profiles(data, data.split["test"], name)
        x, y = Profiles.common(asked, other)
        form, values = (found, x) if helps else (start, x[:, :width])
        directions = form.pairs["wsi", name]
        u, v = form.axes["wsi"].scores(values) @ directions.left, form.axes[name].scores(y) @ directions.right
        u, v = (w / np.linalg.norm(w, axis=1, keepdims=True) for w in (u, v))
        with torch.no_grad():
            ours = (
                model.project(torch.from_numpy(x), "wsi", name)
                @ model.project(model.omics_encoder(name)(torch.from_numpy(y)), name, "wsi").T
            )
        np.testing.assert_allclose(ours.numpy(), u @ v.T, atol=5e-4)


def test_the_parts_of_a_score_are_the_score(started):
    patients = started.data.validation
    rows = list(range(len(patients)))
    found = embed_patients(
        started.model, started.data.evaluation_batches(patients, rows, 8), patients,
        autocast=contextlib.nullcontext, processes=started.processes,
    )  # fmt: skip
    flat, _ = retrieval_metrics(found.pairs)
    for select in ("mean_recall@1", "wsi->rna@5", "rna->wsi@1"):
        assert sum(score_parts(found.pairs, select).values()) == pytest.approx(flat[select])


def changed(data, part, factor):
    """The same cohort with other values of the patients of a part."""
    ids = set(data.split[part])
    tables = {}
    for name, table in data.cohort.modalities.items():
        values = table.rows(np.arange(len(table.patients))).copy()
        own = [at for at, patient in enumerate(table.patients) if patient in ids]
        values[own] = values[own][:, ::-1] * factor
        tables[name] = replace(table, values=values) if isinstance(table, ModalityTable) else table
    return replace(data, cohort=replace(data.cohort, modalities=tables))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_test_patients_change_nothing(folder, started):
    """The start of a cohort in which every test patient has other values: the same bits."""
    prepared = prepare(settings(folder))
    start_in_closed_form(prepared.model, changed(prepared.data, "test", 0.5), prepared.settings.model)
    for name, value in weights(prepared.model).items():
        assert torch.equal(value, started.model.state_dict()[name]), name


def test_validation_patients_only_choose(folder):
    """With too few of them to choose, their values change nothing either."""
    few = settings(folder, data={"validation_share": 0.05})
    starts = []
    for factor in (None, 0.5):
        prepared = prepare(few)
        data = prepared.data if factor is None else changed(prepared.data, "val", factor)
        start_in_closed_form(prepared.model, data, prepared.settings.model)
        starts.append(weights(prepared.model))
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_the_start_is_validated_and_a_resumed_run_is_the_same(folder, tmp_path):
    """Noise from the shrinkage is part of the checkpoint: without it, a resumed run would train on other inputs."""
    part = {"modalities": ["wsi", "rna", "methylation"]}
    whole, halted = settings(folder, data=part, run={"epochs": 3}), tmp_path / "halted"
    train(whole, tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in validations if not row.get("refitted")] == [0, 1, 2, 3]
    # The last closed form is kept, and validated, only if it finds more validation patients.
    for row in (row for row in validations if row.get("refitted")):
        assert row["mean_recall@1"] > validations[3]["mean_recall@1"]

    def stop(step, total, row):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(whole, halted, progress=stop)
    done = train(whole, halted)
    assert done.finished
    assert done.resumed_from == 1
    state = json.loads(next((halted / "checkpoints").iterdir()).joinpath("state.json").read_text())["state"]
    assert set(state["input_noise"]) == {"rna", "methylation"}
    assert min(state["input_noise"].values()) > 0
    assert (halted / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model" / "model.safetensors"
    ).read_bytes()


def test_the_start_is_replaced_only_by_a_clearly_better_model(started, tmp_path):
    """By one standard error of the difference, paired over patients; other models only have to be better."""
    prepared = started
    trainer = Trainer(prepared.model, prepared.data, prepared.settings, RunFolder(tmp_path), prepared.processes)
    selection = trainer.selection
    hits = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 0]), np.array([0, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    before, after = ({f"P{at}": hit / 10 for at, hit in enumerate(values)} for values in hits)
    assert selection.margin(after) == 0
    selection.best, selection.best_step, selection.best_parts = 0.5, 0, before
    assert selection.margin(after) == pytest.approx((hits[1] - hits[0]).std(ddof=1) / np.sqrt(10))
    assert selection.margin(before) == 0  # as good as the start is not better
    selection.best_step = 4
    assert selection.margin(after) == 0


def test_an_ffn_adds_nothing_at_the_start(folder):
    """The published encoder can start in closed form too: its branch is zero, and learns."""
    prepared = prepare(settings(folder, model={"start": "cca", "omics": {"embed_dim": 64, "ffn_ratio": 2.0}}))
    assert prepared.settings.model.preset == "published"
    start_in_closed_form(prepared.model, prepared.data, prepared.settings.model)
    prepared.model.eval()
    encoder = prepared.model.omics_encoder("rna")
    x = torch.randn(5, 30)
    assert torch.equal(encoder(x), encoder.norm(encoder.proj(x)))
    ours, expected = similarities(prepared, "rna", "methylation", prepared.data.split["test"])
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_a_pair_that_no_patient_has_keeps_its_random_start(folder):
    prepared = prepare(settings(folder))
    data = prepared.data
    tables = dict(data.cohort.modalities)
    have = set(tables["rna"].patients[: len(tables["rna"].patients) // 2])
    lack = [p for p in tables["cnv"].patients if p not in have]
    for name, kept in (("rna", have), ("cnv", set(lack))):
        rows = [at for at, patient in enumerate(tables[name].patients) if patient in kept]
        patients = tuple(tables[name].patients[at] for at in rows)
        tables[name] = replace(tables[name], patients=patients, values=tables[name].values[rows])
    before = weights(prepared.model)
    start_in_closed_form(
        prepared.model, replace(data, cohort=replace(data.cohort, modalities=tables)), prepared.settings.model
    )
    after = prepared.model.state_dict()
    key = "loss.projections.rna_to_cnv"
    assert torch.equal(before[key], after[key])
    assert not torch.equal(before["loss.projections.rna_to_snp"], after["loss.projections.rna_to_snp"])


def test_the_preset_follows_from_the_cohort_and_from_what_is_set(folder, started):
    plain = settings(folder)
    assert choose_preset(plain, 400) == "small"
    assert choose_preset(plain, LARGE_COHORT) == "published"
    assert choose_preset(settings(folder, model={"omics": {"ffn_ratio": 4.0}}), 400) == "published"
    assert choose_preset(settings(folder, model={"omics": {"rna": {"ffn_ratio": 4.0}}}), 400) == "published"
    assert choose_preset(settings(folder, model={"preset": "small"}), LARGE_COHORT) == "small"
    data = started.data
    found = resolve_settings(settings(folder, optimizer={"lr": 7e-4}, run={"batch_size": 10}), data)
    assert (found.model.start, found.optimizer.lr, found.run.batch_size) == ("cca", 7e-4, 10)
    assert found.optimizer.omics_lr_share is not None
    published = resolve_settings(settings(folder, model={"preset": "published", "wsi": {}}, run={"epochs": 0}), data)
    assert (published.model.start, published.optimizer.lr, published.run.epochs) == ("random", 1e-3, 300)
    assert published.model.omics == published.model.wsi == {}
    assert WSI in data.modalities
    assert started.settings.run.batch_size == len(data.train)
    # Periods in patches, from the size of the slides.
    assert resolve_settings(settings(folder, model={"wsi": {}}), data).model.wsi["pos_embed_rope_max_period"] == 20
    again = resolve_settings(found, data)
    assert again == found  # nothing is left to choose


def test_chunks_bound_the_patches_in_memory(folder, started, monkeypatch):
    """Slides of 16 patches: chunks of two patients where 32 patches fit, of all where everything does."""
    plain = settings(folder)
    assert resolve_settings(plain, started.data).run.chunk_size == 0
    monkeypatch.setattr("exaonepath.alignment.training.presets._PATCHES", 32)
    assert resolve_settings(plain, started.data).run.chunk_size == 2
    assert resolve_settings(settings(folder, run={"batch_size": 10}), started.data).run.chunk_size == 0
