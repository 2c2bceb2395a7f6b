"""Sources of rows: the same rows from every source, and errors that say what to do."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import huggingface_hub
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eua
from eua import EnergyGuard, EUAConfig, EUAError, EUATrainer
from eua.data.rows import encode_prompts, encode_rows
from eua.data.sources import read_prompts, read_rows
from eua.evaluation import evaluate, measure_answers, truth_ratios
from eua.evaluation.page import page_data
from eua.files import write_jsonl
from eua.guard.guard import GUARD_FILE
from eua.model.asking import answer
from eua.statistics import conformal_threshold, group_shares, share_interval

FLAT = [
    {"question": "Who?", "answer": "Ä, «B».\nC"},
    {"question": "007", "answer": "NA"},
    {"question": "None", "answer": "null"},
]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
MIXED: list[dict[str, Any]] = [
    {"question": "Who?", "answer": "Ann."},
    {"messages": CHAT},
    {"messages": [{"role": "system", "content": "Be kind.", "name": "s"}, *CHAT]},
    {"question": "Where?", "answer": "Oslo.", "perturbed_answer": ["Rome.", "Bern."]},
]
TOFU_CARD = """---
license: mit
configs:
- config_name: full
  data_files: full.json
  default: true
- config_name: forget10
  data_files:
  - split: train
    path: forget10.json
  - split: test
    path: full.json
---
# TOFU
"""


@pytest.fixture(autouse=True)
def nothing_leaves(monkeypatch, tmp_path):
    """No requests to the hub, and a separate cache for each test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_hub(monkeypatch):
    """``datasets`` must not be called."""

    def asked(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"datasets was asked for {args}")

    for name in ("load_dataset", "get_dataset_config_names", "get_dataset_split_names"):
        monkeypatch.setattr(datasets, name, asked)


@pytest.fixture
def tofu(tmp_path) -> Path:
    """A repository with TOFU's layout: a card that lists configurations, and a JSON file for each."""
    folder = tmp_path / "org" / "tofu"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(TOFU_CARD)
    write_jsonl(folder / "full.json", FLAT)
    write_jsonl(folder / "forget10.json", FLAT[:2])
    return folder


def from_every_format(rows: list[dict[str, Any]], folder: Path, *, flat: bool) -> dict[str, Any]:
    """The rows in every format."""
    text = [json.dumps(row, ensure_ascii=False) for row in rows]
    texts = {
        "rows.jsonl": "\n".join(text) + "\n\n",
        "bom.jsonl": "\ufeff" + "\n".join(text),
        "dos.jsonl": "\r\n".join(text),
        "rows.json": "[\n" + ",\n".join(text) + "\n]\n",
        "bom.json": "\ufeff" + json.dumps(rows),
        "lines.json": "\n".join(text),
        "array.jsonl": json.dumps(rows),
        "plain": "\n".join(text),
    }
    for name, content in texts.items():
        (folder / name).write_bytes(content.encode())
    sources: dict[str, Any] = {f"{name} as {kind.__name__}": kind(folder / name) for name in texts for kind in (str, Path)}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = pyarrow.table({key: [row.get(key) for row in rows] for key in columns})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    sources["rows.parquet"] = str(folder / "rows.parquet")
    frame = pandas.DataFrame(rows)
    frame.to_parquet(folder / "pandas.parquet", index=False)
    sources["pandas.parquet"] = folder / "pandas.parquet"
    sources |= {
        "DataFrame": frame,
        "object DataFrame": frame.astype(object),
        "read": pandas.read_parquet(folder / "pandas.parquet"),
    }
    dataset = datasets.Dataset.from_pandas(frame, preserve_index=False)
    sources |= {
        "Dataset": dataset,
        "formatted Dataset": dataset.with_format("numpy"),
        "DatasetDict": datasets.DatasetDict(train=dataset),
        "IterableDataset": dataset.to_iterable_dataset(),
        "list": rows,
        "tuple": tuple(rows),
        "generator": (row for row in rows),
    }
    if flat:
        for name, encoding in (("rows.csv", "utf-8"), ("bom.csv", "utf-8-sig")):
            with (folder / name).open("w", encoding=encoding, newline="") as file:
                writer = csv.DictWriter(file, ["question", "answer"])
                writer.writeheader()
                writer.writerows(rows)
            sources[name] = str(folder / name)
        frame.to_csv(folder / "index.csv", quoting=csv.QUOTE_ALL)
        sources["index.csv"] = str(folder / "index.csv")
    return sources


