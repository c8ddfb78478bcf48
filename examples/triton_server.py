"""Start Triton Inference Server on what `transom repository` wrote: the server that nvidia-pytriton's wheel carries.

    pip install 'transom[triton]'
    transom repository bundles/minilm bundles/gpt --out models
    python examples/triton_server.py models
    curl localhost:8000/v2/models/minilm/infer -d \
'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["A man is eating."]}]}'
    curl -N localhost:8000/v2/models/gpt_stream/generate_stream -d '{"text": "It is a truth", "max_new_tokens": 20}'

A model that cannot be loaded does not keep the others from being served: its state is in
`curl -X POST localhost:8000/v2/repository/index`. What follows `--` goes to the server: `-- --log-verbose=1`. The wheel
has the Python backend alone; models of kind "onnx" need a server with ONNX Runtime's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

STUB = "triton_python_backend_stub"  # runs a model; there is one for each version of Python
RUN = 0o755  # wheels keep no run bits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, nargs="+", help="a folder that `transom repository` wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, for_server = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    triton = wheel_folder()
    stub = triton / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / STUB
    for path in (*options.repository, stub):
        if not path.exists():
            sys.exit(f"triton_server.py: {path} does not exist")
    with tempfile.TemporaryDirectory(prefix="transom-triton-") as folder:
        program = prepared(Path(folder), triton, stub)
        arguments = [
            *(f"--model-repository={path.resolve()}" for path in options.repository),
            f"--backend-directory={folder}/backends",
            f"--backend-config=python,shm-region-prefix-name={Path(folder).name}",  # servers side by side
            "--disable-auto-complete-config",  # configs are complete; guessing starts each model twice
            "--exit-on-error=false",  # one model fails: the others are served
            *(f"--{name}-address={options.host}" for name in ("http", "grpc", "metrics")),
            *(f"--{name}-port={getattr(options, f'{name}_port')}" for name in ("http", "grpc", "metrics")),
            *for_server,
        ]
        return run([str(program), *arguments], folder, environment(triton))


def wheel_folder() -> Path:
    """Return the server's folder in nvidia-pytriton's package, which is not imported."""
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        sys.exit("triton_server.py: nvidia-pytriton is not installed here; pip install 'transom[triton]'")
    return Path(found.submodule_search_locations[0], "tritonserver")


def prepared(folder: Path, triton: Path, stub: Path) -> Path:
    """Put the Python backend with its stub into ``folder``, and return the server's program, ready to run."""
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (triton / "backends" / "python").iterdir():
        (backend / file.name).symlink_to(file)
    (backend / STUB).unlink(missing_ok=True)
    shutil.copyfile(stub, backend / STUB)
    (backend / STUB).chmod(RUN)
    program = triton / "bin" / "tritonserver"
    if not os.access(program, os.X_OK):
        program.chmod(RUN)
    return program


def environment(triton: Path) -> dict[str, str]:
    """Return the variables of the server's processes: models find the Python that is first in PATH, and its packages.

    They do not look into PYTHONPATH.
    """
    libraries = [
        str(triton.parents[1] / "nvidia_pytriton.libs"),  # those beside the package, which the copied stub needs
        str(sysconfig.get_config_var("LIBDIR") or ""),  # of libpython
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "VIRTUAL_ENV": sys.prefix,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }


def run(command: list[str], folder: str, variables: dict[str, str]) -> int:
    """Run the server until it ends, which SIGTERM and SIGINT ask it to; return its exit status.

    Models import from the folder where it starts before all others, so that is an empty one.
    """
    process = subprocess.Popen(command, cwd=folder, env=variables)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: process.send_signal(number))
    status = process.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
