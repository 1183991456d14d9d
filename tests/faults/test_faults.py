"""Every file operation of `encode`, `slide` and `train` failed, killed and interrupted, one at a time.

What has to hold, whatever was disturbed: exit 0 means the undisturbed run's content; an error is one line, and what
lies there under a final name is what the undisturbed run wrote; and the same command, run again, ends with the
undisturbed run's content and no other file. `make test` takes as many places as fit four seconds a stage;
EXAONEPATH_FAULTS may name other seconds, or `all` (`make faults`), which takes them all and prints what it met.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest

from exaonepath.synthetic import make_slide

ALL = os.environ.get("EXAONEPATH_FAULTS") == "all"
# For each stage's places, where not all are taken.
SECONDS = float("inf") if ALL else float(os.environ.get("EXAONEPATH_FAULTS", 4))
PARTS = 8 if ALL else 1  # all places take an hour: several tests keep two processes busy, and show how far they are

FAULTS = {
    "EIO once": {"action": "fail", "error": errno.EIO},
    "EIO from there on": {"action": "fail", "error": errno.EIO, "ongoing": True},
    "ENOSPC once": {"action": "fail", "error": errno.ENOSPC},
    "ENOSPC from there on": {"action": "fail", "error": errno.ENOSPC, "ongoing": True},
    "killed before": {"action": "kill before"},
    "killed inside": {"action": "kill inside"},
    "killed after": {"action": "kill after"},
    "SIGINT": {"action": "signal", "error": signal.SIGINT},
    "SIGTERM": {"action": "signal", "error": signal.SIGTERM},
}
WRITING = set("wsntulmh")  # write, sync, rename, truncate, unlink, link, make a folder, change a mode


@dataclass
class Stage:
    """A command: what is copied into a case's folder first, and the arguments."""

    inputs: dict[str, Path]
    arguments: list[str]
    ends_after_signal: bool = (
        False  # training asked to stop in its last step has nothing left to do: 0, and all is there
    )

    def begin(self, folder: Path) -> list[str]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, source in self.inputs.items():
            shutil.copy(source, folder / name)
        return [argument.format(folder=folder) for argument in self.arguments]


def _values(group) -> dict:
    found = {f"@{name}": np.asarray(value).tolist() for name, value in group.attrs.items()}
    for name, item in group.items():
        found[name] = _values(item) if isinstance(item, h5py.Group) else (item.dtype.str, item[()].tobytes())
        if isinstance(item, h5py.Dataset):
            found[f"{name}@"] = {key: np.asarray(value).tolist() for key, value in item.attrs.items()}
    return found


def content(folder: Path) -> dict:
    """What lies in a folder, decoded: arrays and attributes, tensors, pictures; of other files that they are there."""
    from safetensors.numpy import load_file

    found: dict = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "runs" in (path.name, path.parent.name) or (path.name == "failures" and not any(path.iterdir())):
            continue  # logs, without which a run goes on; where failures were noted, and forgotten since
        if path.is_dir():
            found[name] = "folder"
        elif path.suffix == ".h5":
            with h5py.File(path, "r") as file:
                found[name] = _values(file)
        elif path.suffix == ".safetensors":
            found[name] = {key: (str(t.dtype), t.shape, t.tobytes()) for key, t in load_file(path).items()}
        elif path.suffix == ".jpg":
            found[name] = path.read_bytes()
        elif path.name == "settings.json":
            found[name] = json.loads(path.read_text())
        else:
            found[name] = "file"
    return found


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def encode(work):
    slide = make_slide(work / "one.svs", 1200, 1000, fragments=1, holes=False)
    return Stage({}, ["encode", str(slide), "--out", "{folder}/out", "--weights", "random:0", "--batch-size", "4"])


@pytest.fixture(scope="session")
def slide(work, encode, server):
    done = server(encode.begin(work / "features"), work / "nothing")
    assert done["status"] == 0, done
    features = work / "one_features.h5"
    shutil.copy(work / "features" / "out" / "patches" / "one_features.h5", features)
    return Stage(
        {"in_features.h5": features},
        ["slide", "{folder}/in_features.h5", "--out", "{folder}/one.h5", "--weights", "random:0"],
    )


@pytest.fixture(scope="session")
def train(work):
    pytest.importorskip("anndata", reason="needs the extra `train`")
    from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort

    cohort = work / "cohort"
    sizes = {"rna": 6, "snp": 5, "cnv": 5, "methylation": 5}
    write_synthetic_cohort(cohort, SyntheticCohortSettings(patients=12, patches_per_slide=4, feature_dim=8, **sizes))
    settings = work / "settings.toml"
    settings.write_text(
        f"""
[data]
mudata = "{cohort}/cohort.h5mu"
slides = "{cohort}/slides.csv"
validation_share = 0.25
test_share = 0
[model]
projection_dim = 4
slide_start_steps = 0  # with it, best/ is replaced during the run, and each version would have to be known here
wsi = {{ embed_dim = 16, depth = 1, num_heads = 2, n_storage_tokens = 0, ffn_layer = "swiglu" }}
omics = {{ embed_dim = 4 }}
[run]
steps = 2
batch_size = 6
device = "cpu"
tensorboard = false
monitor = false
checkpoint_every = 1
"""
    )
    return Stage({}, ["train", str(settings), "--out", "{folder}/run"], ends_after_signal=True)


