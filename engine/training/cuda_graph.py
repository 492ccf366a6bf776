"""A function of tensors as one CUDA graph: launched at once, without Python or the launches of its kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch

from engine.parallel import collectives

R = TypeVar("R")
Replay = Callable[[], Any]
WARM = 3
"""Calls that run as usual before one is recorded, so that all that happens once has happened."""


class Graph(Generic[R]):
    """Calls `function` on tensors by their names, and after a few calls replays a recording of it.

    The function must do the same for all inputs of a shape, in place on tensors that stay where they are, and never
    wait for the device. Inputs are copied into tensors of the graph's own; what a replay returns is overwritten by the
    next. Inputs of other shapes are recorded anew. Where nothing can be recorded a sentence says why, once, and the
    function runs as usual.

    reset: undoes what a call that was broken off in the middle left behind. record: takes a function without arguments;
    returns what replays it, and what it returned; default: as a CUDA graph.
    """

    def __init__(
        self,
        function: Callable[[Any], R],
        device: torch.device,
        reset: Callable[[], None] = lambda: None,
        record: Callable[[Callable[[], R]], tuple[Replay, R]] | None = None,
    ) -> None:
        self._function, self._device = function, device
        self._reset, self._record = reset, record or self._as_cuda_graph
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._impossible = record is None and self._hindrance()
        if self._impossible:
            _say(self._impossible)
        self._warm = 0
        self._inputs: Any = {}
        self._replay: Replay | None = None
        self._result: R | None = None
        self._known: dict[str, Any] = {}

    def __call__(self, inputs: Any) -> R:
        """Return what the function returns for these inputs."""
        if self._impossible:
            return self._function(inputs)
        if self._known != (shapes := _shapes(inputs)):
            self._forget()
            self._known = shapes
        if self._warm < WARM:
            self._warm += 1
            return self._beside(inputs)
        if self._replay is None:
            self._inputs = _copies(inputs)
            self._impossible = self._recorded()
            if self._impossible:  # said outside of the handler, whose traceback holds on to memory
                _say(self._impossible)
                self._forget()
                self._reset()
                return self._function(inputs)
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        assert self._replay is not None
        self._replay()
        return self._result  # type: ignore[return-value]

    def _recorded(self) -> str:
        """Record the function; return why that cannot be, or nothing."""
        stream = torch.cuda.current_stream(self._device) if self._stream is not None else None
        try:
            self._replay, self._result = self._record(lambda: self._function(self._inputs))
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # ending a recording that failed raises another error
                cause = cause.__context__
            return f"it cannot be recorded ({(str(cause).splitlines() or [type(cause).__name__])[0]})"
        finally:
            if stream is not None:
                torch.cuda.set_stream(stream)  # which torch leaves changed where ending a recording fails
        return ""

    def _forget(self) -> None:
        self._warm, self._inputs, self._replay, self._result, self._known = 0, {}, None, None, {}

    def _hindrance(self) -> str:
        if self._device.type != "cuda":
            return "there is no GPU"
        return f"{collectives.world()} processes exchange data in it" if collectives.world() > 1 else ""

    def _beside(self, inputs: Any) -> R:
        """Call the function on the stream that it is recorded on."""
        if self._stream is None:
            return self._function(inputs)
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            result = self._function(inputs)
        before.wait_stream(self._stream)
        return result

    def _as_cuda_graph(self, function: Callable[[], R]) -> tuple[Replay, R]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # other threads, such as the loader's, may allocate meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


def _say(why: str) -> None:
    if collectives.rank() == 0:
        print(f"warning: cuda_graph: {why}: the step runs without", file=sys.stderr)


def _shapes(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}


def _copies(inputs: Mapping[str, torch.Tensor]) -> Any:
    """Return copies of the tensors, one for each, in a mapping of the same kind."""
    made: dict[int, torch.Tensor] = {id(t): t.clone() for t in inputs.values()}
    return type(inputs)({name: made[id(tensor)] for name, tensor in inputs.items()})  # type: ignore[call-arg]
