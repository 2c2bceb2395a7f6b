"""Tests of the report page: its data against the scoring functions, hostile rows, and the page in a browser, if available."""

from __future__ import annotations

import copy
import gc
import json
import tomllib
import weakref
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from eua import EnergyGuard, EUAError
from eua.cli.main import main
from eua.data.rows import encode_prompts, encode_rows
from eua.evaluation import measure_answers, page
from eua.evaluation.page import page_data, render_page, rows_to_show, write_page
from eua.files import write_jsonl
from eua.guard.scores import prompt_scores
from tests.conftest import tiny_llama
from tests.evaluation.browser import CHROMIUM, Page

ROOT = Path(__file__).parents[2]
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium found: install it (apt-get install chromium), or set CHROMIUM to its path"
)
HOSTILE = [
    "</script><img src=x onerror=\"window.pwned='img'\">",
    "<!--<script>window.pwned = 'comment'",
    "'); window.pwned = 'quote'; (\"\\u003c/script> {data} {script-digest} ${window.pwned='template'}",
    "line\u2028separators\u2029and\u202eturned\x00 &lt;b&gt; </ScRiPt ><svg onload=\"window.pwned='svg'\">",
]


@pytest.fixture(scope="module")
def models(tokenizer):
    return {title: tiny_llama(len(tokenizer), seed) for seed, title in enumerate(("after", "before"))}


@pytest.fixture(scope="module")
def guard(models, tokenizer, rows):
    return EnergyGuard.calibrate(models["after"], tokenizer, rows["retain"])


@pytest.fixture(scope="module")
def gathered(models, tokenizer, rows, guard):
    sets = {"forget": rows["forget"], "retain": rows["retain"], "unseen": rows["test"]}
    loads = [lambda title=title: (models[title], tokenizer) for title in ("after", "before")]
    return page_data(sets, *loads, guard=guard, rows=6)


@pytest.fixture
def data(gathered):
    return copy.deepcopy(gathered)


def embedded(text: str) -> dict:
    return json.loads(text.partition('<script id="data" type="application/json">')[2].partition("</script>")[0])


def shares(data: dict, threshold: float) -> dict[str, float]:
    """The percentage of each set's scores above the threshold."""
    scores = {entry["name"]: torch.tensor(entry["after"]["scores"], dtype=torch.float64) for entry in data["sets"]}
    return {name: 100 * float((values > threshold).double().mean()) for name, values in scores.items()}


def test_the_data_equal_the_scoring_functions(data, models, tokenizer, rows, guard):
    assert embedded(render_page(data)) == data
    assert data["threshold"] == pytest.approx(guard.threshold, rel=1e-7)
    assert data["guard"]["text"] == guard.promise
    of = {"forget": rows["forget"], "retain": rows["retain"], "unseen": rows["test"]}
    assert [(s["name"], s["forget"], s["rows"]) for s in data["sets"]] == [
        (name, name == "forget", len(of[name])) for name in of
    ]
    for entry in data["sets"]:
        set_rows = of[entry["name"]]
        encoded = encode_rows(set_rows, tokenizer, None)
        for title, model in models.items():
            scores = prompt_scores(model, encode_prompts(set_rows, tokenizer), temperature=guard.temperature)
            torch.testing.assert_close(torch.tensor(entry[title]["scores"]), scores.sort().values)
            assert entry[title]["score"] == pytest.approx(float(scores.mean()))
            if title == "after":
                assert entry["shown"][0]["row"] == int(scores.argmin() if entry["forget"] else scores.argmax())
            measures = measure_answers(model, encoded)
            assert entry[title]["probability"] == pytest.approx(float(measures.probability.mean()))
            for shown in entry["shown"]:
                i, reading = shown["row"], shown[title]
                assert reading["score"] == pytest.approx(float(scores[i]))
                assert reading["extraction_strength"] == pytest.approx(float(measures.extraction_strength[i]))
                assert reading["probability"] == pytest.approx(float(measures.probability[i]))
                with torch.no_grad():
                    logits = model(torch.tensor([encoded[i].input_ids])).logits[0]
                energies = -torch.logsumexp(logits, -1)
                torch.testing.assert_close(torch.tensor(reading["energies"]), energies, atol=1e-3, rtol=0)
                assert reading["energies"][reading["prompt"] - 1] == pytest.approx(float(scores[i]), abs=1e-3)
                likely = logits[encoded[i].prompt_length - 1 : -1].argmax(-1)
                assert reading["likely"] == [tokenizer.decode([token]) for token in likely]
                answered = torch.tensor(encoded[i].input_ids[encoded[i].prompt_length :])
                assert reading["said"] == (likely == answered).tolist()
                assert "".join(reading["tokens"]) == tokenizer.decode(encoded[i].input_ids)
                assert reading["left_out"] == [0, 0]
                assert shown["question"] == set_rows[i]["question"]
                assert shown["answer"] == set_rows[i]["answer"]
    # One prompt's score equals the threshold, and still does when both are written with fewer digits.
    refused = guard.score(models["after"], tokenizer, rows["retain"]) > guard.threshold
    assert shares(data, data["threshold"])["retain"] == pytest.approx(100 * float(refused.float().mean()))


