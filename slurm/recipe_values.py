#!/usr/bin/env python
"""Print what a job needs to know of a recipe, one value a line: output_dir, base model, its revision, dtype.

python slurm/recipe_values.py gsm8k train.learning_rate=5e-4
"""

import argparse
import sys
from pathlib import Path

from abba.errors import AbbaError, exit_with
from abba.training.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides, RECIPES)
    except AbbaError as error:
        return exit_with(error)
    model = recipe.model
    print(recipe.output_dir, model.name_or_path, model.revision or "", model.dtype, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
