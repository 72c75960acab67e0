"""The vLLM backend: one contract for every sampler, whole rollouts, adapters, and servers that fail.

A stub that speaks vLLM's endpoints is tested everywhere; a real `vllm serve` where vLLM and a GPU are there.
"""

import copy
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from searchr1_lite.rollouts import vllm
from searchr1_lite.rollouts.decoding import LocalSampler
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import INVALID_ACTION, encode_observation, render_observation
from searchr1_lite.rollouts.vllm import VLLMError, VLLMSampler
from searchr1_lite.training import loop, rewards
from searchr1_lite.training.score import score
from searchr1_lite.types import Question

QUESTIONS = [
    Question("q0", "What is the capital of Rovana?", ("Belmar",)),
    Question("q1", "Where is Ōtsu", ("here",)),
    Question("q2", "Which language do the people speak?", ("Rovan",)),
]
TURNS = [  # each token is followed by few others, so that pairs of tokens make whole turns
    "<search> capital of Rovana </search>",
    *["<search> Rovana </search>\n\n"] * 3,
    *["<answer>Belmar</answer>"] * 4,
    "nothing<|im_end|>",
]
MAX_TOKENS, TEMPERATURE = 7, 0.8


def bigram_model(tokenizer, seed: int = 0) -> Qwen2ForCausalLM:
    """A Qwen2 that any engine can load, random but for an output layer that favours the pairs of tokens in TURNS."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=576,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).eval()
    said = [tokenizer.encode(text) for text in TURNS]
    pairs = Counter(itertools.chain(*map(itertools.pairwise, said)))
    inside = [left for left, _ in pairs]
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(torch.randint(0, 2, embeddings.shape) * 2.0 - 1)
        for (left, right), count in pairs.items():
            model.lm_head.weight[right] += (9 + math.log(count)) / config.hidden_size * embeddings[left]
        embeddings[:, 0] = 1  # after any other token a turn begins
        embeddings[inside, 0] = -1
        for start, count in Counter(ids[0] for ids in said).items():
            model.lm_head.weight[start, 0] += 9 + math.log(count)
        model.lm_head.weight[len(tokenizer) :] = 0
    return model


@pytest.fixture(scope="module")
def policy(tokenizer) -> Policy:
    return Policy(bigram_model(tokenizer), tokenizer, torch.device("cpu"))


@pytest.fixture
def profile(profile):
    changes = {"max_response_tokens": MAX_TOKENS, "temperature": TEMPERATURE, "rollout_rows": 8, "group_size": 2}
    return profile.model_copy(update=changes | {"model": "stub/base", "sampler": "vllm"})


class Stub(ThreadingHTTPServer):
    """What of vLLM's server we use, around a policy: one request at a time, read from its beginning.

    `fault(path, body)` may return (status, text) in place of an answer, "hang", "die" or None; `spoil(choice)`
    changes an answer.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, policy: Policy, length: int = 4096, logprobs_mode: str = "processed_logprobs") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.policy, self.length, self.logprobs_mode = policy, length, logprobs_mode
        self.asked: list[tuple[str, dict]] = []
        self.adapters: dict[str, PeftModel] = {}
        self.loads: list[tuple[str, str]] = []  # ("load" or "unload", name)
        self.fault = lambda path, body: None
        self.spoil = lambda choice: None
        self.surplus: list[int] = []  # ids that it goes on with after a turn has ended
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def completions(self, body: dict) -> tuple[int, str]:
        if body["model"] not in {"stub/base", *self.adapters}:
            return 404, f"The model `{body['model']}` does not exist."
        if len(body["prompt"]) + body["max_tokens"] > self.length:
            return 400, f"This model's maximum context length is {self.length} tokens."
        with self.lock:
            ids, logprobs, reason = self.sample(body)
        choice = {"text": "", "token_ids": ids, "finish_reason": reason, "logprobs": {"token_logprobs": logprobs}}
        choice = choice if body.get("return_token_ids") else choice | {"token_ids": None}
        self.spoil(choice)
        return 200, json.dumps({"choices": [choice]})

    def sample(self, body: dict) -> tuple[list[int], list[float], str]:
        """As vLLM samples: a stop string is looked for in the text, special tokens included if they are not skipped."""
        model = self.adapters.get(body["model"], self.policy.model)
        random, ids, logprobs = np.random.default_rng(body.get("seed")), [], []
        new, cache = body["prompt"], DynamicCache()
        defaults = {"top_k": 3, "repetition_penalty": 1.2}  # as of a generation_config.json
        allowed = body.get("allowed_token_ids")
        while len(ids) < body["max_tokens"]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([new]), past_key_values=cache).logits[0, -1].double()
            raw = logits.log_softmax(-1)
            if allowed:
                kept = torch.full_like(logits, -torch.inf)
                kept[allowed] = logits[allowed]
                logits = kept
            logits /= body.get("repetition_penalty", defaults["repetition_penalty"])
            if (top_k := body.get("top_k", defaults["top_k"])) > 0:
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            processed = (logits / (body["temperature"] or 1.0)).log_softmax(-1)
            if body["temperature"]:
                token = int((processed.exp().cumsum(-1) < random.random()).sum().clamp(max=len(logits) - 1))
            else:
                token = int(logits.argmax())
            new = [token]
            ids.append(token)
            logprobs.append(float((processed if self.logprobs_mode == "processed_logprobs" else raw)[token]))
            text = self.policy.tokenizer.decode(ids, skip_special_tokens=body["skip_special_tokens"])
            if token in body["stop_token_ids"] or any(stop in text for stop in body["stop"]):
                return ids + self.surplus, logprobs + [-1.0] * len(self.surplus), "stop"
        return ids, logprobs, "length"

    def load_lora_adapter(self, body: dict) -> tuple[int, str]:
        if body["lora_name"] in [name for _, name in self.loads]:
            return 400, "this name was used before, and the prefix cache still knows it"
        base = copy.deepcopy(self.policy.model)
        self.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        self.loads.append(("load", body["lora_name"]))
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."  # text, not JSON

    def unload_lora_adapter(self, body: dict) -> tuple[int, str]:
        del self.adapters[body["lora_name"]]
        self.loads.append(("unload", body["lora_name"]))
        return 200, "Success"

    def models(self, body: dict) -> tuple[int, str]:
        cards = [{"id": name, "root": "/elsewhere", "parent": "stub/base"} for name in self.adapters]
        card = {"id": "stub/base", "root": "stub/base", "max_model_len": self.length}
        return 200, json.dumps({"object": "list", "data": [*cards, card]})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        self.server.asked.append((self.path, body))
        fault = self.server.fault(self.path, body)
        if fault == "hang":
            time.sleep(1)
        if fault in ("hang", "die"):
            self.close_connection = True
            return
        status, text = fault or getattr(self.server, self.path.removeprefix("/v1/"))(body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def stub(policy, monkeypatch):
    monkeypatch.setattr(vllm, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(vllm._ask, "__defaults__", (None, (0.01, 0.01)))
    with Stub(policy) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def real_server(policy, tokenizer, tmp_path_factory):
    """`vllm serve` as the module's docstring says, with the same little model."""
    program = os.environ.get("VLLM") or shutil.which("vllm")  # it may be in another environment
    if program is None or not torch.cuda.is_available():
        pytest.skip("needs a GPU, and vLLM: on the PATH, or its program named by the environment variable VLLM")
    folder = tmp_path_factory.mktemp("served")
    policy.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (
        f"{program} serve {folder} --served-model-name stub/base --port {port} --dtype bfloat16 --max-model-len 4096"
    )
    command += " --enable-lora --max-lora-rank 16 --enable-prefix-caching --logprobs-mode processed_logprobs"
    command += " --gpu-memory-utilization 0.3 --enforce-eager"
    process = subprocess.Popen(command.split(), env=os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})
    try:
        vllm._ask(f"http://127.0.0.1:{port}", "/v1/models", waits=(2,) * 120)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(params=["local", "stub", "vllm"])
def make_sampler(request, policy, profile):
    """Makes a sampler for (greedy or not), and how near its log-probabilities come to a plain 32-bit forward."""
    if request.param == "local":

        def make(greedy: bool = False):
            from searchr1_lite.rollouts.decoding import greedy as likeliest

            return LocalSampler(policy, 8, MAX_TOKENS, likeliest if greedy else None, TEMPERATURE)

        return SimpleNamespace(make=make, near=1e-4)
    server = request.getfixturevalue({"stub": "stub", "vllm": "real_server"}[request.param])
    served = profile.model_copy(update={"vllm_url": server.url})
    return SimpleNamespace(
        make=lambda greedy=False: VLLMSampler(policy, served, greedy), near=0.15 if request.param == "vllm" else 1e-4
    )


def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text) for text in ("Question: What is the capital of Rovana?\n", "Where is Ōtsu?\n")]