class Campaign:
    """Cases of one stage against its undisturbed run."""

    def __init__(self, stage: Stage, server, folder: Path) -> None:
        self.stage, self.server, self.folder = stage, server, folder
        done = server(stage.begin(folder), folder)
        assert done["status"] == 0, done
        self.operations = done["operations"]
        assert self.operations
        self.reference = content(folder)
        self.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        # Content does not depend on the run: what differs below, a fault did.
        again = server(stage.begin(folder), folder)
        assert content(folder) == self.reference
        assert again["operations"] == self.operations
        self.seconds = again["seconds"]
        self.outcomes: Counter = Counter()

    def cases(self, part: int):
        """(place, fault), those of writing first; all of them, or as many as fit the time, spread over all places."""
        places = range(part, len(self.operations), PARTS)
        everything = [(place, fault) for place in places for fault in FAULTS if self.differs(place, fault)]
        if ALL:
            return everything
        random.Random(0).shuffle(everything)
        return sorted(everything, key=lambda case: self.operations[case[0]] not in WRITING)

    def differs(self, place: int, fault: str) -> bool:
        """Whether a case is possible, and not the same as another one.

        No disk is full for those who read; and a process killed before an operation leaves what one killed after the
        previous operation leaves.
        """
        if FAULTS[fault].get("error") == errno.ENOSPC:
            # Opening may make a file, and a remote file system writes when a file is closed.
            return self.operations[place] in WRITING or self.operations[place] in "oc"
        return FAULTS[fault]["action"] != "kill before" or place == 0

    def run(self, part: int) -> dict[str, list[list[str]]]:
        """Disturb one place after another; of each fault, what went wrong in each case."""
        end, found = time.monotonic() + SECONDS, {}
        for n, (place, fault) in enumerate(self.cases(part)):
            if time.monotonic() > end and n >= 10:
                break
            about = f"{fault} at {place} ({self.operations[place]})"
            problems = [f"{about}: {problem}" for problem in self.disturb(at=place, **FAULTS[fault])]
            if problems:
                print(*problems, sep="\n", file=sys.stderr, flush=True)  # the other places may take an hour
            found.setdefault(fault, []).append(problems)
        return found

    def disturb(self, **plan) -> list[str]:
        """One case; returns what is wrong with it."""
        arguments = self.stage.begin(self.folder)
        done = self.server(arguments, self.folder, **plan)
        status, action = done["status"], plan["action"]
        self.outcomes[f"{action}: {status}"] += 1
        problems = []
        errors = [line for line in done["stderr"].splitlines() if line.startswith("error:")]
        if "Traceback" in done["stderr"]:
            problems.append(f"a traceback: {done['stderr']}")
        if action.startswith("kill"):
            if done["fired"] and status != -signal.SIGKILL:
                problems.append(f"status {status}, not killed")
        elif action == "signal":
            if done["fired"] and status != 130 and not (status == 0 and self.stage.ends_after_signal):
                problems.append(f"status {status}, not 130: {done['stderr']}")
        elif status == 1:
            if len(errors) != 1:
                problems.append(f"{len(errors)} lines of error: {done['stderr']}")
        elif status != 0:
            problems.append(f"status {status}: {done['stderr']}")
        try:
            found = content(self.folder)
        except (OSError, ValueError, KeyError) as exc:
            return [*problems, f"an unreadable file: {exc}"]
        for name, value in found.items():
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if not hidden and name in self.reference and value != self.reference[name]:
                problems.append(f"{name} has other content (status {status})")
            checkpoint = "checkpoints" in name  # an earlier one, which the undisturbed run has removed since
            if not hidden and not checkpoint and name not in self.reference and value not in ("file", "folder"):
                problems.append(f"{name} should not be there (status {status})")
        if status == 0 and set(self.reference) - set(found):
            problems.append(f"status 0, but missing: {sorted(set(self.reference) - set(found))}")
        again = self.server(arguments, self.folder)
        if again["status"] != 0:
            problems.append(f"the second run ends with {again['status']}: {again['stderr']}")
        else:
            found = content(self.folder)
            if found != self.reference:
                different = sorted(n for n in {*found, *self.reference} if found.get(n) != self.reference.get(n))
                problems.append(f"after the second run other than undisturbed: {different}")
        return problems


@pytest.fixture(scope="session")
def campaign(server, work, request):
    """Of a stage by its name; the undisturbed runs of a stage are made once."""
    made: dict[str, Campaign] = {}

    def of(name: str) -> Campaign:
        if name not in made:
            made[name] = Campaign(request.getfixturevalue(name), server, work / name)
        return made[name]

    return of


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", ["encode", "slide", "train"])
def test_any_file_operation_may_fail(name, part, campaign, table):
    found = campaign(name).run(part)
    for fault, cases in found.items():
        table(f"{name}, {fault}", len(cases), sum(not problems for problems in cases), "")
    wrong = [problem for cases in found.values() for problems in cases for problem in problems]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:40])


def test_a_disk_of_any_size_is_full_or_enough(campaign, table):
    """Room for 0 bytes up to all of them: an error of one line, and the same command goes on where there is room."""
    encode = campaign("encode")
    count = 26 if ALL else 8
    wrong, before = [], encode.outcomes.copy()
    for i in range(count):
        budget = int(2 * encode.bytes * i / (count - 1))  # twice: what is finished was written in parts before
        plan = {"action": "full", "error": errno.ENOSPC, "budget": budget}
        wrong += [f"{budget} bytes: {problem}" for problem in encode.disturb(**plan)]
    table("encode, a disk of any size", count, count - len(wrong), "")
    assert not wrong, "\n".join(wrong)
    outcomes = encode.outcomes - before
    assert outcomes["full: 1"] > 1
    assert outcomes["full: 0"] >= 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize("name", ["encode", "slide", "train"])
def test_a_file_system_without_locks(name, code, campaign, table):
    stage = campaign(name)
    before = stage.outcomes.copy()
    wrong = stage.disturb(action="no locks", error=code)
    table(f"{name}, a file system without locks", 1, int(not wrong), "")
    assert not wrong
    assert stage.outcomes - before == {"no locks: 0": 1}
