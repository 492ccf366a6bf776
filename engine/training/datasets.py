"""Data sets and loader of a run: opened, checked, verified if requested, the same on all ranks."""

import logging
import platform
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from engine.checkpoint import compatibility
from engine.config.settings import Settings
from engine.evaluate.online_knn import Knn
from engine.evaluate.splits import held_out, refuse_other_classes
from engine.parallel import collectives
from engine.parallel.accelerator import DTYPES, new_group
from engine.parallel.consensus import PeerError, all_gather_object, run_and_gather
from engine.parallel.rendezvous import cores_per_rank, local_rank, local_world, rank, world
from engine.training.model import needed_views
from methods.norm import SHUFFLED
from pipeline.backends.select_backend import Choice, choose, least_demanding
from pipeline.beton import Beton, count_classes
from pipeline.inspect import verify
from pipeline.loader import Loader, Shuffle
from pipeline.sampling.substitutes import Substitutes
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError

logger = logging.getLogger(__name__)

_MAX_LISTED = 10  # damaged records in a message
_VERIFY_SECONDS = 2 * 24 * 3600.0  # wait of the fastest rank for the slowest


@dataclass
class Datasets:
    """The data sets of a run."""

    settings: Settings
    """The run's settings, with numbers for a mean and standard deviation that are `auto`."""
    train: Beton
    eval: Beton | None
    bank: Beton | None
    """kNN's neighbors, where they are not of `train`."""
    knn: Knn | None
    probe_labels: np.ndarray | None
    """Labels of the training images for the probe, int64 [N], -1 for none."""
    backend: Choice

    @property
    def knn_fingerprint(self) -> str | None:
        """Fingerprint of the images that kNN classifies, if any, and of a bank of its own."""
        return _knn_fingerprint(self.train, self.knn, self.bank)

    def facts(self) -> dict[str, Any]:
        """Return what has to be the same on all ranks: the images, by fingerprint, and their normalization."""
        betons = {"data.train": self.train, "data.eval": self.eval, "knn.bank": self.bank}
        images = {key: beton.fingerprint if beton else None for key, beton in betons.items()}
        return {**images, "data.mean": self.settings.data.mean, "data.std": self.settings.data.std}


def open_datasets(settings: Settings, device: torch.device) -> Datasets:
    """Open the data sets, and check whether they suit the settings and the checkpoint to resume.

    The ranks agree once. Raises InputError, on all of them.
    """
    data, choices = run_and_gather(lambda: _open_all(settings, device), lambda data: data.backend, Datasets.facts)
    data.backend = least_demanding([Choice(*choice) for choice in choices])
    return data


def _open_all(settings: Settings, device: torch.device) -> Datasets:
    train = _open(settings, "data.train", settings.data.train)
    settings = with_statistics(settings, train)
    data = settings.data
    if data.batch > len(train):
        raise InputError(
            f"{train.path}: a batch of {data.batch} from {len(train)} samples: choose data.batch from 2 to {len(train)}"
        )
    evaluated = _open(settings, "data.eval", data.eval) if data.eval and settings.knn.every else None
    bank = _open(settings, "knn.bank", settings.knn.bank) if evaluated and settings.knn.bank else None
    knn = _build_knn(settings, bank or train, evaluated, device) if evaluated else None
    labels = _probe_labels(settings, train, evaluated) if settings.probe.every else None
    if rank() == 0:
        compatibility.check(settings, train.fingerprint, _knn_fingerprint(train, knn, bank))
    cores = loading(settings, device)["workers"]
    backend = choose(data.backend, train, device, local_world=local_world(), cores=cores)
    return Datasets(settings, train, evaluated, bank, knn, labels, backend)


def with_statistics(settings: Settings, train: Beton) -> Settings:
    """Return settings with the measured values of the training images for a mean or standard deviation of `auto`.

    Raises InputError where none were measured.
    """
    measured: dict[str, Any] = {}
    for name in ("mean", "std"):
        if getattr(settings.data, name) == "auto":
            measured[name] = getattr(train.manifest, name, [])
            if not measured[name]:
                remedy = "write the file again with python -m pipeline.prepare, or give three numbers"
                raise InputError(f"data.{name} auto: {train.path} has no measured colors: {remedy}")
    return replace(settings, data=replace(settings.data, **measured)) if measured else settings


def _open(settings: Settings, key: str, path: str) -> Beton:
    if not path:
        raise InputError(f"{key} is not set: give a beton, --{key} F.beton; write one with python -m pipeline.prepare")
    return open_data(path, tolerate=settings.data.on_bad == "skip")


def _knn_fingerprint(train: Beton, knn: Knn | None, bank: Beton | None) -> str | None:
    if knn is None or bank is None or bank.fingerprint == train.fingerprint:
        return knn.fingerprint if knn else None
    return f"{knn.fingerprint} with neighbors {bank.fingerprint}"


