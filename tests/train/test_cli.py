"""The command line as a user meets it: help, exit codes, one clean line for an error."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from typer.testing import CliRunner

from fastft.commands import app


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def spawn(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "fastft.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.fixture
def config(settings, tmp_path):
    def write(**changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        return path

    return write


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("train", "demo", "doctor"):
        assert command in result.output
        assert run(command, "--help").exit_code == 0


def test_the_package_runs_as_a_module():
    from fastft import __version__

    command = [sys.executable, "-m", "fastft", "--version"]
    assert subprocess.check_output(command, text=True) == f"fastft {__version__}\n"


def test_no_arguments_is_help():
    assert "Usage" in run().output


def test_unknown_command_and_option():
    assert run("trian").exit_code == 2
    assert run("demo", "--stpes", "3").exit_code == 2


def test_version():
    from fastft import __version__

    assert run("--version").output == f"fastft {__version__}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['fastft', '--help']\n"
        "try: runpy.run_module('fastft.cli', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'numpy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_bad_key_is_said_without_importing_torch(config):
    code = (
        "import sys\nfrom fastft.commands import app\n"
        f"try: app(['train', {str(config(lora_rank=3))!r}])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_missing_extra_is_named():
    code = "import sys; sys.modules['typer'] = None; import fastft.cli as c; c.app()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "fastft: the command line needs typer, which is not installed. "
        "Run: pip install 'fastft[train]'\n"
    )


def test_train_prints_lines_and_leaves_an_adapter(config, tmp_path):
    worker = spawn("train", config(max_steps=3, save_steps=0))
    out, err = worker.communicate()
    assert worker.returncode == 0, err
    # Where it is installed, bitsandbytes says that it found no kernel on the hub.
    assert [line for line in err.splitlines() if "kernels-community" not in line] == []
    assert "step 3/3" in out
    assert "held-out loss" in out
    assert "modules fused" in out
    assert "largest difference of logits 0)" in out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"data": "/none.jsonl"}, "a readable file"),
        ({"resume_from_checkpoint": "last"}, "a whole checkpoint"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(config, changes, text):
    result = run("train", config(**changes))
    assert result.exit_code == 2
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_ctrl_c_is_130_and_resumes(config, tmp_path):
    # Long enough that the signal meets it running.
    path = config(max_steps=4000, save_steps=0, logging_steps=1)
    worker = spawn("train", path)
    for line in worker.stdout:
        if line.startswith("step 2/"):
            break
    worker.send_signal(signal.SIGINT)
    out, err = worker.communicate(timeout=60)
    assert worker.returncode == 130
    assert "writing a checkpoint" in out
    assert "is whole. To go on: fastft train CONFIG --resume last" in err
    (folder,) = (tmp_path / "run").glob("checkpoint-*")
    done = int(folder.name.removeprefix("checkpoint-"))

    result = run(
        "train", config(max_steps=done + 1, save_steps=0, logging_steps=1), "--resume", "last"
    )
    assert result.exit_code == 0, result.output
    assert f"step {done + 1}/{done + 1}" in result.output
    assert f"step {done}/" not in result.output


def test_ctrl_c_in_the_demo_leaves_no_worker(model_folder, data_file, tmp_path):
    demo = spawn(
        *("demo", "--model", model_folder, "--data", data_file, "--out", tmp_path / "demo"),
        *("--steps", 4000, "--batch", 4, "--length", 64),
        start_new_session=True,
    )
    for line in demo.stdout:
        if "step   2/" in line:
            break
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: parent and worker
    demo.communicate(timeout=60)
    assert demo.returncode == 130
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(demo.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a worker is still running")