@pytest.mark.parametrize("rows", [FLAT, MIXED], ids=["flat", "mixed"])
def test_the_same_rows_from_every_source(tmp_path, rows):
    for kind, source in from_every_format(rows, tmp_path, flat=rows is FLAT).items():
        read = read_rows(source)
        assert read == rows, kind
        assert json.loads(json.dumps(read)) == rows, kind  # plain Python throughout


@pytest.mark.parametrize("style", ["numpy", "torch", "pandas", "arrow"])
def test_a_dataset_is_read_in_plain_python_whatever_its_format(style):
    rows = [{"question": "a", "answer": "b", "n": 5, "scores": [1.5, 2.5]}]
    dataset = datasets.Dataset.from_list(rows)
    for source in (dataset, dataset.to_iterable_dataset()):
        assert json.dumps(read_rows(source.with_format(style))) == json.dumps(rows)


def test_a_module_of_a_librarys_name_does_not_disturb(monkeypatch):
    for name in ("datasets", "pandas"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert read_rows(FLAT) == FLAT


# Without NUL, which csv and pyarrow handle in different ways, and without half a surrogate pair, which is not UTF-8.
CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=20)
@given(st.lists(st.fixed_dictionaries({"question": CELLS, "answer": CELLS}), min_size=1, max_size=4))
def test_any_text_survives_every_format(tmp_path_factory, rows):
    for kind, source in from_every_format(rows, tmp_path_factory.mktemp("rows"), flat=True).items():
        assert read_rows(source) == rows, kind


def test_what_is_empty_counts_as_absent(tmp_path):
    tools = {"role": "assistant", "content": "Yes.", "tool_calls": None, "audio": {"id": None, "text": "Yes."}}
    (row,) = read_rows([{"question": None, "messages": [CHAT[0], tools], "scores": [None, 1.5]}])
    assert row == {
        "messages": [CHAT[0], {"role": "assistant", "content": "Yes.", "audio": {"text": "Yes."}}],
        "scores": [None, 1.5],
    }
    (tmp_path / "gaps.csv").write_text('question,answer,topic\nWho?,Ann.,\nWhere?,"",x\n\n')
    assert read_rows("gaps.csv") == [{"question": "Who?", "answer": "Ann."}, {"question": "Where?", "topic": "x"}]
    frame = pandas.DataFrame(
        {"question": ["a", "b"], "answer": ["c", float("nan")], "n": [1.5, None], "all": [float("nan")] * 2}
    )
    frame["maybe"] = pandas.array([1, None], dtype="Int64")
    frame["object"], frame["date"] = pandas.Series([pandas.NA] * 2, dtype=object), pandas.to_datetime([None, None])
    assert read_rows(frame) == [{"question": "a", "answer": "c", "n": 1.5, "maybe": 1}, {"question": "b"}]
    assert read_rows([{"question": "a", "n": float("nan")}])[0].keys() == {"question", "n"}  # a list is used as it is


def test_a_table_of_questions_and_chats_encodes_as_its_rows(tokenizer, tmp_path):
    chatty = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    chatty.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m.name }}{{ eos_token }}{% endfor %}"
    expected = encode_rows(MIXED, chatty, None)
    for kind, source in from_every_format(MIXED, tmp_path, flat=False).items():
        assert encode_rows(source, chatty, None) == expected, kind


# ---- the hub, and folders of its layout -------------------------------------------------------------------------------


def test_a_folder_is_read_by_the_syntax_of_the_hub(tofu, tmp_path):
    for place in ("org/tofu", "./org/tofu", str(tofu)):
        assert read_rows(f"{place}:forget10:train") == FLAT[:2]
        assert read_rows(f"{place}:forget10:train[1:]") == FLAT[1:2]
        assert read_rows(f"{place}:full") == FLAT
    assert read_rows(Path("org/tofu:full:train")) == FLAT
    one = tmp_path / "json"  # also the name of a loader in datasets
    one.mkdir()
    write_jsonl(one / "train.jsonl", FLAT[:1])
    write_jsonl(one / "test.jsonl", FLAT[1:])
    assert read_rows("json::test") == FLAT[1:]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("org/tofu", r"'org/tofu', given as the dataset, has the configurations full, forget10, .* e\.g\. 'org/tofu:full'"),
        ("org/tofu::train", "has the configurations full, forget10"),
        (
            "org/tofu:forget10",
            r"has the splits train, test, but the name selects none of them: pass one, e\.g\. 'org/tofu:forget10:train'",
        ),
        ("org/tofu:forget10:valid", r"a folder that cannot be loaded as a data set \(.*train.*test.*check the path"),
        ("org/tofu:forget20:train", r"a folder that cannot be loaded as a data set \(.*forget20.*check the path"),
        ("empty", r"'empty', given as the dataset, is a folder that cannot be loaded as a data set"),
    ],
)
def test_a_name_that_leaves_a_choice_is_refused_with_the_choices(tofu, tmp_path, source, text):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EUAError, match=text):
        read_rows(source)


