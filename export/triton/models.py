"""The models that a bundle gives a repository of Triton Inference Server, by kind.

    task     the bundle's task as it is: text or an image in; a vector, labels or text out
    stream   generated text in pieces, one request each: Triton's decoupled mode
    tensors  a graph's own tensors, run by the runtime
    onnx     the ONNX file of a graph without state, for Triton's own ONNX Runtime

The first three are Triton's Python backend around ``transom.runtime.serving``. Their tensors are those of the
operations there: no session is opened, unless it alone knows the dtype of a state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transom.export.triton.config import ModelConfig, port_configs, tensor_configs
from transom.runtime.backends import AUTO, DEVICES, open_backend
from transom.runtime.backends.base import Array, Backend
from transom.runtime.bundle import Bundle
from transom.runtime.disk_cache import our_version
from transom.runtime.errors import BackendError, ExportError, InputError
from transom.runtime.graph_spec import Graph, is_decoder
from transom.runtime.host import usable_cores
from transom.runtime.loading import load_with_backends
from transom.runtime.made_for import no_tensorrt
from transom.runtime.manifest import ROWS
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.serving.operation import Operation
from transom.runtime.serving.tasks import task_operation
from transom.runtime.serving.tensors import by_rows, graph_operation
from transom.runtime.session import LoadedBundle

TASK, STREAM, TENSORS, ONNX = KINDS = ("task", "stream", "tensors", "onnx")
MOST_INSTANCES = 4  # where no number is given: each has the weights in memory
BUNDLE = "bundle"  # folder beside model.py
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a model: it is a folder, and part of a URL
UNKNOWN = "unknown"  # ``our_version`` of a package that is not installed


@dataclass(frozen=True)
class Options:
    """Settings of the models of a repository.

    kinds           of KINDS; none: task and stream, or tensors where the bundle has no task
    instances       how often Triton loads a model; None: once a core of this machine, at most MOST_INSTANCES, and once
                    on a GPU: beside other work two instances of a thread each did more than one of two
    threads         CPU threads of a call; None: the server's cores, divided by the instances
    max_batch       rows of a batch at most; None: the bundle's bound
    queue_delay_us  microseconds that a request waits for others; 0: no longer than the model is busy
    device          as ``load`` takes it
    streams         answers that one instance streams at a time

    Raises ExportError for a kind or device that does not exist.
    """

    kinds: Sequence[str] = ()
    instances: int | None = None
    threads: int | None = None
    max_batch: int | None = None
    queue_delay_us: int = 0
    device: str = "cpu"
    streams: int = 4

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ExportError(f"--kind is {unknown[0]!r:.60}; expected one or several of {', '.join(KINDS)}.")
        if self.device not in DEVICES:
            raise ExportError(f"--device is {self.device!r:.60}; expected one of {', '.join(DEVICES)}.")

    @property
    def loads(self) -> int:
        """The number of instances."""
        return self.instances or (min(usable_cores(), MOST_INSTANCES) if self.device == "cpu" else 1)


@dataclass(frozen=True)
class Model:
    """A model: its configuration, the file of the bundle behind each file of the model, and its parameters' names.

    ``graph`` is that of tensors and onnx. ``parameters`` are those that a request may have.
    """

    kind: str
    config: ModelConfig
    files: Mapping[str, str]
    graph: str | None = None
    parameters: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.config.name


@dataclass
class Description:
    """A backend that describes a graph and runs nothing."""

    graph: Graph
    device: str = "cpu"

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        raise BackendError("this bundle was opened to be described; load it to run it.")


@dataclass
class Models:
    """Makes the models of one bundle; ``missing`` collects why it has none of a kind."""

    bundle: Bundle
    name: str
    options: Options
    sha256: str  # of bundle.json
    files: Mapping[str, str]  # of a model around the runtime
    missing: dict[str, str] = field(default_factory=dict)

    def of(self, kind: str) -> list[Model]:
        """Return the models of a kind."""
        makers: Mapping[str, Callable[[], Iterator[Model]]] = {
            TASK: self._task,
            STREAM: self._stream,
            TENSORS: self._tensors,
            ONNX: self._onnx,
        }
        return list(makers[kind]())

    def _task(self) -> Iterator[Model]:
        operation = self._operation()
        if operation is not None:
            yield self._served(self.name, TASK, operation, rows=self._rows(), delay=self.options.queue_delay_us)

    def _stream(self) -> Iterator[Model]:
        operation = self._operation()
        if operation is None or operation.stream is None:
            self.missing.setdefault(STREAM, f"answers of {self.bundle.manifest.task} come at once")
            return
        own = {"streams": str(self.options.streams)}
        yield self._served(f"{self.name}_{STREAM}", STREAM, operation, rows=1, delay=None, own=own)

    def _operation(self) -> Operation | None:
        """Return the operation of the bundle's task; None where it has none."""
        try:
            return task_operation(described(self.bundle))
        except InputError as error:
            self.missing |= dict.fromkeys((TASK, STREAM), str(error))
            return None

    def _tensors(self) -> Iterator[Model]:
        for file in self.bundle.manifest.graphs:
            name = file.graph.name
            operation = graph_operation(self._loaded, name)
            batched = by_rows(self._loaded.backend(name).graph)
            rows, delay = (self._rows(), self.options.queue_delay_us) if batched else (0, None)
            yield self._served(
                f"{self.name}_{name}", TENSORS, operation, rows=rows, delay=delay, own={"graph": name}, graph=name
            )

    def _served(
        self,
        name: str,
        kind: str,
        operation: Operation,
        *,
        rows: int,
        delay: int | None,
        own: Mapping[str, str] | None = None,
        graph: str | None = None,
    ) -> Model:
        """Return a model of the Python backend around the runtime; ``own`` are parameters of its kind."""
        options, version = self.options, our_version()
        parameters = {"bundle": BUNDLE, "kind": kind, **(own or {}), "device": options.device}
        parameters |= {} if options.threads is None else {"threads": str(options.threads)}
        parameters |= {"instances": str(options.loads)}
        parameters |= {} if version == UNKNOWN else {"runtime_version": version}
        config = ModelConfig(
            name,
            port_configs(operation.inputs, ragged=kind == TASK),
            port_configs(operation.outputs),
            rows,
            backend="python",
            queue_delay_us=delay,
            decoupled=kind == STREAM,
            instances=(options.loads, "KIND_CPU" if options.device == "cpu" else "KIND_MODEL"),
            parameters=parameters | {"bundle_sha256": self.sha256},
        )
        return Model(kind, config, self.files, graph, tuple(operation.parameters))

    def _onnx(self) -> Iterator[Model]:
        for file in self.bundle.manifest.graphs:
            if not is_decoder(file.graph):
                yield self._onnx_model(file, self._loaded.backend(file.graph.name).graph)
        self.missing.setdefault(ONNX, "its graphs have a state")

    def _onnx_model(self, file: GraphFile, graph: Graph) -> Model:
        options, batched = self.options, by_rows(graph)
        kind = {"cpu": "KIND_CPU", AUTO: None}.get(options.device, "KIND_GPU")
        config = ModelConfig(
            f"{self.name}_{graph.name}_{ONNX}",
            tensor_configs(graph.inputs, batched=batched),
            tensor_configs(graph.outputs, batched=batched),
            min(self._rows(), self.bundle.manifest.axes[ROWS].max) if batched else 0,
            backend="onnxruntime",
            queue_delay_us=options.queue_delay_us if batched else None,
            instances=None if kind is None else (options.loads, kind),
            parameters={} if options.threads is None else {"intra_op_thread_count": str(options.threads)},
        )
        files = {"1/model.onnx": file.file_for(options.device)}
        files |= {} if file.weights is None else {f"1/{file.weights}": file.weights}
        return Model(ONNX, config, files, graph.name)

    @cached_property
    def _loaded(self) -> LoadedBundle:
        return opened(self.bundle, self.options.device)

    def _rows(self) -> int:
        axes = self.bundle.manifest.axes
        return self.options.max_batch or (axes[ROWS].max if ROWS in axes else 1)


