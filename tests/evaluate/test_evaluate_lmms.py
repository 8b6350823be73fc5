"""Benchmarks through the installed lmms-eval, offline: its own task files over documents made by hand, and a local task."""
# ruff: noqa: E402 - what needs lmms-eval is imported after the check that it is there

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFile

REASON = "lmms-eval is not installed: pip install -e '.[eval]' && pip install --no-deps lmms-eval==0.7.3"
pytest.importorskip("lmms_eval", reason=REASON)
datasets = pytest.importorskip("datasets", reason=REASON)

from llavakd.cli import evaluate
from llavakd.config import DataConfig, EvaluationConfig, TeacherConfig
from llavakd.data.samples import load_samples
from llavakd.errors import UserError
from llavakd.evaluate import generate_answers, lmms, score
from llavakd.evaluate.scoring import COLUMNS, Answer, normalize
from llavakd.models.student import load_teacher

PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.fixture(scope="module", autouse=True)
def quick_task_manager():
    """lmms-eval reads 2,000 files to find its tasks; once is enough."""
    made = {}
    plain = lmms.TaskManager

    def manager(include_path=None):
        if include_path not in made:
            made[include_path] = plain(include_path=include_path)
        return made[include_path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmms, "TaskManager", manager)
        yield


@pytest.fixture(scope="module")
def source(tiny):
    return TeacherConfig(path=str(tiny.teacher), dtype="float32")


@pytest.fixture(scope="module")
def model(source):
    return load_teacher(source)


def settings(batch_size: int = 4, max_new_tokens: int = 3) -> tuple[DataConfig, EvaluationConfig]:
    return DataConfig(path="", template="chatml"), EvaluationConfig(
        data="", batch_size=batch_size, max_new_tokens=max_new_tokens
    )


# Per column of the paper: documents of the benchmark's form, each with what the model is made to say.

PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def vqa(words: str, people: list[str] | None, number: int, **more) -> dict:
    return {"image": PICTURE, "question": words, "question_id": number, "answers": people, **more}


def choice(words: str, index: int, answer: str, options: dict | None = None) -> dict:
    texts = options or {"A": "cat", "B": "dog", "C": "cow", "D": "pig"}
    kinds = {"category": "animals", "L2-category": "nature", "source": "hand", "split": "dev"}
    return {"image": PICTURE, "question": words, "hint": "Look.", **texts, "answer": answer, "index": index, **kinds}


def exam(number: int, words: str, answer: str) -> dict:
    return {
        "id": f"validation_Art_{number}",
        "question": f"<image 1> {words}",
        "options": "['oil', 'ink']",
        "question_type": "multiple-choice",
        "answer": answer,
        "image_1": PICTURE,
    }


