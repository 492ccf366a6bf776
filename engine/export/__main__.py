"""Export a pretrained encoder:  python -m engine.export CHECKPOINT --format torchvision|timm|..."""

import argparse
import logging
import re
from pathlib import Path

from engine.export import hub
from engine.export.formats import FORMATS, export
from engine.weights.load import LoadedEncoder, load_encoder
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import InputError, command

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    description = "Export a pretrained encoder."
    made = ArgumentParser(prog="python -m engine.export", description=description, renamed={"--to": "--out"})
    made.add_argument("checkpoint", type=Path, help="run or checkpoint folder, .safetensors, .pth, .pth.tar")
    formats = "(default: torchvision; with --push-to timm where it has the architecture, else safetensors)"
    made.add_argument("--format", choices=list(FORMATS), help=formats)
    made.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    made.add_argument(
        "--heads", type=int, default=0, help="attention heads of a transformer whose file lacks their number"
    )
    made.add_argument("--prefix", default="", help="of the backbone's keys, in a file of no known kind")
    made.add_argument("--trust-recipe", action="store_true", help="import the code that a run names as its model.arch")
    made.add_argument(
        "--out", type=Path, metavar="FILE", help="(default: ARCH-FORMAT.SUFFIX, or a folder with --push-to)"
    )
    made.add_argument(
        "--push-to", default="", metavar="USER/NAME", help="upload to this repository of the Hugging Face Hub"
    )
    made.add_argument("--private", action="store_true", help="make that repository a private one, if it is new")
    made.add_argument("--dry-run", action="store_true", help="with --push-to: write its folder, and upload nothing")
    return made


def _check(args: argparse.Namespace) -> None:
    """Raise InputError for options that cannot work together."""
    if args.push_to:
        hub.check_name(args.push_to)
    elif args.private or args.dry_run:
        raise InputError(f"{'--private' if args.private else '--dry-run'}: only with --push-to USER/NAME: add it")


@command
def main() -> None:
    args = parser().parse_args()
    _check(args)
    options = {"heads": args.heads, "prefix": args.prefix, "trust_recipe": args.trust_recipe}
    encoder = load_encoder(args.checkpoint, args.which, **options)
    logger.info("%s", encoder.summary())
    for warning in encoder.warnings:
        logger.warning("%s", warning)
    name = re.sub(r"[^\w.-]", "-", encoder.architecture.arch)
    if args.push_to:
        _push(encoder, args, args.out or Path(f"{name}-hub"))
        return
    format = args.format or "torchvision"
    out = args.out or Path(f"{name}-{format}{FORMATS[format].suffix}")
    distance = export(encoder, format, out)
    print(f"written: {out} and {out.name}.md; read back, its features differ by {distance:.1e} at most")


def _push(encoder: LoadedEncoder, args: argparse.Namespace, folder: Path) -> None:
    """Write the repository's folder, and upload it."""
    format = args.format or hub.choose_format(encoder.architecture)
    hub.check_format(encoder.architecture, format)
    distance = hub.write_folder(encoder, format, folder, args.push_to)
    print(f"written: {folder}, as {format}; read back, its features differ by {distance:.1e} at most")
    if args.dry_run:
        print(f"nothing was uploaded: without --dry-run it becomes https://huggingface.co/{args.push_to}")
    else:
        print(f"uploaded: {hub.push(folder, args.push_to, private=args.private)}")


if __name__ == "__main__":
    main()