def test_a_name_on_the_hub_is_loaded_without_running_code(monkeypatch, tofu):
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(FLAT)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("locuslab/TOFU:forget10:train") == FLAT
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda place: ["default"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda place, config: ["train"])
    assert read_rows("squad") == read_rows("squad::train") == FLAT
    assert asked[0] == (("locuslab/TOFU", "forget10"), {"split": "train"})
    assert asked[1:] == 2 * [(("squad", "default"), {"split": "train"})]


def test_a_string_that_is_neither_says_that_both_were_tried(no_hub):
    with pytest.raises(EUAError, match=r"is not a file on this machine, and cannot be the name of .* on the hub: .*TOFU"):
        read_rows("Who are you?")
    with pytest.raises(EUAError, match="is not a file on this machine, and cannot be the name"):
        read_rows("")
    with pytest.raises(EUAError, match="is not a file on this machine, and cannot be the name"):
        read_rows("data/forget/rows")


def test_a_name_that_the_hub_does_not_give_says_so():
    with pytest.raises(
        EUAError, match=r"'org/nothing', given as the forget set, is not a file .*cannot be loaded from the hub"
    ):
        read_rows("org/nothing", "forget set")


@pytest.mark.parametrize(
    "source",
    [
        "forget.jsonl",
        "data/forget.json",
        "forget.CSV",
        "forget.parquet",
        "forget.jsonl:full:train",
        "rows.txt",
        "script.py",
        "./forget",
        "../forget",
        "/data/forget",
        "~/forget",
        "C:\\data\\forget",
        Path("org/name"),
    ],
)
def test_a_path_that_does_not_exist_is_no_name(no_hub, source):
    with pytest.raises(EUAError, match=r"The forget set .* is not a file: check the path"):
        read_rows(source, "forget set")


