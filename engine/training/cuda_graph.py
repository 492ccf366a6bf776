"""A function of tensors as one CUDA graph: launched at once, without Python and without a launch for each kernel."""

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from engine.monitoring.step_result import Tensors
from engine.parallel.consensus import all_gather_object
from engine.parallel.rendezvous import rank

logger = logging.getLogger(__name__)

R = TypeVar("R")
Replay = Callable[[], Any]
WARM = 3
"""Calls that run as usual before one is recorded, so that one-time work is done."""


class Graph(Generic[R]):
    """Calls `function` on tensors by their names; after a few calls it replays a recording.

    The function must do the same for all inputs of a shape, in place on tensors that stay where they are, and never
    wait for the device. Inputs are copied into the graph's own tensors; a replay overwrites the last one's result.
    Inputs of other shapes are recorded anew. Where recording is impossible a warning gives the reason, once, and the
    function runs as usual: on all ranks, since it may contain collectives.

    reset: undoes a call that was interrupted by an error.
    """

    def __init__(
        self, function: Callable[[Tensors], R], device: torch.device, reset: Callable[[], None] = lambda: None
    ) -> None:
        self._function, self._device, self._reset = function, device, reset
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._obstacle = self._find_obstacle()
        if self._obstacle:
            _warn(self._obstacle)
        self._warm = 0
        self._inputs: Tensors = {}
        self._known: dict[str, Any] = {}
        self._replay: Replay | None = None
        self._result: R | None = None

    def __call__(self, inputs: Tensors) -> R:
        """Return the function's result for these inputs."""
        if self._obstacle:
            return self._function(inputs)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}
        if self._known != shapes:
            self._forget()
            self._known = shapes
        if self._warm < WARM:
            self._warm += 1
            return self._warm_up(inputs)
        if self._replay is None:
            copies = {id(tensor): tensor.clone() for tensor in inputs.values()}  # one of each
            self._inputs = {name: copies[id(tensor)] for name, tensor in inputs.items()}
            self._obstacle = _first(self._try_to_record())
            if self._obstacle:  # warned of outside of the handler, whose traceback holds on to memory
                _warn(self._obstacle)
                self._forget()
                self._reset()
                return self._function(inputs)
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        assert self._replay is not None
        self._replay()
        return self._result  # type: ignore[return-value]

    def _forget(self) -> None:
        self._warm, self._inputs, self._known, self._replay, self._result = 0, {}, {}, None, None

    def _find_obstacle(self) -> str:
        """Return the reason why nothing can be recorded here, or an empty string."""
        return "" if self._device.type == "cuda" else "there is no GPU"

    def _warm_up(self, inputs: Tensors) -> R:
        """Call the function on the stream that it will be recorded on."""
        if self._stream is None:
            return self._function(inputs)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._function(inputs)
        current.wait_stream(self._stream)
        return result

    def _try_to_record(self) -> str:
        """Record the function; return the reason of a failure, or an empty string."""
        stream = torch.cuda.current_stream(self._device) if self._stream is not None else None
        try:
            self._replay, self._result = self._record(lambda: self._function(self._inputs))
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # ending a failed recording raises another error
                cause = cause.__context__
            return f"it cannot be recorded ({(str(cause).splitlines() or [type(cause).__name__])[0]})"
        finally:
            if stream is not None:
                torch.cuda.set_stream(stream)  # torch leaves it changed where ending a recording fails
        return ""

    def _record(self, function: Callable[[], R]) -> tuple[Replay, R]:
        """Return a function that replays `function`, and the tensors that hold its result."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # other threads, such as the loader's, may allocate during the recording
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


def _first(reason: str) -> str:
    """Return a rank's reason not to replay, the first of any; all ranks replay, or none. Called by all ranks."""
    reasons = enumerate(all_gather_object(lambda: reason))
    return next((text if number == rank() else f"rank {number}: {text}" for number, text in reasons if text), "")


def _warn(reason: str) -> None:
    if rank() == 0:
        logger.warning(f"cuda_graph: {reason}: the step runs without")
