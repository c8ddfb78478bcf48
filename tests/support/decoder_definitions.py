"""Decoder definitions beside others': the cache handed from call to call, checkpoints edited in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from transom.export.checkpoint import load_checkpoint

WORST = 1e-5  # max|ours - theirs| / max|theirs|
MakeCheckpoint = Callable[..., Path]
SMALL_MARIAN = {
    "d_model": 26, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 31, "decoder_ffn_dim": 29,
}  # fmt: skip


def ours_of(folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"task": None, "max_sizes": {}, "image_size": None, "ignore_unused": False}
    return load_checkpoint(str(folder), **{**defaults, **options})


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None takes one out."""
    words = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in words.items() if value != "absent"}))


def empty_caches(loaded: Any, B: int, C: int) -> list[torch.Tensor]:
    return [
        torch.zeros(B, tensor.shape[1], C, tensor.shape[3])
        for tensor in loaded.graphs[-1].inputs
        if "_cache." in tensor.name
    ]


def decode(
    loaded: Any,
    ids: torch.Tensor,
    chunks: Sequence[int] | None = None,
    source: Sequence[torch.Tensor] = (),
    C: int | None = None,
) -> torch.Tensor:
    """Logits (B, S, V) behind every token, read in chunks of these lengths; ``source`` is the mask and cross pairs."""
    B, S = ids.shape
    caches = empty_caches(loaded, B, C or S)
    module = loaded.parts()["decoder"]
    mask, cross = source[:1], source[1:]
    found, first = [], 0
    for n in chunks or [S]:
        begin, wanted = torch.full((B,), first), torch.arange(n).expand(B, n)
        with torch.no_grad():
            logits, *written = module(ids[:, first : first + n], *mask, begin, wanted, *cross, *caches)
        for new, cache in zip(written, caches, strict=True):
            assert new.data_ptr() == cache.data_ptr()  # in place
        found.append(logits)
        first += n
    assert first == S
    return torch.cat(found, dim=1)


def translate(
    loaded: Any, ids: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, chunks: Any = None
) -> torch.Tensor:
    with torch.no_grad():
        _, *cross = loaded.parts()["encoder"](ids, mask)
    return decode(loaded, target, chunks, (mask, *cross))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= WORST * float(expected.abs().max())


def logits_of(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]
