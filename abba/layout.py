"""What lies where in the directory of a run, its output_dir.

runs/NAME/
    recipe.yaml        as resolved
    metrics.jsonl      one line per optimizer step, one per save
    checkpoints/       step-000100/ and so on
    adapter/           the result, in PEFT's LoHa form or another method's own
    model/             the result of full fine-tuning, in its place
    evaluation/        its score, where the recipe asks; score/ where slurm/convert_evaluate.sh does
    begun.json         the batch job that has begun it, if it was one
    .next-of-JOB       the SLURM job that follows JOB
    lock.json, starts.json, failures/    of a run that is alive, or did not end well
"""

RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ADAPTER, MODEL = "adapter", "model"
EVALUATION, LATER_EVALUATION = "evaluation", "score"
SCORES, GENERATIONS = "scores.json", "generations.jsonl"  # in either, or in any directory that launch/evaluate.py fills
