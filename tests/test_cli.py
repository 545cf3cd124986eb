"""The command line: what reaches the rooms, and what a user reads when something is wrong."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mllm3d import cli, doctor
from mllm3d.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def rooms(monkeypatch):
    """Stand-ins for what commands import; `rooms[name]` is a list of what a function was called with."""
    calls: dict[str, list] = {}

    def replace(module: str, function: str, result=None):
        def record(*args, **kwargs):
            calls.setdefault(function, []).append((args, kwargs))
            return result

        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        setattr(sys.modules[module], function, record)

    replace("mllm3d.training.trainer", "fit")
    replace("mllm3d.training.estimate", "report", "36 layers")
    replace("mllm3d.evaluation.runner", "evaluate")
    replace("mllm3d.release.export", "release")
    monkeypatch.setattr("mllm3d.cli.load", lambda name, overrides: SimpleNamespace(recipe="r", a=(name, overrides)))
    monkeypatch.setattr("mllm3d.registry.recipe_class", lambda name: lambda config: f"recipe {name}")
    return calls


def run(capsys, *argv) -> tuple[int, str, str]:
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails_with(error: BaseException):
    def command(args):
        raise error

    return command


# --- commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "x", "a.b=1", "c=d", "--resume"],
        ["--local_rank=0", "--config", "x", "a.b=1", "--resume", "c=d"],  # as DeepSpeed's launcher starts it
        ["a.b=1", "--resume", "--local_rank", "1", "c=d", "--config=x"],
    ],
)
def test_train_takes_overrides_anywhere_and_the_launchers_option(rooms, argv):
    assert cli.main(["train", *argv]) == 0
    ((config, recipe), options) = rooms["fit"][0]
    assert config.a[0] == "x" and sorted(config.a[1]) == ["a.b=1", "c=d"]
    assert recipe == "recipe r" and options == {"resume": True}
    assert "report" not in rooms


def test_a_dry_run_reports_and_trains_nothing(rooms, capsys):
    assert cli.main(["train", "--config", "x", "--dry-run"]) == 0
    assert len(rooms["report"]) == 1 and "fit" not in rooms
    assert capsys.readouterr().out == "36 layers\n"


def test_eval_and_release_pass_on_what_was_asked(rooms):
    assert cli.main(["eval", "--config", "x", "--checkpoint", "runs/x", "--device", "cpu"]) == 0
    (args, options) = rooms["evaluate"][0]
    assert args[1] == Path("runs/x") and options == {"device": "cpu"}
    assert cli.main(["release", "runs/x", "out", "--checkpoint", "best", "--overwrite"]) == 0
    assert rooms["release"][0][0] == (Path("runs/x"), Path("out"), "best", True, False)


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_the_front_doors_open(program):
    done = subprocess.run(
        [sys.executable, program, "--config", "no_such_config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: config 'no_such_config': no such file") and done.stderr.count("\n") == 1


def test_help_and_wrong_configs_need_no_heavy_library():
    code = (
        "import sys; from mllm3d.cli import build_parser, main; build_parser().format_help()\n"
        "assert main(['config', 'no_such_config']) == 2\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'monai', 'nibabel', 'SimpleITK'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_command_has_help(capsys):
    checkpoints = (["predict"], ["embed"], ["retrieve"], ["release"], ["convert"])
    for command in (["train"], ["eval"], *checkpoints, ["config"], ["data", "check"], ["doctor"]):
        with pytest.raises(SystemExit) as left:
            cli.main([*command, "--help"])
        assert left.value.code == 0
        assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["train"],
        ["train", "--config", "x", "--ressume"],
        ["release", "a", "b", "c=d"],
    ],
)
def test_unknown_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2


def test_data_check_lists_problems_and_counts_them(monkeypatch, capsys, tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    row = {
        "id": "1",
        "case": "c",
        "split": "train",
        "volume": "no.nii.gz",
        "question": "?",
        "answer": "a",
        "task": "t",
    }
    manifest.write_text(json.dumps(row) + "\n" + json.dumps(row | {"volume": "../out.nii.gz"}) + "\n")
    status, out, err = run(capsys, "data", "check", str(manifest))
    assert status == 2 and out == ""
    assert f"{manifest}:1: volume" in err and f"{manifest}:2: " in err
    assert err.splitlines()[-1].startswith(f"error: {manifest}: ") and "problem" in err.splitlines()[-1]


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text", "status"),
    [
        (UserError("a.nii.gz: truncated; copy it again"), "error: a.nii.gz: truncated; copy it again\n", 2),
        (UserError("a.yaml:1: x\na.yaml:2: y"), "error: a.yaml:1: x\nerror: a.yaml:2: y\n", 2),
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/x"),
            "error: /runs/x: no space left on the disk; ",
            2,
        ),
        (OSError(errno.EACCES, "Permission denied", "/runs/x"), "error: /runs/x: Permission denied\n", 2),
        (OSError("no number"), "error: no number\n", 2),
        (KeyboardInterrupt(), "interrupted\n", 130),
    ],
)
def test_a_mistake_is_one_line_unless_debugged(monkeypatch, capsys, error, text, status):
    monkeypatch.setattr(cli, "_doctor", fails_with(error))
    assert cli.main(["doctor"]) == status
    err = capsys.readouterr().err
    assert err.startswith(text) and "Traceback" not in err
    with pytest.raises(type(error)):
        cli.main(["doctor", "--debug"])


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_doctor", fails_with(ValueError("bug")))
    with pytest.raises(ValueError, match="bug"):
        cli.main(["doctor"])


def test_output_that_nobody_reads_is_no_error():
    program = (
        "import sys; from mllm3d import cli\ncli._doctor = lambda args: print('x')\nsys.exit(cli.main(['doctor']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""


def test_only_rank_0_speaks_of_a_wrong_config(monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--config", "no_such_config"])
    assert left.value.code == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert run(capsys, "train", "--config", "no_such_config")[2].startswith("error: config 'no_such_config'")


# --- doctor -------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_installed(capsys):
    status, out, _ = run(capsys, "doctor")
    rows = dict(line.split(None, 1) for line in out.splitlines() if not line.startswith("deepspeed ops"))
    assert status == 0
    assert rows["torch"].endswith("build)") and rows["attention"].startswith("sdpa")
    assert rows["transformers"][0].isdigit() and "accelerator" in rows


@pytest.mark.parametrize(
    ("expected", "cuda", "fails"),
    [
        ("cpu", None, False),
        ("cpu", "13.0", True),
        ("cuda", None, True),
        ("cuda", "13.0", False),
        ("any", "13.0", False),
    ],
)
def test_the_build_of_torch_must_be_the_one_that_was_chosen(monkeypatch, capsys, expected, cuda, fails):
    monkeypatch.setattr("torch.version.cuda", cuda)
    status, out, err = run(capsys, "doctor", "--install", expected)
    assert status == (2 if fails else 0)
    assert ("replaced" in err) == fails and ("torch" in out) != fails


def test_a_gpu_that_torch_cannot_use_is_mentioned(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "gpus", lambda: ["GPU 0: H100"])
    assert "GPU 0: H100" in doctor.accelerator()
    monkeypatch.setattr(doctor, "gpus", lambda: [])
    assert doctor.accelerator() == "CPU"
