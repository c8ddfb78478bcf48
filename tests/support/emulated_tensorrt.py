"""The classes of TensorRT's bindings that NVIDIA's own ``tensorrt.plugin`` stands on, so that it runs without TensorRT.

That package is Python, and comes with the bindings' wheel; the bindings themselves need the library. ``install`` puts
what follows in the place of the bindings and loads NVIDIA's package above it, unchanged. ``planned`` asks a plugin what
a builder asks, in its order. Rules are those of NvInferRuntime.h and of the documentation of IExprBuilder; what no rule
is written for fails.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import operator
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

BINDINGS = "tensorrt_bindings"
DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4")
TensorFormat = enum.Enum("TensorFormat", "LINEAR CHW2 HWC")
DimensionOperation = enum.Enum("DimensionOperation", "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV")
PluginFieldType = enum.Enum("PluginFieldType", "UNKNOWN CHAR INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64")
QuickPluginCreationRequest = enum.Enum(
    "QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
)
TensorRTPhase = enum.Enum("TensorRTPhase", "BUILD RUNTIME")
PluginArgType = enum.Enum("PluginArgType", "INT")
PluginArgDataType = enum.Enum("PluginArgDataType", "INT8 INT16 INT32")

OPERATIONS = {
    DimensionOperation.SUM: operator.add,
    DimensionOperation.PROD: operator.mul,
    DimensionOperation.SUB: operator.sub,
    DimensionOperation.FLOOR_DIV: operator.floordiv,
    DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
    DimensionOperation.MAX: max,
    DimensionOperation.MIN: min,
}


class IDimensionExpr:
    """A number, the size of an axis by its name, or an operation on two of these."""

    def __init__(self, number: int | None = None, name: str = "", parts: tuple[Any, ...] = ()) -> None:
        self._number, self._name, self._parts = number, name, parts

    def is_constant(self) -> bool:
        return self._number is not None

    def get_constant_value(self) -> int:
        assert self._number is not None, "not a constant"
        return self._number

    def value(self, sizes: Mapping[str, int]) -> int:
        """What it is when an engine runs, with these sizes."""
        if self._number is not None:
            return self._number
        if self._name:
            return sizes[self._name]
        kind, first, second = self._parts
        return int(OPERATIONS[kind](first.value(sizes), second.value(sizes)))


class IExprBuilder:
    def constant(self, number: int) -> IDimensionExpr:
        return IDimensionExpr(number)

    def operation(self, kind: Any, first: IDimensionExpr, second: IDimensionExpr) -> IDimensionExpr:
        assert isinstance(first, IDimensionExpr)
        assert isinstance(second, IDimensionExpr)
        if first.is_constant() and second.is_constant():
            return IDimensionExpr(OPERATIONS[kind](first.get_constant_value(), second.get_constant_value()))
        return IDimensionExpr(parts=(kind, first, second))


class DimsExprs(list[Any]):
    def __init__(self, given: int | Iterable[Any]) -> None:
        super().__init__([None] * given if isinstance(given, int) else given)


class Dims(list[int]):
    MAX_DIMS = 8


class Plain:
    """A class whose instances hold what is put there; NVIDIA's plugins derive from several of these."""

    def __init__(self, *arguments: Any) -> None:
        pass


class PluginField(Plain):
    def __init__(self, name: str, data: Any, kind: Any) -> None:
        self.name, self.data, self.type = name, data, kind


class PluginTensorDesc(Plain):
    type = format = None
    scale = 0.0


class DynamicPluginTensorDesc(Plain):
    def __init__(self, dtype: Any, shape: Sequence[int]) -> None:
        self.desc = PluginTensorDesc()
        self.desc.type, self.desc.format, self.desc.dims = dtype, TensorFormat.LINEAR, Dims(shape)
        self.opt = self.min = self.max = Dims(shape)


class Logger(Plain):
    WARNING = 2

    def log(self, severity: int, message: str) -> None:
        pass


class Registry:
    def __init__(self) -> None:
        self._creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self._creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self._creators[name, version, namespace]


