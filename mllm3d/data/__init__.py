"""Volumes, manifests, samplers and the cache: from files on disk to batches of questions about scans.

`orientation` states the axes. A scan goes through `volumes` (read, reorient), `preprocess` (resample, window,
resize) and `cache`; rows of a `manifest` are grouped by volume in `samplers` and loaded in `dataset`. MONAI
is used here alone.
"""
