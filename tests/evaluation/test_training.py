"""The recipe says prompt and task; training and scoring render and extract the same."""

import json

import pytest

from abba.errors import RecipeError
from abba.training.recipe import load_recipe
from tests import warm
from tests.evaluation.made import commonsense
from tests.warm import ROOT

RECIPES = ROOT / "recipes"
RUN = ["launch/train.py", "--recipe", "quickstart", "train.max_steps=2", "data.max_rows=124", "data.prompt=plain"]


def test_a_recipe_names_a_task_and_a_prompt_that_exist():
    recipe = load_recipe("quickstart", ["evaluate.task=commonsense", "evaluate.path=dataset"], RECIPES)
    assert recipe.evaluate.max_new_tokens is None and recipe.data.prompt == "alpaca"
    for override, said in (
        ("evaluate.task=gsm9k", "evaluate.task: 'gsm9k' is no task; did you mean gsm8k?; there are gsm8k, math, boolq"),
        ("data.prompt=chatml", "data.prompt: 'chatml' is not one of 'alpaca', 'plain' or 'chat'"),
    ):
        with pytest.raises(RecipeError) as refused:
            load_recipe("quickstart", ["evaluate.path=dataset", override], RECIPES)
        assert said in str(refused.value)


@pytest.mark.slow
def test_a_run_with_another_prompt_is_scored_with_it_by_every_program(tmp_path):
    run, data = tmp_path / "run", commonsense(tmp_path / "data")
    score = [f"evaluate.path={data}", "evaluate.task=boolq,piqa", "evaluate.max_new_tokens=4"]
    prepared = f"data.prepared_path={tmp_path / 'prepared'}"
    finished = warm.run(tmp_path / "train", *RUN, f"output_dir={run}", prepared, *score)
    assert finished.returncode == 0, finished.stderr
    assert "score: boolq,piqa: exact match 0.0% of 8" in finished.stdout
    scores = json.loads((run / "evaluation/scores.json").read_text())
    assert scores["prompt"] == "plain" and scores["step"] == 2 and scores["n"] == 8
    card = (run / "adapter/README.md").read_text()
    assert (
        '"exact_match_95"' in card and '"prompt": "plain"' in card and str(tmp_path) not in card.split("## Scores")[1]
    )
    command = ["launch/evaluate.py", "--adapter", str(run), "--task", "boolq,piqa", "--data", str(data)]
    finished = warm.run(tmp_path / "again", *command, "--max-new-tokens", "4", "--output", str(tmp_path / "out"))
    assert finished.returncode == 0, finished.stderr
    again = json.loads((tmp_path / "out/scores.json").read_text())
    assert {**again, "adapter": scores["adapter"]} == scores
    lines = [(where / "generations.jsonl").read_bytes() for where in (tmp_path / "out", run / "evaluation")]
    assert lines[0] == lines[1]
    ask = ["launch/generate.py", "--model", "recipes/assets/tiny-llama", "--adapter", str(run / "adapter")]
    finished = warm.run(tmp_path / "ask", *ask, "--prompt", "How many?", "--max-new-tokens", "4")
    assert finished.returncode == 0, finished.stderr
