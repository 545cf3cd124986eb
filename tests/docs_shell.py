"""A shell for the documentation's commands that pays for imports once.

Every `python` and `mllm3d` of a code block would import torch, transformers, DeepSpeed and MONAI again: half a minute
of imports for a page. Here a server imports them, and stand-ins for these programs, first on the PATH, pass arguments,
folder and output on to it; it forks, and the child runs the real thing. The block itself runs in bash as it stands.

What cannot run in a test: `deepspeed` and `torchrun` start a run for a cluster, so the launcher's own parser reads
their options and one rank runs the rest with --dry-run; `make` targets run elsewhere in CI and need only exist.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "monai.transforms",
    "monai.data",
    "SimpleITK",
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "mllm3d.training.trainer",
    "mllm3d.evaluation.runner",
    "mllm3d.release.export",
    "mllm3d.inference.predict",
    "mllm3d.data.check",
    "medpruner.recipes.adapter",
    "photon.recipes.adapter",
    "photon.recipes.backbone",
    "photon.recipes.phases",
)
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = {{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "folder": os.getcwd()}}
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or b"1"))
"""


class Shell:
    """Runs bash with the stand-ins on its PATH."""

    def __init__(self, programs: Path) -> None:
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(self, text: str, folder: Path) -> str:
        """What a script prints; an AssertionError with all of it if a command fails."""
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, f"exit status {done.returncode} of\n{text}\n{done.stdout}"
        return done.stdout


@contextlib.contextmanager
def open_shell() -> Iterator[Shell]:
    """Start the server, and end it afterwards."""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's: the path of a socket has to be short
        address, programs = f"{folder}/socket", Path(folder) / "bin"
        programs.mkdir()
        for name in PROGRAMS:
            client = programs / name
            client.write_text(CLIENT.format(python=sys.executable, address=address))
            client.chmod(0o755)
        # One thread until a fork, for threads do not survive it; passive, for their spinning starves busy machines.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "tests.docs_shell", address]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert b"ready\n" in iter(server.stdout.readline, b"")  # libraries greet on stdout before
            try:
                yield Shell(programs)
            finally:
                server.terminate()


# --- the server ---------------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Answer requests one after the other until killed."""
    for name in HEAVY:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            message, files, *_ = socket.recv_fds(connection, 2**16, 3)
            child = os.fork()
            if child == 0:
                os._exit(_answer(json.loads(message), files))
            for file in files:
                os.close(file)
            _, status = os.waitpid(child, 0)
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            connection.close()


def _answer(request: dict[str, list[str]], files: list[int]) -> int:
    """Be the program that was asked for; its exit status."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(str(request["folder"]))
    name, *arguments = request["argv"]
    try:
        return PROGRAMS[name](arguments)
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _mllm3d(arguments: list[str]) -> int:
    from mllm3d.cli import main

    return main(arguments)


def _python(arguments: list[str]) -> int:
    """A script, or `-m MODULE`."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


def _deepspeed(arguments: list[str]) -> int:
    from deepspeed.launcher.runner import parse_args

    args = parse_args(arguments)
    return _dry([args.user_script, *args.user_args])


def _torchrun(arguments: list[str]) -> int:
    from torch.distributed.run import parse_args

    args: argparse.Namespace = parse_args(arguments)
    return _dry([args.training_script, *args.training_script_args])


def _dry(arguments: list[str]) -> int:
    return _python(arguments if "--dry-run" in arguments else [*arguments, "--dry-run"])


def _make(arguments: list[str]) -> int:
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    unknown = {text for text in arguments if "=" not in text} - set(" ".join(targets).split())
    return int(bool(unknown))


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "python": _python,
    "mllm3d": _mllm3d,
    "deepspeed": _deepspeed,
    "torchrun": _torchrun,
    "make": _make,
}

if __name__ == "__main__":
    serve(sys.argv[1])