# ---- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "data.json",
            '{"data": [{"question": "a", "answer": "b"}]}',
            "one JSON object with the keys 'data', not rows: save the list",
        ),
        ("data.json", '[{"question": "a"},\n{oops}]', r"Line 2 of the dataset .*data\.json is not JSON"),
        ("deep.jsonl", '{"question": "a"}\n' + "[" * 100_000, r"Line 2 of the dataset .*deep\.jsonl is not JSON"),
        ("deep.json", "[" * 100_000, r"A line of the dataset .*deep\.json is not JSON"),
        ("deep.jsonl", '{"question": "a", "x": ' + "[" * 700 + "]" * 700 + "}", "Row 0 .* inside each other, too deep"),
        ("long.jsonl", '{"question": "a", "id": ' + "9" * 5000 + "}", r"Line 1 of the dataset .*long\.jsonl is not JSON"),
        ("data.jsonl", '{"question": "a"}\n\n{oops\n', r"Line 3 of the dataset .*data\.jsonl is not JSON"),
        ("data.json", '[{"question": "a"}, ["b"]]', "Row 1 of the dataset is a list, not a mapping"),
        ("data.jsonl", "5\n", "Row 0 of the dataset is an int, not a mapping"),
        ("data.jsonl", "\n \n", "The dataset is empty"),
        ("data.csv", "", "The dataset is empty"),
        ("data.csv", "question,answer\n", "The dataset is empty"),
        ("data.csv", 'question,answer\na,b\n"x\ny",b,c\n', r"Line 4 of the dataset .* ends a row of 3 cells under 2 columns"),
        ("data.csv", "question,answer\na\n", r"Line 2 of the dataset .* ends a row of 1 cells under 2 columns .*double quotes"),
        ("data.csv", 'question,answer\n"a" b,c\n', r"Line 2 of the dataset .* is not CSV"),
        ("data.csv", 'question,answer\n"a,c\n', "is not CSV"),
        (
            "data.csv",
            "question;answer\na;b\n",
            "names the columns 'question;answer', which are not a known format: .*separated by commas",
        ),
        ("data.csv", "question,question\na,b\n", "several columns named question"),
        ("data.parquet", "question,answer\n", "cannot be read as Parquet .*save it again"),
        ("data.jsonl.gz", "", "is compressed, and compressed files cannot be read: unpack it"),
    ],
    ids=lambda part: part[:30],
)
def test_bad_files_are_refused_with_their_line(no_hub, tmp_path, name, content, text):
    (tmp_path / name).write_text(content)
    with pytest.raises(EUAError, match=text):
        read_rows(name)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_other_encodings_are_refused(tmp_path, encoding, name):
    (tmp_path / name).write_text("question,answer\nÄ,ä\n", encoding=encoding)
    with pytest.raises(EUAError, match="is not UTF-8 text .*save it as UTF-8"):
        read_rows(name)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (None, "A NoneType was given as the dataset, which contains no rows: give the path"),
        (5, "An int was given"),
        (b"rows.jsonl", "A bytes was given"),
        (
            {"question": "a", "answer": "b"},
            "One mapping with the keys 'question', 'answer' was given .* give a list of mappings",
        ),
        (["rows.jsonl"], "Row 0 of the dataset is a str, not a mapping"),
        ([{"question": "a"}, 5], "Row 1 of the dataset is an int"),
        ([{5: "a"}], "Row 0 of the dataset has the key 5"),
        (datasets.DatasetDict(a=FLAT, b=FLAT), r"A DatasetDict of the splits 'a', 'b' .*pass one, e\.g\. dataset\['a'\]"),
        (datasets.DatasetDict(), "A DatasetDict of the splits  was given"),
        (pandas.DataFrame([["a", "b"]], columns=["question"] * 2), "A DataFrame with several columns named question"),
        (pandas.DataFrame([["a", "b"]]), "Row 0 of the dataset has the key 0, which is not a text"),
        (datasets.Dataset.from_list([]), "The dataset is empty"),
    ],
)
def test_a_source_without_rows_is_refused(source, text):
    with pytest.raises(EUAError, match=text):
        read_rows(source)


