"""What an experiment is: a YAML file with arms and seeds, and the runs that follow from it.

An arm is what it changes of BASE, the tiny profile a little smaller. A run's name is these changes and its seed, so
that experiments share their runs. Leaves out: claims, which are carried along for `analysis/findings.py` to read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from searchr1_lite.analysis.runs import read_mapping
from searchr1_lite.config import ROOT, ConfigError, Profile, load_profile
from searchr1_lite.errors import UserError
from searchr1_lite.lab.profile import load_broken
from searchr1_lite.runfolder import is_finished

BASE = {"steps": 24, "questions_per_step": 6, "group_size": 5}
FOLDER = Path(__file__).parent
RUNS = ROOT / "runs" / "experiments"
SMOKE = "smoke"  # shows that everything runs, and measures nothing


class ExperimentError(UserError):
    """An experiment that cannot be used, made or summed up; the message says why and what to do."""


class Experiment(BaseModel):
    """A checked YAML file: arms by name, each the settings that it changes of BASE, and the seeds of each."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    typed: str  # how it was asked for: by name, or a file
    title: str
    question: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    minutes: Annotated[float, Field(gt=0)]  # expected, all runs from nothing, on two quiet cores
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    also_evaluate: dict[str, Any] = {}  # settings with which every trained model is asked once more, greedily
    claims: Any = None

    @property
    def result_file(self) -> Path:
        return (RUNS if self.name == SMOKE else ROOT / "data/results/experiments") / f"{self.name}.json"

    @model_validator(mode="after")
    def _can_be_run(self) -> "Experiment":
        self.runs()
        return self

    def is_made(self, run_folder: Path) -> bool:
        """Whether a run is trained, and asked again where the experiment wants it (another may have trained it)."""
        asked = not self.also_evaluate or (run_folder / "again" / "evaluation.json").is_file()
        return is_finished(run_folder) and asked

    def runs(self) -> dict[str, tuple[str, Profile]]:
        """Arm and profile of each run, by the name of its folder.

        All arms with the first seed, then with the next: what is cut off has about as many seeds in every arm.
        """
        planned: dict[str, tuple[str, Profile]] = {}
        profiles = {arm: _arm_profile(arm, settings) for arm, settings in self.arms.items()}
        base = _arm_profile("base", {})
        for arm, profile, seed in ((arm, profiles[arm], seed) for seed in self.seeds for arm in profiles):
            run = f"{slug(profile, base)}-seed{seed}"
            if run in planned:
                raise ValueError(f"the arms {planned[run][0]!r} and {arm!r} have the same run, {run}")
            planned[run] = arm, profile.model_copy(update={"seed": seed})
        return planned


def _arm_profile(arm: str, settings: dict[str, Any]) -> Profile:
    try:
        load = load_broken if "defects" in settings else load_profile
        return load("tiny", **BASE | settings, name="tiny", seed=0)
    except (ConfigError, TypeError) as error:  # TypeError: settings with a name or seed
        raise ValueError(f"arm {arm!r}: {error}") from None


def slug(profile: Profile, base: Profile) -> str:
    """What a profile changes of the base as part of a folder's name, "base" where that is nothing."""
    keys = sorted(type(profile).model_fields.keys() - {"name", "seed"})
    there = base.model_dump() | {"defects": []}
    changed = [f"{key}={getattr(profile, key)}" for key in keys if getattr(profile, key) != there[key]]
    return ",".join(changed).replace(" ", "").replace("'", "").replace("/", "_") or "base"


def experiment_names() -> list[str]:
    """Of the package's experiments; `untestable.yaml` has claims and no arms."""
    other = (SMOKE, "untestable", "ten_ways")
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in other)


def overview(experiments: Sequence[Experiment]) -> str:
    """What there is, and how long it takes."""
    lines = []
    for experiment in experiments:
        size = f"{len(experiment.arms)} arms x {len(experiment.seeds)} seeds = {len(experiment.runs())} runs"
        lines.append(f"{experiment.name}: {experiment.title} ({size}, {experiment.minutes:g} minutes)")
        lines.append(f"  {' | '.join(experiment.arms)}")
    runs, minutes = {run for one in experiments for run in one.runs()}, sum(one.minutes for one in experiments)
    lines.append("ten_ways: Ten ways to answer (12 methods x 3 seeds, 27 minutes)")
    return "\n".join([*lines, f"{len(runs)} different runs; less than {minutes:g} minutes, as some are shared"])


def load_experiment(name: str, seeds: Sequence[int] = ()) -> Experiment:
    """An experiment by name or from a YAML file, with other seeds where some are given.

    Raises ExperimentError, or RunError for a file that holds no mapping.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file() or (path.parent == FOLDER and path.stem in ("untestable", "ten_ways")):
        known = ", ".join(experiment_names())
        raise ExperimentError(f"no experiment {name!r}; there are {known}, {SMOKE}, or give a .yaml file")
    own = {"seeds": list(seeds)} if seeds else {}
    try:
        return Experiment.model_validate({"name": path.stem, "typed": name} | read_mapping(path) | own)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ": ".join([str(path), *map(str, problem["loc"])])
        raise ExperimentError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None
