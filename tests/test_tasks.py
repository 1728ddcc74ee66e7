"""lm-evaluation-harness: our LM against the harness's own, request by request, and what a run reports."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
from conftest import SHIPPED
from conftest import TEXT as TEXT_FILE

from export.validate.tasks import file_hash
from prune_attn import WriteOptions
from pruner import PruneAttnError
from pruner.errors import MachineError
from pruner.evaluate import task_files
from pruner.evaluate.task_files import resolve_tasks
from pruner.evaluate.tasks import compare_tasks, run_tasks
from pruner.model import TorchLanguageModel
from pruner.progress import Step
from pruner.text import load_tokenizer

TEXT = TEXT_FILE.read_text(encoding="utf-8")
LIMIT = 1e-4  # nats a token


@pytest.fixture(scope="module")
def torch_model() -> TorchLanguageModel:
    return TorchLanguageModel(SHIPPED, dtype="float32")


@pytest.fixture(scope="module")
def onnx_model(tmp_path_factory):
    from export.onnx.session import OnnxSession
    from prune_attn import export

    output = tmp_path_factory.mktemp("tasks") / "onnx"
    export(SHIPPED, output, options=WriteOptions(dtype="float32"))
    return OnnxSession(output, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED)


@pytest.fixture(scope="module")
def harness(tokenizer):
    """The harness's own model, loaded by itself from the directory as ``lm_eval --model hf`` does."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(SHIPPED), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(params=["torch", "onnx"])
def ours(request, tokenizer):
    import copy

    from pruner.evaluate.harness import LanguageModelLM

    model = request.getfixturevalue(f"{request.param}_model")
    return LanguageModelLM(model, copy.deepcopy(tokenizer), batch=3, max_length=model.max_length)


def instances(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [
    ("Emma Woodhouse, handsome, clever, and", " rich"),
    ("Emma Woodhouse, handsome, clever, and", " poor"),  # the same context: the harness makes its logits once
    ("Emma Woodhouse, handsome, clever, and", " rich, with a comfortable home"),
    ("It was a truth ", "universally acknowledged"),  # a trailing space moves over
    ("", "No one who had ever seen Catherine Morland"),  # BOS stands for the empty context
    ("<s> The bill was paid", " and they were"),  # a BOS that is there already
    ("café – ☃", " naïve"),  # byte fallback
    (TEXT[:5000], " and she was"),  # longer than the context of 1,024: the beginning goes
]


def test_loglikelihood_is_the_harness_own(ours, harness):
    requests = instances("loglikelihood", *PAIRS)
    # where the greedy token is the continuation, the flag has to be true
    context = "He was a man of very"
    greedy = harness.generate_until(instances("generate_until", (context, {"until": [], "max_gen_toks": 3})))[0]
    requests += instances("loglikelihood", (context, f" {greedy.strip()}"), (f"{context} {greedy.strip()}", " zebra"))
    theirs = harness.loglikelihood(requests, disable_tqdm=True)
    mine = ours.loglikelihood(requests)
    for (a, flag), (b, their_flag), request in zip(mine, theirs, requests, strict=True):
        assert a == pytest.approx(b, abs=LIMIT * max(1, len(request.args[1].split()) * 2)), request.args[1]
        assert flag == their_flag, request.args[1]
    assert {flag for _, flag in mine} == {True, False}
    assert ours.truncated == 1


def test_rolling_is_the_harness_own(ours, harness):
    requests = instances("loglikelihood_rolling", (TEXT[:200],), (TEXT[:5000],), (TEXT[100:180],))
    theirs = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    counted = []
    ours.report = lambda done, total: counted.append((done, total))
    mine = ours.loglikelihood_rolling(requests)
    ours.report = None
    assert mine == pytest.approx(theirs, rel=1e-6, abs=LIMIT)
    assert counted[-1][0] == counted[-1][1] >= 4  # windows


def test_generation_is_the_harness_own(ours, harness):
    contexts = ["It was a dark night, and", "“My dear Emma,” said", "She looked at the", TEXT[:5000]]
    options = ({"until": [".", "\n"], "max_gen_toks": 16}, {"until": "the", "max_gen_toks": 8}, {"max_gen_toks": 5})
    requests = instances("generate_until", *((c, dict(o, do_sample=False)) for o in options for c in contexts))
    theirs = harness.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests) == theirs
    assert any(theirs)


