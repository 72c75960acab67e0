"""The trajectory page: what goes into it, in Python, and what a person finds, in a real headless browser.

The browser is Chromium or Chrome as the system has it, driven by playwright; where one is missing its tests skip.
"""

import base64
import gzip
import json
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import searchr1
from hypothesis import given
from hypothesis import strategies as st
from synthetic_runs import write_run

from searchr1_lite.analysis import page as pages
from searchr1_lite.analysis.page import RunError, Source, load_source, write_page
from searchr1_lite.config import ROOT
from searchr1_lite.rollouts.protocol import render_observation, render_prompt
from searchr1_lite.tasks.answers import last_answer
from searchr1_lite.types import Hit, Passage

SIZE = {"width": 1200, "height": 800}
NASTY = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!--<script>",
    "]]></style></title></textarea><svg onload=alert(3)>",
    "<img src=x onerror=alert(4)>",
    '"><iframe src="javascript:alert(5)">',
    "[click](javascript:alert(6)) ![x](https://example.org/x.png) **bold** `code`",
    "javascript:alert(7)",
    "<style>*{display:none}</style><base href=https://example.org/><meta http-equiv=refresh content=0>",
    "\x1b[31mred\x1b]0;title\x07\x1b[2J\r\x00\x7f\x85",
    "left \u202eright\u202c \u2066in\u2069 \u200bzero\ufeff",
    "line\u2028paragraph\u2029end",
    "half \ud800 a pair \udfff",
    "{{data}} ${alert(8)} <!--index--> <!--parts--> %s {% raw %} __proto__",
    "&lt;b&gt; &amp;#x3c; \\u003c \\",
    "family \U0001f469\u200d\U0001f467 عربي שלום",
    "tag \U000e0041\U000e0042 private \ue000",
    "x" * 3000,
    "ż\u0301" * 40,
]


def visible(text: str) -> str:
    """What the page must show for a text, written anew from Unicode's own classes."""

    def sign(char: str) -> str:
        code = ord(char)
        if char in "\n\t\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
            return char
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\u{{{code:x}}}"

    return "".join(map(sign, text))


def call(*pieces: tuple[str, float | None], prompt: str = "the prompt") -> dict:
    return {"prompt": prompt, "pieces": [text for text, _ in pieces], "logprobs": [value for _, value in pieces]}


def row(number: int = 0, right: bool = True, searches: int = 1, **more) -> dict:
    """A row that searches as often as asked for; its question needs the passages p0 and p9."""
    hits = [Hit(Passage(f"p{n}", f"Title {n}", f"Text {n}."), 1.0) for n in range(3)]
    search = {"text": f"<search> q{number} </search>", "action": "search", "query": f"q{number}"}
    search |= {"observation": render_observation(hits), "hit_ids": ["p0", "p1", "p2"]}
    answer = {
        "text": f"<answer> a{number} </answer>",
        "action": "answer",
        "query": None,
        "observation": "",
        "hit_ids": [],
    }
    metadata = {"hops": 1 + number % 3, "supporting_ids": ["p0", "p9"]}
    question = {
        "id": f"id{number}",
        "question": f"Question {number}?",
        "golden_answers": ["gold"],
        "metadata": metadata,
    }
    made = {"question": question, "turns": [search] * searches + [answer], "searches": searches, "finished": True}
    made |= {"stop_reason": "answer", "exact_match": float(right), "response_length": 9}
    return made | more


def unpacked(file: Path) -> list:
    parts = re.findall(r'<script type="text/plain" id="part\d+">([^<]*)</script>', file.read_text(encoding="utf-8"))
    return [json.loads(gzip.decompress(base64.b64decode(part))) for part in parts]


# What goes in


