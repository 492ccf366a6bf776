"""Training steps a second: ours, eager and compiled, and the official MoCo algorithm written plainly.

    python -m benchmarks.step [--ways eager,compiled,official,official-amp] [--runs 10] [--json OUT]
        --config engine/recipes/moco_v2_in1k.yaml [--data.batch 64] [any setting of a run]

The ways take steps in turn on the same batch, which lies on the device; medians and spread of wall clock, and of CPU
time where there is no GPU. Then each part of our step alone: encoders, loss with its terms, moving average, queue,
optimiser, augmentation. `official` is facebookresearch/moco's training loop, in float32 and NCHW as published, without
its shuffling; `official-amp` the same under autocast.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from engine.arguments import parse
from engine.build import Model, build_accelerator, build_model
from engine.config import Settings
from methods.base import Embeddings, total
from methods.heads import Encoder
from pipeline.augment import IMAGENET, augment
from pipeline.cores import available_cores
from pipeline.draws import draw_colour
from pipeline.errors import InputError, command
from pipeline.loader import Batch
from pipeline.views import AUGMENTATIONS

Call = Callable[[], Any]


class Official:
    """facebookresearch/moco's `main_moco.py` and `moco/builder.py`, on an encoder of ours."""

    def __init__(self, encoder: Encoder, settings: Settings, device: torch.device, dtype: torch.dtype | None) -> None:
        self._online = _plain(encoder).to(device)
        self._target = copy.deepcopy(self._online).requires_grad_(False)
        assert settings.model.dim is not None
        self._length, self._temperature = settings.method.queue or 65536, settings.method.temperature or 0.2
        self._queue = F.normalize(torch.randn(settings.model.dim, self._length, device=device), dim=0)
        self._position = torch.zeros(1, dtype=torch.long)
        optim = settings.optim
        self._optimiser = torch.optim.SGD(
            self._online.parameters(), optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
        self._criterion, self._dtype, self._device = nn.CrossEntropyLoss(), dtype, device

    def step(self, views: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Train on two views [B, 3, S, S], and return the loss."""
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            q = F.normalize(self._online(views[0])[0], dim=1)
            with torch.no_grad():
                for a, b in zip(self._online.parameters(), self._target.parameters(), strict=True):
                    b.data = b.data * 0.999 + a.data * (1.0 - 0.999)
                k = F.normalize(self._target(views[1])[0], dim=1)
            positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
            negative = torch.einsum("nc,ck->nk", [q, self._queue.clone().detach()])
            logits = torch.cat([positive, negative], dim=1) / self._temperature
            labels = torch.zeros(logits.shape[0], dtype=torch.long, device=self._device)
            loss = self._criterion(logits, labels)
        with torch.no_grad():
            at, count = int(self._position), len(k)
            self._queue[:, at : at + count] = k.T[:, : self._length - at].to(self._queue.dtype)
            self._position[0] = (at + count) % self._length
            _, best = logits.topk(5, 1)  # its accuracy meter
            float((best == 0).float().sum())
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        return float(loss.detach())


def _plain(encoder: Encoder) -> Encoder:
    """Return a copy without autocast or compiled calls, its weights NCHW."""
    found = Encoder(copy.deepcopy(encoder.backbone), copy.deepcopy(encoder.projector))
    return found.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def batch_of(settings: Settings, device: torch.device) -> Batch:
    """Return random views as the loader hands them out."""
    side, count = settings.data.size, settings.data.batch
    generator = torch.Generator().manual_seed(0)
    views = tuple(
        torch.randn(count, 3, side, side, generator=generator).to(device).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    return Batch(views, np.arange(count), 0, 0, 0.0)


def ways(settings: Settings, chosen: list[str], accelerator: Accelerator) -> tuple[dict[str, Call], Model]:
    """Return the steps to compare, by name, and our eager model."""
    device, batch = accelerator.device, batch_of(settings, accelerator.device)
    a, b = batch.views
    assert a is not None
    assert b is not None
    ours = build_model(replace(settings, compile=False), accelerator)
    found: dict[str, Call] = {}
    for name in chosen:
        if name == "eager":
            found[name] = lambda: ours.step(batch)
        elif name == "compiled":
            compiled = build_model(replace(settings, compile=True), accelerator)
            found[name] = lambda compiled=compiled: compiled.step(batch)  # type: ignore[misc]
        else:
            plain = Official(ours.step.encoder, settings, device, None if name == "official" else torch.bfloat16)
            found[name] = lambda plain=plain: plain.step((a.contiguous(), b.contiguous()))  # type: ignore[misc]
    return found, ours


def parts(settings: Settings, model: Model, accelerator: Accelerator) -> dict[str, Call]:
    """Return each part of our step alone, by name."""
    device, batch = accelerator.device, batch_of(settings, accelerator.device)
    moving = model.step.moving_average
    dim, count = settings.model.dim, settings.data.batch
    assert dim is not None
    needs = {name.lower() for name in model.step.objective.needs}
    named = {name: F.normalize(torch.randn(count, dim, device=device), dim=1) for name in needs}
    named |= {name.upper(): value for name, value in named.items()}
    views = {int(name[1]): batch.views[int(name[1]) - 1] for name in needs}
    queries = [views[n] for n in sorted({int(name[1]) for name in needs if name[0] == "q"})]
    keys = [views[n] for n in sorted({int(name[1]) for name in needs if name[0] == "k"})]

    def encode_keys() -> None:
        with torch.no_grad(), accelerator.autocast():
            model.target(*keys)  # type: ignore[misc]

    def encode_queries() -> None:
        with torch.enable_grad():
            torch.stack([q.float().sum() for q in model.online(*queries)]).sum().backward()

    def loss() -> None:
        leaves = {name: value.detach().requires_grad_(name[0] in "qQ") for name, value in named.items()}
        queue = None if model.queue is None else model.queue.keys
        total(model.step.objective(Embeddings(leaves, queue, 0))).backward()

    crops = torch.randint(0, 256, (count, settings.data.size, settings.data.size, 3), dtype=torch.uint8, device=device)
    colours = [
        draw_colour(view, number, seed=0, epoch=0, ids=np.arange(count))
        for number, view in enumerate(AUGMENTATIONS[settings.data.augmentation])
    ]
    found: dict[str, Call] = {"encoder, queries": encode_queries}
    if model.target is not None and moving is not None:
        found |= {"encoder, keys": encode_keys, "moving average": lambda: moving.update(0.001)}
    if model.queue is not None:
        fresh = named.get("k2", next(iter(named.values())))
        found["queue"] = lambda: model.queue.write(fresh)  # type: ignore[union-attr]
    found |= {
        "loss and terms": loss,
        "optimiser": model.optimiser.step,
        "augmentation": lambda: [augment(crops, colour, IMAGENET, torch.float32) for colour in colours],
    }
    return found


def clock(call: Call, device: torch.device) -> dict[str, float]:
    """Return seconds of wall clock, and of CPU time, that a call takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def in_turn(calls: dict[str, Call], device: torch.device, runs: int, warm: int = 2) -> dict[str, Any]:
    """Return median, minimum and maximum seconds of each, called one after another, `runs` times after the warm-up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for run in range(warm + runs):
        for name, call in calls.items():
            taken = clock(call, device)
            if run >= warm:
                found[name].append(taken)
    return {
        name: {kind: machine.spread([taken[kind] for taken in all_]) for kind in ("wall", "cpu")}
        for name, all_ in found.items()
    }


def measure(settings: Settings, chosen: list[str], runs: int) -> dict[str, Any]:
    """Return seconds of each way's step, of each part of ours, and what follows from them."""
    accelerator = build_accelerator(replace(settings, tracker="none"))
    device = accelerator.device
    steps, ours = ways(settings, chosen, accelerator)
    with FlopCounterMode(display=False) as counter:
        ours.step(batch_of(settings, device))
    flops = counter.get_total_flops()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole = in_turn(steps, device, runs)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    alone = in_turn(parts(settings, ours, accelerator), device, runs)
    kind, batch = "wall" if device.type == "cuda" else "cpu", settings.data.batch
    median = {name: taken[kind]["median"] for name, taken in whole.items()}
    encoders = sum(taken[kind]["median"] for name, taken in alone.items() if name.startswith("encoder"))
    others = sum(taken[kind]["median"] for name, taken in alone.items() if not name.startswith("encoder"))
    return {
        "device": device.type,
        "clock": kind,
        "ways": whole,
        "parts": alone,
        "pairs_per_second": {name: batch / taken["wall"]["median"] for name, taken in whole.items()},
        "ratio_to_official": {n: median["official"] / taken for n, taken in median.items() if "official" in median},
        "share_beside_the_encoders": others / (encoders + others),
        "flops_a_step": flops,
        "tflops": {name: flops / taken["wall"]["median"] / 1e12 for name, taken in whole.items()},
        "peak_gpu_bytes": peak,
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(box=None)
    for heading in ("", "ms a step", "CPU ms", "pairs/s", "TFLOP/s", "to official"):
        table.add_column(heading, justify="left" if not heading else "right")
    spread = "{median:.1f} ({min:.1f}-{max:.1f})"
    for name, taken in result["ways"].items():
        shown = [spread.format(**{k: 1000 * v for k, v in taken[kind].items()}) for kind in ("wall", "cpu")]
        ratio = result["ratio_to_official"].get(name)
        rates = f"{result['pairs_per_second'][name]:.1f}", f"{result['tflops'][name]:.2f}"
        table.add_row(name, *shown, *rates, f"{ratio:.2f}" if ratio else "")
    for name, taken in result["parts"].items():
        shown = [spread.format(**{k: 1000 * v for k, v in taken[kind].items()}) for kind in ("wall", "cpu")]
        table.add_row(f"  {name}", *shown)
    Console(width=140).print(table)
    print(f"all but the encoders: {result['share_beside_the_encoders']:.1%} of the parts' {result['clock']} time")


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time training steps.")
    parser.add_argument("--ways", default="eager,compiled,official,official-amp", help="default %(default)s")
    parser.add_argument("--runs", type=int, default=10, help="steps timed of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU (default: all cores)")
    parser.add_argument("--json", type=Path, help="write the result here")
    args, rest = parser.parse_known_args()
    chosen = args.ways.split(",")
    for name in chosen:
        if name not in ("eager", "compiled", "official", "official-amp"):
            raise InputError(f"--ways {name}: choose of eager, compiled, official, official-amp")
    if args.runs < 1 or args.threads < 0:
        raise InputError("--runs must be positive and --threads not negative: give 1 or more")
    settings = parse(rest)
    if settings.method.name != "moco_v2" and any(name.startswith("official") for name in chosen):
        raise InputError(f"--ways {args.ways}: the official loop is MoCo's: leave it out for {settings.method.name}")
    torch.set_num_threads(args.threads or available_cores())
    about = machine.describe()
    result: dict[str, Any] = {"machine": about, "arguments": rest} | measure(settings, chosen, args.runs)
    print(f"{about['processor']}, {about['cores']} cores, load {about['load']}, {about['gpu'] or 'no GPU'}")
    print(f"{about['date']}, {' '.join(rest)}")
    _print(result)
    machine.write(result, args.json)


if __name__ == "__main__":
    main()
