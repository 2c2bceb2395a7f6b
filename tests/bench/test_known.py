"""What a model knows as a task of the benchmark."""

from __future__ import annotations

from dataclasses import replace

from eua.bench import known as known_module
from eua.bench.measure import full_report, objectives
from tests.bench.test_facts import world_facts  # noqa: F401


def test_a_task_of_what_a_model_knows_can_be_measured(world_facts, trained_folder, known, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(known_module, "load_facts", lambda: world_facts)
    relations = sorted({fact.relation for fact in world_facts})[:4]
    task = known_module.facts(0, model=str(trained_folder), cache=tmp_path, relations=relations, forget=8, least=1)
    task = replace(task, samples=1, new_tokens=24, relearning_steps=(1,))
    assert len(task.forget) == 8
    assert {fact.group for fact in task.facts} > {"forget"}
    found = objectives(known, tokenizer, task.validation)
    assert 0 < found["forget"] <= 1
    report = full_report(known, tokenizer, task).metrics
    assert report["said"]["any wording"] == 1.0
    assert {f"any wording, greedily, {fact.group}" for fact in task.facts} - {"any wording, greedily, forget"} <= set(
        report["said"]
    )
    near = {fact.group for fact in task.facts} - {"forget"}  # what is near is wrapped, too
    still = [report["wrapped"][f"still said after a prefix, {group}"] for group in near]
    assert max(still) > 0
    assert {f"after a prefix, {group}" for group in near} < set(report["refused"])
    assert list(task.validation) == list(task.test)
    assert all(row["alternatives"] for row in task.forget)
    assert "forget_quality" in report["left_out"]  # there is no retain-only model


def test_rows_that_the_model_writes_are_added_and_kept(world_facts, trained_folder, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    relations = sorted({fact.relation for fact in world_facts})[:4]
    monkeypatch.setattr(known_module, "load_facts", lambda: world_facts)
    drawn = {"model": str(trained_folder), "cache": tmp_path, "relations": relations, "forget": 8, "least": 1}
    plain = known_module.facts(0, **drawn)
    asked = []

    def write(model, tokenizer, rows, *, count, avoid, progress, **options):
        asked.append((list(rows), avoid))
        return [{"question": f"Who is number {place}?", "answer": "Someone."} for place in range(count)]

    monkeypatch.setattr(known_module, "write_neighbours", write)
    for _ in range(2):
        more = known_module.facts(0, reworded=2, neighbours=5, **drawn)
        assert len(more.forget) == 3 * len(plain.forget)
        assert more.forget[::3] == plain.forget
        assert all(row["keys"] == plain.forget[place // 3]["keys"] for place, row in enumerate(more.forget))
        assert more.retain[: len(plain.retain)] == plain.retain
        assert len(more.retain) == len(plain.retain) + 5
    ((rows, avoid),) = asked  # then from the file
    assert rows == plain.forget
    unseen = {fact.name for fact in plain.facts if "never seen" in fact.group}
    assert unseen
    assert all(any(entity in name for entity in avoid) for name in unseen)
    assert not [row for row in plain.retain if any(entity in row["question"] for entity in avoid)]
    assert more.digest != plain.digest
