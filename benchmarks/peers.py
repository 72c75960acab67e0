"""Four other ways to do the same rollouts, each as its authors run it, with a script in place of the sampler.

`trl_tools`: TRL's tool loop. `generate_loop`: `generate` on the whole history at every turn, as Search-R1's infer.py
does. `search_r1`: Search-R1's own LLMGenerationManager. `continuous_batching`: transformers' manager, fed turn by
turn. Each returns ids and mask of every row. Where a peer is given more than it has in life, a comment says so.
"""

import contextlib
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from workload import Scripted, TagStop, Work, Written

from searchr1_lite.rollouts.protocol import encode_observation, parse_action, render_observation, render_prompt

GENERATION = "search_r1/llm_agent/generation.py"  # in a checkout of Search-R1
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}


def observe(work: Work, queries: list[str]) -> list[list[int]]:
    """Our observations: the ids that answer these queries, searched in one call."""
    found = work.retriever.search(queries, work.profile.topk)
    most = work.profile.max_observation_tokens
    return [encode_observation(work.policy.tokenizer, render_observation(hits), most) for hits in found]


def left_padded(rows: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


# (b) generate, with everything read again at every turn


def generate_loop(work: Work) -> list[Written]:
    """Given more than infer.py has: all rows in one batch, rows that are done leave it, ids are never encoded again."""
    tokenizer, stop = work.policy.tokenizer, StoppingCriteriaList([TagStop(work.policy.tokenizer)])
    written: list[Written] = [([], []) for _ in work.prompts]
    going = list(range(len(written)))
    for turn in range(work.profile.max_turns + 1):
        batch = left_padded([work.prompts[row] + written[row][0] for row in going])
        output = work.policy.model.generate(
            **batch,
            **SAMPLING,
            max_new_tokens=work.profile.max_response_tokens,
            logits_processor=LogitsProcessorList([Scripted(work)]),
            stopping_criteria=stop,
        )
        turns = [[i for i in ids if i] for ids in output[:, batch["input_ids"].shape[1] :].tolist()]
        actions = [parse_action(text) for text in tokenizer.batch_decode(turns)]
        for row, ids in zip(going, turns, strict=True):
            _add(written[row], ids, 1)
        if turn == work.profile.max_turns:
            break
        going, queries = zip(
            *[(r, a.content) for r, a in zip(going, actions, strict=True) if a.kind == "search"], strict=True
        )
        for row, ids in zip(going, observe(work, list(queries)), strict=True):
            _add(written[row], ids, 0)
    return written


def _add(written: Written, ids: list[int], own: int) -> None:
    written[0].extend(ids)
    written[1].extend([own] * len(ids))


# (a) TRL


class TrlTools:
    """GRPOTrainer's generation with `tools=`: its loop, its `generate` calls and its padding as they are.

    Ours are the two ends of a tool call, since the Search-R1 protocol is not a chat template's: how a call is found in
    a turn, and which ids answer it. Given more than it has: turns end at the closing tag, which TRL cannot ask for (it
    stops at the end token only, which would add one to every turn).
    """

    def __init__(self, work: Work) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.work = work
        budget = work.profile.max_context_tokens - max(map(len, work.prompts))
        self.folder = tempfile.TemporaryDirectory()
        arguments = GRPOConfig(
            output_dir=self.folder.name,
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            per_device_train_batch_size=len(work.prompts),
            num_generations=work.group_size,
            max_completion_length=budget,
            max_tool_calling_iterations=work.profile.max_turns,
            beta=0.0,
            temperature=1.0,
        )
        self.prompts = [[{"role": "user", "content": render_prompt(q.question)}] for q in work.questions]
        data = Dataset.from_list([{"prompt": prompt} for prompt in self.prompts])
        self.trainer = GRPOTrainer(
            model=work.policy.model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=data,
            processing_class=work.policy.tokenizer,
        )
        self.trainer.generation_config.max_new_tokens = work.profile.max_response_tokens
        self.trainer.generation_kwargs["max_new_tokens"] = work.profile.max_response_tokens
        self.stop = StoppingCriteriaList([TagStop(work.policy.tokenizer)])

    def __call__(self) -> list[Written]:
        from trl.trainer import grpo_trainer

        work, trainer, model = self.work, self.trainer, self.work.policy.model
        rows = [prompt for prompt in self.prompts for _ in range(work.group_size)]
        generate, single_turn = model.generate, type(trainer)._generate_single_turn

        def search(query: str) -> str:
            """Search.

            Args:
                query: What to look for.
            """
            return render_observation(work.retriever.search([query], work.profile.topk)[0])

        def scripted_generate(**arguments):
            processors = LogitsProcessorList([Scripted(work)])
            return generate(**arguments, logits_processor=processors, stopping_criteria=self.stop)

        def without_padding(*arguments, **options):  # it keeps all that has no end token
            ids, logprobs = single_turn(trainer, *arguments, **options)
            return [[i for i in row if i] for row in ids], logprobs

        def answer_ids(messages):
            return encode_observation(
                work.policy.tokenizer, messages[-1]["content"], work.profile.max_observation_tokens
            )

        # set here and not given to the constructor, which refuses chat templates that render no tool calls
        trainer.tools, trainer._tokenizer.response_template = [search], "Search-R1's tags"
        trainer._sync_tool_dicts = [{"search": search}] * len(rows)
        trainer._async_tool_dicts = [{}] * len(rows)
        trainer._generate_single_turn, trainer._get_tool_suffix_ids = without_padding, answer_ids
        before, grpo_trainer.parse_response = grpo_trainer.parse_response, _parse_response
        model.generate = scripted_generate
        try:
            _, ids, mask, *_ = trainer._generate(rows)
        finally:
            grpo_trainer.parse_response = before
            del model.generate, trainer._tokenizer.response_template
        return list(zip(ids, mask, strict=True))


def _parse_response(tokenizer, ids, **_) -> dict:
    text = tokenizer.decode(ids)
    action = parse_action(text)
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": action.content}}}
    message = {"role": "assistant", "content": text}
    return message | {"tool_calls": [call]} if action.kind == "search" else message


# (c) Search-R1


class _DataProto:
    """As much of verl's as Search-R1's generation.py uses."""

    def __init__(self, batch: dict) -> None:
        self.batch, self.meta_info = batch, {}

    from_dict = classmethod(lambda cls, tensors: cls(tensors))


def import_search_r1(checkout: Path) -> ModuleType:
    """The checkout's search_r1.llm_agent.generation. What it imports of verl is made here, in memory."""
    for name in ("verl", "verl.utils", "verl.utils.tracking"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["verl"].DataProto, sys.modules["verl.utils.tracking"].Tracking = _DataProto, object
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module("search_r1.llm_agent.generation")
    finally:
        sys.path.remove(str(checkout))


def search_r1(work: Work, checkout: Path, stop_at_tag: bool) -> list[Written]:
    """Its loop, its cutting and encoding of texts, its padding; `generate` in the place of its vLLM worker.

    As upstream runs it there is no stop: a turn runs on to `max_response_tokens` (its policy learns no end token: the
    cut drops it) and is cut at the tag afterwards. Given more than it has: the search is a call in this process, not
    a request to a server, and `stop_at_tag`.
    """
    module, profile, tokenizer = import_search_r1(checkout), work.profile, work.policy.tokenizer

    def generate_sequences(batch):
        ids, mask = batch.batch["input_ids"], batch.batch["attention_mask"]
        output = work.policy.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **SAMPLING,
            max_new_tokens=profile.max_response_tokens,
            logits_processor=LogitsProcessorList([Scripted(work, runs_on=not stop_at_tag)]),
            stopping_criteria=StoppingCriteriaList([TagStop(tokenizer)] if stop_at_tag else []),
        )
        return _DataProto({"responses": output[:, ids.shape[1] :]})

    def batch_search(queries):
        found = work.retriever.search(queries, profile.topk)
        documents = [[f"{hit.passage.title_line}\n{hit.passage.text}" for hit in hits] for hits in found]
        return {"result": [[{"document": {"contents": one}} for one in hits] for hits in documents]}

    config = module.GenerationConfig(
        max_turns=profile.max_turns,
        max_start_length=profile.max_prompt_tokens,
        max_prompt_length=profile.max_context_tokens,
        max_response_length=profile.max_response_tokens,
        max_obs_length=profile.max_observation_tokens,
        num_gpus=1,
        topk=profile.topk,
    )
    worker = SimpleNamespace(generate_sequences=generate_sequences)
    manager = module.LLMGenerationManager(tokenizer, worker, config)
    manager._batch_search = batch_search
    batch = left_padded(work.prompts)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with contextlib.redirect_stdout(None):
        output = manager.run_llm_loop(_DataProto(batch), batch["input_ids"]).batch
    own = output["responses_with_info_mask"] != tokenizer.pad_token_id
    rows = zip(output["responses"].tolist(), own.long().tolist(), strict=True)
    return [([i for i in ids if i], [m for i, m in zip(ids, mask, strict=True) if i]) for ids, mask in rows]


# (d) continuous batching


class _ScriptedRequests(ContinuousBatchingLogitsProcessor):
    """The script as a processor of the manager; requests are named "row.turn"."""

    supported_kwargs, ignored_kwargs = {}, ()

    def __init__(self, work: Work) -> None:
        self.work = work

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests) -> torch.Tensor:
        with self.work.scripting():
            tokens = []
            for request in requests:
                row, turn = map(int, request.state.request_id.split("."))
                tokens.append(self.work.scripts[row][turn][len(request.state.generated_tokens)])
            return torch.tensor(tokens, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        with self.work.scripting():
            tokens = tensor_arg[: len(scores), None].long()
            return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def continuous_batching(work: Work, share: bool) -> list[Written]:
    """A row's next turn is a new request with its whole history, sent in the moment its last turn is there.

    `share`: blocks of equal beginnings are kept and shared, between turns and between copies of a question (for which
    first copies are sent first). Given more than it has: it cannot stop at a tag, and is told each turn's length.
    On a CPU its attention looks at the entries of all requests of a batch, masked, so few at once are faster: of 4, 8
    and 16 requests and 256 and 1,024 tokens, the fastest for 32 rows were 8 and 256.
    """
    model, page = work.policy.model, 32
    longest = max(map(len, work.prompts)) + work.profile.max_turns * 400 + max(sum(map(len, s)) for s in work.scripts)
    settings = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=len(work.prompts) * (longest // page + 2),
        max_batch_tokens=256,
        max_requests_per_batch=8,
        allow_block_sharing=share,
    )
    sampling = GenerationConfig(**SAMPLING, eos_token_id=-1, max_new_tokens=work.profile.max_response_tokens)
    written: list[Written] = [([], []) for _ in work.prompts]
    manager = model.init_continuous_batching(sampling, settings)
    processors = manager.logit_processor
    processors.logits_processor.append(_ScriptedRequests(work))
    processors.tensors_required, processors.do_processing = processors.tensors_required + 1, True

    def send(row: int, turn: int) -> None:
        history, length = work.prompts[row] + written[row][0], len(work.scripts[row][turn])
        manager.add_request(history, request_id=f"{row}.{turn}", max_new_tokens=length)

    manager.start()
    try:
        for row in sorted(range(len(written)), key=lambda row: row % work.group_size):
            send(row, 0)
        going = len(written)
        while going:
            result = manager.get_result(timeout=1)
            if result is None or not result.is_finished():
                if not manager.is_running():
                    raise RuntimeError("continuous batching stopped before it was done; its log says why")
                continue
            row, turn = map(int, result.request_id.split("."))
            _add(written[row], result.generated_tokens, 1)
            action = parse_action(work.policy.tokenizer.decode(result.generated_tokens))
            if action.kind == "search" and turn < work.profile.max_turns:
                _add(written[row], observe(work, [action.content])[0], 0)
                send(row, turn + 1)
            else:
                going -= 1
    finally:
        manager.stop(block=True)
        manager.destroy()
    return written
