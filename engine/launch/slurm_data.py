"""Print the data sets of a run's settings, one a line.

python -m engine.launch.slurm_data --config R.yaml [settings]
"""

import sys

from engine.config.cli import parse
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import command


def parser() -> ArgumentParser:
    return ArgumentParser(
        prog="python -m engine.launch.slurm_data", description="Print the data sets of a run's settings."
    )


@command
def main() -> None:
    parser().parse_known_args()  # answers --help
    settings = parse(sys.argv[1:])
    named = {"data.train": settings.data.train, "data.eval": settings.data.eval, "knn.bank": settings.knn.bank}
    for name, path in named.items():
        if path:
            print(f"{name} {path}")


if __name__ == "__main__":
    main()
