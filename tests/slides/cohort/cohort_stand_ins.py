"""Encoders that cost nothing, for runs in other processes: a module of its own, which those can import.

As a program it is a process of a cohort run: `python cohort_stand_ins.py OUT SLIDE...`. It prints one JSON object a
slide, and exits with the run's exit status. The environment disturbs it:

    STAND_IN_BATCH_SECONDS  how long a batch takes
    STAND_IN_DIE_AT         "<patches of a slide>": the process kills itself in the batch in which that many were begun
    STAND_IN_RAY            address of a Ray cluster that does the work, slowly
    STAND_IN_STALE_AFTER    seconds until a claim is stale
    STAND_IN_LOG            a file to which each batch adds a line with its number of patches
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch

from exaonepath.encoders.configuration import ExaonePathSlideEncoderConfig
from exaonepath.encoders.loading import LoadedEncoder, randomize, weights_fingerprint
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import WeightsError
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.encoders import EncoderPair
from exaonepath.slides.cohort.outcome import SlideOutcome
from exaonepath.slides.cohort.run import RunOptions, RunStatus, encode_cohort
from exaonepath.slides.stages import EncodeSettings

WIDTH = 24
SETTINGS = {"patching": {"step_size": 90, "a_t": 0.1}, "batch_size": 4, "num_workers": 1, "dtype": "float32"}
_SLIDE = {
    "input_dim": WIDTH, "embed_dim": 16, "depth": 2, "num_heads": 2, "ffn_layer": "swiglu", "n_storage_tokens": 2,
    "nope_interval": 2, "embed_use_norm": True,
}  # fmt: skip


class Colours(torch.nn.Module):
    """Maps [B, 3, crop, crop] to [B, WIDTH]: colours of a coarse grid, mixed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.nn.Parameter(torch.randn(48, WIDTH, generator=generator) / 7)
        self.batches: list[int] = []
        self.seconds = float(os.environ.get("STAND_IN_BATCH_SECONDS", "0"))
        self.die_at = int(os.environ.get("STAND_IN_DIE_AT", "0"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.batches.append(len(x))
        if "STAND_IN_LOG" in os.environ:
            with Path(os.environ["STAND_IN_LOG"]).open("a") as log:
                log.write(f"{len(x)}\n")
        if len(x) > 1 and self.die_at and sum(self.batches) >= self.die_at:  # of one image: asked for the width
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.mix


@cache
def _slide_encoder(weights: str) -> LoadedEncoder:
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=_SLIDE))
    randomize(model, len(weights))
    return LoadedEncoder(model.eval(), weights, weights_fingerprint(model), True)


def load(weights: str, device: torch.device) -> EncoderPair:
    """Stand-ins for the encoders with these weights."""
    patch = LoadedEncoder(Colours(len(weights)).eval(), weights, f"colours:{weights}", True)
    return EncoderPair(patch, _slide_encoder(weights))


def deadly(weights: str, device: torch.device) -> EncoderPair:
    """Stand-ins whose first batch kills the process."""
    pair = load(weights, device)
    pair.patch.model.die_at = 1
    return pair


def load_noting(noted: Path, weights: str, device: torch.device) -> EncoderPair:
    """Slow stand-ins that append the number of patches of each batch to a file, when it was encoded."""
    pair = load(weights, device)

    def note(module: torch.nn.Module, given: object, result: torch.Tensor) -> None:
        with noted.open("a") as file:
            file.write(f"{len(result)}\n")

    pair.patch.model.seconds = 0.2
    pair.patch.model.register_forward_hook(note)
    return pair


def no_weights(weights: str, device: torch.device) -> EncoderPair:
    """Weights that cannot be loaded."""
    raise WeightsError(f"no such weights: {weights}")


def dies_while_loading(weights: str, device: torch.device) -> EncoderPair:
    """A process that is killed before its encoders are loaded."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def results(out: Path) -> dict[str, bytes]:
    """The results in an output folder, and whatever else lies with them."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for folder in ("patches", "embeddings", "masks", "contours")
        for path in sorted((out / folder).rglob("*"))
        if path.is_file()
    }


def as_process(arguments: list[str], environment: dict[str, str | None], stdout: str, stderr: str) -> None:
    """What a process of `multiprocessing` runs in place of the program, with its own environment and streams."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    # `multiprocessing` leaves Ctrl-C to the parent's process group; here each process is asked by itself.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(arguments))


def main(arguments: list[str]) -> int:
    """Encode slides with the stand-ins; returns the exit status."""
    torch.set_num_threads(1)
    out, *paths = arguments
    slides = [CohortSlide(Path(path), Path(path).stem) for path in paths]
    options = RunOptions(poll=(0.05, 0.2), stale_after=float(os.environ.get("STAND_IN_STALE_AFTER", "120")))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = RunStatus()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    try:
        for outcome in _outcomes(slides, Path(out), options):
            status.add(outcome)
            print(json.dumps({outcome.slide.id: outcome.outcome, "error": str(outcome.error or "")}), flush=True)
        status.ended = True
    except KeyboardInterrupt:
        pass
    return status.exit_status


def _outcomes(slides: list[CohortSlide], out: Path, options: RunOptions) -> Iterator[SlideOutcome]:
    settings, address = EncodeSettings(**SETTINGS), os.environ.get("STAND_IN_RAY")
    if address is None:
        return encode_cohort(slides, out, load("stand-in", torch.device("cpu")), settings, options, load=load)
    import cohort_stand_ins  # under this name, the nodes can import it

    from exaonepath.slides.cohort.dispatch import CohortWork
    from exaonepath.slides.cohort.ray_cluster import RayOptions
    from exaonepath.slides.cohort.ray_engine import encode_on_ray

    slow = partial(cohort_stand_ins.load_noting, out.with_name("batches"))
    return encode_on_ray(CohortWork(slides, out, "stand-in", settings, options, slow), RayOptions(address))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
