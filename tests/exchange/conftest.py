"""Results of two slides, made once with encoders that cost nothing, and the libraries that read the exports."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from stand_in_encoders import stand_in_patch_encoder, stand_in_slide_encoder

from exaonepath.encoders.loading import LoadedEncoder
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.encode import encode_slide
from exaonepath.slides.image import SlideImage
from exaonepath.synthetic import make_slide

FIRST, SECOND = "first", "zweite Färbung.1"

# `make test-exchange` installs the tools that read the exports next to the environment: scanpy, squidpy, hs2p, ...
SITE = os.environ.get("EXAONEPATH_EXCHANGE_SITE")
if SITE and SITE not in sys.path:
    sys.path.append(SITE)


def why_not_installed(name: str) -> str:
    """Why a tool cannot be imported, as the installer found it; else how to install it."""
    reasons = json.loads(Path(SITE, "not_installed.json").read_text()) if SITE else {}
    return f"cannot be installed: {reasons[name]}" if name in reasons else "`make test-exchange` installs it"


def tool(name: str) -> Any:
    """A library of a tool, by its full name; the test is skipped with the reason if it is not here."""
    # Some of these raise other errors than ImportError if a library of theirs is missing or too new.
    try:
        return importlib.import_module(name)
    except Exception as exc:  # noqa: BLE001
        pytest.skip(f"{name} ({type(exc).__name__}: {exc}): {why_not_installed(name.partition('.')[0])}")


@pytest.fixture(scope="session")
def slide_encoder() -> LoadedEncoder:
    return stand_in_slide_encoder()


@pytest.fixture(scope="session")
def made(tmp_path_factory, slide_encoder) -> Path:
    """An output folder of two slides, and `slides/`; not to be changed (see `results`)."""
    folder = tmp_path_factory.mktemp("exchange")
    slides = folder / "slides"
    slides.mkdir()
    make_slide(slides / f"{FIRST}.svs", 1800, 1500, fragments=2, holes=False, seed=3)
    make_slide(slides / "second.svs", 1500, 1100, fragments=2, holes=False, seed=4, mpp=0.25)
    patch_encoder = stand_in_patch_encoder("some/Encoder-1")
    patching = {"patch_size": 128, "close": 40, "a_t": 0.2, "a_h": 0.2}
    given = (CohortSlide(slides / f"{FIRST}.svs", FIRST, "P1"), CohortSlide(slides / "second.svs", SECOND))
    for slide in given:
        with SlideImage(slide.path, name=slide.id) as image:
            encode_slide(
                image,
                folder,
                patch_encoder,
                slide_encoder,
                patching=patching,
                keep="all",
                num_workers=0,
                patient=slide.patient,
            )
    return folder


@pytest.fixture
def results(made, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "results"))
