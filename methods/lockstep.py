"""Two encoders layer by layer, so that each exchange of their BatchNorm statistics between ranks serves both.

A forward pass becomes a generator: it yields the statistics of this rank at each synchronized BatchNorm, and continues
with those of all ranks.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from methods.heads import Encoder
from methods.norm import BatchNorm

Pass = Generator[torch.Tensor, torch.Tensor, Any]
"""Yields this rank's statistics, [1, ...], is sent those of all ranks, [world, ...], and returns the output."""
_Instruction = tuple[fx.Node, Callable[..., Any], nn.Module | None, list[fx.Node]]


def in_lockstep(
    passes: Sequence[Pass], gather: Callable[[torch.Tensor], torch.Tensor], gradients: Sequence[bool]
) -> list[Any]:
    """Run passes by turns; return their outputs. One gather serves the statistics that all of them wait for.

    gather: this rank's row [1, N] to those of all ranks, [world, N]. gradients: whether each pass records gradients.
    """
    outputs: list[Any] = [None] * len(passes)
    answers: dict[int, torch.Tensor | None] = dict.fromkeys(range(len(passes)))
    while answers:
        waiting: dict[int, torch.Tensor] = {}
        for number, answer in answers.items():
            with torch.set_grad_enabled(gradients[number]):
                try:
                    waiting[number] = passes[number].send(answer)  # type: ignore[arg-type]
                except StopIteration as end:
                    outputs[number] = end.value
        if not waiting:
            break
        rows = [local.flatten() for local in waiting.values()]
        gathered = gather(torch.cat(rows)[None] if len(rows) > 1 else rows[0][None])
        parts = gathered.split([row.numel() for row in rows], dim=1)
        answers = {
            number: part.reshape(-1, *local.shape[1:])
            for (number, local), part in zip(waiting.items(), parts, strict=True)
        }
    return outputs


def forward(encoder: Encoder, *views: torch.Tensor) -> Pass:
    """Return the forward pass of an encoder, all views at once."""
    x = encoder.keep((yield from _through(encoder.backbone, encoder.joined(views))))
    for module in (encoder.projector, encoder.predictor):
        if module is not None:
            x = yield from _through(module, x)
    return encoder.embeddings(x, len(views))


def _through(module: nn.Module, x: torch.Tensor) -> Pass:
    if isinstance(module, BatchNorm):
        if not module.training:
            return module(x)
        gathered = yield module.statistics(x)
        return module.normalize(x, gathered)
    if not any(isinstance(child, BatchNorm) for child in module.modules()):
        return module(x)
    values: dict[fx.Node, Any] = {}
    for node, function, layer, unneeded in _program(module):
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
        if isinstance(layer, BatchNorm):
            values[node] = yield from _through(layer, *args)
        elif node.op == "placeholder":
            values[node] = x
        elif node.op == "output":
            return args[0]
        else:
            values[node] = function(*args, **kwargs)
        for old in unneeded:
            del values[old]
    raise AssertionError("a traced module without an output")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BatchNorm) or not any(isinstance(child, BatchNorm) for child in m.modules())


_programs: WeakKeyDictionary[nn.Module, list[_Instruction]] = WeakKeyDictionary()


def _program(module: nn.Module) -> list[_Instruction]:
    """Return a module's operations in order, each with the values that none needs after it."""
    if module in _programs:
        return _programs[module]
    graph = _Tracer().trace(module)
    last = dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        last.update(dict.fromkeys(node.all_input_nodes, node))
    _programs[module] = list(_instructions(module, graph, last))
    return _programs[module]


def _instructions(module: nn.Module, graph: fx.Graph, last: dict[fx.Node, fx.Node]) -> Iterator[_Instruction]:
    for node in graph.nodes:
        layer = module.get_submodule(node.target) if node.op == "call_module" else None
        if layer is not None:
            function: Callable[..., Any] = layer
        elif node.op == "call_method":
            function = _method(node.target)
        elif node.op == "get_attr":
            function = _attribute(module, node.target)
        else:
            function = node.target if callable(node.target) else _no_operation
        yield node, function, layer, [value for value, user in last.items() if user is node]


def _no_operation() -> None:
    """The input, or the output."""


def _method(name: str) -> Callable[..., Any]:
    return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)


def _attribute(module: nn.Module, path: str) -> Callable[[], Any]:
    owner, _, name = path.rpartition(".")
    return lambda: getattr(module.get_submodule(owner), name)