@torch.no_grad()
def work(sampler, groups: list[tuple[list[int], list[int]]], observation: list[int], turns: int = 3, seed: int = 0):
    """Every row writes `turns` turns with an observation between them; what each row wrote, turn by turn."""
    said = {row: [] for rows, _ in groups for row in rows}
    for rows, prompt in groups:
        sampler.open(rows, prompt, [np.random.default_rng([seed, row]) for row in rows])
    assert len(said) <= sampler.capacity
    late = time.monotonic() + 120
    while any(len(turn) < turns for turn in said.values()):
        assert time.monotonic() < late
        for row, ids, logprobs in sampler.advance():
            said[row].append((ids, logprobs))
            if len(said[row]) == turns:
                sampler.close(row)
            else:
                sampler.read(row, observation)
    assert sampler.active == 0
    return said


def ended(tokenizer, ids: list[int]) -> bool:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return ids[-1] == tokenizer.eos_token_id or "</search>" in text or "</answer>" in text


def logprobs_at(policy, prompt: list[int], ids: list[int], temperature: float) -> list[float]:
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("greedy", [False, True])
def test_every_sampler_writes_turns_of_its_own_history(make_sampler, policy, tokenizer, greedy):
    first, second = prompts(tokenizer)
    observation = tokenizer.encode("\n\n<information>nothing</information>\n\n")
    said = work(make_sampler.make(greedy), [([7, 3, 5, 0], first), ([11, 2, 4], second)], observation, turns=6)
    endings = set()
    for row, turns in said.items():
        history = list(first if row in (7, 3, 5, 0) else second)
        for ids, logprobs in turns:
            assert 1 <= len(ids) == len(logprobs) <= MAX_TOKENS
            assert not any(ended(tokenizer, ids[:n]) for n in range(1, len(ids)))
            assert ended(tokenizer, ids) or len(ids) == MAX_TOKENS
            expected = logprobs_at(policy, history, ids, 1.0 if greedy else TEMPERATURE)
            assert logprobs == pytest.approx(expected, abs=make_sampler.near)
            endings.add("none" if not ended(tokenizer, ids) else tokenizer.decode(ids[-1:]))
            history += ids + observation
    assert greedy or endings >= {"none", ">", ">\n\n", "<|im_end|>"}  # otherwise this model tests little


