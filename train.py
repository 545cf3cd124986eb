"""Train a model: `deepspeed train.py --config NAME [section.key=value ...]`; torchrun and python work too."""

import sys

from mllm3d.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