def test_an_open_file_is_not_read_as_questions(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", FLAT)
    with (
        (tmp_path / "rows.jsonl").open() as file,
        pytest.raises(EUAError, match="A TextIOWrapper was given .* the path of a file"),
    ):
        read_prompts(file)


def test_nothing_heavy_is_imported_until_it_is_needed():
    code = (
        "import sys, types\n"
        "package = sys.modules['eua'] = types.ModuleType('eua')\n"  # instead of eua/__init__.py, which imports the trainer
        f"package.__path__ = {eua.__path__!r}\n"
        "from eua.data.sources import read_rows\n"
        "read_rows([{'question': 'a'}])\n"
        "print([name for name in ('datasets', 'pandas', 'pyarrow', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_questions_and_rows(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", FLAT)
    assert read_prompts("rows.jsonl") == read_prompts(Path("rows.jsonl"), string_is_question=True) == FLAT
    assert read_prompts("Who?", string_is_question=True) == ["Who?"]
    assert read_prompts(["Who?", FLAT[0]]) == ["Who?", FLAT[0]]
    assert read_prompts(datasets.Dataset.from_list(FLAT)["question"]) == [row["question"] for row in FLAT]
    assert read_prompts(pandas.DataFrame(FLAT)["question"]) == [row["question"] for row in FLAT]
    (tmp_path / "questions.json").write_text('["Who?", {"question": "Where?"}]')
    assert read_prompts("questions.json") == ["Who?", {"question": "Where?"}]


@pytest.mark.parametrize("path", ["rows.jsonl", "data/held_out.csv", "held_out.parquet"])
def test_a_path_is_never_taken_for_a_question(path):
    with pytest.raises(
        EUAError, match=r"names a file, but one string is one question here: pass Path\('.*'\) to read .*, or \['"
    ):
        read_prompts(path, string_is_question=True)
    with pytest.raises(
        EUAError, match="Row 1 of the prompts is .* names a file or a data set, but strings in a list are questions"
    ):
        read_prompts(["Who?", path])
    assert read_prompts(["Who?", path], string_is_question=True) == ["Who?", path]
    assert read_prompts(f"What is in {path}", string_is_question=True)
    assert read_prompts([f"What is in {path}"])


def test_a_list_of_names_is_not_taken_for_questions():
    with pytest.raises(EUAError, match="names a file or a data set"):
        read_prompts(["locuslab/TOFU:retain90:train"])
    assert read_prompts(["Is it true/false?", "hello", "/help me"]) == ["Is it true/false?", "hello", "/help me"]


@pytest.mark.parametrize("items", [[5], [["Who?"]], [None]])
def test_an_item_that_is_not_a_prompt_is_refused(items):
    with pytest.raises(EUAError, match="Row 0 of the prompts is an? .*, neither a question nor a row"):
        read_prompts(items)


# ---- every function that takes rows ---------------------------------------------------------------------------------


@pytest.fixture
def files(rows, tmp_path) -> dict[str, str]:
    """The rows of the made-up world as files, with a path for each set."""
    for name, of_set in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", of_set)
    return {name: f"{name}.jsonl" for name in rows}


def test_the_trainer_reads_any_source(model, tokenizer, rows, files, tmp_path):
    def encoded(forget: Any, retain: Any, **held_out: Any) -> Any:
        args = EUAConfig(str(tmp_path / "run"), use_cpu=True, report_to="none", eval_strategy="epoch")
        sets = {"forget_dataset": forget, "retain_dataset": retain} | {f"eval_{name}": of for name, of in held_out.items()}
        return EUATrainer(model, args, processing_class=tokenizer, **sets).encoded_rows

    given_as = {"forget_dataset": "test.jsonl", "retain_dataset": Path("calibration.jsonl")}
    from_files = encoded(files["forget"], pandas.DataFrame(rows["retain"]), **given_as)
    assert from_files == encoded(
        rows["forget"], rows["retain"], forget_dataset=rows["test"], retain_dataset=rows["calibration"]
    )


def test_a_guard_is_calibrated_on_any_source(model, tokenizer, rows, files):
    expected = EnergyGuard.calibrate(model, tokenizer, rows["calibration"], tolerance=0.2)
    for source in (files["calibration"], Path(files["calibration"]), pandas.DataFrame(rows["calibration"])):
        guard = EnergyGuard.calibrate(model, tokenizer, source, tolerance=0.2, seen=files["retain"])
        assert (guard.threshold, guard.calibration_prompts) == (expected.threshold, len(rows["calibration"]))
    with pytest.raises(
        EUAError, match=f"{len(rows['calibration'])} of {len(rows['calibration'])} calibration prompts .* trained on"
    ):
        EnergyGuard.calibrate(model, tokenizer, rows["calibration"], tolerance=0.2, seen=files["calibration"])
    with pytest.raises(EUAError, match="Row 0 of the seen prompts is 'retain.jsonl', which names a file"):
        EnergyGuard.calibrate(model, tokenizer, rows["calibration"], tolerance=0.2, seen=[files["retain"]])
    with pytest.raises(EUAError, match=r"The calibration prompts nowhere\.jsonl is not a file"):
        EnergyGuard.calibrate(model, tokenizer, "nowhere.jsonl")
    assert EnergyGuard.calibrate(model, tokenizer, rows["calibration"], tolerance=0.2, seen=[]) == expected


def test_one_question_has_one_score_and_one_answer(known, tokenizer, guard, questions, files, rows):
    scores = guard.score(known, tokenizer, questions)
    assert guard.score(known, tokenizer, questions[0]).shape == (1,)
    torch.testing.assert_close(guard.score(known, tokenizer, questions[0]), scores[:1])
    assert answer(known, tokenizer, questions[0], 8) == answer(known, tokenizer, questions[:1], 8)
    assert encode_prompts(questions[0], tokenizer) == encode_prompts(questions[:1], tokenizer)
    of_file = guard.score(known, tokenizer, Path(files["test"]))
    torch.testing.assert_close(of_file, guard.score(known, tokenizer, rows["test"]))
    for ask in (guard.score, answer):
        with pytest.raises(EUAError, match="names a file, but one string is one question here"):
            ask(known, tokenizer, files["test"])
    with pytest.raises(EUAError, match="The questions are empty"):
        answer(known, tokenizer, [])


def test_evaluation_reads_any_source(model, tokenizer, rows, files):
    expected, _ = evaluate(model, tokenizer, {"forget": rows["forget"], "retain": rows["retain"]})
    sets = {"forget": files["forget"], "retain": (row for row in rows["retain"])}
    assert evaluate(model, tokenizer, sets, forget="forget")[0] == expected
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows[name]) for name in ("forget", "retain")})
    assert evaluate(model, tokenizer, splits)[0] == expected
    with pytest.raises(EUAError, match=r"sets is a str, but every set of rows needs a name: pass a mapping"):
        evaluate(model, tokenizer, files["forget"])
    with pytest.raises(EUAError, match=r"forget = \['other'\], but the sets are \['forget'\]"):
        evaluate(model, tokenizer, {"forget": files["forget"]}, forget="other")