def models_of(models: Models) -> list[Model]:
    """Return the models of a bundle, of the kinds that are asked for.

    Raises ExportError for a bundle that has none of them, and for a name that no URL allows.
    """
    asked = models.options.kinds
    found = [model for kind in KINDS if kind in (asked or (TASK, STREAM)) for model in models.of(kind)]
    if not asked and not found:
        found = models.of(TENSORS)
    folder = models.bundle.folder
    if not found:
        why = "; ".join(f"{kind}: {reason.rstrip('.')}" for kind, reason in models.missing.items() if kind in asked)
        raise ExportError(f"{folder} gives no model of --kind {' and '.join(asked)} ({why}). Give another --kind.")
    for model in found:
        if not NAME.fullmatch(model.name):
            raise ExportError(
                f"the models of {folder} would be called {model.name!r:.60}, and a URL has to hold that; expected "
                "letters of A to Z, digits, _ . and -. Give --name, or rename the folder."
            )
    return found


def described(bundle: Bundle) -> LoadedBundle:
    """Load a bundle around its graphs' descriptions: for its operations' tensors, not to run anything."""
    return load_with_backends(bundle, {file.graph.name: Description(file.graph) for file in bundle.manifest.graphs})


def opened(bundle: Bundle, device: str) -> LoadedBundle:
    """Load a bundle as ``described`` does, but with the dtypes that states have on ``device``.

    Where the CPU has a file of its own, only a session knows them. Raises ExportError for a device that is not known
    until the server starts.
    """
    cpu_alone = no_tensorrt(bundle.manifest, bundle.folder)
    if cpu_alone is not None and device not in ("cpu", AUTO):
        raise ExportError(f"--device is {device}; {cpu_alone}, or give --device cpu.")
    backends: dict[str, Backend] = {}
    for file in bundle.manifest.graphs:
        backends[file.graph.name] = Description(file.graph)
        states = [tensor for tensor in (*file.graph.inputs, *file.graph.outputs) if tensor.state]
        if "cpu" in file.files and any(tensor.dtype != "float32" for tensor in states):
            if device == AUTO:
                raise ExportError(
                    f"{bundle.folder} has a state that differs between the CPU and GPUs, and --device is auto; its "
                    "tensors need one that is known now: --device cpu, cuda or tensorrt."
                )
            if device == "cpu":
                backends[file.graph.name] = Description(open_backend(file, bundle.read, device, 1).graph)
    return load_with_backends(bundle, backends)
