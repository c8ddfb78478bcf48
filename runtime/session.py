"""Run the graphs of a loaded bundle: checked inputs in, fresh numpy arrays out, from any number of threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from threading import Lock, local
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

from transom.runtime.backends import AUTO, open_chosen
from transom.runtime.backends.base import Array, Backend, FromPlan
from transom.runtime.backends.kernels import AUTO as AUTO_KERNELS
from transom.runtime.backends.kernels import NATIVE, ONNXRUNTIME, KernelChoice
from transom.runtime.bundle import Bundle
from transom.runtime.devices import ASKED, Choice, choose, without_engines
from transom.runtime.errors import BackendError, BundleError, InputError
from transom.runtime.feeds import checked_feeds, engine_axes, wanted_outputs, wider
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.host import usable_cores
from transom.runtime.made_for import no_tensorrt
from transom.runtime.process_bound import ProcessBound

if TYPE_CHECKING:
    from transom.runtime.manifest import Manifest


GPU_WORKERS = 4  # of ``submit`` on a GPU, as many calls as the TensorRT backend has there at once
CLOSED = "this bundle is closed; load it again."


class Submitted(ProcessBound, Future[dict[str, Array]]):
    """The future of a ``run`` in a worker thread."""


class LoadedBundle(ProcessBound):
    """Base of every family's loaded bundle. Use it in a ``with``, or call ``close``.

    GRAPHS has the graphs that the family's methods run, and the inputs they give them besides caches and outputs of
    another graph. ``backends``, by graph, execute the graphs in place of those that ``device`` would have.

    ``kernels`` says by name of the graph what executes it on the CPU, and why.
    """

    GRAPHS: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        threads: int | None = None,
        backends: Mapping[str, Backend] | None = None,
        kernels: str = AUTO_KERNELS,
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self._bundle = bundle
        check_graphs(bundle.manifest, self.GRAPHS)
        graphs = bundle.manifest.graphs
        self.kernels: dict[str, KernelChoice] = {}

        def open_on(device: str) -> list[Backend]:
            if backends is not None:
                return [backends[graph.graph.name] for graph in graphs]
            if device == "tensorrt" and cpu_alone is not None:
                raise BackendError(cpu_alone)
            opened = open_graphs(bundle, device, threads, kernels)
            self.kernels = {graph.graph.name: choice for graph, (_, choice) in zip(graphs, opened, strict=True)}
            return [backend for backend, _ in opened]

        cpu_alone = no_tensorrt(bundle.manifest, bundle.folder) if backends is None else None
        self._backends, self.choice = (
            choose(open_on, {} if cpu_alone else without_engines(graphs))
            if device == AUTO
            else (open_on(device), Choice(device, ASKED))
        )
        first = self._backends[0]
        self.axes: Mapping[str, Axis] = (  # what calls may have: the bundle's bounds, or narrower ones of its engine
            engine_axes(bundle.manifest.axes, first.plan) if isinstance(first, FromPlan) else bundle.manifest.axes
        )
        self._workers: ThreadPoolExecutor | None = None
        self._lock = Lock()
        self._thread = local()  # of a worker, has ``works``
        self._open = True
        self.device: str = self._backends[0].device  # never "auto"

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Execute the graph that has these inputs: numpy arrays in, numpy arrays out, by name.

        Names, dtypes and axes are those of ``graph_for(inputs)``; an input with a default may be left
        out. ``outputs`` names the ones wanted, all by default. Outputs are fresh, but for the buffers of
        a decoder's cache: those are written in place and returned under their own names.

        Raises InputError or ShapeError.
        """
        if not isinstance(inputs, Mapping):
            raise InputError(f"inputs is a {type(inputs).__name__}; expected a dict of numpy arrays by name.")
        backend = self._pick(inputs)
        graph = backend.graph
        feeds, sizes = checked_feeds(graph, self.axes, inputs)
        wanted = wanted_outputs(graph, outputs, sizes)
        if not graph.written:
            return backend.run(feeds, wanted)
        written = {name: feeds[name] for name in wanted if name in feeds}
        fresh = {name: shape for name, shape in wanted.items() if name not in written}
        return backend.run(feeds, fresh) | written

    def submit(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Future[dict[str, Array]]:
        """Call ``run`` in a worker thread, one per usable core, on a GPU GPU_WORKERS; ``result`` raises its errors."""
        future = Submitted()

        def work() -> None:
            self._thread.works = True
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self.run(inputs, outputs))
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if not self._open:
                raise BackendError(CLOSED)
            if self._workers is None:
                workers = usable_cores() if self.device == "cpu" else GPU_WORKERS
                self._workers = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="transom")
            self._workers.submit(work)
        return future

    def graph_for(self, inputs: Mapping[str, Array]) -> Graph:
        """Return the graph that ``run`` would execute for these inputs."""
        return self._pick(inputs).graph

    def backend(self, name: str) -> Backend:
        """Return the backend of the graph called ``name``; BundleError where the bundle has none."""
        for backend in self._opened():
            if backend.graph.name == name:
                return backend
        raise BundleError(f"bundle.json has no graph {name!r}; export the bundle again.")

    def _pick(self, inputs: Mapping[str, Array]) -> Backend:
        """Return the backend whose inputs these are: the only one, or the one that knows the most of the names."""
        backends = self._opened()
        if len(backends) == 1:
            return backends[0]
        return max(backends, key=lambda backend: sum(t.name in inputs for t in backend.graph.inputs))

    def _opened(self) -> list[Backend]:
        """Return the backends, read once: ``close`` may remove them at any time, but not from a call that has them."""
        backends = self._backends
        if not backends:
            raise BackendError(CLOSED)
        return backends

    def close(self) -> None:
        """Free the sessions; waits for what was submitted. Closing twice is fine.

        Any thread may close, a callback of a submitted run too, which does not wait. A call that runs in another
        thread finishes, or raises the BackendError of a closed bundle before its next run of a graph; its session is
        freed when it ends.
        """
        with self._lock:
            workers, self._workers = self._workers, None
            self._open = False
        if workers is not None:
            workers.shutdown(wait=not getattr(self._thread, "works", False))  # a thread cannot wait for itself
        self._backends = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def need_task(self, *tasks: str) -> None:
        """Raise InputError unless the bundle was exported for one of ``tasks``."""
        if self.manifest.task not in tasks:
            raise InputError(
                f"this bundle was exported for {self.manifest.task}; the call needs {' or '.join(tasks)}. "
                f"Export a checkpoint that has this head, with --task {tasks[0]}."
            )

    def max_size(self, axis: str) -> int:
        """Return the maximum of a named axis, in the engine that is used; BundleError for an axis it does not have."""
        if axis not in self.axes:
            raise BundleError(f"bundle.json has no axis {axis}; export the bundle again.")
        return self.axes[axis].max

    def wider(self, **sizes: int) -> str:
        """Return how to get axes of ``sizes`` out of their bounds: ``Export again with --max S=600``."""
        return wider({name: self.axes[name] for name in sizes}, sizes)

    def labels(self, count: int) -> tuple[str, ...]:
        """Return the names of ``count`` classes; BundleError where the bundle names another number of them."""
        found = self.manifest.labels
        if len(found) != count:
            raise BundleError(f"bundle.json has {len(found)} labels, the graph gives {count}; export the bundle again.")
        return found