def _build_knn(settings: Settings, bank: Beton, evaluated: Beton, device: torch.device) -> Knn:
    """Return the kNN classifier of the images of `evaluated` by their neighbors in `bank`."""
    knn = settings.knn
    if not knn.bank and bank.labels.min() < 0:
        raise InputError(
            f"{bank.path}: has images without a label, by which kNN cannot classify: prepare it from class folders, "
            "give labeled neighbors with --knn.bank F.beton, or --knn.every 0"
        )
    backend = "ffcv_gpu" if device.type == "cuda" and settings.data.backend != "ffcv" else "ffcv"
    if not (bank.in_one_file and evaluated.in_one_file):
        backend = "dali"
    options = {**loading(settings, device), "backend": backend}  # never resident: each image is read once
    options |= {"batch": max(256, settings.data.batch), "crop_ratio": settings.data.eval_crop_ratio}
    return Knn(bank, evaluated, k=knn.k, temperature=knn.temperature, limit=knn.limit, **options)


def _probe_labels(settings: Settings, train: Beton, evaluated: Beton | None) -> np.ndarray:
    """Return the probe's labels of the training images, int64 [N], -1 for none and for evaluated images."""
    labels, key = train.labels.copy(), f"probe.every {settings.probe.every}"
    if labels.max() < 0:
        remedy = "prepare it from class folders, or choose probe.every 0"
        raise InputError(f"{key}: the images of {train.path} have no labels to train on: {remedy}")
    count_classes(train)
    if evaluated is not None:
        refuse_other_classes(train, evaluated)
    if evaluated is not None and evaluated.fingerprint == train.fingerprint:
        if settings.knn.bank:
            remedy = "leave knn.bank out, or give other images as data.eval"
            raise InputError(f"{key}: data.eval is data.train, so that the probe trains on its test images: {remedy}")
        labels[held_out(labels)] = -1
    return labels


def verify_datasets(settings: Settings, data: Datasets) -> None:
    """Check every record if `data.verify` is full, which may take long. Raises InputError, on all ranks alike.

    Damaged records that `data.on_bad` skips become `unreadable`: call this before the loader is built.
    """
    if settings.data.verify != "full":
        return
    _verify(settings, "data.train", data.train)
    if data.eval is not None and data.eval.fingerprint != data.train.fingerprint:
        _verify(settings, "data.eval", data.eval)
    elif data.eval is not None:
        data.eval.unreadable |= data.train.unreadable
    if data.bank is not None:
        _verify(settings, "knn.bank", data.bank)


def _verify(settings: Settings, key: str, beton: Beton) -> None:
    """Check every record of each machine's copy, divided among its ranks.

    A record that is damaged on one machine is skipped on all, or ends the run on all, as `data.on_bad` says.
    """
    first, end = (len(beton) * number // local_world() for number in (local_rank(), local_rank() + 1))
    results = all_gather_object(
        lambda: [platform.node(), verify(beton, range(first, end), quiet=local_rank() > 0)], _VERIFY_SECONDS
    )
    faults = {int(sample): f"{fault}, on {host}" for host, records in results for sample, fault in records}
    if not faults:
        return
    numbers = ", ".join(map(str, sorted(faults)[:_MAX_LISTED])) + (", ..." if len(faults) > _MAX_LISTED else "")
    summary = f"{beton.path}: {len(faults)} of {len(beton)} records are damaged, samples {numbers}"
    if settings.data.on_bad == "error":
        first = min(faults)
        raise PeerError(
            f"{summary} (the first, {beton.name(first)}: {faults[first]}): write the file again with python -m "
            "pipeline.prepare, or skip them with --data.on-bad skip"
        )
    beton.unreadable |= frozenset(faults)
    try:
        Substitutes(beton, "skip")
    except InputError as error:  # too many; all ranks know of the same records
        raise PeerError(str(error)) from None
    if rank() == 0:
        logger.warning(f"{key}: {summary}: skipped")


def build_loader(settings: Settings, data: Datasets, accelerator: Accelerator) -> Loader:
    """Return the loader of this rank's views."""
    chosen, views = settings.data, settings.data.augmentations
    options = {**loading(settings, accelerator.device), "size": settings.size_of_epochs, "batch": chosen.batch}
    options |= {"prefetch_factor": chosen.prefetch_factor, "backend": data.backend.name, "order": chosen.order}
    options |= {
        "seed": settings.seed,
        "rank": rank(),
        "world": world(),
        "shuffle": _shuffle(settings, accelerator.device),
    }
    return Loader(data.train, views, dtype=DTYPES[accelerator.mixed_precision], **options)


def _shuffle(settings: Settings, device: torch.device) -> Shuffle | None:
    """Return the shuffle of the keys' views, where BatchNorm meets other samples in them than in the queries.

    Ranks exchange the crops on the loader's stream, while a step runs, possibly a CUDA graph with collectives of its
    own: hence in a process group of its own.
    """
    if settings.model.bn not in SHUFFLED:
        return None
    queries, keys = (needed_views(settings, kinds) for kinds in ("qQ", "kK"))
    parts = 1 if settings.model.bn == "shuffle" else world()
    exchange = partial(collectives.exchange, group=new_group(settings, device))
    return Shuffle(tuple(sorted(keys)), exchange, parts, only=tuple(sorted(keys - queries)))


def loading(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Return the options that all loaders of a run share."""
    data = settings.data
    return {
        "size": data.size,
        "device": device,
        "workers": data.workers or cores_per_rank(),
        "stall_timeout": data.stall_timeout,
        "hw_decoder_load": data.hw_decoder_load,
        "on_bad": data.on_bad,
        "statistics": data.statistics,
    }