def test_tokens_keep_the_space_before_a_word():
    vocabulary = {"▁a": 0, "▁who": 1, "re": 2, "<unk>": 3}
    metaspace = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    texts = page._TokenTexts(PreTrainedTokenizerFast(tokenizer_object=metaspace, unk_token="<unk>"))
    assert [texts[1], texts[2]] == [" who", "re"]


def test_the_worst_rows_come_first_and_the_others_are_spread():
    scores = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0, 3.5, 8.0])
    assert rows_to_show(scores, 4, lowest_first=True) == {1: 1, 2: 3, 6: 2, 10: 4}
    assert rows_to_show(scores, 3, lowest_first=False) == {1: 4, 2: 9, 10: 1}
    assert list(rows_to_show(scores, 99, lowest_first=False).values()) == scores.argsort(descending=True).tolist()
    assert rows_to_show(scores, 1, lowest_first=False) == {1: 4}


def test_the_size_is_bounded(models, tokenizer, rows, monkeypatch):
    for name, bound in {"SCORES_KEPT": 5, "TOKENS_KEPT": 10, "TEXT_KEPT": 12}.items():
        monkeypatch.setattr(page, name, bound)
    sets = {"forget": rows["forget"], "retain": rows["retain"]}
    found = page_data(sets, lambda: (models["after"], tokenizer), rows=3)
    for entry in found["sets"]:
        lowest, *_, highest = entry["after"]["scores"]
        assert len(entry["after"]["scores"]) == 5
        assert lowest == min(entry["after"]["scores"])
        assert highest == max(entry["after"]["scores"])
        assert len(entry["shown"]) == 3
        for shown in entry["shown"]:
            reading, ids = shown["after"], encode_rows([sets[entry["name"]][shown["row"]]], tokenizer, None)[0]
            assert len(reading["tokens"]) == len(reading["energies"]) == 10
            assert reading["left_out"] == [ids.prompt_length - 5, len(ids.input_ids) - ids.prompt_length - 5]
            assert reading["tokens"] == [tokenizer.decode([t]) for t in ids.input_ids[ids.prompt_length - 5 :][:10]]
            assert len(reading["likely"]) == 5
            assert max(len(shown["question"]), len(shown["answer"])) <= 12


def test_a_page_without_guard_and_without_the_model_before(models, tokenizer, rows):
    sets = {"forget": rows["forget"], "retain": rows["retain"]}
    found = page_data(sets, lambda: (models["after"], tokenizer))
    assert found["guard"] is None
    assert all("before" not in entry for entry in found["sets"])
    assert shares(found, found["threshold"])["retain"] == 5.0
    with pytest.raises(EUAError, match=r"forget = \['forget'\], but the sets are \['retain'\]: name one or more"):
        page_data({"retain": rows["retain"]}, lambda: (models["after"], tokenizer))


def test_one_model_at_a_time_is_in_memory(tokenizer, rows):
    earlier: list[weakref.ref] = []

    def load():
        gc.collect()
        assert not [model for model in earlier if model() is not None]
        model = tiny_llama(len(tokenizer))
        earlier.append(weakref.ref(model))
        return model, tokenizer

    page_data({"forget": rows["forget"]}, load, load, rows=2)
    assert len(earlier) == 2


