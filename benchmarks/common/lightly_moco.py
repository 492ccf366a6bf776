"""lightly's MoCo on CIFAR-10, with the settings of its benchmark script, on the same files as Millrace.

    python -m benchmarks.common.lightly_moco --train TRAIN --test TEST --out DIR [--epochs 200] [--batch 512]
        [--width 1]

Model, loss, augmentation, optimizer and schedule are those of lightly's `docs/source/getting_started/benchmarks/
cifar10_benchmark.py`: ResNet-18 with BatchNorm split in eight, projection head, memory bank, transform in worker
processes; SGD at rate 0.06 for a batch of 128, in proportion, cosine by epoch; a symmetric loss. kNN (k 200, T 0.1) is
ours, on features of norm 1, so that both are measured alike. `engine.report` and `benchmarks.study` read the run
folder. Needs lightly and torchvision.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from engine.evaluate.nearest_neighbors import classify
from pipeline.augment.color import IMAGENET, normalize
from pipeline.beton import Beton
from pipeline.storage.decode import decode
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import InputError, command
from pipeline.system.files import write_atomic, write_json

_KNN_K, _KNN_TEMPERATURE = 200, 0.1
_EMA_MOMENTUM, _TEMPERATURE = 0.99, 0.1


class Images(Dataset):
    """A beton's images, transformed as PIL images, and their labels."""

    def __init__(self, path: str, transform: Any) -> None:
        beton = Beton(path)
        if (beton.labels < 0).any() or beton.longest_side > 64:
            raise InputError(f"{path}: give labeled images of at most 64 pixels, such as CIFAR-10's")
        self.pixels, self.labels = [decode(beton, index) for index in range(len(beton))], beton.labels
        self._transform = transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Any:
        return self._transform(Image.fromarray(self.pixels[index]))


class Moco(nn.Module):
    """The model of lightly's benchmark: backbone, head, their momentum copies, loss."""

    def __init__(self, width: float, bank: int) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models import ResNetGenerator
        from lightly.models.modules.heads import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        layers = list(ResNetGenerator("resnet-18", width=width, num_splits=8).children())
        self.backbone = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1))
        features = layers[-1].in_features
        self.head = MoCoProjectionHead(features, features, 128)
        self.backbone_momentum, self.head_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        for module in (self.backbone_momentum, self.head_momentum):
            deactivate_requires_grad(module)
        self.criterion = NTXentLoss(temperature=_TEMPERATURE, memory_bank_size=(bank, 128))

    def loss(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Update the momentum copies; return the symmetric loss of two views [B, 3, S, S]."""
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, _EMA_MOMENTUM)
        update_momentum(self.head, self.head_momentum, _EMA_MOMENTUM)
        return 0.5 * (self._one_way(a, b) + self._one_way(b, a))

    def _one_way(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        from lightly.models.utils import batch_shuffle, batch_unshuffle

        q = self.head(self.backbone(queries).flatten(start_dim=1))
        with torch.no_grad():
            keys, shuffle = batch_shuffle(keys)
            k = self.head_momentum(self.backbone_momentum(keys).flatten(start_dim=1))
            k = batch_unshuffle(k, shuffle)
        return self.criterion(q, k)


@torch.no_grad()
def top1(model: Moco, train: Images, test: Images, device: torch.device) -> float:
    """Return kNN top-1 of the backbone's features."""
    was_training = model.training
    model.eval()
    bank, queries = (_features(model, images.pixels, device) for images in (train, test))
    model.train(was_training)
    labels, true = (torch.from_numpy(images.labels.astype(np.int64)).to(device) for images in (train, test))
    settings = {"k": _KNN_K, "temperature": _KNN_TEMPERATURE, "classes": int(labels.max()) + 1}
    return float((classify(queries, bank, labels, **settings) == true).float().mean())  # type: ignore[arg-type]


def _features(model: Moco, pixels: list[np.ndarray], device: torch.device) -> torch.Tensor:
    features = []
    for start in range(0, len(pixels), 1000):
        images = torch.from_numpy(np.stack(pixels[start : start + 1000])).to(device)
        output = model.backbone(normalize(images, IMAGENET, torch.float32)).flatten(1).float()
        features.append(F.normalize(output, dim=1))
    return torch.cat(features)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, writing metrics.jsonl like our runs; return the summary."""
    from lightly.transforms import SimCLRTransform

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = Images(args.train, SimCLRTransform(input_size=32, gaussian_blur=0.0))
    test = Images(args.test, None)
    model = Moco(args.width, args.bank).to(device).train()
    parameters = [*model.backbone.parameters(), *model.head.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.06 * args.batch / 128, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    loader: Iterable[Any] = DataLoader(
        images, args.batch, shuffle=True, drop_last=True, num_workers=args.workers, persistent_workers=args.workers > 0
    )
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    metrics, seconds, steps, loss = args.out / "metrics.jsonl", 0.0, 0, torch.zeros(())
    metrics.unlink(missing_ok=True)
    for epoch in range(1, args.epochs + 1):
        start, samples = time.perf_counter(), 0
        for a, b in loader:
            with half:
                loss = model.loss(a.to(device), b.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps, samples = steps + 1, samples + len(a)
        schedule.step()
        last_loss = loss.item()  # waits for the device
        taken = time.perf_counter() - start
        seconds += taken
        rate = round(samples / taken, 1)
        line: dict[str, Any] = {"step": steps, "epoch": epoch, "loss": last_loss, "pairs_per_second": rate}
        if epoch % args.every == 0 or epoch == args.epochs:
            line["knn_top1"] = top1(model, images, test, device)
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rate = steps * args.batch / seconds
    return {**line, "training_seconds": seconds, "pairs_per_second": rate, "device": device_name}


def begin(args: argparse.Namespace) -> None:
    """Make the run folder, with the settings that readers of runs need."""
    args.out.mkdir(parents=True, exist_ok=True)
    method = {"name": "lightly's MoCo", "queue_size": args.bank, "ema_momentum": _EMA_MOMENTUM}
    model = {"arch": "resnet18", "stem": "small", "width": args.width, "dim": 128, "bn": "split"}
    settings = {
        "seed": args.seed,
        "method": {**method, "temperature": _TEMPERATURE},
        "model": model,
        "data": {"train": args.train, "eval": args.test, "batch": args.batch, "size": 32},
        "optim": {"epochs": args.epochs},
    }
    write_atomic(args.out / "config.yaml", yaml.safe_dump(settings, sort_keys=False))


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog="python -m benchmarks.common.lightly_moco", description="Train lightly's MoCo.")
    parser.add_argument("--train", required=True, metavar="BETON", help="labeled images of 32 pixels to train on")
    parser.add_argument("--test", required=True, metavar="BETON", help="labeled images of 32 pixels to test on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument("--epochs", type=int, default=200, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=512, help="images a batch (default %(default)s)")
    parser.add_argument("--bank", type=int, default=4096, help="keys in the memory bank (default %(default)s)")
    parser.add_argument("--width", type=float, default=1.0, help="width of the ResNet (default %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="epochs between evaluations (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that transform (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser


@command
def main() -> None:
    args = parser().parse_args()
    try:
        import lightly  # noqa: F401
        import torchvision  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install lightly torchvision") from None
    begin(args)
    summary = train(args)
    write_json(args.out / "summary.json", summary)
    print(f"finished: kNN top-1 {summary['knn_top1']:.2%} in {summary['training_seconds']:.0f} s")


if __name__ == "__main__":
    main()