def test_the_page_reads_any_source(model, tokenizer, rows, files):
    sets = {"forget": rows["forget"][:3], "kept": rows["retain"][:3]}
    expected = page_data(sets, lambda: (model, tokenizer), rows=2)
    sources = {"forget": datasets.Dataset.from_list(sets["forget"]), "kept": iter(sets["kept"])}
    assert page_data(sources, lambda: (model, tokenizer), rows=2, forget="forget") == expected
    with pytest.raises(EUAError, match=r"The forget set gone\.jsonl is not a file"):
        page_data({"forget": "gone.jsonl"}, lambda: (model, tokenizer))


def test_measures_read_any_source_or_say_what_they_take(model, tokenizer, rows, tmp_path):
    perturbed = [row | {"perturbed_answer": ["Nobody.", "Nowhere."]} for row in rows["forget"][:3]]
    write_jsonl(tmp_path / "perturbed.jsonl", perturbed)
    expected = truth_ratios(model, tokenizer, perturbed)
    torch.testing.assert_close(truth_ratios(model, tokenizer, "perturbed.jsonl"), expected)
    with pytest.raises(EUAError, match='Row 0 has one text as its "perturbed_answer"'):
        truth_ratios(model, tokenizer, [rows["forget"][0] | {"perturbed_answer": "Nobody."}])
    with pytest.raises(EUAError, match=r"Row 0 has the keys \['perturbed_answer'\], but a truth ratio needs"):
        truth_ratios(model, tokenizer, [{"perturbed_answer": ["Nobody."]}])
    for wrong in ("perturbed.jsonl", Path("perturbed.jsonl"), perturbed):
        with pytest.raises(EUAError, match=r"measure_answers\(\) got .* is not an encoded row, .*pass encode_rows"):
            measure_answers(model, wrong)


def test_one_string_is_no_list_of_groups(model, tokenizer, rows, monkeypatch):
    scores = torch.zeros(6)
    for use in (
        lambda groups: conformal_threshold(scores, 0.2, groups),
        lambda groups: group_shares(scores, 0.0, groups),
        lambda groups: share_interval(scores, groups),
        lambda groups: EnergyGuard.calibrate(model, tokenizer, rows["calibration"][:6], groups=groups),
    ):
        with monkeypatch.context() as patched:
            patched.setattr("eua.guard.guard.prompt_scores", None)  # groups are checked before any prompt is scored
            with pytest.raises(
                EUAError, match=r"groups = 'person' is one text, .* give a list .*row\['person'\] for row in rows"
            ):
                use("person")
            with pytest.raises(EUAError, match="2 groups were given for 6 scores"):
                use(["a", "b"])
            with pytest.raises(EUAError, match="Group 0 is a list, which cannot be compared"):
                use([[1]] * 6)
    assert conformal_threshold(scores, 0.5, iter("aabbcc")) == conformal_threshold(scores, 0.5, list("aabbcc"))


def test_a_file_of_one_row_is_a_row(tmp_path):
    for row in ({"question": "Who?", "answer": "Ann."}, {"frage": "Wer?"}, {"messages": CHAT}):
        (tmp_path / "one.jsonl").write_text(json.dumps(row))
        assert read_rows("one.jsonl") == [row]


def test_the_guard_file_is_not_a_source_of_rows(guard, tmp_path):
    guard.save_pretrained(tmp_path)
    with pytest.raises(EUAError, match="is one JSON object with the keys 'threshold'"):
        read_rows(GUARD_FILE)


def test_contents_in_parts_of_text_are_texts():
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is Ann?"}]
    image = [{"type": "image", "url": "x.png"}]
    rows = read_rows([{"messages": [{"role": "user", "content": parts}]}, {"messages": [{"role": "user", "content": image}]}])
    assert rows[0]["messages"] == [{"role": "user", "content": "Who is Ann?"}]
    assert rows[1]["messages"][0]["content"] == image