REGISTRY = Registry()
PUBLIC = (
    *(DataType, TensorFormat, DimensionOperation, PluginFieldType, QuickPluginCreationRequest, TensorRTPhase),
    *(PluginArgType, PluginArgDataType, IDimensionExpr, IExprBuilder, DimsExprs, Dims, PluginField, PluginTensorDesc),
    *(DynamicPluginTensorDesc, Logger),
)
INTERFACES = (
    *("IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime", "IPluginV3QuickAOTBuild"),
    *("ISymExpr", "ITensor", "IPluginCreatorV3Quick"),
)


def install() -> Any:
    """NVIDIA's ``tensorrt.plugin`` on the classes above."""
    tensorrt: Any = types.ModuleType("tensorrt")
    for given in PUBLIC:
        setattr(tensorrt, given.__name__, given)
    for name in INTERFACES:
        setattr(tensorrt, name, type(name, (Plain,), {}))
    tensorrt.PluginFieldCollection = list
    tensorrt.get_plugin_registry = lambda: REGISTRY
    tensorrt.float32, tensorrt.float16, tensorrt.int32 = DataType.FLOAT, DataType.HALF, DataType.INT32
    spec = importlib.util.find_spec(BINDINGS)
    assert spec is not None
    tensorrt.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["tensorrt"] = tensorrt
    tensorrt.plugin = importlib.import_module("tensorrt.plugin")
    return tensorrt.plugin


def planned(
    name: str, dtypes: Sequence[str], shapes: Sequence[Sequence[int | str]], attributes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What a builder is told of the plugin ``name`` of our namespace, for each tactic; sizes that vary have names."""
    fields = [
        PluginField(key, np.frombuffer(value.encode(), np.int8), PluginFieldType.CHAR)
        if isinstance(value, str)
        else PluginField(key, np.array([value], np.float32), PluginFieldType.FLOAT32)
        for key, value in attributes.items()
    ]  # as the parser makes them of an ONNX STRING and an ONNX FLOAT
    creator = REGISTRY.get_creator(name, "1", "transom")
    request = QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(name, "transom", fields, TensorRTPhase.BUILD, request)
    kinds = [DataType[dtype] for dtype in dtypes]
    (result,) = plugin.get_output_data_types(kinds, [len(shape) for shape in shapes])
    builder = IExprBuilder()
    inputs = [
        DimsExprs(IDimensionExpr(size) if isinstance(size, int) else IDimensionExpr(name=size) for size in shape)
        for shape in shapes
    ]
    (output,) = plugin.get_output_shapes(inputs, [], builder)
    everything = [(kind, shape) for kind, shape in zip(kinds, shapes, strict=True)] + [(result, shapes[0])]
    in_out = [
        DynamicPluginTensorDesc(kind, [s if isinstance(s, int) else -1 for s in shape]) for kind, shape in everything
    ]
    combinations = plugin.get_supported_format_combinations(in_out, len(shapes))
    assert [each.type for each in combinations] == [kind for kind, _ in everything]
    assert {each.format for each in combinations} == {TensorFormat.LINEAR}
    plugin.configure_plugin(in_out[: len(shapes)], in_out[len(shapes) :])
    found = []
    for tactic in plugin.get_valid_tactics():
        plugin.set_tactic(tactic)
        launch, integers = types.SimpleNamespace(), Setter()
        plugin.get_launch_params(inputs, in_out, len(shapes), launch, integers, builder)
        kernel, ptx = plugin.get_kernel([each.desc for each in in_out[: len(shapes)]], [in_out[-1].desc])
        found.append({"name": kernel, "ptx": ptx.decode(), "launch": launch, "integers": integers, "output": output})
    return found


class Setter(dict[int, Any]):
    """The integers of a launch, by their place."""

    nbSymExprs = 0

    def values_for(self, sizes: Mapping[str, int]) -> list[int]:
        assert sorted(self) == list(range(self.nbSymExprs))
        assert all(each.dtype is PluginArgDataType.INT32 for each in self.values())
        return [self[place].expr.value(sizes) for place in range(self.nbSymExprs)]
