"""What must not be overlooked about a slide: whoever looks at its colours has to know these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from exaonepath.slides.image import SlideImage
from exaonepath.slides.scale import ASSUMED
from exaonepath.text import printable
from exaonepath.viz.values.results import Results


class SlideFacts(Protocol):
    """What is known of a slide file: where its pixel size comes from, doubts about it, and (the beginning of) its
    fingerprint."""

    @property
    def mpp_source(self) -> str: ...

    @property
    def doubts(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class OpenSlideFacts:
    """`SlideFacts` of an open slide."""

    mpp_source: str
    doubts: tuple[str, ...]
    fingerprint: str

    @classmethod
    def of(cls, slide: SlideImage) -> OpenSlideFacts:
        """The facts of a slide; the errors of `SlideImage.fingerprint` are raised."""
        return cls(slide.mpp_source, slide.scale_doubts, slide.fingerprint())


def banners(info: SlideFacts | None, results: Results | None) -> list[dict[str, str]]:
    """Warnings that the viewer shows above the slide and pictures below it, each with a kind ("random", "scale",
    "slide") and a text."""
    found: list[dict[str, str]] = []
    if results is not None and _random(results):
        text = (
            "Random weights: colours, clusters and similarities show stain and texture as a random network sees them, "
            "not learned pathology."
        )
        found.append({"kind": "random", "text": text})
    source = info.mpp_source if info is not None else None if results is None else results.mpp_source
    if source == ASSUMED or (results is not None and results.mpp_source == ASSUMED):
        text = (
            "Assumed scale: the slide does not state its pixel size, and 0.5 µm was assumed. Lengths, magnifications "
            "and the size of patches may be wrong."
        )
        found.append({"kind": "scale", "text": text})
    elif info is not None and info.doubts:
        found.append({"kind": "scale", "text": f"Doubtful scale: the slide {'; '.join(map(printable, info.doubts))}."})
    fingerprint = None if results is None else results.slide_fingerprint
    if info is not None and fingerprint is not None and not fingerprint.startswith(info.fingerprint):
        text = "Another slide file: these results were computed from a file with other content. Positions may not fit."
        found.append({"kind": "slide", "text": text})
    return found


def _random(results: Results) -> bool:
    return bool(results.attrs.get("random_weights")) or str(results.attrs.get("weights", "")).startswith("random:")
