"""Tests of the figures that the demo promises. CI runs them after the other tests, with ``pytest -m demo``."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from eua import EnergyGuard
from eua.demo.run import SET_NAMES
from eua.demo.world import make_world
from eua.guard.guard import DEFAULT_REFUSAL
from eua.model.asking import answer

FORGOTTEN, SEEN, UNSEEN = SET_NAMES["forget"], SET_NAMES["retain"], SET_NAMES["test"]


def test_world_is_seeded_and_its_groups_share_nobody():
    world = make_world(40, seed=5)
    assert world == make_world(40, seed=5)
    assert world != make_world(40, seed=6)
    groups = [{fact.person for fact in group} for group in (world.forget, world.retain, world.calibration, world.test)]
    assert [len(group) for group in groups] == [4, 20, 8, 8]
    assert len(set.union(*groups)) == 40
    for fact in world.all():
        assert fact.person in fact.question
        assert fact.question != fact.paraphrased_question
    questions = [fact.question for fact in world.all()]
    assert len(set(questions)) == len(questions)


@pytest.mark.demo
@pytest.mark.timeout(900)
def test_demo_keeps_its_promises(tmp_path, shared_folder):
    command = [sys.executable, "-m", "eua", "demo", "--output", str(tmp_path / "out"), "--cache", str(shared_folder / ".cache")]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    first = time.monotonic() - start
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["before"]["sets"], report["after"]["sets"]
    assert before[FORGOTTEN]["extraction_strength"] >= 0.8
    assert after[FORGOTTEN]["extraction_strength"] <= 0.1
    assert after[SEEN]["extraction_strength"] >= 0.95 * before[SEEN]["extraction_strength"]
    assert after[UNSEEN]["extraction_strength"] >= 0.85 * before[UNSEEN]["extraction_strength"]
    assert min(entry["auroc"] for entry in report["after"]["separation"].values()) >= 0.95
    assert after[FORGOTTEN]["refused"] >= 0.9
    assert after[UNSEEN]["refused"] <= report["tolerance"]
    assert after[SEEN]["refused"] <= report["tolerance"]
    assert (tmp_path / "out" / "energies.png").read_bytes().startswith(b"\x89PNG")
    assert len(report["answers"]) == 6
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    shown = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert {entry["name"]: entry["after"]["score"] for entry in shown["sets"]} == {
        name: entry["score"] for name, entry in after.items()
    }

    folder = tmp_path / "out" / "unlearned"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with EnergyGuard.from_pretrained(folder).attach(model):
        shown = answer(model, tokenizer, [entry["question"] for entry in report["answers"]])
    assert shown == [entry["after"] for entry in report["answers"]]
    assert shown[:3] == [DEFAULT_REFUSAL] * 3

    start = time.monotonic()
    again = subprocess.run([*command, "--overwrite"], capture_output=True, text=True)
    second = time.monotonic() - start
    assert again.returncode == 0
    assert "it knows them already" in again.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["after"] == report["after"]
    print(f"first run {first:.0f} s, second {second:.0f} s")
    assert first < 360
    assert second < 120
