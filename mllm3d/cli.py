"""The command line: `mllm3d`, `train.py` and `eval.py`.

Each command imports what it needs when it runs, so that `--help` and mistakes in a config answer at once.
A `UserError` becomes one line on stderr and exit status 2; `--debug` shows the traceback instead.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mllm3d import __version__
from mllm3d.config import Config, load, load_with_origins
from mllm3d.errors import UserError

Command = Callable[[argparse.Namespace], int]
USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = parse(argv)
    try:
        command: Command = args.command
        status = command(args)
        sys.stdout.flush()  # here, so that a closed pipe is met inside this block
        return status
    except (UserError, OSError, KeyboardInterrupt) as error:
        if args.debug:
            raise
        return _report(error)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of one command; `section.key=value` may stand before, between and after the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    stray = [text for text in rest if text.startswith("-") or "=" not in text or "overrides" not in args]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        args.overrides += rest
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(prog="mllm3d", description="3D medical multimodal language models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks instead of one-line errors")
    checkpoints = (_add_predict, _add_embed, _add_retrieve, _add_release, _add_convert)
    for add in (_add_train, _add_eval, _add_plot, *checkpoints, _add_config, _add_data, _add_doctor):
        add(commands, common)
    return parser


# --- train and eval -----------------------------------------------------------------------------------------


def _add_train(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("train", parents=[common], help="train a model")
    _add_config_options(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the run's latest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, steps, memory and hours; train nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher inserts it
    parser.set_defaults(command=_train)


def _train(args: argparse.Namespace) -> int:
    from mllm3d.registry import recipe_class

    config = _load_on_every_rank(args)
    recipe = recipe_class(config.recipe)(config)
    if args.dry_run:
        from mllm3d.training.estimate import report

        text = report(config, recipe)
        if _rank() == 0:
            print(text)
    else:
        from mllm3d.training.trainer import fit

        fit(config, recipe, resume=args.resume)
    return 0


def _load_on_every_rank(args: argparse.Namespace) -> Config:
    """All ranks read the same files, so a mistake in them is the same on all: rank 0 has the word."""
    try:
        return load(args.config, args.overrides)
    except UserError:
        if _rank() == 0:
            raise
        time.sleep(3)  # a launcher ends the other ranks as soon as one has left; let rank 0 speak first
        sys.exit(USER_ERROR)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _add_eval(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("eval", parents=[common], help="evaluate a trained model")
    _add_config_options(parser)
    parser.add_argument("--checkpoint", type=Path, help="folder to evaluate; default: the run's latest checkpoint")
    parser.add_argument("--device", help="for example cuda:1 or cpu; default: a GPU where there is one")
    parser.set_defaults(command=_eval)


def _eval(args: argparse.Namespace) -> int:
    from mllm3d.registry import EMBEDDING_RECIPES

    config = load(args.config, args.overrides)
    if config.recipe in EMBEDDING_RECIPES:
        from mllm3d.evaluation.retrieval_run import evaluate
    else:
        from mllm3d.evaluation.runner import evaluate  # type: ignore[assignment]
    evaluate(config, args.checkpoint, device=args.device)
    return 0


def _add_plot(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("plot", parents=[common], help="draw how many tokens a run kept while it trained")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folders, drawn side by side")
    parser.add_argument("--out", type=Path, help="folder for the figures; default: figures in the first run")
    parser.set_defaults(command=_plot)


def _plot(args: argparse.Namespace) -> int:
    from mllm3d.evaluation.plots import plot

    plot(args.runs, args.out)
    return 0


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML file, or its name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")


# --- checkpoints --------------------------------------------------------------------------------------------


def _add_predict(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("predict", parents=[common], help="answer a question about a scan, images or a video")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="released folder, run, or RUN/checkpoints/step_N"
    )
    parser.add_argument("--volume", type=Path, help="NIfTI, NRRD, MHA, .npy or a DICOM series folder")
    parser.add_argument("--prior", type=Path, help="an earlier scan of the same patient")
    parser.add_argument("--image", type=Path, action="append", help="PNG, JPEG, BMP, TIFF or WebP; may be repeated")
    parser.add_argument("--video", type=Path, metavar="FOLDER", help="frames, one per second, in order of their names")
    parser.add_argument("--question", required=True)
    parser.add_argument("--modality", choices=("ct", "mr"), default="ct", help="how intensities are scaled")
    modes = ("scheduled", "none", "random", "noisy", "evicted")
    parser.add_argument("--mode", choices=modes, default="scheduled", help="token dropping, as evaluation.modes")
    parser.add_argument("--pruner", metavar="NAME", help="medpruner method of a slice-wise model, as evaluation.pruner")
    parser.add_argument(
        "--pruner-set", metavar="KEY=VALUE", action="append", help="a setting of the method; may be repeated"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer, in tokens")
    parser.add_argument("--device", help="for example cuda:1 or cpu; default: a GPU where there is one")
    parser.add_argument("--json", action="store_true", help="print the answer with keep rate and timing")
    drawn = "draw which tokens stayed; those of a --prior go beside it, as NAME_prior.png"
    parser.add_argument("--evidence", type=Path, metavar="PNG", help=drawn)
    sheet = "draw what stayed of each slice along the volume, and where on it"
    parser.add_argument("--evidence-slices", type=Path, metavar="PNG", help=sheet)
    parser.add_argument(
        "--evidence-nifti", type=Path, metavar="NII", help="the same as a mask on the volume's own grid"
    )
    parser.set_defaults(command=_predict)


def _predict(args: argparse.Namespace) -> int:
    from mllm3d.inference.predict import predict_command

    return predict_command(args)


def _add_embed(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("embed", parents=[common], help="make an index of volumes and reports to search")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="of med3dvlm.contrastive: folder, run, or RUN/checkpoints/step_N"
    )
    parser.add_argument("--manifest", type=Path, required=True, help="JSON Lines file; reports are its rows' report")
    parser.add_argument("--split", required=True, help="value of split whose volumes are embedded")
    parser.add_argument("--out", metavar="INDEX", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--where", metavar="KEY=VALUE", action="append", help="only such rows, as data.where; may be repeated"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder of preprocessed volumes; default: .cache beside the manifest"
    )
    parser.add_argument("--device", help="for example cuda:1 or cpu; default: a GPU where there is one")
    parser.set_defaults(command=_embed)


def _embed(args: argparse.Namespace) -> int:
    from mllm3d.evaluation.retrieve import embed_command

    return embed_command(args)


def _add_retrieve(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("retrieve", parents=[common], help="find volumes or reports by a text or a scan")
    parser.add_argument("--index", type=Path, required=True, help="folder that mllm3d embed wrote")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="what to look for, worded as in a report")
    query.add_argument("--volume", type=Path, help="a scan to look for the like of: any format that predict takes")
    parser.add_argument("--checkpoint", type=Path, help="default: the one that the index was made with")
    parser.add_argument("-k", type=int, default=5, help="how many to show")
    parser.add_argument(
        "--among", choices=("image", "text"), default="image", help="compare with the volumes, or with their reports"
    )
    parser.add_argument("--modality", choices=("ct", "mr"), default="ct", help="how intensities of --volume are scaled")
    parser.add_argument("--device", help="for example cuda:1 or cpu; default: a GPU where there is one")
    parser.add_argument("--json", action="store_true", help="print everything, with whole reports")
    parser.set_defaults(command=_retrieve)


def _retrieve(args: argparse.Namespace) -> int:
    from mllm3d.evaluation.retrieve import retrieve_command

    return retrieve_command(args)


def _add_release(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("release", parents=[common], help="export a run's checkpoint for others")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step's number")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    parser.add_argument("--merge-lora", action="store_true", help="add adapters to the weights that they adapt")
    parser.set_defaults(command=_release)


def _release(args: argparse.Namespace) -> int:
    from mllm3d.release.export import release

    release(args.run, args.out, args.checkpoint, args.overwrite, args.merge_lora)
    return 0


def _add_convert(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("convert", parents=[common], help="convert a published checkpoint, or back to one")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="origin", metavar="NAME", help="what SRC is: photon, med3dvlm or gguf")
    direction.add_argument("--to", dest="target", metavar="NAME", help="format of DST: photon, med3dvlm or qwen2_5_vl")
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="folder or .gguf file to read; with --to also a run or its step"
    )
    parser.add_argument("out", metavar="DST", type=Path, help="folder to write; must not exist or be empty")
    parser.set_defaults(command=_convert)


def _convert(args: argparse.Namespace) -> int:
    from mllm3d.release.convert import convert_from, convert_to

    if args.origin:
        convert_from(args.origin, args.source, args.out)
    else:
        convert_to(args.target, args.source, args.out)
    return 0


# --- looking at settings, data and the machine --------------------------------------------------------------


def _add_config(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("config", parents=[common], help="print resolved settings and where they come from")
    parser.add_argument("config", metavar="NAME", help="a YAML file, or its name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    parser.add_argument("--explain", action="store_true", help="print what each setting means")
    written = "write the volume section as preprocessing.json into a model's folder that has none, and print nothing"
    parser.add_argument("--preprocessing", type=Path, metavar="FOLDER", help=written)
    parser.set_defaults(command=_config)


def _config(args: argparse.Namespace) -> int:
    from mllm3d.config.show import show, write_preprocessing

    if args.preprocessing is not None:
        write_preprocessing(load(args.config, args.overrides), args.preprocessing)
        return 0
    print(show(load_with_origins(args.config, args.overrides), explain=args.explain))
    return 0


def _add_data(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    actions = commands.add_parser("data", help="look after data").add_subparsers(required=True, metavar="action")
    check = actions.add_parser("check", parents=[common], help="read every row and file, report all problems")
    check.add_argument("manifest", type=Path, help="JSON Lines file")
    check.add_argument("--workers", type=int, default=0, help="processes that read files; 0: none besides this")
    check.set_defaults(command=_data_check)


def _data_check(args: argparse.Namespace) -> int:
    from mllm3d.data.check import check_manifest

    problems = check_manifest(args.manifest, workers=args.workers)
    for problem in problems:
        print(problem.text(args.manifest), file=sys.stderr)
    if problems:
        raise UserError(f"{args.manifest}: {len(problems)} problem{'s' * (len(problems) > 1)}, listed above")
    print(f"{args.manifest}: no problems")
    return 0


def _add_doctor(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("doctor", parents=[common], help="print versions, accelerator and kernels")
    parser.add_argument(
        "--install",
        choices=("cpu", "cuda", "any"),
        help="only check that torch is the build that the set-up chose",
    )
    parser.set_defaults(command=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from mllm3d.doctor import check_install, report

    if args.install:
        print(check_install(args.install))
        return 0
    for what, state in report():
        print(f"{what:14} {state}")
    return 0


# --- errors -------------------------------------------------------------------------------------------------


def _report(error: BaseException) -> int:
    """Print a mistake for its user and return the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `mllm3d config x | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    for line in (_describe_os_error(error) if isinstance(error, OSError) else str(error)).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return USER_ERROR


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{where}no space left on the disk; free some and run again, what was complete is untouched"
    return f"{where}{error.strerror or error}"


if __name__ == "__main__":
    sys.exit(main())
