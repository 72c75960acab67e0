"""Train with known faults; otherwise as `python -m searchr1_lite.training`.

python -m searchr1_lite.lab --run-folder runs/wrong-sign group_size=5 defects='[kl_sign]'
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from searchr1_lite.lab.defects import train_broken
from searchr1_lite.lab.profile import load_broken
from searchr1_lite.plain import plain
from searchr1_lite.training.__main__ import ERRORS, setting


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m searchr1_lite.lab", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="tiny", help="a profile's name or a .yaml file")
    parser.add_argument("--run-folder", type=Path, required=True, help="made here; a run that was cut off goes on")
    parser.add_argument("settings", nargs="*", type=setting, metavar="name=value")
    given = parser.parse_args(arguments)
    try:
        train_broken(load_broken(given.profile, **dict(given.settings)), given.run_folder)
    except ERRORS as error:
        sys.exit(f"error: {plain(str(error))}")


if __name__ == "__main__":
    main()
