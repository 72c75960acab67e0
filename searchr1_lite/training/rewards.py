"""What a response earns: exact match of its last answer, F1, substring match, Search-R1's format-aware rewards, and
those of ReSearch, R1-Searcher and AutoRefine.

Rewards read the response only. The original scores prompt and response together and therefore needs two `<answer>`
spans, the first being the prompt's example (Search-R1 verl/utils/reward_score/qa_em.py, extract_solution);
`read_with_prompt` makes of the two what the original reads. What the three others pay is theirs; tags, prompt and what
counts as right format stay Search-R1's, so that rewards alone differ between runs. A reward of yours is a function of a
trajectory, by name (`reward=my_module:my_reward`). No learned rewards.
"""

import re
from collections.abc import Sequence
from math import isfinite
from statistics import fmean

from searchr1_lite.config import PLUGIN, Profile
from searchr1_lite.errors import UserError
from searchr1_lite.plugins import PluginError, load_plugin
from searchr1_lite.rollouts.protocol import render_prompt
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.tasks.answers import ANSWER, exact_match, f1, last_answer, stands_in, substring_match
from searchr1_lite.training.relatives_rewards import autorefine_reward, r1_searcher_reward, research_reward

RETRIEVAL = 0.1  # what retrieving the answer adds (the 0.3 in the remarks of Search-R1 qa_em_format.py)
TAG = re.compile(r"(</?(?:think|search|information|answer)>)")

# Think, then search, information and think again as often as wanted, then the answer, with no text between (Search-R1
# qa_em_format.py, is_valid_sequence). Inside a tag's span any text is allowed that holds none of the tags.
INSIDE = rf"(?:(?!{TAG.pattern}).)*"
SPAN = {tag: rf"<{tag}>{INSIDE}</{tag}>\s*" for tag in ("think", "search", "information", "answer")}
FORMAT = re.compile(r"\s*(?:{think}{search}{information})*{think}{answer}".format(**SPAN), re.DOTALL)


def read_with_prompt(response: str, prompt: str) -> str:
    """Prompt and response as one text to score, as the original does, or "" where it has not two answers to read."""
    text = prompt + response
    return text if len(ANSWER.findall(text)) > 1 else ""


def has_valid_format(response: str) -> bool:
    """Whether the tags of a response follow one another as Search-R1's v0.3 wants them, with no text between."""
    return FORMAT.fullmatch(response) is not None


def format_reward(
    response: str,
    golden_answers: str | Sequence[str],
    structure: float = 0.2,
    final: float = 0.1,
    retrieval: float = 0.0,
    prompt: str | None = None,
) -> float:
    """Exact match graded by format, with the six outcomes and the weights of Search-R1's v0.3 (qa_em_format.py).

    Right: 1, or 1 - structure where the format is broken. Wrong in good format: structure, plus `retrieval` if a
    golden answer stands in retrieved text. Wrong in bad format: `final` if there is an answer at all, else 0.
    `response` holds the retrieved blocks too. With a `prompt`, the answer is looked for in both together.
    """
    valid = has_valid_format(response)
    read = response if prompt is None else read_with_prompt(response, prompt)
    if exact_match(read, golden_answers):
        return 1.0 if valid else 1.0 - structure
    if valid:
        return structure + (retrieval if answer_was_retrieved(response, golden_answers) else 0.0)
    return final if last_answer(read) is not None else 0.0


def answer_was_retrieved(response: str, golden_answers: str | Sequence[str]) -> bool:
    """Whether a golden answer stands, normalised, inside an `<information>` block of the response.

    One that normalises to nothing ("---") stands nowhere; in the original it stands everywhere.
    """
    blocks = re.findall(r"<information>(.*?)</information>", response, re.DOTALL)
    return stands_in(blocks, golden_answers)


def trajectory_reward(trajectory: Trajectory, kind: str, reads_prompt: bool = False, progress: float = 1.0) -> float:
    """The reward of one trajectory; `kind` and `reads_prompt` are the profile's `reward` and `reward_reads_prompt`.

    A passage may hold `<answer>` or other tags as ordinary text. Answers are therefore taken from what the model
    wrote alone, and the format is judged with the tags inside observations taken out. With `reads_prompt` everything is
    read as it stands, prompt, passages and all, as the original does. `progress`, the share of training that is done
    (0 to 1), matters to R1-Searcher's stages only.
    """
    if PLUGIN.fullmatch(kind):
        return plugin_reward(trajectory, kind)
    golden = trajectory.question.golden_answers
    prompt = render_prompt(trajectory.question.question) if reads_prompt else None
    quoted = "".join(turn.text + _quoted(turn.observation) for turn in trajectory.turns)
    response = trajectory.response if reads_prompt else quoted
    if kind in ("format", "retrieval"):
        return format_reward(response, golden, retrieval=RETRIEVAL if kind == "retrieval" else 0.0, prompt=prompt)
    read = read_with_prompt(trajectory.response, prompt) if reads_prompt else trajectory.policy_text
    if kind == "research":
        return research_reward(f1(read, golden), has_valid_format(response), last_answer(read))
    if kind == "r1_searcher":
        return r1_searcher_reward(f1(read, golden), has_valid_format(response), trajectory.searches, progress)
    if kind == "autorefine":
        return autorefine_reward(f1(read, golden), trajectory)
    return {"exact_match": exact_match, "f1": f1, "substring_match": substring_match}[kind](read, golden)


def plugin_reward(trajectory: Trajectory, name: str) -> float:
    """What the function `module:name` returns for (trajectory, question); PluginError if it is no finite number."""
    try:
        reward = load_plugin(name)(trajectory, trajectory.question)
        finite = isfinite(reward)
    except UserError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise PluginError(f"{name} gave question {trajectory.question.id!r} no reward, but {what}") from error
    if not finite:
        raise PluginError(f"{name}: a reward must be a finite number, got {reward!r} for {trajectory.question.id!r}")
    return float(reward)


def _quoted(observation: str) -> str:
    """An observation whose only tags are the pair that wraps it; the invalid-action text stays text."""
    if not observation.strip().startswith("<information>"):
        return TAG.sub("", observation)
    return f"<information>{TAG.sub('', observation)}</information>"


def group_rewards(trajectories: Sequence[Trajectory], profile: Profile, progress: float = 1.0) -> list[float]:
    """Each trajectory's reward, `progress` (0 to 1) through training; one whose search failed has its group's mean.

    So the group's mean is as if the failed one were not there; and no token of it is learned from (score.collate).
    """
    kind = profile.reward, profile.reward_reads_prompt, progress
    rewards = [trajectory_reward(trajectory, *kind) for trajectory in trajectories]
    for start in range(0, len(rewards), profile.group_size):
        group = range(start, start + profile.group_size)
        known = [rewards[n] for n in group if not trajectories[n].search_failed]
        for n in group:
            if trajectories[n].search_failed:
                rewards[n] = fmean(known) if known else 0.0
    return rewards
