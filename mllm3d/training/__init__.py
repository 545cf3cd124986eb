"""Training: `fit` runs a recipe, `recipe` says what a recipe is."""
