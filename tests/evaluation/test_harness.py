"""The border to lm-evaluation-harness: what it is given and what is kept. With the real one where it is installed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from abba import save_adapter
from abba.errors import ArgumentError, DataError, RecipeError
from abba.evaluation.harness import run_harness
from abba.evaluation.subject import Subject
from abba.sharded.ranks import Ranks
from tests.distributed.ranks import STORIES, TINY
from tests.evaluation.made import adapted

REAL = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def harness(monkeypatch):
    """The stand-in as `lm_eval`; see there for what it is."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_in"))
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    import lm_eval

    lm_eval.asked.clear()
    yield lm_eval
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def run(output, task="lm-eval:first_word", data=None, adapter=None, **changes):
    settings = {"limit": 2, "batch_size": 2, "max_new_tokens": None, "engine": "auto", "max_ungraded": 0}
    settings |= {"dtype": torch.float32, "ranks": Ranks(), "say": print, **changes}
    return run_harness(Subject(TINY, adapter, given=adapter), task, data, output, **settings)


def test_the_harness_gets_the_model_with_its_adapter_and_its_result_is_kept(harness, tmp_path):
    save_adapter(adapted()[0], tmp_path / "adapter")
    texts = []
    for adapter in (None, tmp_path / "adapter"):
        scores = run(tmp_path / "out", adapter=adapter, max_new_tokens=6)
        assert scores == json.loads((tmp_path / "out/scores.json").read_text())
        assert scores["lm_eval"] == "0.4.13+stand.in" and scores["n"] == {"first_word": 2}
        assert scores["headline"] == (
            "lm-eval:first_word: acc 0.7500, brier 0.5000, exact_match (strict-match) 0.2500, "
            "exact_match (flexible-extract) 1.0000"
        )
        assert scores["results"]["first_word"]["acc_95,none"] == pytest.approx([0.554, 0.946], abs=1e-4)
        lines = [json.loads(line) for line in (tmp_path / "out/generations.jsonl").read_text().splitlines()]
        assert [line["task"] for line in lines] == ["first_word"] * 2
        texts.append([line["resps"][0][0] for line in lines])
    assert texts[0] != texts[1], "the adapter must matter"
    assert harness.asked[0] == {"tasks": ["first_word"], "limit": 2, "gen_kwargs": {"max_gen_toks": 6}, "path": None}


def test_an_answer_ends_at_eos(harness, tmp_path):
    run(tmp_path, max_new_tokens=120)
    answers = [json.loads(line)["resps"][0][0] for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert all(answer.count("</s>") == 1 and answer.endswith("</s>") for answer in answers), answers


@pytest.mark.parametrize(
    "changes, error, said",
    [
        ({"task": "lm-eval:nothing"}, DataError, "lm-eval:nothing: lm_eval has no such task"),
        ({"task": "lm-eval:breaks"}, DataError, "lm_eval: ConnectionError: Couldn't reach 'somebody/data' on the Hub$"),
        ({"task": "lm-eval:large"}, ArgumentError, "out of GPU memory: .* use a smaller batch size$"),
        ({"ranks": Ranks(0, 2)}, RecipeError, "runs on one rank, not 2"),
        ({"engine": "vllm"}, RecipeError, "leave --engine out"),
        ({"max_ungraded": 3}, RecipeError, "leave --max-ungraded out"),
        ({"data": "no/where"}, DataError, "no/where: is no directory of task definitions"),
    ],
)
def test_what_it_cannot_do_is_one_line(harness, tmp_path, changes, error, said):
    with pytest.raises(error, match=said) as refused:
        run(tmp_path / "out", **changes)
    assert "\n" not in str(refused.value) and not (tmp_path / "out/scores.json").exists()


def test_a_task_is_looked_up_before_a_model_is_loaded(harness, tmp_path, monkeypatch):
    monkeypatch.setattr("abba.evaluation.harness.load_for_generation", None)
    with pytest.raises(DataError, match="has no such task"):
        run(tmp_path / "out", "lm-eval:first_word,nothing")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(REAL, reason="lm_eval is installed")
def test_without_the_harness_a_line_says_what_to_install(tmp_path):
    with pytest.raises(RecipeError, match=r"task lm-eval:x: lm_eval is not installed; pip install lm-eval==0\.4\.13$"):
        run(tmp_path / "out", "lm-eval:x")


DEFINITION = """
task: stories
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="lm_eval is not installed: forty packages that nothing else here needs")
def test_the_real_harness_runs_a_task_of_our_own_rows(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/stories.yaml").write_text(DEFINITION.format(file=STORIES / "test.jsonl"))
    scores = run(tmp_path / "out", "lm-eval:stories", str(tmp_path / "tasks"), limit=4)
    assert scores["n"] == {"stories": 4} and scores["results"]["stories"]["exact_match,none"] == 0.0
    assert len((tmp_path / "out/generations.jsonl").read_text().splitlines()) == 4