def test_end_of_text_stops_a_row(tokenizer):
    """A model that says 7, 8, EOS and goes on: what comes after EOS is not text."""
    from pruner.evaluate.harness import LanguageModelLM

    class Scripted:
        vocab_size, max_length = 4096, 512
        script = (70, 71, 2, 72, 73, 74)

        def _say(self, rows: int) -> np.ndarray:
            out = np.zeros((rows, self.vocab_size), dtype=np.float32)
            out[:, self.script[self.step]] = 1
            self.step += 1
            return out

        def prefill(self, prompts):
            self.step = 0
            return self._say(len(prompts))

        def decode(self, tokens):
            return self._say(len(tokens))

        def reset(self):
            pass

    model = Scripted()
    lm = LanguageModelLM(model, tokenizer, batch=2, max_length=512)
    request = ("once", {"until": [], "max_gen_toks": 6})
    assert lm.generate_until(instances("generate_until", request)) == [tokenizer.decode([70, 71])]
    assert model.step == 3  # and no step is made after the last row has ended
    with pytest.raises(PruneAttnError, match="samples"):
        lm.generate_until(instances("generate_until", ("once", {"do_sample": True, "temperature": 1.0})))


def test_last_token_graph_is_refused(tmp_path, tokenizer):
    from export.onnx.session import OnnxSession
    from prune_attn import export

    export(SHIPPED, tmp_path / "last", last_token_logits=True, options=WriteOptions(dtype="float32"))
    with pytest.raises(PruneAttnError, match="without --last-token-logits"):
        run_tasks(lambda: OnnxSession(tmp_path / "last", device="cpu"), tokenizer, "cloze", limit=1)


def test_cloze_on_both_backends(torch_model, onnx_model, tokenizer, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)  # from anywhere; the data lies beside the task file, and nothing is written here
    (tmp_path / "cloze.jsonl").write_text("not the one")
    seen = []
    a = run_tasks(lambda: torch_model, tokenizer, "cloze", limit=60, batch=16, progress=seen.append)
    b = run_tasks(lambda: onnx_model, tokenizer, "cloze", limit=60, batch=16)
    one, other = a["tasks"]["cloze"], b["tasks"]["cloze"]
    assert seen[-1] == Step("cloze", 240, 240, "requests")
    assert (one["metric"], one["n"], one["shots"], one["notes"]) == ("acc", 60, 0, [])
    assert one["hash"] == other["hash"]
    assert sum(x != y for x, y in zip(one["items"], other["items"], strict=True)) <= 1  # a tie may fall either way
    assert one["value"] > 0.25 + 4 * one["stderr"]  # chance is 1 in 4
    assert one["value"] == pytest.approx(np.mean(one["items"]))
    assert a["average"] == one["value"]
    assert json.loads(json.dumps(a)) == a
    assert os.listdir(tmp_path) == ["cloze.jsonl"]
    assert capfd.readouterr() == ("", "")


def test_cloze_data_is_what_the_script_writes():
    """Context and right answer stand in the text as they are, and the answers' places give nothing away."""
    items = [json.loads(line) for line in (task_files.SHIPPED["cloze"].parent / "cloze.jsonl").open(encoding="utf-8")]
    labels = [item["label"] for item in items]
    assert len(items) == 400
    for item in items:
        assert f"{item['context']} {item['choices'][item['label']]}" in TEXT
        assert len(set(item["choices"])) == 4
        lengths = [len(choice) for choice in item["choices"]]
        assert max(lengths) - min(lengths) <= 8
    assert all(70 <= labels.count(k) <= 130 for k in range(4))


