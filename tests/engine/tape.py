"""A stand-in for a CUDA graph on the CPU: operators that are recorded, and replayed without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from engine.training.cuda_graph import Graph

R = TypeVar("R")
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class Tape(TorchDispatchMode):
    """The operators that a function calls, with the tensors they read and write.

    `record` restores all outside tensors that were overwritten: recording a CUDA graph changes none. `replay` runs the
    same operators on the same tensors again. An operator that waits for the device, or draws random numbers, raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded = self.replayed = 0
        self._calls: list[tuple[Any, Any, Any, list[tuple[int, torch.Tensor]]]] = []

    def record(self, function: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """Return a function that replays `function`, and its result."""
        self._calls, self._inner, self._before = [], dict[int, torch.Tensor](), dict[int, Any]()
        self.recorded += 1
        try:
            with self:
                result = function()
        finally:
            for storage, content in self._before.values():
                storage.copy_(content)
        return self.replay, result

    def replay(self) -> None:
        """Run all recorded operators; their results are overwritten."""
        self.replayed += 1
        with torch.no_grad():
            for operator, args, kwargs, new in self._calls:
                results = tree_leaves(operator(*args, **kwargs))
                for work in results if operator.namespace == "c10d" else ():
                    if isinstance(work, torch.ScriptObject):
                        Work.unbox(work).wait()  # type: ignore[attr-defined]
                for place, tensor in new:
                    tensor.copy_(results[place])

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, operator._schema.name
        if name in _WAITS or torch.Tag.nondeterministic_seeded in operator.tags:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for storage in (tensor.untyped_storage() for tensor in self._written(operator, args, kwargs)):
            if storage.data_ptr() not in self._inner and storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = storage, storage.clone()
        result = operator(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in inputs}
        leaves = [(n, t) for n, t in enumerate(tree_leaves(result)) if isinstance(t, torch.Tensor)]
        new = [(n, t) for n, t in leaves if t.untyped_storage().data_ptr() not in known]
        for _, tensor in new:
            self._inner[tensor.untyped_storage().data_ptr()] = tensor  # so that no other takes its memory
        if (
            new or operator._schema.is_mutable or operator.namespace == "c10d"
        ):  # else it returns views, which stay valid
            self._calls.append((operator, args, kwargs, [(n, t.detach()) for n, t in new]))
        return result

    @staticmethod
    def _written(operator: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """Return the tensors that a call writes to."""
        if operator._schema.name == "aten::native_batch_norm":  # its schema does not mention running statistics
            return [t for t in args[3:5] if t is not None]
        if operator.namespace == "c10d":  # nor collectives' schemas their outputs
            return [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        arguments = operator._schema.arguments
        values = [*args, *([None] * (len(arguments) - len(args)))]
        written = [
            kwargs.get(argument.name, value)
            for argument, value in zip(arguments, values, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return [t for t in tree_flatten(written)[0] if isinstance(t, torch.Tensor)]


class TapedGraph(Graph[R]):
    """A `Graph` that records on a tape."""

    def __init__(
        self,
        function: Callable[[Any], R],
        reset: Callable[[], None] = lambda: None,
        record: Callable[[Callable[[], R]], Any] | None = None,
    ) -> None:
        self.tape = Tape()
        self._record = record or self.tape.record  # type: ignore[method-assign]
        super().__init__(function, torch.device("cpu"), reset)

    def _find_obstacle(self) -> str:
        return ""