@given(
    st.recursive(
        st.text(st.characters(), max_size=9) | st.sampled_from(NASTY), lambda inner: st.lists(inner, max_size=4)
    )
)
def test_whatever_the_text_it_comes_back_and_holds_no_character_of_html(value):
    packed = pages.pack(value)
    assert re.fullmatch(r"[A-Za-z0-9+/]+=*", packed)
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == value


def test_a_page_of_nasty_texts_differs_from_a_harmless_one_in_its_data_only(tmp_path):
    harmless, nasty = row(), row()
    nasty["question"] = harmless["question"] | {"id": NASTY[1], "question": NASTY[13], "golden_answers": NASTY}
    nasty["turns"] = [harmless["turns"][-1] | {"text": text, "observation": text, "hit_ids": NASTY} for text in NASTY]
    nasty |= {"strategy": NASTY[1], "stop_reason": NASTY[4], "calls": [call((NASTY[2], -1.0), prompt=NASTY[1])]}
    about = {"model": NASTY[1], "date": NASTY[2], "command": NASTY[5]}
    written = [
        write_page([harmless], tmp_path / "a.html"),
        write_page(Source(NASTY[1], [nasty], about), tmp_path / "b.html"),
    ]
    first, second = (re.sub(r"(id=\"part\d+\">)[A-Za-z0-9+/=]*<", r"\1<", file.read_text()) for file in written)
    assert first == second
    assert unpacked(written[1])[1][0]["golden"] == NASTY