@pytest.fixture
def task_file(tmp_path):
    """Two local tasks of other kinds, with few-shot examples; the answer is always the third word."""
    rng = random.Random(0)
    words = ["garden", "carriage", "sister", "letter", "fortune", "evening", "morning", "father"]
    rows = [{"words": rng.sample(words, 3)} for _ in range(6)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "common.yaml").write_text(
        "dataset_path: json\ndataset_kwargs: {data_files: {train: data/rows.jsonl, test: [data/rows.jsonl]}}\n"
        "test_split: test\nfewshot_split: train\n"
        'doc_to_text: "{{words[0]}}, {{words[1]}},"\ndoc_to_target: " {{words[2]}}"\n'
    )
    path = tmp_path / "last_word.yaml"
    path.write_text(
        "include: common.yaml\ntask: last_word\noutput_type: generate_until\nnum_fewshot: 2\n"
        "generation_kwargs: {until: [','], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    return path


def test_a_task_file_with_shots(torch_model, onnx_model, tokenizer, task_file):
    def run(model, **options):
        return run_tasks(lambda: model, tokenizer, [f"{task_file}@3"], **options)

    a, b = run(torch_model), run(onnx_model, batch=4)
    assert a["tasks"] == b["tasks"]
    entry = a["tasks"]["last_word"]
    assert (entry["metric"], entry["shots"], entry["n"], entry["higher_is_better"]) == ("exact_match", 3, 6, True)
    assert run(torch_model, seed=5)["tasks"]["last_word"]["hash"] != entry["hash"]  # other examples
    assert run(torch_model, seed=5) == run(torch_model, seed=5)


def test_one_name_for_two_tasks(tokenizer, task_file):
    with pytest.raises(PruneAttnError, match="last_word: asked for twice"):
        run_tasks(lambda: 1 / 0, tokenizer, [f"{task_file}@3", f"{task_file}@1"])


def test_finished_tasks_are_not_run_again(torch_model, tokenizer, task_file):
    saved = {}
    first = run_tasks(lambda: torch_model, tokenizer, [task_file.as_posix()], save=saved.__setitem__)
    assert run_tasks(lambda: 1 / 0, tokenizer, [task_file.as_posix()], done=saved, save=lambda *_: 1 / 0) == first


def test_out_of_memory_halves_the_batch(torch_model, tokenizer):
    class Small:
        vocab_size, max_length = torch_model.vocab_size, torch_model.max_length
        rows = 2

        def logits(self, ids):
            if len(ids) > self.rows:
                raise MachineError("no memory")
            return torch_model.logits(ids)

    entry = run_tasks(Small, tokenizer, "cloze", limit=2, batch=8)["tasks"]["cloze"]
    assert entry["notes"] == ["batch 2: 8 ran out of memory"]
    assert entry["n"] == 2
    Small.rows = 0
    with pytest.raises(MachineError, match="cloze: out of memory with a batch of 1"):
        run_tasks(Small, tokenizer, "cloze", limit=1)


def test_names(monkeypatch, tmp_path):
    assert resolve_tasks("openllm, cloze") == [
        "arc_challenge@25", "hellaswag@10", "truthfulqa_mc2@0", "mmlu@5", "winogrande@5", "gsm8k@5", "cloze",
    ]  # fmt: skip
    assert resolve_tasks(["arc_easy", "arc_easy", "ai2_*@3"]) == ["arc_easy", "ai2_arc@3"]
    for wrong, says in (
        ("helaswag", r"unknown task 'helaswag'; did you mean hellaswag"),
        ("qqqqqqqqqqqq", "unknown task 'qqqqqqqqqqqq'; `lm_eval ls tasks`"),
        (",", "no task is named"),
        (f"{tmp_path}/no.yaml", "no.yaml: no such task file"),
    ):
        with pytest.raises(PruneAttnError, match=says):
            resolve_tasks(wrong)
    for content, says in (("a: [", "not a task file"), ("- 1", "not a task file"), ("a: 1", "names no task")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(PruneAttnError, match=rf"bad\.yaml: .*{says}") as caught:
            resolve_tasks(str(tmp_path / "bad.yaml"))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PruneAttnError, match=r"pip install '\.\[eval\]' in the clone"):
        resolve_tasks("cloze")


def test_data_that_is_not_there(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        PruneAttnError, match=r"task arc_easy: its data cannot be loaded .*run it once online"
    ) as caught:
        run_tasks(lambda: 1 / 0, tokenizer, "arc_easy")
    assert "\n" not in str(caught.value)
    (tmp_path / "t.yaml").write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\ntest_split: test\n"
        "doc_to_text: a\ndoc_to_target: b\n"
    )
    with pytest.raises(PruneAttnError, match=r"t\.yaml: its data cannot be loaded"):
        run_tasks(lambda: 1 / 0, tokenizer, str(tmp_path / "t.yaml"))


