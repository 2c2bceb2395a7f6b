"""Measures on hand-made cases, and the report."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from eua import EnergyGuard, EUAError
from eua.data.rows import EncodedRow, encode_prompts, encode_rows
from eua.data.sources import read_rows
from eua.evaluation import evaluate, measure_answers, render_tables, truth_ratios
from eua.evaluation.page import page_data
from eua.evaluation.pictures import energy_histograms
from eua.guard.scores import prompt_scores
from tests.guard.test_guarded_generate import CHAT, messages

TOFU = Path(__file__).parents[3] / "shared" / "tofu"


def test_measures_are_their_definitions(model):
    """Answers of the model's own greedy choices, with errors at known places."""
    prompt = [5, 9, 30]
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2)[0, 3:]

    def forced(slips: set[int]) -> list[int]:
        """Greedy tokens, with the least likely token at ``slips``."""
        ids = list(prompt)
        for position in range(6):
            logits = model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmin() if position in slips else logits.argmax()))
        return ids

    with torch.no_grad():
        rows = [EncodedRow(forced(slips), 3) for slips in ({}, {0}, {3}, {5}, {1, 2})]
        assert rows[0].answer_ids == greedy.tolist()
        measures = measure_answers(model, rows, batch_size=2)
        logits = model(torch.tensor([rows[2].input_ids])).logits[0, 2:-1]
    torch.testing.assert_close(measures.extraction_strength, torch.tensor([1.0, 5 / 6, 2 / 6, 0.0, 3 / 6]))
    torch.testing.assert_close(measures.exact_memorization, torch.tensor([1.0, 5 / 6, 5 / 6, 5 / 6, 4 / 6]))
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(rows[2].answer_ids))
    torch.testing.assert_close(measures.probability[2], torch.exp(-nll))
    torch.testing.assert_close(measures.energy[2], -torch.logsumexp(logits, -1).mean())


def test_truth_ratio_is_its_definition(model, tokenizer):
    row = {"question": "Who?", "answer": "x", "paraphrased_answer": "It was Ann.", "perturbed_answer": ["It was Bob.", "Carl!"]}
    answers = [row["paraphrased_answer"], *row["perturbed_answer"]]
    encoded = encode_rows([{"question": "Who?", "answer": text} for text in answers], tokenizer, None)
    right, *wrong = measure_answers(model, encoded).probability.tolist()
    assert truth_ratios(model, tokenizer, [row]).item() == pytest.approx(sum(wrong) / 2 / right)
    with pytest.raises(EUAError, match='Row 0 has no "perturbed_answer"'):
        truth_ratios(model, tokenizer, [{"question": "Who?", "answer": "I."}])


def test_report_counts_what_the_guard_refuses(model, tokenizer, world, tmp_path):
    sets = {name: [vars(fact) for fact in getattr(world, name)] for name in ("forget", "test")}
    guard = EnergyGuard.calibrate(model, tokenizer, [fact.question for fact in world.retain])
    report, scores = evaluate(model, tokenizer, sets, guard=guard)
    for name, rows in sets.items():
        entry = report["sets"][name]
        assert entry["rows"] == len(rows)
        assert entry["refused"] == pytest.approx(float((guard.score(model, tokenizer, rows) > guard.threshold).float().mean()))
        paraphrased = guard.score(model, tokenizer, [row["paraphrased_question"] for row in rows])
        assert entry["refused_paraphrased"] == pytest.approx(float((paraphrased > guard.threshold).float().mean()))
        assert "truth_ratio" not in entry
    assert list(report["separation"]) == ["test"]
    json.dumps(report)
    table = render_tables({"before": report, "after": report})
    assert table.count("| forget") == 2
    assert "truth ratio" not in table

    picture = tmp_path / "energies.png"
    energy_histograms(picture, {"now": {"forget": scores["forget"], "retain": scores["test"]}}, threshold=guard.threshold)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["energies.png"]