def open_graphs(bundle: Bundle, device: str, threads: int | None, kernels: str) -> list[tuple[Backend, KernelChoice]]:
    """Open all graphs of a bundle, by ONNX Runtime those whose state another graph would take in another dtype.

    The native library computes in float32; a graph that it does not cover may keep keys and values in half precision.
    """
    graphs = bundle.manifest.graphs
    with closing(bundle.reader()) as reader:
        if device == "cpu":  # others may have no use for the weights
            reader.begin()
        opened = [open_chosen(graph, reader, device, threads, kernels) for graph in graphs]
    if len({choice.kernels for _, choice in opened}) < 2 or not states_differ([backend.graph for backend, _ in opened]):
        return opened
    why = "another graph of the bundle has no list of operators, and keeps the state that they share in another dtype"
    if kernels == NATIVE:
        raise BackendError(f"kernels='native' was asked for, and cannot be: {why}. Load with kernels='auto'.")
    del opened
    with closing(bundle.reader()) as reader:
        again = [open_chosen(graph, reader, device, threads, ONNXRUNTIME) for graph in graphs]
    return [(backend, KernelChoice(ONNXRUNTIME, why)) for backend, _ in again]


def states_differ(graphs: Sequence[Graph]) -> bool:
    """Return whether two graphs have a state tensor of one name in different dtypes."""
    dtypes: dict[str, str] = {}
    tensors = [tensor for graph in graphs for tensor in (*graph.inputs, *graph.outputs) if tensor.state]
    return any(dtypes.setdefault(tensor.name, tensor.dtype) != tensor.dtype for tensor in tensors)


def check_graphs(manifest: Manifest, expected: Mapping[str, tuple[str, ...]]) -> None:
    """Raise BundleError unless the bundle has the graphs that its family runs, and they take what it gives them."""
    graphs = {file.graph.name: file.graph for file in manifest.graphs}
    made = {tensor.name for graph in graphs.values() for tensor in graph.outputs}
    for name, given in expected.items():
        if name not in graphs:
            raise BundleError(
                f"bundle.json has no graph {name!r}, which {manifest.family} runs; export the bundle again."
            )
        inputs = {tensor.name: tensor for tensor in graphs[name].inputs}
        written = {tensor.aliases for tensor in graphs[name].outputs}
        asked = {key for key, tensor in inputs.items() if tensor.state or tensor.default is None} - written
        wrong = sorted({*given} - inputs.keys()) or sorted(asked - {*given} - made)
        if wrong:
            raise BundleError(
                f"bundle.json says family {manifest.family}, which gives the graph {name!r} {', '.join(given)}; it "
                f"takes {', '.join(list(inputs)[:6])}, so {wrong[0]!r} does not fit. Export the bundle again."
            )
