"""What an experiment is: a YAML file with arms and seeds, and the runs that follow from it.

An arm is what it changes of BASE, the tiny profile a little smaller. A run's name is these changes and its seed, so
that experiments share their runs. Leaves out: claims, which are carried along for `analysis/findings.py` to read.
"""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from searchr1_lite.analysis.runs import read_mapping
from searchr1_lite.config import ROOT, ConfigError, Profile, load_profile

BASE = {"steps": 24, "questions_per_step": 6, "group_size": 5}
FOLDER = Path(__file__).parent
RUNS = ROOT / "runs" / "experiments"
SMOKE = "smoke"  # shows that everything runs, and measures nothing
KEYS = ("title", "question", "seeds", "minutes", "arms", "claims")


class ExperimentError(ValueError):
    """An experiment that cannot be used, made or summed up; the message says why and what to do."""


class PlannedRun(NamedTuple):
    arm: str
    seed: int
    profile: Profile
    name: str  # of the run folder


class Experiment(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    file: Path
    title: str
    question: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    minutes: Annotated[float, Field(gt=0)]  # expected, all runs from nothing, on two quiet cores
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    claims: Any = None

    def runs(self) -> list[PlannedRun]:
        """All arms with the first seed, then with the next: what is cut off has about as many seeds in every arm."""
        profiles = [(arm, seed, arm_profile(self.arms[arm], seed)) for seed in self.seeds for arm in self.arms]
        return [PlannedRun(arm, seed, one, f"{slug(one)}-seed{seed}") for arm, seed, one in profiles]

    @property
    def typed(self) -> str:
        """How it is asked for: by name, or by its file where that is not of the package."""
        return self.name if self.file.parent == FOLDER else str(self.file)

    @property
    def result_file(self) -> Path:
        return (RUNS if self.name == SMOKE else ROOT / "data/results/experiments") / f"{self.name}.json"


def experiment_names() -> list[str]:
    """Of the package's experiments; `untestable.yaml` has claims and no arms."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in (SMOKE, "untestable"))


def load_experiment(name: str | os.PathLike, seeds: Sequence[int] = ()) -> Experiment:
    """An experiment by name or from a YAML file, with other seeds where some are given.

    Raises ExperimentError, or RunError for a file that holds no mapping.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file() or path == FOLDER / "untestable.yaml":
        known = ", ".join(experiment_names())
        raise ExperimentError(f"no experiment {str(name)!r}; there are {known}, {SMOKE}, or give a .yaml file")
    written = read_mapping(path)
    for key in set(written) - set(KEYS):
        close = get_close_matches(str(key), KEYS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(KEYS)}"
        raise ExperimentError(f"{path}: there is no key {key!r}; {hint}")
    about = {"name": path.stem, "file": path} | ({"seeds": list(seeds)} if seeds else {})
    try:
        experiment = Experiment.model_validate(written | about)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ExperimentError(f"{path}: {where}: {problem['msg']}, got {problem['input']!r}") from None
    _check_arms(experiment, path)
    return experiment


def _check_arms(experiment: Experiment, path: Path) -> None:
    names: dict[str, str] = {}
    for arm, settings in experiment.arms.items():
        if fixed := sorted(settings.keys() & {"seed", "name"}):
            raise ExperimentError(f"{path}: arm {arm!r} sets {fixed[0]}, which is not an arm's to set; see seeds")
        try:
            name = slug(arm_profile(settings, 0))
        except ConfigError as error:
            raise ExperimentError(f"{path}: arm {arm!r}: {error}") from None
        if name in names:
            raise ExperimentError(f"{path}: the arms {names[name]!r} and {arm!r} have the same settings ({name})")
        names[name] = arm
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise ExperimentError(f"{path}: a seed is there twice: {experiment.seeds}")


def arm_profile(settings: dict[str, Any], seed: int) -> Profile:
    return load_profile("tiny", **BASE | settings | {"seed": seed})


def changes(profile: Profile, base: Profile) -> dict[str, Any]:
    """The settings in which a profile differs, by name; seed and name do not count."""
    values = [(key, value) for key, value in sorted(profile.model_dump().items()) if key not in ("seed", "name")]
    return {key: value for key, value in values if value != getattr(base, key)}


def slug(profile: Profile) -> str:
    """What a profile changes of BASE as part of a folder's name, "base" where that is nothing."""
    changed = changes(profile, arm_profile({}, 0)).items()
    texts = {key: f"[{','.join(map(str, value))}]" if isinstance(value, list) else value for key, value in changed}
    return ",".join(f"{key}={text}" for key, text in texts.items()).replace("/", "_") or "base"
