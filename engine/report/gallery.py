"""Images as the runs' encoders embed them: one sample of each data set, with neighbors and maps of its features."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import storage
from engine.report import tsne
from engine.report.run_folder import RunFiles, number
from engine.report.sample import Neighbors, Sample, agreement, draw_sample, embed, nearest
from engine.weights.layouts import Which
from engine.weights.load import LoadedEncoder, load_encoder
from methods.registry import Backbone
from pipeline.beton import Beton
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError

logger = logging.getLogger(__name__)

_DEFAULT_CROP_RATIO = 0.875


@dataclass(frozen=True)
class GalleryOptions:
    """Options of the galleries."""

    data: str
    """Images to show; empty: those of the run."""
    neighbors: int
    limit: int
    """Images in a sample, at most."""
    seed: int
    which: Which
    device: torch.device
    untrained: Backbone | None = None
    """Backbone before training, to show next to the runs'."""
    trust_recipe: bool = False
    """Import the code that a run names as its `model.arch`."""


@dataclass
class EncoderView:
    """An encoder's features of a sample, with their neighbors and map."""

    run: RunFiles
    title: str
    checkpoint: str
    """Name of its checkpoint; empty before training."""
    features: torch.Tensor
    near: Neighbors | None = None
    agreement: float | None = None
    """Fraction of neighbors of the same class, over the entire sample."""
    points: np.ndarray | None = None
    """Points of the map, [m, 2]."""


@dataclass
class Gallery:
    """A sample of a data set, viewed by several encoders."""

    sample: Sample
    size: int
    """Images in the data set."""
    views: list[EncoderView] = field(default_factory=list)
    mapped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Positions in the sample of the images on the maps, int64 [m]."""


def build_galleries(runs: list[RunFiles], options: GalleryOptions) -> list[Gallery]:
    """Return the gallery of each data set, with the encoders of its runs.

    A run without encoder or data gets a note in its `problems`. Raises InputError if `options.data` cannot be read.
    """
    data = open_data(options.data, tolerate=True) if options.data else None
    galleries: dict[str, Gallery] = {}
    for run in runs:
        try:
            encoder = _encoder(run, options)
            beton = _run_data(run) if data is None else data
            gallery = galleries.get(beton.fingerprint) or _empty_gallery(beton, run, options)
            if options.untrained is None:
                _add_view(gallery, run, run.name, encoder, options)
            else:
                before = replace(encoder, backbone=options.untrained)
                _add_view(gallery, run, "before training", before, options)
                _add_view(gallery, run, "after training", encoder, options)
            galleries[beton.fingerprint] = gallery
        except InputError as error:
            run.problems.append(f"Its encoder is not shown: {' '.join(str(error).split())}.")
    for gallery in galleries.values():
        _finish(gallery, options)
    return list(galleries.values())


def _encoder(run: RunFiles, options: GalleryOptions) -> LoadedEncoder:
    """Return the encoder of the run's newest intact checkpoint. Raises InputError if there is none."""
    path, broken = storage.newest(run.path / "checkpoints")
    run.problems += [f"A checkpoint was skipped: {problem}." for problem in broken]
    if path is None:
        raise InputError("there is no intact checkpoint yet")
    encoder = load_encoder(path, options.which, trust_recipe=options.trust_recipe)
    if not 8 <= (size := encoder.architecture.size) <= 1024:
        raise InputError(f"it is for images of {size} pixels")
    return encoder


def _run_data(run: RunFiles) -> Beton:
    """Return the run's evaluation data, or else its training data. Raises InputError if neither can be read."""
    names = [str(value) for key in ("data.eval", "data.train") if (value := run.settings.get(key))]
    problems = []
    for name in names:
        try:
            return open_data(name if Path(name).exists() else _from_start(run, name), tolerate=True)
        except (OSError, ValueError) as error:  # OSError: of a name that is too long
            problems.append(str(error))
    raise InputError(f"{'; '.join(problems) or 'its settings name no images'}: give --data")


def _from_start(run: RunFiles, name: str) -> str:
    """Return a path of the settings from the folder in which training was started, deduced from a relative `out`."""
    out = Path(str(run.settings.get("out", "")))
    for folder in run.path.parents:
        if folder / out == run.path and (folder / name).exists():
            return str(folder / name)
    return name


def _crop_ratio(run: RunFiles) -> float:
    ratio = number(run.settings.get("data.eval_crop_ratio"))
    return ratio if ratio and 0 < ratio <= 1 else _DEFAULT_CROP_RATIO


def _empty_gallery(beton: Beton, run: RunFiles, options: GalleryOptions) -> Gallery:
    sample = draw_sample(beton, options.limit, _crop_ratio(run), options.seed)
    if len(sample.ids) < 2:
        raise InputError(f"{beton.path}: has fewer than two readable images")
    return Gallery(sample, len(beton))


def _add_view(gallery: Gallery, run: RunFiles, title: str, encoder: LoadedEncoder, options: GalleryOptions) -> None:
    """Add an encoder's features. Raises InputError for features without information."""
    logger.info("%s: features of %d images ...", title, len(gallery.sample.ids))
    features, intact = embed(encoder, gallery.sample, _crop_ratio(run), options.device)
    if not intact.all():  # the first encoder to read damaged records removes them for all
        gallery.sample, features = gallery.sample.only(intact), features[torch.from_numpy(intact)]
    if not features.isfinite().all():
        raise InputError("it gives non-finite features")
    if float(features.std(dim=0).max()) < 1e-6:
        raise InputError("it gives the same features for all images: it is collapsed")
    checkpoint = "" if encoder.backbone is options.untrained else encoder.path.name
    gallery.views.append(EncoderView(run, title, checkpoint, features))


def _finish(gallery: Gallery, options: GalleryOptions) -> None:
    """Compute neighbors and maps."""
    sample = gallery.sample
    gallery.mapped = tsne.choose_points(sample)
    for view in gallery.views:
        view.near = nearest(view.features, sample.queries, options.neighbors)
        view.agreement = agreement(view.features, sample.labels, options.neighbors) if sample.labeled else None
        if len(gallery.mapped) >= tsne.MIN_POINTS:
            logger.info("%s: map of %d images ...", view.title, len(gallery.mapped))
            view.points = tsne.project(view.features[torch.from_numpy(gallery.mapped)], options.seed)
