"""Many small kernels as one launch: column-by-column rounding is all launch overhead on a GPU otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


class Graphed:
    """Wraps a function of tensors that returns a tuple of tensors and reads no tensor's value on the host.

    On CUDA it is captured once for each combination of shapes and then replayed; the results are those of the
    function itself. On other devices the function is called as it is.
    """

    def __init__(self, function: Function):
        self._function = function
        self._captured: dict[object, tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]] = {}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if tensors[0].device.type != "cuda":
            return self._function(*tensors)
        key = tuple((t.shape, t.dtype, t.device) for t in tensors)
        if key not in self._captured:
            self._captured[key] = self._capture([t.clone() for t in tensors])
        graph, inputs, outputs = self._captured[key]
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    def _capture(self, inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a first run outside the capture sets libraries up
            self._function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._function(*inputs)
        return graph, inputs, outputs
