"""The models and sizes that are measured."""

from __future__ import annotations

from dataclasses import dataclass

ENCODER, GENERATION, TRANSLATION = "encoder", "generation", "translation"
THREADS = 2
VOCABULARY = {"gpt": 50257, "transformer": 32000}


@dataclass(frozen=True)
class Workload:
    """One model at one size: B rows of S tokens (images: no S), then ``new`` tokens by ``beams`` beams.

    ``part`` is the input of CLIP that is given: "image" or "text".
    """

    name: str
    title: str
    model: str
    kind: str
    B: int = 1
    S: int = 0
    new: int = 0
    beams: int = 1
    part: str = ""
    core: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """Return what is timed: "run", or "prefill" and "step" of a generation."""
        return ("prefill", "step") if self.kind == GENERATION else ("run",)


def bert(S: int, B: int = 1, *, core: bool = False) -> Workload:
    return Workload(f"bert-s{S}-b{B}", f"BERT-base S={S} B={B}", "bert", ENCODER, B, S, core=core)


def gpt(S: int, new: int, *, core: bool) -> Workload:
    return Workload(f"gpt2-{S}-{new}", f"GPT-2 124M {S}+{new}", "gpt", GENERATION, 1, S, new, core=core)


def marian(beams: int, title: str) -> Workload:
    name = f"marian-{title.replace(' ', '')}"
    return Workload(name, f"Transformer 6+6 20→20 {title}", "transformer", TRANSLATION, 1, 20, 20, beams)


WORKLOADS = {
    workload.name: workload
    for workload in (
        bert(128, core=True),
        bert(128, 8, core=True),
        Workload("vit-b1", "ViT-B/16 B=1", "vit", ENCODER),
        Workload("clip-image-b1", "CLIP B/32 image B=1", "clip", ENCODER, part="image"),
        Workload("clip-text-b8", "CLIP B/32 text S=77 B=8", "clip", ENCODER, 8, 77, part="text"),
        gpt(64, 64, core=True),
        marian(1, "greedy"),
        marian(4, "beam 4"),
        *(bert(S) for S in (16, 32, 64, 256, 512)),
        gpt(900, 100, core=False),
    )
}