TEN = ["red"] * 2 + ["blue"] * 8
DOCUMENTS = {
    "vqav2_test": [(vqa("what v?", None, 11), "Two dogs"), (vqa("who v?", None, 12), "a man")],
    "gqa": [
        ({"image": PICTURE, "question": f"g{n}?", "answer": "Left"}, said) for n, said in enumerate(["left.", "up"])
    ],
    "vizwiz_vqa_test": [(vqa("what w?", None, 21), "unanswerable")],
    "scienceqa_img": [
        ({"image": PICTURE, "hint": "", "question": f"s{n}?", "choices": ["up", "down"], "answer": 1}, said)
        for n, said in enumerate(["B", "B. down", "A", "down"])
    ],
    "textvqa_val": [
        (vqa("what t?", TEN, 31, ocr_tokens=["STOP", "GO"]), "Red."),
        (vqa("who t?", TEN, 32, ocr_tokens=["x"]), "the blue"),
    ],
    # Existence: one picture right both times (100 + 100), one once (50 + 0): 250 / 2. Count: 200. Cognition: not counted.
    "mme": [
        (
            {
                "image": PICTURE,
                "question_id": name,
                "question": f"m{n}? Please answer yes or no.",
                "answer": true,
                "category": kind,
            },
            said,
        )
        for n, (name, kind, true, said) in enumerate(
            [
                ("a", "existence", "Yes", "Yes"),
                ("a", "existence", "No", "no."),
                ("b", "existence", "Yes", "Yes"),
                ("b", "existence", "No", "Yes"),
                ("c", "count", "Yes", "yes, two"),
                ("c", "count", "No", "No"),
                ("d", "code_reasoning", "Yes", "Yes"),
                ("d", "code_reasoning", "No", "No"),
            ]
        )
    ],
    # Question 1: both rotations right; 2: one of two; 3: alone, right, not by its letter; 4: wrong. Two of four.
    "mmbench_en_dev": [
        (choice("e1?", 1, "A"), "A"),
        (choice("e1r?", 1000001, "B"), "B."),
        (choice("e2?", 2, "A"), "A"),
        (choice("e2r?", 1000002, "B"), "A"),
        (choice("e3?", 3, "C"), "it is a cow"),
        (choice("e4?", 4, "C"), "no idea"),
    ],
    "mmbench_cn_dev": [
        (choice("c1?", 1, "A"), "A"),
        (choice("c1r?", 2000001, "D"), "(D)"),
        (choice("c2?", 7, "B"), "C"),
        (choice("c2r?", 1000007, "C"), "C"),
    ],
    # F1 of yes: random 1, popular 2/3 (TP 1, FP 1), adversarial 0; accuracies 1, 1/2, 0.
    "pope_random": [({"image": PICTURE, "question": "pr?", "question_id": 1, "answer": "yes"}, "Yes")],
    "pope_pop": [
        ({"image": PICTURE, "question": "pp1?", "question_id": 1, "answer": "yes"}, "yes"),
        ({"image": PICTURE, "question": "pp2?", "question_id": 2, "answer": "no"}, "yes"),
    ],
    "pope_adv": [({"image": PICTURE, "question": "pa?", "question_id": 1, "answer": "yes"}, "no")],
    "mmmu_val": [(exam(1, "u1?", "B"), "(B)"), (exam(2, "u2?", "A"), "B"), (exam(3, "u3?", "A"), "A")],
}
ENDINGS = {
    "vqav2_test": "v?" + PHRASE,
    "gqa": "?" + PHRASE,
    "vizwiz_vqa_test": "w?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + PHRASE,
    "scienceqa_img": "?\nA. up\nB. down\n" + LETTER,
    "textvqa_val": PHRASE,
    "mme": "?" + PHRASE,
    "mmbench_en_dev": "\nA. cat\nB. dog\nC. cow\nD. pig\n" + LETTER,
    "mmbench_cn_dev": "\nA. cat\nB. dog\nC. cow\nD. pig\n请直接回答选项字母。",
    "pope_random": "?" + PHRASE,
    "pope_pop": "?" + PHRASE,
    "pope_adv": "?" + PHRASE,
    "mmmu_val": "?\nA. oil\nB. ink\n\n" + LETTER,
}
LONG = {"scienceqa_img", "mmbench_en_dev", "mmbench_cn_dev", "mmmu_val"}