@pytest.mark.parametrize(
    "word", ["innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "http:", "https:"]
)
def test_the_template_has_no_way_to_run_text_or_to_fetch(word):
    assert word not in pages.TEMPLATE.read_text(encoding="utf-8")


@given(
    st.lists(st.sampled_from(["<answer>", "</answer>", " x ", "\n", "<search>", "<answer>y\nz</answer>"]), max_size=9)
)
def test_the_answer_shown_is_the_answer_judged(pieces):
    text = "".join(pieces)
    one = row()
    one["turns"] = [one["turns"][-1] | {"text": text}]
    assert pages.detail(one)["answer"] == last_answer(text)


def test_an_answer_in_a_text_that_is_not_the_last_is_none():
    one = row()
    one["turns"] = [one["turns"][-1] | {"action": "write"}, one["turns"][-1] | {"text": "well", "action": "invalid"}]
    assert pages.detail(one)["answer"] is None


def test_format_is_told_apart():
    invalid = row()
    invalid["turns"] = [invalid["turns"][0] | {"action": "invalid"}, *invalid["turns"]]
    rows = [row(), invalid, invalid | {"finished": False}]
    assert [pages.facets("x", one)["format"] for one in rows] == ["well formed", "invalid actions", "no answer"]


def test_before_and_after_are_partners_and_training_has_none(tmp_path):
    phases = ["after", "train", "before", "before", "train", "before", "after"]
    rows = [row(n, phase=phase) for n, phase in zip([0, 0, 1, 0, 1, 2, 1], phases, strict=True)]
    index = unpacked(write_page(rows, tmp_path / "page.html"))[0]
    assert sorted(index["pairs"]) == [[2, 6], [3, 0]]


def test_two_files_pair_by_question_decoding_and_time_asked(tmp_path):
    ours = [row(n, decoding=decoding) for decoding in ("greedy", "sampled") for n in (0, 0, 1)] + [
        row(5, phase="train")
    ]
    theirs = [row(1, phase="after"), row(0, decoding="sampled"), row(0, decoding="sampled"), row(0, phase="before")]
    theirs += [row(5, phase="train")]
    file = write_page(ours, tmp_path / "page.html", against=theirs)
    index = unpacked(file)[0]
    assert sorted(index["pairs"]) == [[2, 7], [3, 8], [4, 9]]  # training evaluates greedily
    assert index["facets"]["folder"] == ["trajectories (1)"] * 7 + ["trajectories (2)"] * 5
    assert index["facets"]["pair"][:4] == ["", "", "right → right", "right → right"]


def test_a_folder_names_its_settings(tmp_path):
    source = load_source(write_run(tmp_path / "run"))
    assert source.name == "run" and len(source.rows) == 4
    assert (source.about["model"], source.about["date"][:10], source.about["masked"]) == (
        "data/tiny-base",
        "2026-01-01",
        True,
    )
    assert load_source(tmp_path / "run" / "trajectories.jsonl.gz") == source


def test_the_command_writes_the_page_whole_or_not_at_all(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "new" / "page.html"
    searchr1("report", "page", run, "--against", write_run(tmp_path / "b" / "run"), "--out", out)
    assert "8 trajectories" in capsys.readouterr().out
    assert [name for name, _ in unpacked(out)[0]["sources"]] == ["run (1)", "run (2)"]
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        searchr1("report", "page", tmp_path / "nowhere", "--out", out)
    assert out.read_bytes() == before and sorted(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"exact_match": None}, "exact_match: Input should be a valid number"),
        ({"exact_match": float("nan")}, "exact_match: Input should be a finite number"),
        ({"finished": 1}, "finished: Input should be a valid boolean"),
        ({"searches": True}, "searches: Input should be a valid integer"),
        ({"f1": float("inf")}, "f1: Input should be a finite number"),
        ({"turns": "none"}, "turns: Input should be a valid list"),
        ({"turns": [{"text": "x", "action": "answer"}]}, "turns.0.observation: Field required"),
        (
            {"question": {"id": "1", "question": "?", "golden_answers": [1]}},
            "question.golden_answers.0: Input should be a valid string",
        ),
        ({"calls": [call(("a", -1.0), ("b", float("nan")))]}, "calls.0.logprobs.1: Input should be a finite number"),
        ({"calls": [call(("a", -1.0)) | {"pieces": []}]}, "calls.0: Value error, 0 pieces and 1 logprobs"),
        ({"calls": [{"pieces": [], "logprobs": []}]}, "calls.0.prompt: Field required"),
        ({"calls": "none"}, "calls: Input should be a valid list"),
        ({"question": row()["question"] | {"metadata": 3}}, "question.metadata: Input should be a valid dictionary"),
        ({"step": "one"}, "step: Input should be a valid integer"),
        ({"phase": ["x"]}, "phase: Input should be a valid string"),
    ],
)
def test_a_row_that_cannot_be_shown_is_named(tmp_path, change, message):
    file = tmp_path / "trajectories.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in (row(), row() | change)).encode()))
    with pytest.raises(RunError, match=re.escape(f"{file}:2: {message}")):
        write_page([row()], tmp_path / "page.html", against=load_source(file))
    with pytest.raises(RunError, match=re.escape(f"row 2: {message}")):
        write_page([row(), row() | change], tmp_path / "page.html")


def test_no_rows_are_no_page(tmp_path):
    with pytest.raises(RunError, match="no trajectories"):
        write_page([], tmp_path / "page.html")


