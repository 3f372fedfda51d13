"""`--model parrot` of lm-eval against its own `--model hf` on the same decoder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parrot_sys
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.integrations.task_settings import expected_sampling, request, settings_of_tasks
from tests.support.plain_decoder import FIXTURE, write_plain_decoder
from tests.support.serving import serving
from tests.support.text_tasks import TASKS, write_text_tasks

lm_eval = pytest.importorskip("lm_eval", reason="runs in an environment of its own: make test-integrations")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402

WINGS = FIXTURE.parents[1] / "wings_tiny" / "model"
TEXTS = st.text("ab 1\nэ水.", max_size=12)
LONG = "a cat 12 " * 200
"""More tokens than the model has positions (512)."""


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_decoder(tmp_path_factory.mktemp("plain") / "decoder")


@pytest.fixture(scope="module")
def models(plain: Path) -> tuple[Any, Any]:
    """Ours on the whole checkpoint, theirs on its decoder."""
    hf = get_model("hf")(pretrained=str(plain), device="cpu", dtype="float32", batch_size=3)
    return get_model("parrot")(pretrained=str(FIXTURE), device="cpu", batch_size=5), hf


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)]


def assert_equal_scores(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-5)


@settings(max_examples=10)
@given(
    # (A context of white space alone has no tokens, of which `--model hf` makes nothing that has a meaning.)
    pairs=st.lists(
        st.tuples(TEXTS.filter(lambda text: not text or text.strip()), TEXTS.filter(bool)), min_size=1, max_size=6
    )
)
def test_log_likelihoods_are_those_of_hf(models: tuple[Any, Any], pairs: list[tuple[str, str]]) -> None:
    ours, theirs = (own.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for own in models)
    assert_equal_scores(ours, theirs)


def test_contexts_that_are_too_long_lose_the_same_beginning(models: tuple[Any, Any]) -> None:
    pairs = [(LONG, " dog"), (LONG * 2, "a cat 12"), ("", LONG[:400]), ("b", "")]
    ours, theirs = (own.loglikelihood(instances("loglikelihood", pairs[:3]), disable_tqdm=True) for own in models)
    assert_equal_scores(ours, theirs)
    assert models[0].loglikelihood(instances("loglikelihood", pairs[3:]), disable_tqdm=True) == [(0.0, True)]


def test_the_greedy_continuation_is_found(models: tuple[Any, Any]) -> None:
    own = models[0]
    prompt = own.tok_encode("a cat")
    ids = own.model.generate(torch.tensor([prompt]), max_new_tokens=4)[0, len(prompt) :].tolist()
    request = (("a cat", "any"), prompt, ids)
    other = (request[0], request[1], [ids[0], (ids[1] + 1) % 600])
    assert [greedy for _, greedy in own._loglikelihood_tokens([request, other], disable_tqdm=True)] == [True, False]


@settings(max_examples=4)
@given(texts=st.lists(TEXTS.filter(bool) | st.just(LONG), min_size=1, max_size=3))
def test_rolling_log_likelihoods_are_those_of_hf(models: tuple[Any, Any], texts: list[str]) -> None:
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    ours, theirs = (own.loglikelihood_rolling(requests, disable_tqdm=True) for own in models)
    assert ours == pytest.approx(theirs, rel=1e-5)


@settings(max_examples=6)
@given(
    contexts=st.lists(TEXTS.filter(bool) | st.just(LONG), min_size=1, max_size=3),
    until=st.lists(st.sampled_from(["a", "e ", " ", "ş", "фр", "\n\n"]), max_size=2, unique=True),
)
def test_answers_are_those_of_hf_up_to_stop_strings(
    models: tuple[Any, Any], contexts: list[str], until: list[str]
) -> None:
    wanted = [(text, {"until": list(until), "max_gen_toks": 8, "do_sample": False}) for text in contexts]
    ours, theirs = (own.generate_until(instances("generate_until", wanted), disable_tqdm=True) for own in models)
    assert ours == theirs
    assert not any(stop in text for text in ours for stop in until)


def test_settings_of_tasks_are_kept_apart_and_refused_by_name(models: tuple[Any, Any]) -> None:
    own = models[0]
    short, long = {"max_gen_toks": 2}, {"max_gen_toks": 6}
    both = own.generate_until(instances("generate_until", [("a", short), ("b", long)]), disable_tqdm=True)
    alone = own.generate_until(instances("generate_until", [("b", long)]), disable_tqdm=True)
    assert both[1] == alone[0]
    with pytest.raises(ConfigError, match="num_beams"):
        own.generate_until(instances("generate_until", [("a", {"num_beams": 2})]), disable_tqdm=True)
    with pytest.raises(ConfigError, match="max_gen_toks"):
        own.generate_until(instances("generate_until", [("a", {"max_gen_toks": 512})]), disable_tqdm=True)
    with pytest.raises(ConfigError, match="max_length"):
        get_model("parrot")(pretrained=str(FIXTURE), max_length=513)


def test_arguments_of_other_models_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="model_args: load_in_8bit, peft not supported"):
        get_model("parrot")(pretrained=str(FIXTURE), peft="adapter", load_in_8bit=True, trust_remote_code=False)


def test_settings_of_all_tasks_are_taken_as_the_kit_takes_them_or_are_known_to_be_refused() -> None:
    found = settings_of_tasks(Path(lm_eval.__file__).parent / "tasks")
    assert len(found) > 300
    for file, own in found.items():
        for asked in (own, dict(normalize_gen_kwargs(own))):
            if (expected := expected_sampling(own)) is not None:
                assert request(asked).sampling == expected, file
                continue
            with pytest.raises(ConfigError, match="generation_kwargs"):
                request(asked)


def test_the_chat_template_is_that_of_training(models: tuple[Any, Any]) -> None:
    own = models[0]
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a?"}]
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "a?"}]
    expected = own.processor.format_conversation(turns, add_generation_prompt=True)
    text = own.apply_chat_template(history)
    assert text == expected["prompt"]
    assert own.tok_encode(text) == expected["input_ids"]


def evaluate(folder: Path, name: str, *options: str) -> Path:
    """Runs the documented command on copies of all tasks; returns the folder of what it wrote."""
    data = folder / "data"
    if not data.is_dir():
        write_text_tasks(data)
    command = [
        *(sys.executable, "-m", "parrot_sys.integrations.lm_eval", "--data", str(data), "run"),
        *("--device", "cpu", "--tasks", ",".join(TASKS), "--output_path", str(folder / name / "found.json"), *options),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / name


def test_its_command_scores_tasks_from_local_files_as_hf_does(plain: Path, tmp_path: Path) -> None:
    found = {}
    for name, folder in (("parrot", FIXTURE), ("hf", plain)):
        arguments = f"pretrained={folder},dtype=float32"
        written = evaluate(tmp_path, name, "--model", name, "--model_args", arguments, "--num_fewshot", "1")
        found[name] = json.loads(next(written.glob("found*.json")).read_text(encoding="utf-8"))["results"]
    assert found["parrot"].keys() == set(TASKS)
    for task in TASKS:
        ours, theirs = found["parrot"][task], found["hf"][task]
        assert {key: ours[key] for key in ours if key.startswith("acc")} == {
            key: theirs[key] for key in theirs if key.startswith("acc")
        }
        assert "acc,none" in ours


def test_its_command_scores_a_checkpoint_of_wings(tmp_path: Path) -> None:
    arguments = ("--model", "parrot", "--model_args", f"pretrained={WINGS},dtype=float32", "--log_samples")
    written = evaluate(tmp_path, "wings", *arguments, "--limit", "2")
    model, processor = parrot_sys.load_pretrained(WINGS, device="cpu")

    def log_probability(context: str, continuation: str) -> float:
        """Of a continuation, from the logits of the whole text."""
        whole, start = processor.tokenizer.encode(context + continuation), len(processor.tokenizer.encode(context))
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        return sum(float(scores[place - 1, whole[place]]) for place in range(start, len(whole)))

    for task in TASKS:
        lines = next(written.glob(f"samples_{task}_*.jsonl")).read_text(encoding="utf-8").splitlines()
        asked = [
            (argument["arg_0"], argument["arg_1"], float(answer[0][0]))
            for line in map(json.loads, lines)
            for argument, answer in zip(line["arguments"].values(), line["resps"], strict=True)
        ]
        assert len(asked) == 2 * (2 if task == "winogrande" else 4)
        assert [score for _, _, score in asked] == pytest.approx(
            [log_probability(context, continuation) for context, continuation, _ in asked], rel=1e-4
        )


def test_a_data_set_that_is_missing_is_named(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "parrot_sys.integrations.lm_eval", "--data", str(tmp_path), "run"),
        *("--model", "dummy", "--tasks", "arc_easy"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode
    assert "no folder allenai/ai2_arc" in result.stderr
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)


def test_tasks_of_files_and_converted_copies_run_from_local_files(tmp_path: Path) -> None:
    """A task of lm-eval that names a file of a repository, one whose copy is converted, and one of the user's own."""
    data, tasks = tmp_path / "data", tmp_path / "tasks"
    sums = [{"context": f"Q: What is {index} plus 1? A:", "completion": f" {index + 1}"} for index in range(3)]
    lines = "\n".join(map(json.dumps, sums))
    for file in (data / "EleutherAI" / "arithmetic" / "data" / "single_digit_three_ops.jsonl", tasks / "own.jsonl"):
        file.parent.mkdir(parents=True)
        file.write_text(lines, encoding="utf-8")
    options = {"A": "red", "B": "two", "C": "sun", "D": "cat", "Answer": "B"}
    for split in ("dev", "test"):
        file = data / "haonan-li" / "cmmlu" / "agronomy" / split / "0000.parquet"
        file.parent.mkdir(parents=True)
        pandas.DataFrame([{"Question": f"{index} 是什么", **options} for index in range(6)]).to_parquet(file)
    (tasks / "own.yaml").write_text(
        f"task: own_sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tasks}/own.jsonl\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{completion}}'\n",
        encoding="utf-8",
    )
    names = ("arithmetic_1dc", "cmmlu_agronomy", "own_sums")
    command = [
        *(sys.executable, "-m", "parrot_sys.integrations.lm_eval", "--data", str(data), "run", "--model", "dummy"),
        *("--include_path", str(tasks), "--tasks", ",".join(names), "--output_path", str(tmp_path / "found.json")),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(next(tmp_path.glob("found*.json")).read_text(encoding="utf-8"))
    assert {name: samples["original"] for name, samples in found["n-samples"].items()} == dict(
        zip(names, (3, 6, 3), strict=True)
    )


def test_its_model_for_servers_asks_ours(models: tuple[Any, Any], tmp_path: Path) -> None:
    """`local-completions` against `parrot serve`: the same log-likelihoods, rolling ones and answers."""
    ours = models[0]
    pairs = [("a cat", " dog"), ("水 э", "э水 ab"), ("a", "1\n2")]
    texts = ["a cat 12 э水", "b a"]
    wanted = [("a cat", {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False})]
    with serving(tmp_path, checkpoint=FIXTURE) as server:
        theirs = get_model("local-completions")(
            model=FIXTURE.name, base_url=f"{server.url}/v1/completions", tokenizer=str(FIXTURE),
            tokenizer_backend="huggingface", tokenized_requests=True, max_retries=1,
        )  # fmt: skip
        scores, rolling, answers = (
            theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True),
            theirs.loglikelihood_rolling(instances("loglikelihood_rolling", [(own,) for own in texts])),
            theirs.generate_until(instances("generate_until", wanted), disable_tqdm=True),
        )
    assert_equal_scores(ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True), scores)
    requests = instances("loglikelihood_rolling", [(own,) for own in texts])
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(rolling, rel=1e-5)
    assert ours.generate_until(instances("generate_until", wanted), disable_tqdm=True) == answers