def test_a_row_writes_the_same_whatever_is_beside_it(make_sampler, tokenizer):
    first, second = prompts(tokenizer)
    sampler = make_sampler.make()
    together = work(sampler, [([0, 1, 2], first), ([3, 4], second)], first)
    alone = work(sampler, [([4], second)], first)  # the same sampler: closed rows have left nothing behind
    other = work(sampler, [([0, 1, 2], first)], first, seed=1)
    if make_sampler.near < 0.1:  # in bfloat16, rounding differs with the batch, and so may a token
        assert [ids for ids, _ in alone[4]] == [ids for ids, _ in together[4]]
    assert len({str(together[row][0]) for row in (0, 1, 2)}) > 1  # rows that share a prompt differ
    assert other[0] != together[0]


def served(profile, stub, **changes):
    return profile.model_copy(update={"vllm_url": stub.url, **changes})


def check_trajectories(policy, profile, trajectories, temperature):
    """Observations, masks and log-probabilities, rebuilt from the turns and one plain forward."""
    for trajectory in trajectories:
        ids, mask, logprobs = map(list, (trajectory.completion_ids, trajectory.loss_mask, trajectory.logprobs))
        start = 0
        for turn in trajectory.turns:
            chunk = []
            if turn.observation:
                text = render_observation(turn.hits) if turn.query is not None else INVALID_ACTION
                chunk = encode_observation(policy.tokenizer, text, profile.max_observation_tokens)
            length = len(list(itertools.takewhile(bool, mask[start:])))
            assert policy.tokenizer.decode(ids[start : start + length], skip_special_tokens=True) == turn.text
            start += length
            assert ids[start : start + len(chunk)] == chunk
            assert not any(mask[start : start + len(chunk)]) and not any(logprobs[start : start + len(chunk)])
            start += len(chunk)
        assert start == len(ids) == len(mask) == len(logprobs)
        plain = logprobs_at(policy, list(trajectory.prompt_ids), ids, temperature)
        assert [p for p, own in zip(logprobs, mask, strict=True) if own] == pytest.approx(
            [p for p, own in zip(plain, mask, strict=True) if own], abs=1e-4
        )


