"""Predictions over a manifest, scores beside text-only baselines, and tables."""
