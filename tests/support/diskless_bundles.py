"""Bundles that need no disk and no graph: what ``load`` makes of a bundle.json's bytes alone."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

TINY = {  # a tokenizer.json: what bundles read besides must cost nothing here
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
}  # fmt: skip
MARIAN = {
    "unigram": {
        "pieces": {"a": -1.0}, "unknown_score": -10.0, "charsmap": "", "add_dummy_prefix": True,
        "remove_extra_whitespaces": True, "escape_whitespaces": True, "whitespace_as_suffix": False,
    },
    "vocabulary": {"a": 1, "</s>": 0, "<unk>": 2}, "added": [], "surfaces": {}, "unk_token": "<unk>",
    "eos_token": "</s>",
}  # fmt: skip
FILES = {"tokenizers": json.dumps(TINY).encode(), "marian": json.dumps(MARIAN).encode()}


def load_manifest(data: bytes) -> Any:
    """What ``transom.runtime.load`` does with the bytes of a bundle.json, up to the task; raises as it does.

    Every file of the bundle is a tiny tokenizer, Marian's where the name says so; graphs are as they are described.
    """
    from transom.runtime.bundle import versioned
    from transom.runtime.errors import BundleError
    from transom.runtime.loading import load_with_backends
    from transom.runtime.manifest import MANIFEST, manifest_from_json
    from transom.runtime.text.tokenizer import TextTokenizer

    manifest = manifest_from_json(versioned(data, MANIFEST))

    def read(name: str) -> bytes:
        if name not in manifest.files:
            raise BundleError(f"no file {name}")
        return FILES["marian" if "marian" in name else "tokenizers"]

    def open_tokenizer(spec: Any, *limits: Any) -> Any:
        return TextTokenizer(read(spec.file), spec, *limits)

    bundle: Any = SimpleNamespace(manifest=manifest, read=read, open_tokenizer=open_tokenizer)
    backends: Any = {file.graph.name: SimpleNamespace(graph=file.graph, device="cpu") for file in manifest.graphs}
    return load_with_backends(bundle, backends)


def slim(words: dict[str, Any]) -> dict[str, Any]:
    """A manifest of the same structure with less to read; its tokenizers need no ids of special tokens."""
    words["parity"]["cases"] = words["parity"].get("cases", [])[:1]
    words["labels"] = words.get("labels", [])[:3]
    for name in ("tokenizer", "target_tokenizer"):
        if words.get(name):
            words[name].update(pad_token=None, mask_token=None, mask_id=None)
    return words