def test_a_whole_rollout(stub, policy, profile, retriever):
    profile = served(profile, stub)
    runs = []
    for rows, seed in ((8, 5), (3, 5), (8, 6)):
        sampler = VLLMSampler(policy, profile.model_copy(update={"rollout_rows": rows}))
        runs.append(rollout(policy, QUESTIONS, retriever, profile, group_size=3, seed=seed, sampler=sampler))
    assert [t.question.id for t in runs[0]] == ["q0"] * 3 + ["q1"] * 3 + ["q2"] * 3
    assert runs[0] == runs[1] != runs[2]  # a row's own stream decides, not how many rows are written together
    check_trajectories(policy, profile, runs[0], TEMPERATURE)
    assert {turn.action for t in runs[0] + runs[2] for turn in t.turns} == {"search", "answer", "invalid"}
    assert any(t.searches for t in runs[0] + runs[2])


def test_greedily_it_is_what_our_own_engine_writes(stub, policy, profile, retriever):
    profile = served(profile, stub)
    sampler = VLLMSampler(policy, profile, greedy=True)
    remote = rollout(policy, QUESTIONS, retriever, profile, greedy=True, sampler=sampler)
    local = rollout(policy, QUESTIONS, retriever, profile, greedy=True)
    for one, other in zip(remote, local, strict=True):
        assert (one.completion_ids, one.loss_mask, one.turns) == (other.completion_ids, other.loss_mask, other.turns)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_request_leaves_nothing_to_the_servers_defaults(stub, policy, profile, tokenizer):
    sampler = VLLMSampler(policy, served(profile, stub))
    prompt = prompts(tokenizer)[0]
    said = work(sampler, [([0], prompt)], [100], turns=2)
    seeds = np.random.default_rng([0, 0])
    sent = [body for path, body in stub.asked if path == "/v1/completions"][1:]  # the first is the check at the start
    assert [body["prompt"] for body in sent] == [prompt, prompt + said[0][0][0] + [100]]
    for body in sent:
        expected = {"model": "stub/base", "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        expected |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "temperature": TEMPERATURE}
        expected |= {"max_tokens": MAX_TOKENS, "stop": ["</search>", "</answer>"], "skip_special_tokens": False}
        expected |= {"include_stop_str_in_output": True, "stop_token_ids": [tokenizer.eos_token_id], "logprobs": 0}
        expected |= {"return_token_ids": True, "seed": int(seeds.integers(2**63)), "prompt": body["prompt"]}
        assert body == expected


def test_what_comes_after_the_end_of_a_turn_is_not_part_of_it(stub, policy, profile, tokenizer):
    plain = work(VLLMSampler(policy, served(profile, stub)), [([0, 1, 2], prompts(tokenizer)[0])], [100])
    stub.surplus = [100]  # a server that samples ahead; a tag that ends inside a token stays whole all the same
    assert work(VLLMSampler(policy, served(profile, stub)), [([0, 1, 2], prompts(tokenizer)[0])], [100]) == plain


def lora(policy, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(policy.model), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.5 * torch.randn_like(parameter)
    return model.eval()


def test_each_version_of_the_adapter_is_its_own_model(stub, policy, profile, tokenizer, tmp_path):
    sampler, prompt = VLLMSampler(policy, served(profile, stub)), prompts(tokenizer)[0]
    names, written = [], []
    for step in (0, 1, 1):  # a run that goes on makes a step again
        model = lora(policy, len(names))
        sampler.load_adapter(model, tmp_path / "adapters", step)
        names.append(sampler.model)
        (turn,) = work(sampler, [([0], prompt)], [], turns=1)[0]
        assert turn[1] == pytest.approx(
            logprobs_at(Policy(model, tokenizer, policy.device), prompt, turn[0], TEMPERATURE), abs=1e-4
        )
        assert turn[1] != pytest.approx(logprobs_at(policy, prompt, turn[0], TEMPERATURE), abs=1e-2)
        written.append([body["model"] for path, body in stub.asked if path == "/v1/completions"][-1])
    assert written == names and len(set(names)) == 3
    assert [name.rpartition("-")[0] for name in names] == ["step-0", "step-1", "step-1"]
    first, second, third = names
    assert stub.loads == [
        ("load", first),
        ("load", second),
        ("unload", first),
        ("load", third),
        ("unload", second),
    ]
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [third]


def test_an_adapter_that_the_server_has_dropped_itself_is_no_error(stub, policy, profile, tmp_path):
    sampler = VLLMSampler(policy, served(profile, stub))
    sampler.load_adapter(lora(policy, 0), tmp_path, 0)
    stub.fault = lambda path, body: (500, "Failed to remove lora adapter") if "unload" in path else None
    sampler.load_adapter(lora(policy, 1), tmp_path, 1)
    assert sampler.model.startswith("step-1-") and len(list(tmp_path.iterdir())) == 1


def test_adapters_that_the_server_refuses(stub, policy, profile, tmp_path):
    sampler = VLLMSampler(policy, served(profile, stub))
    stub.fault = lambda path, body: (404, "Not Found")
    with pytest.raises(VLLMError, match=rf"{stub.url}/v1/load_lora_adapter .*step-0.*HTTP 404.*docstring|top of"):
        sampler.load_adapter(lora(policy, 0), tmp_path, 0)
    assert sampler.model == "stub/base"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "Qwen/other"}, "serves stub/base, not Qwen/other"),
        ({"max_context_tokens": 5000}, "reads 4096 tokens at most, but max_context_tokens = 5000"),
        ({"vllm_url": "http://127.0.0.1:9"}, "127.0.0.1:9/v1/models.*refused.*alive"),
        ({"vllm_url": "localhost:8000"}, "localhost:8000/v1/models.*unknown url type"),
        ({"vllm_url": "somewhere"}, "somewhere/v1/models.*unknown url type"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(stub, policy, profile, settings, says):
    with pytest.raises(VLLMError, match=says):
        VLLMSampler(policy, served(profile, stub, **settings))


@pytest.mark.parametrize("text", ["<html>", "[]", "{}", '{"data": [{"id": "stub/base"}]}'])
def test_what_is_no_vllm_server_is_refused(stub, policy, profile, text):
    stub.fault = lambda path, body: (200, text)
    with pytest.raises(VLLMError, match=r"/v1/models: this is no vLLM server.*set vllm_url"):
        VLLMSampler(policy, served(profile, stub))


def test_log_probabilities_of_another_distribution_are_refused(stub, policy, profile):
    stub.logprobs_mode = "raw_logprobs"
    with pytest.raises(VLLMError, match="--logprobs-mode processed_logprobs"):
        VLLMSampler(policy, served(profile, stub))


def change(**changes):
    return lambda choice: choice.update(changes)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (change(token_ids=None), "not one log-probability for each sampled id"),
        (lambda choice: choice.pop("token_ids"), "KeyError.*token_ids"),
        (change(logprobs=None), "not one log-probability for each sampled id"),
        (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "ids, .* log-probabilities"),
        (lambda choice: choice["logprobs"].update(token_logprobs=[None] * len(choice["token_ids"])), "not one"),
        (lambda choice: choice["logprobs"].update(token_logprobs=[np.nan] * len(choice["token_ids"])), "no numbers"),
        (change(token_ids=[], logprobs={"token_logprobs": []}), "0 ids"),
        (
            change(token_ids=[100], logprobs={"token_logprobs": [-1.0]}, finish_reason="abort"),
            "1 tokens, ended by 'abort', without closing tag",
        ),
        (change(token_ids=[100] * 8, logprobs={"token_logprobs": [-1.0] * 8}), "8 tokens, ended by"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_one_clear_error(stub, policy, profile, retriever, spoil, says):
    profile = served(profile, stub)
    sampler = VLLMSampler(policy, profile)
    stub.spoil = spoil
    with pytest.raises(VLLMError, match=says) as caught:
        rollout(policy, QUESTIONS, retriever, profile, group_size=2, sampler=sampler)
    message = str(caught.value)
    assert message.startswith(f"{stub.url}/v1/completions {{'model': 'stub/base', 'seed': ") and "tokens" in message


@pytest.mark.parametrize(
    ("fault", "says", "tries"),
    [
        ((400, '{"error": {"message": "too long"}}'), "HTTP 400, .*too long", 1),
        ((500, "out of memory"), "HTTP 500, out of memory", 1),
        ((503, "loading"), "HTTP 503, loading", 3),
        ("die", "closed connection without response", 3),
        ("hang", "no answer in 0.2 seconds", 1),
    ],
)
def test_a_server_that_fails_midway(stub, policy, profile, retriever, monkeypatch, fault, says, tries):
    profile = served(profile, stub)
    sampler = VLLMSampler(policy, profile)
    stub.asked.clear()
    monkeypatch.setattr(vllm, "SECONDS", 0.2)
    stub.fault = lambda path, body: fault if len(body["prompt"]) > 135 else None  # the prompt alone has 127
    with pytest.raises(VLLMError, match=says) as caught:
        rollout(policy, QUESTIONS[:1], retriever, profile, seed=1, sampler=sampler)
    assert str(caught.value).startswith(f"{stub.url}/v1/completions {{") and "prompt tokens" in str(caught.value)
    assert "start the run again" in str(caught.value)
    assert len([body for _, body in stub.asked if len(body["prompt"]) > 135]) == tries


def test_a_server_that_is_busy_for_a_moment_is_asked_again(stub, policy, profile, retriever):
    profile = served(profile, stub)
    expected = rollout(policy, QUESTIONS, retriever, profile, sampler=VLLMSampler(policy, profile))
    before, faults = Counter(), [(503, "busy"), "die", None]

    def fault(path, body):
        before[str(body)] += 1
        return faults[before[str(body)] - 1]

    stub.fault = fault
    assert rollout(policy, QUESTIONS, retriever, profile, sampler=VLLMSampler(policy, profile)) == expected
    assert len(before) > 4 and set(before.values()) == {3}


def test_one_row_is_one_request_and_they_run_together(stub, policy, profile, tokenizer):
    profile = served(profile, stub)
    sampler, together = VLLMSampler(policy, profile), threading.Barrier(8, timeout=5)
    stub.fault = lambda path, body: together.wait() and None  # nobody is answered until all eight have asked
    work(sampler, [(list(range(8)), prompts(tokenizer)[0])], [], turns=1)


def test_a_group_always_fits(stub, policy, profile, retriever):
    profile = served(profile, stub, rollout_rows=1, group_size=3)
    trajectories = rollout(
        policy, QUESTIONS[:1], retriever, profile, group_size=3, sampler=VLLMSampler(policy, profile)
    )
    assert len(trajectories) == 3


@pytest.mark.parametrize("masked", [True, False])
def test_training_samples_from_the_server_and_weighs_what_it_sampled(
    stub, policy, profile, retriever, tmp_path, monkeypatch, masked
):
    """Each step is sampled with that step's adapter: the learner finds its own log-probabilities again."""
    monkeypatch.setattr(rewards, "trajectory_reward", lambda trajectory, *_: sum(trajectory.completion_ids) % 7 / 7)
    settings = {"steps": 3, "questions_per_step": 2, "masked": masked, "learning_rate": 0.01, "lora_r": 4}
    profile = served(profile, stub, sampler="vllm", max_turns=1, warmup_steps=0, **settings)
    learner = Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.device)
    update, batches = loop.Learner.update, []
    monkeypatch.setattr(loop.Learner, "update", lambda self, batch: batches.append(batch) or update(self, batch))
    order, model = loop.question_order(QUESTIONS, profile), loop.model_to_train(learner, profile)
    rollouts = loop.Rollouts(profile, learner, order, retriever, [], tmp_path)
    loop.fit(model, learner, rollouts, loop.Recorder(profile, tmp_path, str), None, 0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(batches) == 3 and all(row["grad_norm"] > 0 for row in rows)
    for batch in batches:
        apart = (batch.old_logprobs - batch.sampled_logprobs).abs() * batch.own
        assert batch.own.sum() > 20 and apart.max() < 1e-4
    # the third adapter is not the first: sampled with that one, the learner would have found other values
    with torch.no_grad(), model.disable_adapter():
        base, _, _ = score(model, batches[-1], profile.temperature)
    assert ((base - batches[-1].sampled_logprobs).abs() * batches[-1].own).max() > 1e-3
    loaded = [name.split("-")[1] for what, name in stub.loads if what == "load"]
    assert loaded == ["0", "1", "2"]
    asked = [body["model"] for path, body in stub.asked if path == "/v1/completions"]
    assert {name.split("-")[1] for name in asked if name != "stub/base"} == {"0", "1", "2"}