def test_a_page_needs_neither_torch_nor_training(tmp_path):
    code = "import sys, searchr1_lite.analysis.page\n"
    code += "print([name for name in sys.modules if name == 'torch' or 'searchr1_lite.training' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What a person finds


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no Chromium or Chrome is installed")
    with api.sync_playwright() as play:
        one = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Write a page of rows and open it from disk, offline; afterwards nothing was fetched, said or run."""
    context = browser.new_context(viewport=SIZE, offline=True)
    tab, events = context.new_page(), []
    tab.set_default_timeout(4000)
    tab.on("console", lambda message: events.append(("console", message.text)))
    tab.on("pageerror", lambda error: events.append(("error", str(error))))
    tab.on("dialog", lambda dialog: (events.append(("dialog", dialog.message)), dialog.dismiss()))
    tab.on("request", lambda request: events.append(("request", request.url)))
    tab.on("framenavigated", lambda frame: events.append(("moved", frame.url)) if frame.parent_frame else None)
    tab.on("popup", lambda popup: events.append(("popup", popup.url)))

    def go(rows, address="", against=None):
        file = write_page(rows, tmp_path / "page.html", against)
        tab.goto("about:blank")
        events.clear()
        tab.goto(f"{file.as_uri()}{address}")
        tab.wait_for_selector(".columns")
        return tab

    yield go
    requests = [event for event in events if event[0] == "request"]
    assert [event for event in events if event[0] != "request"] == []
    assert len(requests) == 1 and requests[0][1].startswith("file:///")  # the page itself
    context.close()


def until(tab, what: str, given=None) -> None:
    """Wait for an expression, or a function of `given`; playwright's own wait is refused by the page's policy."""
    for _ in range(200):
        if tab.evaluate(what, given):
            return
        tab.wait_for_timeout(20)
    raise AssertionError(f"waited in vain for {what}")


def chosen(tab) -> str:
    return tab.inner_text(".question")


def mixed_rows() -> list[dict]:
    """Rows of every kind there are filters for."""
    rng, rows = random.Random(0), []
    for n in range(60):
        one = row(n, right=rng.random() < 0.4, searches=rng.choice([0, 1, 2, 11]))
        one |= {"strategy": rng.choice(["rag", "search_r1"]), "decoding": rng.choice(["greedy", "sampled"])}
        one |= {"phase": rng.choice(["before", "train", "after"]), "step": rng.choice([0, 10])}
        one["question"]["metadata"]["data_source"] = rng.choice(["nq", "popqa"])
        if rng.random() < 0.3:
            one |= {"finished": False, "stop_reason": "turns"}
        if rng.random() < 0.3:
            one["turns"] = [one["turns"][-1] | {"action": "invalid"}, *one["turns"]]
        rows.append(one)
    return rows


def test_nothing_that_is_written_runs_and_all_of_it_is_shown(visit):
    rows = []
    for n, text in enumerate(NASTY):
        one = row(n)
        one["question"] |= {"id": f"{n} {text}", "question": text, "golden_answers": [text], "metadata": {"hops": text}}
        one["turns"] = [one["turns"][0] | {"text": text, "observation": text, "hit_ids": [text]}]
        one["turns"].append(row()["turns"][1] | {"text": f"<answer>{text}</answer>", "action": text})
        hits = [Hit(Passage(text, "T", text), 1.0)]
        one["turns"].append(one["turns"][0] | {"observation": render_observation(hits)})
        one |= {"stop_reason": text, "strategy": text, "phase": text, "decoding": text}
        rows.append(one | ({"calls": [call((text, -0.5), (text, None), prompt=text)]} if n % 2 else {}))
    about = {"model": NASTY[1], "date": NASTY[4], "command": NASTY[5]}
    tab = visit(Source(NASTY[1], rows, about), against=Source(NASTY[4], rows, about))
    assert tab.inner_text("h1") == f"{NASTY[1]} against {NASTY[4]}" and NASTY[1] in tab.title()
    for n, text in enumerate(NASTY):
        shown = visible(text)
        assert tab.text_content(".question") == shown
        assert shown.strip() in tab.text_content(".row[aria-selected=true] .isolate")
        assert tab.text_content(".model .text") == visible(text.strip("\n"))
        assert tab.text_content(".environment:not(details) .text") == visible(text.strip("\n"))
        assert f"answered “{visible(text.strip())}”" in tab.text_content(".verdict")
        assert f"{n} {shown}" in tab.text_content(".counts")
        if n % 2:
            assert tab.text_content("details .text") == shown
            for key in "mps":
                tab.keyboard.press(key)
            tab.wait_for_selector(".columns.two .t")
            assert tab.text_content(".t.ours") == tab.text_content(".t.theirs") == visible(text.replace("\n", "↵"))
            assert f"“{visible(text)}”" in tab.get_attribute(".t.ours", "aria-label")
            for key in "mps":
                tab.keyboard.press(key)
        tab.keyboard.press("j")
        until(tab, "n => document.querySelector('#place').textContent.startsWith(n + ' of')", n + 2)
        until(tab, "q => document.querySelector('.question').textContent !== q", shown)
    assert tab.evaluate("document.querySelectorAll('img, iframe, svg, base, a, object, embed, link').length") == 0
    assert tab.evaluate("document.querySelectorAll('script:not([type])').length") == 1


def test_even_a_mistake_could_not_run_or_load_anything(browser, tmp_path):
    tab = browser.new_page()
    tab.goto(write_page([row()], tmp_path / "page.html").as_uri())
    tab.wait_for_selector(".columns")
    with pytest.raises(Exception, match="TrustedHTML"):
        tab.evaluate("document.body.innerHTML = '<b>x</b>'")
    result = tab.evaluate("""async () => {
        const script = document.createElement("script");
        try { script.textContent = "window.ran = 1"; document.body.append(script); } catch {}
        const picture = new Image();
        const loaded = new Promise(done => { picture.onload = () => done(true); picture.onerror = () => done(false); });
        picture.src = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=";
        document.body.append(picture);
        try { document.body.setAttribute("onclick", "window.ran = 2"); } catch {}
        document.body.click();
        return [window.ran, await loaded, await fetch("data:,x").then(() => "fetched", () => "refused")];
    }""")
    assert result == [None, False, "refused"]
    tab.close()


def test_filters_and_counts_are_those_that_python_counts(visit):
    rows = mixed_rows()
    described = [pages.facets("x", one) for one in rows]
    tab = visit(rows)

    def said(kept):
        right = sum(bool(rows[n]["exact_match"]) for n in kept)
        some = f"{len(kept)} of 60" if len(kept) < 60 else "All 60"
        return f"{some} trajectories, exact match " + (f"{right / len(kept):.3f}" if kept else "\u2013")

    for name in ("result", "hops", "searches", "format", "phase", "step", "decoding", "data set", "strategy"):
        values = [one[name] for one in described]
        select = tab.locator(f"[id='facet {name}']")
        options = [text for text in select.locator("option").all_inner_texts() if text != "all"]
        assert options == [
            f"{v} ({values.count(v)})" for v in sorted(set(values), key=lambda v: (int(v) if v.isdigit() else 0, v))
        ]
        for value in set(values):
            select.select_option(value)
            assert tab.inner_text("#count") == said([n for n, v in enumerate(values) if v == value])
        tab.click("#clear")
    tab.locator("[id='facet result']").select_option("right")
    tab.locator("[id='facet decoding']").select_option("greedy")
    tab.fill("#q", "qUESTION 1")
    asked = [n for n, one in enumerate(rows) if "question 1" in one["question"]["question"].lower()]
    fits = [n for n in asked if described[n]["decoding"] == "greedy"]
    kept = [n for n in fits if described[n]["result"] == "right"]
    assert kept and tab.inner_text("#count") == said(kept)
    assert tab.locator("[role=option]").evaluate_all("found => found.map(one => +one.id.slice(3))") == kept
    wrong = len(fits) - len(kept)  # what the other choice of a filter would show
    assert f"wrong ({wrong})" in tab.locator("[id='facet result'] option").all_inner_texts()
    tab.fill("#q", "no such question")
    assert tab.inner_text("#count") == said([]) and "No trajectory" in tab.inner_text("#detail")
    tab.click("#clear")
    assert tab.inner_text("#count") == said(range(60))


def test_a_view_can_be_linked(visit):
    rows = mixed_rows()
    tab = visit(rows, "#row=7")
    assert chosen(tab) == "Question 7?"
    tab.locator("[id='facet data set']").select_option("nq")
    tab.fill("#q", "5")
    tab.keyboard.press("Escape")
    tab.keyboard.press("m")
    view = tab.evaluate("location.hash"), tab.inner_text("#count"), chosen(tab)
    tab = visit(rows, view[0])
    assert (tab.evaluate("location.hash"), tab.inner_text("#count"), chosen(tab)) == view
    assert tab.get_attribute("#mask", "aria-pressed") == "true" and tab.input_value("#q") == "5"
    for broken in ("#row=-1", "#row=x&hops=none&mask=yes", "#%E0%A4%A", "#row=99999&__proto__=1", "#row=1.5"):
        assert chosen(visit(rows, broken)) == "Question 0?"
    tab.evaluate("location.hash = '#row=3'")
    until(tab, "document.querySelector('.question').textContent === 'Question 3?'")


def test_keys(visit):
    rows = [row(n) for n in range(300)]
    tab = visit(rows)

    def after(key):
        tab.keyboard.press(key)
        until(tab, "document.querySelector('.question').textContent === data.questions[state.row]")
        return int(chosen(tab).split()[1][:-1])

    moves = [
        ("j", 1),
        ("ArrowDown", 2),
        ("ArrowRight", 3),
        ("k", 2),
        ("ArrowUp", 1),
        ("ArrowLeft", 0),
        ("k", 0),
        ("End", 299),
    ]
    assert [after(key) for key, _ in moves] == [place for _, place in moves]
    inside = """(() => {
        const row = document.querySelector("[aria-selected=true]").getBoundingClientRect();
        const list = document.querySelector("#list").getBoundingClientRect();
        return row.top >= list.top - 1 && row.bottom <= list.bottom + 1;
    })()"""
    assert tab.evaluate(inside)
    assert [after("Home"), after("j")] == [0, 1] and tab.evaluate(inside)
    for key, name in (("m", "mask"), ("p", "logp")):
        tab.keyboard.press(key)
        assert tab.get_attribute(f"#{name}", "aria-pressed") == "true"
    tab.keyboard.press("/")
    tab.keyboard.type("jkmps?2")
    assert tab.input_value("#q") == "jkmps?2" and not tab.is_visible("dialog")
    assert tab.get_attribute("#mask", "aria-pressed") == "true"
    tab.fill("#q", "")
    tab.keyboard.press("Escape")
    tab.keyboard.press("Control+m")
    assert tab.get_attribute("#mask", "aria-pressed") == "true"
    tab.keyboard.press("?")
    assert tab.is_visible("dialog")
    tab.keyboard.press("j")
    assert after("Escape") == 1 and not tab.is_visible("dialog")


def test_the_tab_key_goes_everywhere_and_is_caught_nowhere(visit):
    tab = visit([row(calls=[call(("a", -1.0), ("b", -2.0))]), row(1)], "#logp=1")
    seen = []
    where = "[document.activeElement.id || document.activeElement.className || document.activeElement.tagName, "
    where += "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle]"
    for _ in range(40):
        tab.keyboard.press("Tab")
        name, outline = tab.evaluate(where)
        assert outline != "none", f"the focus on {name} cannot be seen"
        seen.append(name)
    for name in ("q", "facet result", "list", "next", "mask", "logp", "help", "t ours"):
        assert seen.count(name) > 1, f"{name} is passed once a round: {seen}"


def test_side_by_side(visit):
    rows = [
        row(0, False, 0, phase="before"),
        row(0, phase="train"),
        row(1, phase="after"),
        row(0, True, 2, phase="after"),
    ]
    tab = visit(rows, "#row=3&side=1")
    tab.wait_for_selector(".columns.two")
    assert tab.locator(".columns h3").all_inner_texts() == ["before", "after"]
    assert [text.split(":")[0] for text in tab.locator(".verdict").all_inner_texts()] == ["✗ Wrong", "✓ Right"]
    assert "wrong → right (2)" in tab.locator("[id='facet pair'] option").all_inner_texts()
    tab.keyboard.press("s")
    until(tab, "document.querySelectorAll('.columns > section').length === 1")
    assert tab.locator(".columns h3").all_inner_texts() == ["after"]
    tab.keyboard.press("s")
    tab.keyboard.press("Home")
    tab.wait_for_selector(".columns.two")
    assert tab.locator(".columns h3").all_inner_texts() == ["before", "after"]
    tab.keyboard.press("j")
    tab.wait_for_selector("text=has no partner")
    tab = visit([row(0, strategy="rag")], "#side=1&row=1", against=[row(0, False, strategy="direct")])
    assert tab.locator(".columns h3").all_inner_texts() == ["trajectories (1) · rag", "trajectories (2) · direct"]


def test_passages_prompt_and_counts(visit):
    tab = visit(
        [row(0, False, retrieved_tokens=31, f1=0.25), row(1, strategy="rag"), row(2, calls=[call(("x", -1.0))])]
    )
    blocks = tab.locator(".passage")
    assert blocks.locator(".text").all_inner_texts() == [f'Doc {n + 1}(Title: "Title {n}") Text {n}.' for n in range(3)]
    assert ["supporting" in one.lower() for one in blocks.locator(".who").all_inner_texts()] == [True, False, False]
    assert tab.inner_text(".verdict") == "✗ Wrong: answered “a0”. Golden answer: “gold”."
    counts = tab.inner_text(".counts").replace("\n", " ")
    assert "stopped by answer searches 1 tokens written 9 tokens retrieved 31 F1 0.25" in counts
    assert "supporting passages found 1 of 2" in counts
    assert tab.text_content("details .text") == render_prompt("Question 0?") and "rebuilt" in tab.inner_text("summary")
    assert tab.locator(".block .who").all_inner_texts()[1:3] == ["MODEL search", "ENVIRONMENT 3 passages"]
    tab.keyboard.press("j")
    tab.wait_for_selector("text=The prompt was not recorded")
    tab.keyboard.press("j")
    until(tab, "document.querySelector('details .text')?.textContent === 'the prompt'")
    assert "rebuilt" not in tab.inner_text("summary")


def test_several_texts_each_stand_under_their_prompt(visit):
    made = row(0, strategy="ircot", calls=[call(("x", -1.0), prompt="first"), call(("y", -1.0), prompt="second")])
    search, answer = made["turns"]
    made["turns"] = [search | {"text": "", "query": "who"}, answer | {"text": "a thought", "action": "write"}, answer]
    tab = visit([made, row(1, strategy="direct")])
    assert tab.locator("details .text").all_text_contents() == ["first", "second"]
    order = ["ENVIRONMENT 3 passages", "PROMPT of call 1 of 2", "MODEL write", "PROMPT of call 2 of 2", "MODEL answer"]
    assert tab.locator(".block > .who").all_inner_texts() == order
    assert "Searched for: who" in tab.inner_text(".environment")
    tab.keyboard.press("j")
    until(tab, "document.querySelector('.question').textContent === 'Question 1?'")
    assert tab.text_content("details .text") == render_prompt("Question 1?", "direct")


def test_mask_and_log_probabilities_of_the_right_tokens(visit):
    pieces = [("<th", -0.25), ("ink>", -2.0), ("\n\n", None), ("<info>", None), ("", -0.5), ("ans", -1e-9)]
    tab = visit([row(calls=[call(*pieces), call(("z", -3.0), prompt="second")])], "#logp=1")
    chips = tab.locator(".t")
    assert chips.all_text_contents() == ["<th", "ink>", "↵↵", "<info>", "", "ans", "z"]
    assert chips.evaluate_all("found => found.map(one => one.dataset.mask)") == list("1100111")
    shade = "found => found.map(one => +one.style.getPropertyValue('--p'))"
    assert chips.evaluate_all(shade) == pytest.approx([0.7788, 0.1353, 0, 0, 0.6065, 1, 0.0498], abs=1e-4)
    hatched = "found => found.map(one => getComputedStyle(one).backgroundImage.includes('gradient'))"
    assert chips.evaluate_all(hatched) == [False, False, True, True, False, False, False]
    strength = chips.evaluate_all(
        "found => found.map(one => +getComputedStyle(one).backgroundColor.match(/[0-9.]+(?=\\)$)/)[0])"
    )
    assert strength[1] > strength[4] > strength[0] > strength[5]  # the less likely, the stronger
    chips.nth(1).hover()
    assert "Token 2 of 6 “ink>”" in tab.inner_text(".readout")
    assert "log-probability \u22122.0000, probability 0.1353" in tab.inner_text(".readout")
    chips.nth(0).focus()
    assert "\u22120.2500" in tab.inner_text(".readout")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert "environment's (mask 0)" in tab.inner_text(".readout") and tab.inner_text("#place") == "1 of 1 shown"
    digit = "found => found.map(one => getComputedStyle(one, '::after').content)"
    assert set(chips.evaluate_all(digit)) == {"none"}
    tab.keyboard.press("m")
    tab.wait_for_selector(".mask.logp")
    assert chips.evaluate_all(digit) == [f'"{mask}"' for mask in "1100111"]
    assert tab.locator("details .text").all_text_contents() == ["the prompt", "second"]


def test_five_thousand_trajectories_keep_few_nodes(visit):
    tab = visit([row(n) for n in range(5000)])
    nodes = "document.querySelectorAll('*').length"
    assert tab.evaluate(nodes) < 900 and tab.locator(".row").count() < 40  # of them, parts of data: 250
    assert tab.inner_text("#count").startswith("All 5,000 trajectories")
    tab.evaluate("document.querySelector('#list').scrollTop = 56 * 2500")
    tab.wait_for_selector("#row2500")
    assert tab.locator(".row").count() < 40
    tab.click("#row2500")
    until(tab, "document.querySelector('.question').textContent === 'Question 2500?'")
    tab.keyboard.press("End")
    until(tab, "document.querySelector('.question').textContent === 'Question 4999?'")


@pytest.mark.parametrize("width", [320, 700, 1000])
def test_a_narrow_window_scrolls_downwards_only(visit, width):
    one = row(calls=[call(("x" * 200, -1.0), ("y" * 200, None))])
    one["turns"][-1]["text"] = "<answer>" + "w" * 500 + "</answer>"
    tab = visit([one | {"phase": "before"}, one | {"phase": "after"}], "#side=1")
    tab.set_viewport_size({"width": width, "height": 700})
    for key in ("", "m"):
        if key:
            tab.keyboard.press(key)
            tab.wait_for_selector(".t")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_real_run_is_shown(visit):
    folder = ROOT / "data/results/runs/tiny-masked-seed0"
    if not folder.is_dir():
        pytest.skip("the committed run is not here")
    source = load_source(folder)
    tab = visit(source)
    after = [one for one in source.rows if one["phase"] == "after"]
    right = sum(one["exact_match"] for one in after) / len(after)
    assert f"after ({len(after)}): exact match {right:.3f}" in tab.inner_text("#groups").replace("\n", " ")
    assert "model data/tiny-base" in tab.inner_text("#about")


def test_the_benchmark_makes_up_calls_of_the_rows_own_text(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import page as benchmark

    if not (ROOT / "data/results/runs").is_dir():
        pytest.skip("no committed runs are here")
    rows = benchmark.many_rows(3, seed=0)
    for one in rows:
        made = one["calls"][0]
        assert "".join(made["pieces"]) == "".join(turn["text"] + turn["observation"] for turn in one["turns"])
        written = "".join(p for p, value in zip(made["pieces"], made["logprobs"], strict=True) if value is not None)
        assert written == "".join(turn["text"] for turn in one["turns"])
