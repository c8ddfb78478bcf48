"""Run the GPU check by itself on a GPU that computes with PyTorch on the CPU: ``python -I -S FILE PATH... -- OPTIONS``.

The PATHs are all that is imported from, besides the standard library and the pack's wheel. Printed last is JSON: the
exit status, and the packages that were imported. Without ``--fake`` among the options it is the check as it is.

Each launch of ours takes 1 ms, and so does what a mark costs: a call of PyTorch takes 1 ms, and one of our kernel 2.
"""

from __future__ import annotations

import json
import sys
from typing import Any

split = sys.argv.index("--")
sys.path[:0] = sys.argv[1:split]
OPTIONS = [option for option in sys.argv[split + 1 :] if option != "--fake"]
FAKE = len(OPTIONS) < len(sys.argv) - split - 1


class FakeMachine:
    """A GPU whose kernels are PyTorch's attention, and whose clock counts launches and marks."""

    device, timed, clock = "cpu", True, 0.0

    def kernel(self, compiled: Any) -> FakeKernel:
        assert b".target sm_90a" in compiled.ptx
        return FakeKernel(self, compiled)

    def stream(self) -> int:
        return 7

    def mark(self) -> FakeMark:
        return FakeMark(self)

    def flush(self) -> None: ...

    def wait(self) -> None: ...

    def free(self) -> None: ...


class FakeMark:
    def __init__(self, machine: FakeMachine) -> None:
        self.machine, self.at = machine, 0.0

    def record(self) -> None:
        self.machine.clock += 1.0
        self.at = self.machine.clock

    def elapsed_time(self, end: FakeMark) -> float:
        return end.at - self.at


class FakeKernel:
    def __init__(self, machine: FakeMachine, compiled: Any) -> None:
        self.machine, self.compiled, self.tensors = machine, compiled, {}

    def bind(self, tensors: Any, B: int, S: int, T: int, splits: int = 1) -> FakeKernel:
        bound = FakeKernel(self.machine, self.compiled)
        bound.tensors = tensors
        return bound

    def launch(self, stream: int) -> None:
        """Compute the whole attention in the first kernel, and copy its result in the second of split-KV."""
        import torch

        given = self.tensors
        self.machine.clock += 1.0
        if "query" not in given:
            given["output"].copy_(given["split_acc"][0])
            return
        groups = given["query"].shape[1] // given["key"].shape[1]
        k, v = (given[name].float().repeat_interleave(groups, 1) for name in ("key", "value"))
        causal = self.compiled.variant.causal
        found = torch.nn.functional.scaled_dot_product_attention(given["query"].float(), k, v, is_causal=causal)
        (given["split_acc"][0] if "split_acc" in given else given["output"]).copy_(found)


def main() -> None:
    import gpu_check.__main__ as command

    if FAKE:
        unpacked = command.use_wheel

        def use_wheel(site: Any) -> None:
            """Put the fakes in place once the wheel's transom is there."""
            unpacked(site)
            import gpu_check.cases
            import gpu_check.machines
            import gpu_check.timing
            import torch

            from transom.runtime.backends import cuda

            cuda.find_gpu = lambda: cuda.Gpu("NVIDIA H200", (9, 0), 1 << 37, 13000)
            torch.cuda.is_available = lambda: True
            gpu_check.machines.CudaMachine = FakeMachine
            gpu_check.timing.PRODUCT, gpu_check.timing.COPIED = 8, 64
            every = gpu_check.cases.cases
            gpu_check.cases.cases = lambda only: [case.tiny() for case in every(only)]

        command.use_wheel = use_wheel
    status = command.main(OPTIONS)
    print(json.dumps({"status": status, "imported": sorted({name.partition(".")[0] for name in sys.modules})}))


if __name__ == "__main__":
    main()