def write_documents(task: str, folder: Path) -> dict:
    """The documents as a local data set; returns what must go over the task's YAML to read it instead of the hub's."""
    split = {"gqa": "testdev", "textvqa_val": "validation", "mmmu_val": "validation", "pope_random": "random"}
    split |= {"pope_pop": "popular", "pope_adv": "adversarial", "mmbench_en_dev": "dev", "mmbench_cn_dev": "dev"}
    table = datasets.Dataset.from_list([document for document, _ in DOCUMENTS[task]])
    table.to_parquet(folder / f"{task}.parquet")
    files = {split.get(task, "test"): str(folder / f"{task}.parquet")}
    kwargs = {"data_files": files, "cache_dir": str(folder / "cache")}
    return {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": kwargs, "process_docs": None}


@pytest.fixture(scope="module")
def paper10(source, tmp_path_factory):
    """One run of all ten columns, answered from DOCUMENTS: (results row, its folder, [(sample, limit), ...])."""
    folder = tmp_path_factory.mktemp("paper10")
    asked = []

    def answer(model, samples, data, evaluation, label):
        for sample in samples:
            asked.append((sample, evaluation.max_new_tokens))
            task, number = sample.id.split()
            yield Answer(sample=sample, prediction=DOCUMENTS[task][int(number)][1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmms, "generate_answers", answer)
        tasks = {task: config | write_documents(task, folder) for task, config in lmms._PAPER_TASKS.items()}
        patch.setattr(lmms, "_PAPER_TASKS", tasks)
        row = lmms.evaluate_tasks(source, ["paper10"], *settings(), folder / "out")
    return row, folder / "out" / "teacher", asked


def test_the_ten_columns_are_what_is_counted_by_hand(paper10):
    row, _, _ = paper10
    assert row["benchmarks"] == {
        "gqa": 50.0,
        "sqa": 50.0,
        "textvqa": pytest.approx(100 * (0.6 + 1) / 2),
        "mme": pytest.approx((250 / 2 + 200) / 20),
        "mmb": 50.0,
        "mmb_cn": 50.0,
        "pope": pytest.approx(100 * (1 + 2 / 3 + 0) / 3),
        "pope_accuracy": 50.0,
        "mmmu": pytest.approx(200 / 3, abs=1e-3),  # lmms-eval rounds it to five digits
    }
    assert row["values"]["mme.mme_cognition_score"] == 200
    assert row["n"] == sum(map(len, DOCUMENTS.values()))
    assert set(DOCUMENTS) == {task for column in COLUMNS.values() for task in column.get("tasks", [])}


def test_what_only_a_server_scores_is_marked_and_its_file_lies_under_out(paper10):
    row, folder, _ = paper10
    assert set(row["servers"]) == {"vqav2", "vizwiz", "mmb", "mmb_cn"}
    assert {"vqav2", "vizwiz"}.isdisjoint(row["benchmarks"])
    names = [Path(path).name for path in row["submissions"]]
    assert all(Path(path).parent == folder / "submissions" and Path(path).stat().st_size for path in row["submissions"])
    for start in ("vqav2-test-submission", "vizwiz_vqa-test-submission", "mmbench_en_dev", "mmbench_cn_dev"):
        assert sum(name.startswith(start) for name in names) == 1, start
    vqav2 = next(path for path in row["submissions"] if "vqav2" in path)
    assert json.loads(Path(vqav2).read_text()) == [
        {"question_id": 11, "answer": "Two dogs"},
        {"question_id": 12, "answer": "a man"},
    ]


def test_prompts_end_and_answers_are_limited_as_in_the_papers_scripts(paper10):
    _, _, asked = paper10
    for sample, limit in asked:
        task = sample.id.split()[0]
        text = sample.turns[0].text
        assert text.endswith(ENDINGS[task]), text
        assert text.count("\n\n") == (task == "mmmu_val")
        assert limit == (1024 if task in LONG else 128)
        assert (len(sample.images), sample.turns[0].images) == (1, 1)
    texts = [sample.turns[0].text for sample, _ in asked if sample.id.startswith("textvqa")]
    assert texts[0] == "What t?\nReference OCR token: STOP, GO" + PHRASE


def test_everything_that_lmms_eval_found_is_kept(paper10):
    _, folder, _ = paper10
    kept = json.loads((folder / "lmms_eval.json").read_text())
    assert [line["filtered_resps"] for line in kept["samples"]["gqa"]] == [["left."], ["up"]]


def test_the_table_of_columns_is_left_as_it_was(paper10):
    assert COLUMNS["gqa"]["config"]["generation_kwargs"] == {"max_new_tokens": 128}
    assert set(COLUMNS["gqa"]["config"]["lmms_eval_specific_kwargs"]) == {"default"}


@pytest.mark.parametrize(
    ("said", "percent"),
    [(["A", "B", "C", "D"], 100), (["A", "B", "C", "A"], 0), (["A", "A", "A", "A"], 0), (["dog"] * 4, 0)],
)
def test_a_question_counts_only_if_all_its_rotations_are_right(said, percent):
    rows = [choice("?", 5 + 10**6 * turn, letter) for turn, letter in enumerate("ABCD")]
    rows = [row | {"prediction": text} for row, text in zip(rows, said, strict=True)]
    assert lmms.circular_accuracy(rows) == percent
    assert lmms.circular_accuracy([*rows, choice("other?", 6, "A") | {"prediction": "A"}]) == (percent + 100) / 2


def test_no_chat_service_is_asked_where_no_letter_is_found(paper10, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("requests.post", refuse)
    assert lmms.circular_accuracy([choice("?", 1, "A") | {"prediction": "no idea"}]) == 0


def test_lmms_eval_does_not_let_damaged_pictures_through():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_answers_are_normalised_as_lmms_eval_normalises_them():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    theirs = EvalAIAnswerProcessor()
    pick = random.Random(0)
    words = [
        "the",
        "two",
        "none",
        "dont",
        "It's",
        "3.5",
        "p.m.",
        "-",
        "a/b",
        "(x)",
        "?",
        ",",
        "1,000",
        "Hes",
        "'",
        ";",
        "\n",
    ]
    for _ in range(2000):
        text = pick.choice(["", " "]).join(pick.choices(words, k=pick.randint(1, 5)))
        assert normalize(text) == theirs(text), repr(text)
    for word in EvalAIAnswerProcessor.CONTRACTIONS:
        assert normalize(word) == theirs(word)


# A local task over pictures, answered by the tiny model itself.

TASK = {
    "task": "local",
    "dataset_path": "parquet",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_visual": "image",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "generation_kwargs": {"max_new_tokens": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}],
}


@pytest.fixture(scope="module")
def local(tiny, model, tmp_path_factory):
    """(folder of the local task, the same questions as a LLaVA file); every second truth is what the model says."""
    folder = tmp_path_factory.mktemp("local")
    rows = json.loads((tiny.world / "test.json").read_text()) + json.loads((tiny.world / "instruct.json").read_text())
    rows = [row for row in rows if len(row["conversations"]) == 2][:18]
    for row in rows[::5]:  # without a picture
        row["conversations"][0]["value"] = row["conversations"][0]["value"].removeprefix("<image>\n")
        row.pop("image", None)
    turned = Image.open(tiny.world / "images" / rows[1]["image"])
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    (folder / "images").mkdir()
    for row in rows:
        if "image" in row:
            name = Path(row["image"]).name
            (folder / "images" / name).write_bytes((tiny.world / "images" / row["image"]).read_bytes())
            row["image"] = name
    turned.save(folder / "images" / rows[1]["image"], exif=exif)
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    data = DataConfig(path=str(path), images=str(folder / "images"), template="chatml", max_length=400)
    answers = generate_answers(model, load_samples(data), data, settings(18, 4)[1], "")
    for row, answer in list(zip(rows, answers, strict=True))[::2]:
        row["conversations"][1]["value"] = answer.prediction or "nothing"
    path.write_text(json.dumps(rows))
    pictures = [{"bytes": (folder / "images" / row["image"]).read_bytes()} if "image" in row else None for row in rows]
    table = datasets.Dataset.from_dict(
        {
            "question": [row["conversations"][0]["value"].removeprefix("<image>\n") for row in rows],
            "answer": [row["conversations"][1]["value"] for row in rows],
            "image": pictures,
        }
    )
    table.cast_column("image", datasets.Image()).to_parquet(folder / "rows.parquet")
    kwargs = {"data_files": {"test": "rows.parquet"}, "cache_dir": str(folder / "cache")}
    (folder / "local.yaml").write_text(yaml.safe_dump(TASK | {"dataset_kwargs": kwargs}))
    chat = {"task": "talk", "output_type": "generate_until_multi_round", "dataset_kwargs": kwargs}
    (folder / "talk.yaml").write_text(yaml.safe_dump(TASK | chat))
    stops = {"task": "stops", "dataset_kwargs": kwargs, "generation_kwargs": {"until": ["e", "o"]}}
    (folder / "stops.yaml").write_text(yaml.safe_dump(TASK | stops))
    return folder, data


def answers_of(folder: Path, task: str = "local") -> list[str]:
    kept = json.loads((folder / "teacher" / "lmms_eval.json").read_text())
    return [line["filtered_resps"][0] for line in kept["samples"][task]]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_local_task_scores_what_our_own_scorer_does_on_the_same_questions_at_any_batch_size(
    local, source, model, tmp_path, batch_size
):
    folder, data = local
    row = lmms.evaluate_tasks(source, ["local"], *settings(batch_size), tmp_path, include=folder)
    ours = generate_answers(model, load_samples(data), data, settings(5, 4)[1], "")
    assert answers_of(tmp_path) == [answer.prediction for answer in ours]
    assert row["values"] == {"local.exact_match": pytest.approx(score(ours)["accuracy"])}
    assert 0.3 < score(ours)["accuracy"] < 0.9
    assert len(set(answers_of(tmp_path))) > 3
    assert row["benchmarks"] == row["servers"] == {}
    assert row["submissions"] == []
    assert row["n"] == 18


def test_a_turned_picture_is_turned_upright_whether_named_or_opened(local, model):
    folder, data = local
    seen = []

    def watch(images, return_tensors):
        seen.extend(images)
        return model.image_processor(images=images, return_tensors=return_tensors)

    watched = dataclasses.replace(model, image_processor=watch)
    named = load_samples(data)[1]
    opened = Image.open(folder / "images" / named.images[0])
    assert opened.getexif()[0x0112] == 6
    for sample in (named, dataclasses.replace(named, images=(opened,))):
        generate_answers(watched, [sample], data, settings(1, 1)[1], "")
    upright = np.rot90(np.asarray(opened.convert("RGB")), k=-1)  # entry 6: a quarter to the right
    assert len(seen) == 2
    for picture in seen:
        assert np.array_equal(np.asarray(picture), upright)
    assert not np.array_equal(np.asarray(opened.convert("RGB")), upright)


def test_only_the_first_questions_are_asked_and_max_new_tokens_holds_where_a_task_sets_none(local, source, tmp_path):
    folder, _ = local
    row = lmms.evaluate_tasks(source, ["stops"], *settings(4, 6), tmp_path, include=folder, limit=5)
    assert row["n"] == len(answers_of(tmp_path, "stops")) == 5
    assert not any(letter in text for text in answers_of(tmp_path, "stops") for letter in "eo")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lokal"], "no task 'lokal'; did you mean 'local'"),
        (["talk"], "talk asks for generate_until_multi_round"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_before_anything_is_answered(local, source, tmp_path, names, said):
    with pytest.raises(UserError, match=said):
        lmms.evaluate_tasks(source, names, *settings(), tmp_path, include=local[0])
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_had_is_said_in_one_message(source, tmp_path, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"no data for pope_random: .*POPE"):
        lmms.evaluate_tasks(source, ["pope"], *settings(), tmp_path)


def test_the_command_prints_one_json_object_or_every_score_and_file(local, tiny, tmp_path, capsys):
    options = {"include": local[0], "template": "chatml", "batch_size": 4, "out": tmp_path, "limit": 3}
    evaluate(str(tiny.teacher), tasks="local, local", **options, as_json=True)
    row = json.loads(capsys.readouterr().out)
    assert (row["name"], row["n"], set(row["values"])) == ("teacher", 3, {"local.exact_match"})
    evaluate(str(tiny.teacher), tasks="local", **options)
    assert capsys.readouterr().out.strip(" \n\u2022") == f"local.exact_match = {row['values']['local.exact_match']:.6g}"
