"""What the model is told, what it may do, and what it is shown: the protocol of Search-R1, as text and as token ids.

Everything here is quoted or rebuilt from Search-R1 (arXiv 2503.09516, table 1; `scripts/data_process/nq_search.py`,
`search_r1/llm_agent/generation.py`). Left out: other prompts, and tags as special tokens; in Qwen2.5's vocabulary the
tags are ordinary text of several tokens, and stay so.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from searchr1_lite.types import Hit

PROMPT = (
    "Answer the given question. "
    "You must conduct reasoning inside <think> and </think> first every time you get new information. "
    "After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query </search> "
    "and it will return the top searched results between <information> and </information>. "
    "You can search as many times as your want. "
    "If you find no further external knowledge needed, you can directly provide the answer inside <answer> and "
    "</answer>, without detailed illustrations. For example, <answer> Beijing </answer>. Question: {question}\n"
)
THINK_PROMPT = (  # scripts/data_process/nq.py
    "Answer the given question. "
    "You should first have a reasoning process in mind and then provides the answer. "
    "Show your reasoning in <think> </think> tags and return the final answer in <answer> </answer> tags, "
    "for example <answer> Beijing </answer>. Question: {question}\n"
)
ANSWER_PROMPT = (
    "Answer the given question directly, without any reasoning. "
    "Return the answer in <answer> </answer> tags, for example <answer> Beijing </answer>. Question: {question}\n"
)
STEPS_PROMPT = (  # "Let's think step by step": Kojima et al., arXiv 2205.11916
    "Answer the given question. Let's think step by step, between <think> and </think>, and then return the final "
    "answer in <answer> </answer> tags, for example <answer> Beijing </answer>. Question: {question}\n"
)
# By strategy: those whose answer is one trajectory. Only the first searches.
PROMPTS = {"search_r1": PROMPT, "r1": THINK_PROMPT, "direct": ANSWER_PROMPT, "cot": STEPS_PROMPT}
INVALID_ACTION = (
    "\nMy previous action is invalid. "
    "If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
CLOSING_TAGS = ("</search>", "</answer>")  # a turn ends at the first of them
OBSERVATION_END = "</information>\n\n"
# In a passage these would be read as the protocol's, or as the tokenizer's own tokens (<|im_end|>).
MARKS = re.compile(r"<(/?(?:think|search|information|answer)|\|\w+\|)>")


class Action(NamedTuple):
    """What a turn asks for. `content` is the query or the answer, "" for an invalid action."""

    kind: Literal["search", "answer", "invalid"]
    content: str


def question_text(question: str) -> str:
    """The question as the prompts hold it: without space around it, and with its question mark."""
    question = question.strip()
    return question if question.endswith("?") else question + "?"


def render_prompt(question: str, strategy: str = "search_r1") -> str:
    """The user message for a question, byte for byte as Search-R1 writes it ("direct" and "cot" are ours)."""
    return PROMPTS[strategy].format(question=question_text(question))


def encode_prompt(tokenizer: Any, question: str, chat_template: bool, strategy: str = "search_r1") -> list[int]:
    """Token ids of the prompt; see `encode_message`."""
    return encode_message(tokenizer, render_prompt(question, strategy), chat_template)


def encode_message(tokenizer: Any, text: str, chat_template: bool) -> list[int]:
    """Token ids of one user message, in the template if one is asked for and the tokenizer has one.

    Search-R1 wraps base models too (`verl/utils/dataset/rl_dataset.py`); Qwen's template adds its system message.
    """
    if chat_template and tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def parse_action(text: str) -> Action:
    """The first complete search or answer in a turn's text; without one the action is invalid."""
    match = re.search(r"<(search|answer)>(.*?)</\1>", text, re.DOTALL)
    if match is None:
        return Action("invalid", "")
    return Action(match.group(1), match.group(2).strip())


def render_observation(hits: Sequence[Hit]) -> str:
    """The text that answers a search, best passage first; no hits make an empty information block.

    A tag of the protocol in a passage loses its angle brackets, `[answer]`: it is text that was found, and can neither
    end the block nor pass for the model's own. The original shows it as it is.
    """
    return f"\n\n<information>{render_passages(hits)}</information>\n\n"


def render_passages(hits: Sequence[Hit]) -> str:
    """The passages of an observation, without what is around them."""
    documents = "".join(
        f"Doc {rank}(Title: {hit.passage.title_line}) {hit.passage.text}\n" for rank, hit in enumerate(hits, start=1)
    )
    return MARKS.sub(r"[\1]", documents).strip()


def encode_observation(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    """Token ids of an observation, at most `max_tokens`; a cut information block keeps its closing tag.

    The original cuts the tag off with the rest (Search-R1 issue 127).
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # it may be longer than the model's context
    if len(ids) <= max_tokens:
        return ids
    if not text.endswith(OBSERVATION_END):
        return ids[:max_tokens]
    end = tokenizer.encode(OBSERVATION_END, add_special_tokens=False)
    if len(end) >= max_tokens:
        raise ValueError(
            f"max_observation_tokens = {max_tokens} leaves no room for a passage: the closing tag takes {len(end)}"
        )
    return ids[: max_tokens - len(end)] + end