class Tags(HTMLParser):
    """The tags, attributes and comments of a page, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))

    def handle_endtag(self, tag):
        self.found.append((tag,))

    def handle_comment(self, text):
        self.found.append(("comment", text))


def hostile_data(models, tokenizer, guard) -> dict:
    hostile = [{"question": text, "answer": text[::-1] + text} for text in HOSTILE]
    sets = {"forget": hostile, HOSTILE[0]: hostile}
    mean_guard = guard.with_refusal(HOSTILE[0], tokenizer)
    loads = [lambda title=title: (models[title], tokenizer) for title in ("after", "before")]
    return page_data(sets, *loads, guard=mean_guard, settings={HOSTILE[1]: HOSTILE[2]})


def test_hostile_rows_add_no_markup(data, models, tokenizer, guard):
    found = hostile_data(models, tokenizer, guard)
    text = render_page(found)
    assert Tags(text).found == Tags(render_page(data)).found
    assert embedded(text) == found
    assert {shown["question"] for shown in found["sets"][1]["shown"]} == set(HOSTILE)
    json_text = text.partition('type="application/json">')[2].partition("</script>")[0]
    assert json_text.isascii()
    assert not set("<>&") & set(json_text)


def test_the_policy_names_the_pages_own_script_and_nothing_else(data):
    text = render_page(data)
    policy = text.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_nan_is_not_written(data, tmp_path):
    data["threshold"] = float("nan")
    with pytest.raises(ValueError, match="Out of range float"):
        write_page(tmp_path / "report.html", data)
    assert not list(tmp_path.iterdir())


def test_the_page_is_part_of_the_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = {f"{name.replace('.', '/')}/{file}" for name, names in declared.items() for file in names}
    packages = [path for package in ("eua", "fused_energy") for path in (ROOT / package).rglob("*") if path.is_file()]
    others = {path.relative_to(ROOT).as_posix() for path in packages if path.suffix not in (".py", ".pyc")}
    assert others == files


def test_the_command_writes_one_file(models, tokenizer, rows, guard, tmp_path, capsys):
    for title, model in models.items():
        model.save_pretrained(tmp_path / title)
        tokenizer.save_pretrained(tmp_path / title)
    guard.save_pretrained(tmp_path / "guard")
    for name, part in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    output = tmp_path / "out" / "report.html"
    command = ["report", "--model", str(tmp_path / "after"), "--before", str(tmp_path / "before"), "--output", str(output)]
    command += ["--guard", str(tmp_path / "guard"), "--rows", "3", "--forget", str(tmp_path / "forget.jsonl")]
    command += ["--retain", str(tmp_path / "retain.jsonl"), "--also", f"unseen={tmp_path / 'test.jsonl'}"]
    command += ["--also-forget", f"more={tmp_path / 'calibration.jsonl'}"]
    assert main(command) == 0
    text = output.read_text(encoding="utf-8")
    found = embedded(text)
    assert [(s["name"], s["forget"], len(s["shown"])) for s in found["sets"]] == [
        ("forget", True, 3),
        ("retain", False, 3),
        ("unseen", False, 3),
        ("more", True, 3),
    ]
    assert found["threshold"] == pytest.approx(guard.threshold)
    assert dict(found["settings"]) == {"temperature": "1.0", "model": "after", "model before unlearning": "before"}
    assert str(tmp_path) not in text
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    capsys.readouterr()
    assert main(command) == 2
    assert "report.html already exists and would be lost: name another, or pass --overwrite" in capsys.readouterr().err
    assert main([*command[:-2], "--overwrite"]) == 0
    assert len(embedded(output.read_text(encoding="utf-8"))["sets"]) == 3


@pytest.fixture
def browser(tmp_path):
    with Page(tmp_path / "profile") as opened:
        yield opened


def refused_shares(browser: Page) -> dict[str, float]:
    """The percentage of each set that is refused, as the lanes of the figure show it."""
    lanes = "[...document.querySelectorAll('.lane')].map(l => [...l.querySelectorAll('.text, .share')].map(e => e.textContent))"
    return {name: float(text.removesuffix(" % refused")) for name, text in browser.run(lanes)}


def rounded(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, abs=0.0501)


@needs_chromium
def test_refused_shares_follow_the_threshold(data, browser, tmp_path):
    write_page(tmp_path / "report.html", data)
    browser.open(tmp_path / "report.html")
    assert refused_shares(browser) == rounded(shares(data, data["threshold"]))
    low, high = (float(browser.run(f"document.getElementById('threshold').{end}")) for end in ("min", "max"))
    kept = [score for entry in data["sets"] if not entry["forget"] for score in entry["after"]["scores"]]
    highest = [shown["after"]["score"] for entry in data["sets"] if not entry["forget"] for shown in entry["shown"]]
    highest.sort(reverse=True)

    x, y, width = browser.run("(r => [r.x, r.y + 20, r.width])(document.querySelector('.plot').getBoundingClientRect())")
    seen = set()
    for goal in torch.tensor(kept).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist():
        browser.drag((x + 0.99 * width, y), (x + (goal - low) / (high - low) * width, y))
        threshold = browser.run("document.getElementById('threshold').valueAsNumber")
        assert threshold == pytest.approx(goal, abs=1.5 * (high - low) / width)
        assert refused_shares(browser) == rounded(shares(data, threshold))
        seen.add(tuple(refused_shares(browser).values()))
        percents = [f"{share:.1f} %" for share in refused_shares(browser).values()]
        cells = browser.run("[...document.querySelectorAll('#summary td:nth-child(2)')].map(e => e.textContent)")
        assert cells == percents
        said = browser.run("document.getElementById('threshold').getAttribute('aria-valuetext')")
        assert all(f"{percent} of {name}" in said for percent, name in zip(percents, refused_shares(browser), strict=True))
        verdicts = browser.run("[...document.querySelectorAll('#refusals-list .verdict')].map(e => e.textContent)")
        assert len(verdicts) == 10
        assert [text.startswith("refused") for text in verdicts] == [score > threshold for score in highest[:10]]
    assert len(seen) == 3

    browser.run("document.getElementById('threshold').focus()")
    before = threshold
    browser.press("ArrowRight")
    threshold = browser.run("document.getElementById('threshold').valueAsNumber")
    assert before < threshold < high
    assert refused_shares(browser) == rounded(shares(data, threshold))
    browser.press("Home")
    assert set(refused_shares(browser).values()) == {100}
    browser.run("document.getElementById('reset').click()")
    assert refused_shares(browser) == rounded(shares(data, data["threshold"]))
    assert browser.complaints() == []


OPEN_ALL = "document.querySelectorAll('details').forEach(d => { d.open = true; }); "


@needs_chromium
@pytest.mark.parametrize("whole", [True, False], ids=["all there is", "no guard, no model before"])
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_the_page_is_quiet_and_fits(width, dark, whole, data, browser, tmp_path):
    if not whole:
        data["guard"] = None
        for entry in data["sets"]:
            for part in (entry, *entry["shown"]):
                del part["before"]
    write_page(tmp_path / "report.html", data)
    browser.open(tmp_path / "report.html", width=width, dark=dark)
    for _ in range(2):  # opened details contain further details
        browser.run(OPEN_ALL + "new Promise(requestAnimationFrame)")
        browser.run("document.querySelectorAll('details').length")
    assert browser.run("document.querySelectorAll('.reading table').length") > 0
    assert browser.run("document.querySelectorAll('.token').length") > 100
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    assert browser.requests() == [(tmp_path / "report.html").as_uri()]
    unnamed = "[...document.querySelectorAll('input, select')].filter(e => !e.labels.length).length"
    assert browser.run(unnamed) == 0


@needs_chromium
def test_the_page_marks_tokens_as_its_data_says(data, browser, tmp_path):
    """Different tokens that are parts of characters share one text; a score of several tokens belongs to no single token."""
    data["first_tokens"] = 3
    for entry in data["sets"]:
        for reading in (shown[title] for shown in entry["shown"] for title in ("after", "before")):
            reading["likely"] = reading["tokens"][reading["prompt"] :]
            reading["said"] = [place == 0 for place in range(len(reading["likely"]))]
    write_page(tmp_path / "report.html", data)
    browser.open(tmp_path / "report.html")
    for _ in range(2):
        browser.run(OPEN_ALL)
        browser.run("new Promise(requestAnimationFrame)")
    said, scored = (browser.run(f"document.querySelectorAll('.token.{name}').length") for name in ("said", "scored"))
    assert said == scored > 0
    assert "and the first 3 generated tokens" in browser.run("document.querySelector('main').innerText")
    assert "whose energy decides" not in browser.run("document.querySelector('main').innerText")
    assert browser.complaints() == []


@needs_chromium
def test_hostile_rows_are_shown_as_text(models, tokenizer, guard, browser, tmp_path):
    write_page(tmp_path / "report.html", hostile_data(models, tokenizer, guard))
    browser.open(tmp_path / "report.html", width=360)
    for _ in range(2):
        browser.run(OPEN_ALL)
        browser.run("new Promise(requestAnimationFrame)")
    shown = browser.run("[...document.querySelectorAll('#leaks-list summary > .text')].map(e => e.textContent)")
    assert set(shown) == set(HOSTILE)
    assert browser.run("window.pwned") is None
    assert browser.run("document.querySelectorAll('img, svg[onload], script').length") == 2  # the page's own scripts
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert browser.complaints() == []
    assert len(browser.requests()) == 1

    # Even if a row were inserted as markup, the policy would keep it from running.
    for text in HOSTILE:
        browser.run(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(text)})")
    browser.run("new Promise(resolve => setTimeout(resolve, 100))")
    assert browser.run("document.querySelectorAll('img').length") > 0
    assert browser.run("window.pwned") is None
    assert any("Content Security Policy" in str(event) for event in browser.complaints())
