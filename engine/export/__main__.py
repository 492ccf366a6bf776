"""Export a pretrained encoder:  python -m engine.export CHECKPOINT --format torchvision|timm|..."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.export.formats import FORMATS, export
from engine.weights.load import load_encoder
from pipeline.system.errors import command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m engine.export", description="Export a pretrained encoder.")
    parser.add_argument("checkpoint", type=Path, help="run or checkpoint folder, .safetensors, .pth, .pth.tar")
    parser.add_argument("--format", choices=list(FORMATS), default="torchvision", help="(default: torchvision)")
    parser.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    parser.add_argument("--heads", type=int, default=0, help="of a transformer whose file does not say")
    parser.add_argument("--to", type=Path, metavar="FILE", help="(default: ARCH-FORMAT.SUFFIX)")
    return parser.parse_args()


@command
def main() -> None:
    args = _arguments()
    loaded = load_encoder(args.checkpoint, args.which, heads=args.heads)
    print(loaded.summary())
    for warning in loaded.warnings:
        print(f"warning: {warning}")
    to = args.to or Path(f"{loaded.architecture.arch}-{args.format}{FORMATS[args.format].suffix}")
    distance = export(loaded, args.format, to)
    print(f"written: {to} and {to.name}.md; read back, its features differ by {distance:.1e} at most")


if __name__ == "__main__":
    main()
