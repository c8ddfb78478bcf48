"""Write lines of a builder's log as TensorRT-RTX 1.7 does."""

from __future__ import annotations

BETWEEN = "Inputs: [ { Name: x, Datatype: %s } ], Constants: [], Outputs: [], TacticName: t, StreamId: 0"


def layer(name: str, *nodes: str, kind: str = "kgen", dtype: str = "Half") -> str:
    """A line as TensorRT 1.7 writes it: the ONNX nodes are parted by the character 0x1f."""
    metadata = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return f"Name: {name}, LayerType: {kind}, {BETWEEN % dtype}, Metadata: {metadata}"
