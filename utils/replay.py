"""CUDA graphs: the kernels that the host launches one by one in an update are recorded once and replayed by a single launch.

A host needs 20 to 70 ms to launch an update of a DiT-S from Python, whatever the batch size. GPUs with a small network, or with a
small share of a batch among many, would wait for it (benchmarks/README.md).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

EAGER_CALLS = 3             # compile, tune and fill the caches first


class Replay:
    """Losses and gradients of one network, by a function whose tensors keep their shapes and which never looks at a value.

    What Python decides inside the function is decided while it is recorded, and never again.

    Args:
        function: takes tensors; returns tensors, and leaves gradients in `network`, which had none.
        network: whose gradients they are; the weights may change between calls, in place. A gradient is the same memory at each call.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], network: nn.Module):
        self.function, self.parameters = function, list(network.parameters())
        self.side = torch.cuda.Stream()
        self.calls, self.graph = 0, None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        assert all(parameter.grad is None for parameter in self.parameters)
        self.calls += 1
        if self.calls <= EAGER_CALLS:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.side)
            return tuple(output.detach() for output in outputs)
        if self.graph is None:
            self.record(inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            assert kept.shape == given.shape
            kept.copy_(given)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        return tuple(output.clone() for output in self.outputs)

    def record(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [given.clone() for given in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # What other threads ask of CUDA meanwhile, such as NCCL's after its events, would otherwise be refused and end the recording.
        with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
            self.outputs = tuple(output.detach() for output in self.function(*self.inputs))
        self.gradients = [parameter.grad for parameter in self.parameters]
