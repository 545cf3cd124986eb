"""Med3DVLM's three stages for the trainer, and its models for `Predictor`."""