def test_a_chat_scores_as_the_guard_scores_it(model, tokenizer, rows):
    """The last turn alone counts, with a guard and without one."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    asked = [row["question"] for row in rows["test"][:4]]
    chats = [
        {"messages": messages("Who is Bob?", "A baker.", question) + [{"role": "assistant", "content": "Ann."}]}
        for question in asked
    ]
    guard = EnergyGuard.calibrate(model, chatty, [row["question"] for row in rows["retain"]])
    alone = guard.score(model, chatty, asked)
    for with_guard in (guard, None):
        report, scores = evaluate(model, chatty, {"forget": chats}, guard=with_guard)
        torch.testing.assert_close(scores["forget"], alone)
    assert report["threshold"] is None


def test_a_guard_that_scores_chats_in_context_scores_reports_so(model, tokenizer, rows):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    prompts = [{"messages": messages("Who is Bob?", "A baker.", row["question"])} for row in rows["retain"]]
    guard = EnergyGuard.calibrate(model, chatty, prompts)
    assert guard.turns.in_context
    chats = [{"messages": [*prompt["messages"], {"role": "assistant", "content": "Ann."}]} for prompt in prompts[:6]]
    expected = guard.score(model, chatty, prompts[:6])
    assert not torch.allclose(expected, guard.score(model, chatty, [row["question"] for row in rows["retain"][:6]]))
    torch.testing.assert_close(evaluate(model, chatty, {"forget": chats}, guard=guard)[1]["forget"], expected)
    page = page_data({"forget": chats}, *[lambda: (model, chatty)] * 2, guard=guard)
    for title in ("after", "before"):
        torch.testing.assert_close(torch.tensor(page["sets"][0][title]["scores"]), expected.sort().values)


@pytest.fixture
def asked(rows) -> dict[str, list[dict]]:
    """A set to forget as TOFU writes it, which has answers in common, and another set with a row and a question of it."""
    forget = [
        row
        | {"paraphrased_answer": f"It is {row['answer']}", "perturbed_answer": ["Nobody.", "Nowhere, never.", row["answer"]]}
        | {"paraphrased_question": other["question"]}
        for row, other in zip(rows["forget"][:5], rows["test"], strict=False)
    ]
    return {"forget": forget, "retain": [*rows["test"][3:9], rows["forget"][0]]}


def run_alone(model, tokenizer, asked, **settings) -> tuple[dict, dict]:
    """The measures of every row, each text run alone: (set, measure) → values, and the scores."""
    found = {}
    for name, of_set in asked.items():
        single = [measure_answers(model, [row]) for row in encode_rows(of_set, tokenizer, None)]
        for key in ("extraction_strength", "extraction_strength_openunlearning", "probability", "energy"):
            found[name, key] = sum(float(getattr(one, key)) for one in single) / len(single)
    ratios = []
    for row in asked["forget"]:
        texts = [
            {"question": row["question"], "answer": answer} for answer in [row["paraphrased_answer"], *row["perturbed_answer"]]
        ]
        right, *wrong = (measure_answers(model, [one]).probability for one in encode_rows(texts, tokenizer, None))
        ratios.append(float(sum(wrong) / len(wrong) / right))
    found["forget", "truth_ratio"] = sum(ratios) / len(ratios)
    return found, {name: prompt_scores(model, encode_prompts(of_set, tokenizer), **settings) for name, of_set in asked.items()}


@pytest.mark.parametrize("kind", ["guard", "no guard", "generated tokens", "guard of generated tokens"])
def test_measures_are_those_of_texts_run_alone(kind, model, tokenizer, rows, asked):
    count = 2 if "generated" in kind else 0
    guard = EnergyGuard.calibrate(model, tokenizer, rows["retain"], first_tokens=count) if kind.startswith("guard") else None
    report, scores = evaluate(model, tokenizer, asked, guard=guard, first_tokens=count, batch_size=7)
    measures, alone = run_alone(model, tokenizer, asked, first_tokens=count)
    for (name, key), value in measures.items():
        assert report["sets"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    for name, of_set in asked.items():
        torch.testing.assert_close(scores[name], alone[name], rtol=1e-5, atol=1e-5)
        if guard:
            torch.testing.assert_close(scores[name], guard.score(model, tokenizer, of_set), rtol=1e-5, atol=1e-5)


@pytest.fixture
def tokens_run(monkeypatch) -> list[int]:
    """The number of tokens in each forward of a Llama, without padding."""
    counts: list[int] = []
    forward = LlamaForCausalLM.forward

    def counting(self, input_ids=None, attention_mask=None, **kwargs):
        counts.append(int(attention_mask[:, -input_ids.shape[1] :].sum()))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counting)
    return counts


def test_prompts_and_answers_run_once(model, tokenizer, rows, asked, tokens_run):
    guard = EnergyGuard.calibrate(model, tokenizer, rows["retain"])
    texts: dict[tuple[int, ...], set[tuple[int, ...]]] = {}  # prompt → answers
    for name, of_set in asked.items():
        for row in of_set:
            answers = [row["answer"], *([row["paraphrased_answer"], *row["perturbed_answer"]] if name == "forget" else [])]
            for one in encode_rows([{"question": row["question"], "answer": answer} for answer in answers], tokenizer, None):
                texts.setdefault(tuple(one.prompt_ids), set()).add(tuple(one.answer_ids))
    expected = 0
    for prompt, answers in texts.items():
        # The last token of an answer predicts nothing, and that of a shared prompt runs with the answers.
        expected += len(prompt) + sum(map(len, answers)) - (len(answers) > 1)
    expected += max(len(prompt) + len(answer) for prompt, answers in texts.items() for answer in answers if len(answers) > 1)
    others = {tuple(ids) for ids in encode_prompts([row["paraphrased_question"] for row in asked["forget"]], tokenizer)}
    assert others & set(texts)
    expected += sum(map(len, others - set(texts)))
    tokens_run.clear()
    evaluate(model, tokenizer, asked, guard=guard)
    assert sum(tokens_run) == expected

    # A row that is shown runs once more.
    tokens_run.clear()
    sets = {"retain": rows["retain"][:8]}
    encoded = encode_rows(sets["retain"], tokenizer, None)
    page_data(sets, lambda: (model, tokenizer), forget="retain", guard=guard, rows=len(encoded))
    assert sum(tokens_run) == 2 * sum(len(row.input_ids) for row in encoded)


@pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU's files are not next to the checkout")
def test_tofu_rows_are_understood(model, tokenizer):
    rows = read_rows(TOFU / "forget01_perturbed.jsonl")[:3]
    authors = read_rows(TOFU / "real_authors_perturbed.jsonl")[:3]
    report, _ = evaluate(model, tokenizer, {"forget": rows, "real authors": authors})
    assert all(0 < entry["truth_ratio"] < 10 for entry in report["sets"].values())
