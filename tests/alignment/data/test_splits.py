"""Splits: by patient, stratified, the same whatever the order of rows."""

import numpy as np
import pandas as pd
import pytest

from exaonepath.alignment.data.splits import Split, split_patients
from exaonepath.errors import DataFileError, SettingsError

PEOPLE = [f"p{i:03d}" for i in range(103)]
LABELS = pd.Series(np.where(np.arange(103) % 5 == 0, "rare", "usual"), PEOPLE, name="subtype")


def test_everybody_once_in_the_right_shares_and_strata():
    split = split_patients(PEOPLE, LABELS)
    assert sorted(p for part in split.parts.values() for p in part) == PEOPLE
    assert split.stratified_by == "subtype"
    for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        # Dealt to whoever lags most: no part is a patient off, nor two within a label.
        assert abs(len(split[name]) - share * 103) <= 1
        assert abs((LABELS[list(split[name])] == "rare").sum() - share * 21) <= 2


def test_order_of_rows_changes_nothing_and_the_seed_everything():
    shuffled = LABELS.sample(frac=1, random_state=3)
    first = split_patients(PEOPLE, LABELS, seed=1)
    assert split_patients(list(shuffled.index), shuffled, seed=1) == first
    assert split_patients(PEOPLE, LABELS, seed=2)["test"] != first["test"]
    # As drawn when this was written: a split must not change with a version of this package.
    assert split_patients(PEOPLE[:10], seed=1, fractions={"a": 0.5, "b": 0.5})["a"] == (
        "p001",
        "p004",
        "p005",
        "p006",
        "p009",
    )


def test_patients_without_a_label_are_a_stratum_of_their_own():
    labels = LABELS.copy().astype(object)
    labels.iloc[:40] = None
    split = split_patients(PEOPLE, labels)
    assert abs(len(set(split["test"]) & set(PEOPLE[:40])) - 8) <= 2


def test_a_file_holds_it(tmp_path):
    split = split_patients(PEOPLE, LABELS, seed=4)
    split.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json") == split
    assert split.restricted_to(PEOPLE[:50]).parts.keys() == split.parts.keys()
    assert all(p in PEOPLE[:50] for part in split.restricted_to(PEOPLE[:50]).parts.values() for p in part)


@pytest.mark.parametrize("text", ["", "[]", '{"parts": 3}', '{"parts": {"train": ["a"], "test": ["a"]}}'])
def test_files_that_hold_none(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(DataFileError, match="cannot be read as a split"):
        Split.load(tmp_path / "split.json")
    with pytest.raises(DataFileError):
        Split.load(tmp_path / "none.json")


def test_what_cannot_be_split():
    with pytest.raises(SettingsError, match="add up to 1"):
        split_patients(PEOPLE, fractions={"train": 0.5, "test": 0.4})
    with pytest.raises(SettingsError, match="more than once: p000"):
        split_patients([*PEOPLE, "p000"])
    with pytest.raises(SettingsError, match="nobody is left for val"):
        split_patients(PEOPLE[:3])
    with pytest.raises(SettingsError, match="no part 'dev'"):
        split_patients(PEOPLE)["dev"]


@pytest.mark.parametrize("patients_per_label", [1, 2])
def test_a_column_that_is_nearly_unique_does_not_fix_the_split(patients_per_label, caplog):
    labels = pd.Series([f"{n // patients_per_label}" for n in range(103)], PEOPLE, name="days")
    splits = [split_patients(PEOPLE, labels, seed=seed) for seed in range(6)]
    shared = [len(set(a["test"]) & set(splits[0]["test"])) for a in splits[1:]]
    # Of two draws of 21 of 103, 4.3 are shared by chance, with a deviation of 1.7: four of them.
    assert max(shared) <= 11
    for split in splits:
        assert abs(len(split["test"]) - 0.2 * 103) <= 1
    warned = patients_per_label == 1
    assert ("103 of the 103 labels in the column 'days' have one patient each" in caplog.text) == warned
    assert split_patients(PEOPLE[::-1], labels[::-1], seed=3) == splits[3]


def test_labels_that_can_be_spread_are_split_as_ever(caplog):
    labels = LABELS.copy()
    labels.iloc[3] = "unique"
    # As drawn before rare labels were put together.
    drawn = "p013 p027 p030 p052 p059 p061 p070 p079 p101 p102"
    assert " ".join(split_patients(PEOPLE, LABELS, seed=1)["val"]) == drawn
    assert not caplog.records
    found = split_patients(PEOPLE, labels, seed=1)
    assert abs(len(found["test"]) - 0.2 * 103) <= 1
    assert not caplog.records  # one label of three has a single patient: usual enough
