"""Training, evaluation and release of native 3D medical multimodal language models.

Rooms, from the ground up: `errors`, `config` and `registry`; `data`; `training`, `inference`, `evaluation`
and `release` side by side; `cli` on top. Models live in packages of their own, reached through `registry`.
"""

__version__ = "0.1.0"
