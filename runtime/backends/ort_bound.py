"""Run an ONNX Runtime session over memory that is bound once, however often it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import local
from typing import Any

import numpy as np

from transom.runtime.backends.base import Array
from transom.runtime.errors import BackendError, one_line
from transom.runtime.feeds import storage
from transom.runtime.graph_spec import Graph, Tensor, recurrent_inputs
from transom.runtime.process_bound import ProcessBound

BFLOAT16 = 16  # TensorProto.DataType: numpy has no word for it


class OrtBoundRun(ProcessBound):
    """A run of a graph with fixed inputs, arrays of host memory or OrtValues; what they hold may change between runs.

    Binding a tensor costs 3 us, and a step of GPT-2 has 52 of them: inputs and what is written in place are bound here,
    once, and of the outputs those that are to be fresh again. On a GPU, ONNX Runtime copies host memory there as it is
    bound, so that inputs of host memory are bound again as well. Not to be shared by threads.
    """

    def __init__(
        self,
        session: Any,
        graph: Graph,
        device: str,
        feeds: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self._session, self._device = session, device
        self._binding = session.io_binding()
        kept = {name: value for name, value in feeds.items() if not isinstance(value, np.ndarray)}  # on the device
        self._feeds = {name: np.ascontiguousarray(value) for name, value in feeds.items() if name not in kept}
        self._replaced = {tensor.name: np.empty_like(self._feeds[tensor.name]) for tensor in recurrent_inputs(graph)}
        self._outputs = [
            (tensor, tuple(shapes[tensor.name]), storage(tensor))
            for tensor in graph.outputs
            if tensor.name in shapes and tensor.aliases is None
        ]
        self._reused: dict[str, Array] = {}  # what is bound to the outputs, where no caller has it to keep
        self._again = [tensor for tensor in graph.inputs if device != "cpu" and tensor.name in self._feeds]
        try:
            for tensor in graph.inputs:
                if tensor.name in kept:
                    self._binding.bind_ortvalue_input(tensor.name, kept[tensor.name])
                else:
                    bind(self._binding.bind_input, tensor, self._feeds[tensor.name])
            for tensor in graph.outputs:
                if tensor.aliases in self._replaced:  # other nodes may read the state when the next one is written
                    bind(self._binding.bind_output, tensor, self._replaced[tensor.aliases])
                elif tensor.aliases in kept:  # one buffer, input and output: written in place
                    self._binding.bind_ortvalue_output(tensor.name, kept[tensor.aliases])
                elif tensor.aliases is not None:
                    bind(self._binding.bind_output, tensor, self._feeds[tensor.aliases])
        except Exception as error:  # the library raises bare RuntimeError and its own types alike
            raise failed(device, error) from None

    def run(self, *, reused: bool = False) -> dict[str, Array]:
        """Execute; return the wanted outputs, and write the state. Raises BackendError.

        On a CPU they are the same arrays in every run that is ``reused``.
        """
        try:
            for tensor in self._again:
                bind(self._binding.bind_input, tensor, self._feeds[tensor.name])
            outputs = self._reused
            if not outputs or not reused:
                outputs = self._bind_outputs()
                self._reused = outputs if reused and self._device == "cpu" else {}
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # as above
            raise failed(self._device, error) from None
        for name, array in self._replaced.items():
            self._feeds[name][...] = array
        return outputs

    def _bind_outputs(self) -> dict[str, Array]:
        """Bind fresh arrays to the wanted outputs."""
        outputs: dict[str, Array] = {}
        for tensor, shape, dtype in self._outputs:
            outputs[tensor.name] = np.empty(shape, dtype)
            bind(self._binding.bind_output, tensor, outputs[tensor.name])
        return outputs


class RepeatedShapes(ProcessBound):
    """Runs of a graph without state on the CPU: memory of each thread stays bound while its calls have the same shapes.

    Inputs are copied there and outputs from there, so that a caller's arrays are read, and fresh ones returned.
    """

    def __init__(self, session: Any, graph: Graph) -> None:
        self._session, self._graph = session, graph
        self._thread = local()

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Execute as ``Backend.run`` does. The first call of a shape binds the caller's own arrays, once."""
        kept = self._thread.__dict__  # "shapes" of the last call; from the second on "feeds" and the "run" over them
        key = ({name: (value.shape, value.dtype) for name, value in feeds.items()}, dict(shapes))
        if kept.get("shapes") != key:
            kept.clear()
            found = OrtBoundRun(self._session, self._graph, "cpu", feeds, shapes).run()
            kept["shapes"] = key
            return found
        if "run" not in kept:
            own = {name: np.array(value, order="C") for name, value in feeds.items()}
            kept["run"] = OrtBoundRun(self._session, self._graph, "cpu", own, shapes)
            kept["feeds"] = own
        own = kept["feeds"]
        for name, value in feeds.items():
            own[name][...] = value
        return {name: array.copy() for name, array in kept["run"].run(reused=True).items()}


def bind(to: Any, tensor: Tensor, array: Array) -> None:
    """Bind the array's own memory to a tensor of ONNX Runtime."""
    kind = BFLOAT16 if tensor.dtype == "bfloat16" else array.dtype
    to(tensor.name, "cpu", 0, kind, array.shape, array.ctypes.data)


def failed(device: str, error: Exception) -> BackendError:
    """Return the error of a run that ONNX Runtime refused or broke off."""
    return BackendError(f"ONNX Runtime failed on {device}: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """Return ONNX Runtime's reason for a failure, without C++ signature and source location."""
    return one_line(RuntimeError(str(error).rpartition("= void] ")[2].partition(" ; GPU=")[0]))
