"""What the runs' encoders make of images: features of one sample of each data set, neighbors and maps of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import storage
from engine.report import tsne
from engine.report.run_folder import RunFiles, number
from engine.report.sample import Near, Sample, agreement, embed, nearest, sample
from engine.weights.load import Loaded, Which, load_encoder
from pipeline.beton import Beton
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError

_CENTER = 0.875  # of the shorter side: what is cropped where a run does not say


@dataclass(frozen=True)
class Wanted:
    """What is asked of the pictures."""

    data: str
    """Images in place of each run's own; empty for these."""
    neighbors: int
    limit: int
    seed: int
    which: Which
    device: torch.device


@dataclass
class Seen:
    """An encoder's features of a sample, and what is shown of them."""

    run: RunFiles
    checkpoint: str
    features: torch.Tensor
    near: Near | None = None
    agreement: float | None = None
    """Share of neighbors of the same class, over the whole sample."""
    places: np.ndarray | None = None
    """In the plane, [m, 2], of the images that the map shows."""


@dataclass
class Gallery:
    """A sample of a data set as several encoders see it."""

    sample: Sample
    size: int
    """Images that the data set has."""
    seen: list[Seen] = field(default_factory=list)
    shown: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Places in the sample of the images on the maps, int64 [m]."""


def look(runs: list[RunFiles], wanted: Wanted) -> list[Gallery]:
    """Return each data set's sample as the encoders of its runs see it.

    Where there is no encoder, or no data, the run says so. Raises InputError for `wanted.data` that cannot be read.
    """
    given = open_data(wanted.data, tolerate=True) if wanted.data else None
    galleries: dict[str, Gallery] = {}
    for run in runs:
        try:
            loaded = _encoder(run, wanted.which)
            beton = _own_data(run) if given is None else given
            gallery = galleries.get(beton.fingerprint) or _gallery(beton, run, wanted)
            _add(gallery, run, loaded, wanted)
            galleries[beton.fingerprint] = gallery
        except InputError as error:
            run.missing.append(f"Its encoder is not looked at: {' '.join(str(error).split())}.")
    for gallery in galleries.values():
        _finish(gallery, wanted)
    return list(galleries.values())


def _encoder(run: RunFiles, which: Which) -> Loaded:
    """Return the run's newest whole checkpoint's encoder. Raises InputError where there is none."""
    path, broken = storage.newest(run.path / "checkpoints")
    run.missing += [f"A checkpoint was passed over: {problem}." for problem in broken]
    if path is None:
        raise InputError("there is no whole checkpoint yet")
    loaded = load_encoder(path, which)
    if not 8 <= (size := loaded.architecture.size) <= 1024:
        raise InputError(f"it is for images of {size} pixels")
    return loaded


def _own_data(run: RunFiles) -> Beton:
    """Return the run's data for evaluation, or else for training. Raises InputError where neither can be read."""
    named = [str(value) for key in ("data.eval", "data.train") if (value := run.settings.get(key))]
    problems = []
    for name in named:
        try:
            return open_data(name if Path(name).exists() else _from_start(run, name), tolerate=True)
        except (OSError, ValueError) as error:  # such as a name that is too long
            problems.append(str(error))
    raise InputError(f"{'; '.join(problems) or 'its settings name no images'}: give --data")


def _from_start(run: RunFiles, name: str) -> str:
    """Return a path of the settings from where training was started, which `out` tells where it is relative, too."""
    out = Path(str(run.settings.get("out", "")))
    for started in run.path.parents:
        if started / out == run.path and (started / name).exists():
            return str(started / name)
    return name


def _share(run: RunFiles) -> float:
    share = number(run.settings.get("data.eval_crop_ratio"))
    return share if share and 0 < share <= 1 else _CENTER


def _gallery(beton: Beton, run: RunFiles, wanted: Wanted) -> Gallery:
    found = sample(beton, wanted.limit, _share(run), wanted.seed)
    if len(found.ids) < 2:
        raise InputError(f"{beton.path}: has fewer than two images that can be read")
    return Gallery(found, len(beton))


def _add(gallery: Gallery, run: RunFiles, loaded: Loaded, wanted: Wanted) -> None:
    """Add what an encoder sees. Raises InputError where its features say nothing."""
    print(f"{run.name}: features of {len(gallery.sample.ids)} images ...", file=sys.stderr, flush=True)
    found, whole = embed(loaded, gallery.sample, _share(run), wanted.device)
    if not whole.all():  # the first encoder to meet damaged records takes them out for all
        gallery.sample, found = gallery.sample.only(whole), found[torch.from_numpy(whole)]
    if not found.isfinite().all():
        raise InputError("it gives features that are not finite")
    if float(found.std(dim=0).max()) < 1e-6:
        raise InputError("it gives the same features for all images: it is collapsed")
    gallery.seen.append(Seen(run, loaded.path.name, found))


def _finish(gallery: Gallery, wanted: Wanted) -> None:
    """Find the neighbors and maps."""
    of = gallery.sample
    gallery.shown = tsne.shown(of)
    for seen in gallery.seen:
        seen.near = nearest(seen.features, of.queries, wanted.neighbors)
        seen.agreement = agreement(seen.features, of.labels, wanted.neighbors) if of.labeled else None
        if len(gallery.shown) >= tsne.FEWEST:
            print(f"{seen.run.name}: map of {len(gallery.shown)} images ...", file=sys.stderr, flush=True)
            seen.places = tsne.project(seen.features[torch.from_numpy(gallery.shown)], wanted.seed)
