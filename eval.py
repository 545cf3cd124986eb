"""Evaluate a trained model: `python eval.py --config NAME [section.key=value ...]`."""

import sys

from mllm3d.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