def test_openllm_is_the_harness_own_group():
    """Shots as the harness's own group has them, and each task's metric among those that it reports."""
    from lm_eval.tasks._yaml_loader import load_yaml

    index = task_files.task_manager().task_index
    group = {entry["task"]: entry["num_fewshot"] for entry in index["openllm"].cfg["task"]}
    group["truthfulqa_mc2"] = group.pop("truthfulqa")
    assert group == {name: shots for name, (shots, _) in task_files.OPENLLM.items()}
    for name, (_, key) in task_files.OPENLLM.items():
        metric, filtered = key.split(",")
        fields = load_yaml(index[name].yaml_path, resolve_func=False)
        listed = fields.get("metric_list") or fields["aggregate_metric_list"]
        assert metric in [m["metric"] for m in listed], name
        assert filtered in [f["name"] for f in fields.get("filter_list", [{"name": "none"}])], name


def test_openllm_end_to_end(onnx_model, tokenizer, monkeypatch):
    """The six tasks' own code on rows of the real data sets' shape, which cannot be fetched here."""
    import datasets

    choices = ["a garden", "a sister", "a letter", "a carriage"]
    rows = {
        "allenai/ai2_arc": {
            "id": "1", "question": "What is read?", "choices": {"text": choices, "label": ["A", "B", "C", "D"]},
            "answerKey": "C",
        },
        "Rowan/hellaswag": {
            "ind": 1, "activity_label": "Reading", "ctx_a": "She took it.", "ctx_b": "then she", "ctx": "",
            "endings": ["read it.", "ate it.", "wore it.", "drove it."], "label": "0",
        },
        "truthfulqa/truthful_qa": {
            "question": "What is read?", "mc1_targets": {"choices": choices, "labels": [1, 0, 0, 0]},
            "mc2_targets": {"choices": choices, "labels": [1, 1, 0, 0]},
        },
        "cais/mmlu": {"question": "What is read?", "subject": "x", "choices": choices, "answer": 2},
        "allenai/winogrande": {"sentence": "Emma wrote to Jane as _ was away.", "option1": "Emma", "option2": "Jane",
                               "answer": "2"},
        "openai/gsm8k": {"question": "How many are two and two?", "answer": "Two and two.\n#### 4"},
    }  # fmt: skip

    def load_dataset(path, **_):
        text = next(key for key in ("question", "ctx_a", "sentence") if key in rows[path])
        data = datasets.Dataset.from_list([rows[path] | {text: f"{i}. {rows[path][text]}"} for i in range(30)])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), data))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    results = run_tasks(lambda: onnx_model, tokenizer, "openllm", limit=1, batch=16)
    entries = results["tasks"]
    assert {name: (e["metric"], e["filter"], e["shots"], e["n"]) for name, e in entries.items()} == {
        "arc_challenge": ("acc_norm", "none", 25, 1), "hellaswag": ("acc_norm", "none", 10, 1),
        "truthfulqa_mc2": ("acc", "none", 0, 1), "mmlu": ("acc", "none", 5, 57), "winogrande": ("acc", "none", 5, 1),
        "gsm8k": ("exact_match", "strict-match", 5, 1),
    }  # fmt: skip
    assert results["averaged"] == list(entries)
    json.dumps(results, allow_nan=False)  # one item has no standard error
    assert results["average"] == pytest.approx(np.mean([e["value"] for e in entries.values()]))
    assert entries["mmlu"]["value"] == pytest.approx(np.mean(entries["mmlu"]["items"]))


def test_comparison_is_paired():
    def results(items, metric="acc"):
        entry = {"metric": metric, "value": float(np.mean(items)), "items": list(items), "hash": "h"}
        return {"tasks": {"a": entry}, "averaged": ["a"]}

    before, after = [1, 1, 0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1, 1, 1]
    row = compare_tasks(results(before), results(after))["tasks"]["a"]
    assert row["difference"] == 0
    assert row["ratio"] == 1
    assert row["stderr"] == pytest.approx(np.std(np.subtract(after, before), ddof=1) / np.sqrt(8))
    same = compare_tasks(results(before), results(before))
    assert same["average"]["stderr"] == 0
    assert same["average"]["ratio"] == 1
    assert compare_tasks(results(before), results(after[:4]))["tasks"]["a"]["stderr"] is None


def test_a_task_file_is_told_from_its_former_self_wherever_it_lies(tmp_path, monkeypatch):
    """What a stopped validate goes on from depends on it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("task: own\n")
    before = {file_hash("~/own.yaml"), file_hash("~/own.yaml@3"), file_hash(f"{tmp_path}/own.yaml")}
    (tmp_path / "own.yaml").write_text("task: own\nlimit: 3\n")
    assert len(before) == 1
    assert None not in before
    assert file_hash("~/own.yaml") not in before
