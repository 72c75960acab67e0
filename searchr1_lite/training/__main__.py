"""Train from a shell; any setting of the profile can follow as name=value.

python -m searchr1_lite.training --run-folder data/results/runs/tiny-masked-seed0 seed=0 masked=true

On several GPUs, or CPU processes, the same run in less time (with accelerate's --cpu there would be one process):

accelerate launch --multi_gpu --num_processes 2 -m searchr1_lite.training --run-folder runs/of-two-processes
"""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from searchr1_lite.config import ConfigError, Profile, load_profile
from searchr1_lite.plain import plain
from searchr1_lite.preflight import MemoryFullError
from searchr1_lite.retrieval.build import BuildError
from searchr1_lite.retrieval.corpus import CorpusError
from searchr1_lite.retrieval.encoders import EncoderError
from searchr1_lite.retrieval.manifest import IndexMismatchError
from searchr1_lite.rollout.engine import PromptTooLongError
from searchr1_lite.rollout.policy import PolicyError
from searchr1_lite.rollout.vllm import VLLMError
from searchr1_lite.runfolder import RunFolderError
from searchr1_lite.tasks.questions import QuestionError
from searchr1_lite.training.loop import train
from searchr1_lite.types import RetrievalError

# What a user can put right; a message says it, and a traceback would hide it. Anything else is a fault of ours.
ERRORS = (ConfigError, QuestionError, CorpusError, EncoderError, IndexMismatchError, PolicyError, RunFolderError)
ERRORS += (BuildError, PromptTooLongError, RetrievalError, MemoryFullError, VLLMError)


def setting(text: str) -> tuple[str, object]:
    """`name=value`, the value read as YAML (3, 0.001, true, text)."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ArgumentTypeError(f"{text!r}: the value is no YAML ({str(error).splitlines()[0]})") from None


def main(
    arguments: list[str] | None = None,
    name: str = "training",
    load: Callable[..., Profile] | None = None,
    make: Callable[[Profile, Path], Any] | None = None,
) -> None:
    """The command; the bug lab gives a `load` and a `make` of its own (searchr1_lite/lab)."""
    parser = ArgumentParser(prog=f"python -m searchr1_lite.{name}", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="tiny", help="a profile's name or a .yaml file")
    parser.add_argument("--run-folder", type=Path, required=True, help="made here; a run that was cut off goes on")
    parser.add_argument("settings", nargs="*", type=setting, metavar="name=value")
    given = parser.parse_args(arguments)
    try:
        profile = (load or load_profile)(given.profile, **dict(given.settings))
        (make or train)(profile, given.run_folder)
    except ERRORS as error:
        sys.exit(f"error: {plain(str(error))}")


if __name__ == "__main__":
    main()
