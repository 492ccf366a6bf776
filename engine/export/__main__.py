"""Export a pretrained encoder:  python -m engine.export CHECKPOINT --format torchvision|timm|..."""

import argparse
import logging
import re
from pathlib import Path

from engine.export.formats import FORMATS, export
from engine.weights.load import load_encoder
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import command

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    description = "Export a pretrained encoder."
    made = ArgumentParser(prog="python -m engine.export", description=description, renamed={"--to": "--out"})
    made.add_argument("checkpoint", type=Path, help="run or checkpoint folder, .safetensors, .pth, .pth.tar")
    made.add_argument("--format", choices=list(FORMATS), default="torchvision", help="(default: torchvision)")
    made.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    made.add_argument(
        "--heads", type=int, default=0, help="attention heads of a transformer whose file lacks their number"
    )
    made.add_argument("--prefix", default="", help="of the backbone's keys, in a file of no known kind")
    made.add_argument("--trust-recipe", action="store_true", help="import the code that a run names as its model.arch")
    made.add_argument("--out", type=Path, metavar="FILE", help="(default: ARCH-FORMAT.SUFFIX)")
    return made


@command
def main() -> None:
    args = parser().parse_args()
    options = {"heads": args.heads, "prefix": args.prefix, "trust_recipe": args.trust_recipe}
    encoder = load_encoder(args.checkpoint, args.which, **options)
    logger.info("%s", encoder.summary())
    for warning in encoder.warnings:
        logger.warning("%s", warning)
    name = re.sub(r"[^\w.-]", "-", encoder.architecture.arch)
    out = args.out or Path(f"{name}-{args.format}{FORMATS[args.format].suffix}")
    distance = export(encoder, args.format, out)
    print(f"written: {out} and {out.name}.md; read back, its features differ by {distance:.1e} at most")


if __name__ == "__main__":
    main()
