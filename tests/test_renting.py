"""Test exp001/command.sh and SkyPilot's tasks on a machine that has only the repository, with stand-ins for the hub, for
runpodctl, for the mounted storage and for torch._dynamo. The model is tiny; everything else is what a rented machine runs.
"""

import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SAMPLE, SAMPLE_TOKENIZER, environment, n_reported, newest, reset_signals
from test_download import Hub, address, hub, settings  # noqa: F401  hub is a fixture

from gptkit.base.locks import LOCK_FILE, file_lock
from gptkit.training.checkpoints import verify_checkpoint
from gptkit.training.signals import EXIT_STOPPED

TASKS = ("cloud/sky.yaml", "cloud/sky_runpod.yaml")
PROGRAMS = ("gpt_model.py", "pretraining.py", "pretokenize.py", "requirements.txt")
TOKENIZER = f"--tokenizer sentencepiece --tokenizer_path {SAMPLE_TOKENIZER}"
TINY = "--n_layers 1 --emb_dim 32 --n_heads 2 --context_length 32 --bigram_steps 0 --batch_size 2 --eval_iter 1"
# The changes to a copy of exp001 that make a run take seconds.
CHANGES = {
    "--tokenizer hf --hf_name rinna/japanese-gpt2-small": TOKENIZER,
    "--batch_size 16 --eval_freq 100 --print_sample_iter 100": f"{TINY} --device cpu --eval_freq 2 --max_steps 6",
}
SESSION = re.compile(r"^this session took \d+\.\d\d hours, \d+\.\d\d USD at 2\.5 USD an hour$", re.MULTILINE)
NOWHERE = "http://127.0.0.1:1"


def new_machine(folder: Path) -> Path:
    """Make the repository of a new machine: no .venv, no data, and exp002, a copy of exp001 with a few changes."""
    folder.mkdir()
    for name in PROGRAMS:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "gptkit", folder / "gptkit", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "dataset").mkdir()
    for path in (ROOT / "dataset").glob("*.py"):
        shutil.copy(path, folder / "dataset")
    (folder / "exp002").mkdir()
    shutil.copy(ROOT / "exp001" / "command.sh", folder / "exp002")
    for old, new in CHANGES.items():
        change_script(folder, old, new)
    return folder


def change_script(repository: Path, old: str, new: str) -> None:
    script = repository / "exp002" / "command.sh"
    text = script.read_text("utf-8")
    assert text.count(old) == 1, old
    script.write_text(text.replace(old, new), "utf-8")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return new_machine(tmp_path / "repository")


@pytest.fixture
def prepared(repository: Path, sample_tokens: Path) -> Path:
    """Copy token shards, made as command.sh makes them, into the repository."""
    shutil.copytree(sample_tokens, repository / "dataset" / "001_pretok")
    return repository


@pytest.fixture
def pod(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a pod that is to be stopped, with a runpodctl that only records its arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(programs / "python3", f'exec "{sys.executable}" "$@"')
    write_program(programs / "runpodctl", f'echo "$@" >>"{programs}/calls.txt"')
    variables = environment() | settings(NOWHERE, tmp_path) | {"HF_HUB_OFFLINE": "0"}
    variables |= {"PATH": f"{programs}:{os.environ['PATH']}", "HOURLY_USD": "2.5"}
    return variables | {"STOP_POD": "1", "RUNPOD_POD_ID": "pod123"}


def write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def replace_pretraining(tmp_path: Path, line: str) -> None:
    """Run a line of shell in place of pretraining.py, for tests that depend only on how that ends."""
    program = f'case $1 in *pretraining.py) {line} ;; *) exec "{sys.executable}" "$@" ;; esac'
    write_program(tmp_path / "bin" / "python3", program)


def runpodctl_calls(tmp_path: Path) -> str:
    """Return the arguments of runpodctl, one line per call."""
    path = tmp_path / "bin" / "calls.txt"
    return path.read_text() if path.exists() else ""


def run(repository: Path, variables: dict[str, str]) -> tuple[int, str]:
    """Run command.sh to its end from another folder; return its exit code and all that it printed."""
    process = start(repository, variables)
    printed = process.communicate(timeout=300)[0]
    return process.returncode, printed


def start(repository: Path, variables: dict[str, str], *before: str) -> subprocess.Popen:
    """Start command.sh, behind a command such as nohup, in a session of its own."""
    arguments = [*before, repository / "exp002" / "command.sh"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    options |= {"preexec_fn": reset_signals, "start_new_session": True, "encoding": "utf-8"}
    return subprocess.Popen(arguments, cwd="/", env=variables, **options)


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    """Wait until the run has reported `step`; fail if it ends before."""
    deadline = time.monotonic() + 120
    while n_reported(output) < step:
        assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_command_runs_all_steps_and_later_only_those_whose_result_is_missing(
    tmp_path: Path,
    repository: Path,
    pod: dict[str, str],
    hub: Hub,  # noqa: F811
) -> None:
    hub.body = hub.described_body = gzip.compress(SAMPLE.read_bytes(), mtime=0)
    code, printed = run(repository, pod | {"HF_ENDPOINT": address(hub)})
    assert code == 0, printed
    assert "finished 6 steps" in printed
    assert SESSION.search(printed), printed
    assert runpodctl_calls(tmp_path) == "stop pod pod123\n"
    verify_checkpoint(newest(repository / "exp002" / "model_checkpoints"))
    assert len(hub.ranges) == 1

    shards = [*(repository / "dataset").rglob("manifest.json")]
    assert len(shards) == 2
    before = [path.stat().st_mtime_ns for path in shards]
    code, printed = run(repository, pod)  # no server at HF_ENDPOINT
    assert code == 0, printed
    assert "the run is finished at step 6" in printed
    assert [path.stat().st_mtime_ns for path in shards] == before
    assert len(hub.ranges) == 1

    shutil.rmtree(repository / "dataset" / "001")  # a machine that got only the token shards
    change_script(repository, "--max_steps 6", "--max_steps 8")
    code, printed = run(repository, pod)
    assert code == 0, printed
    assert "finished 8 steps" in printed
    assert not (repository / "dataset" / "001").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGHUP, True)])
def test_a_signal_reaches_training_once_and_leaves_the_pod_running(
    tmp_path: Path, prepared: Path, pod: dict[str, str], number: signal.Signals, to_all: bool
) -> None:
    """Send the signal to the script alone, as kill does, or to all processes of its group, as a terminal does."""
    change_script(prepared, "--max_steps 6", "--max_steps 100000")
    output = prepared / "exp002" / "model_checkpoints"
    process = start(prepared, pod)
    wait_for_step(process, output, 2)
    if to_all:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_STOPPED, printed
    assert f"stopped by {number.name}: step" in printed
    assert SESSION.search(printed), printed
    assert printed.endswith("the pod is not stopped: a signal ended the run; run the same command to resume\n")
    assert runpodctl_calls(tmp_path) == ""
    verify_checkpoint(newest(output))

    change_script(prepared, "--max_steps 100000", f"--max_steps {n_reported(output) + 4}")
    code, printed = run(prepared, pod)
    assert code == 0, printed
    assert "resuming from" in printed
    assert runpodctl_calls(tmp_path) == "stop pod pod123\n"


def test_a_signal_during_the_download_ends_the_command(
    tmp_path: Path,
    repository: Path,
    pod: dict[str, str],
    hub: Hub,  # noqa: F811
) -> None:
    hub.n_sent_at_most, hub.hangs = 10, True
    process = start(repository, pod | {"HF_ENDPOINT": address(hub)})
    while not hub.ranges:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_STOPPED, printed
    assert "a signal ended the run" in printed
    assert runpodctl_calls(tmp_path) == ""
    assert not (repository / "dataset" / "001").exists()


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_is_ignored(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    change_script(prepared, "--max_steps 6", "--max_steps 60")
    process = start(prepared, pod, "nohup")
    wait_for_step(process, prepared / "exp002" / "model_checkpoints", 2)
    os.killpg(process.pid, signal.SIGHUP)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert "finished 60 steps" in printed
    assert runpodctl_calls(tmp_path) == "stop pod pod123\n"


def test_a_crash_of_training_stops_the_pod(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    replace_pretraining(tmp_path, "kill -9 $$")
    code, printed = run(prepared, pod)
    assert code == 128 + signal.SIGKILL, printed
    assert runpodctl_calls(tmp_path) == "stop pod pod123\n"


def test_a_killed_tee_stops_the_pod_all_the_same(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    """command.sh itself prints after the training, to a pipe that nobody reads."""
    replace_pretraining(tmp_path, "exit 0")
    process = start(prepared, pod)
    assert process.stdout
    process.stdout.close()
    assert process.wait(timeout=100) == 0
    assert runpodctl_calls(tmp_path) == "stop pod pod123\n"


def test_a_user_error_stops_the_pod(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    change_script(prepared, "--n_heads 2", "--n_heads 3")
    code, printed = run(prepared, pod)
    assert code == 2, printed
    assert "error: " in printed
    assert SESSION.search(printed), printed
    assert runpodctl_calls(tmp_path) == "stop pod pod123\n"


def test_a_step_that_fails_ends_the_command(tmp_path: Path, repository: Path, pod: dict[str, str]) -> None:
    code, printed = run(repository, pod)
    assert code == 2, printed
    assert printed.count("error: ") == 1, printed
    assert "check the network" in printed
    assert not (repository / "exp002" / "model_checkpoints").exists()


def test_command_prints_why_a_pod_is_not_stopped(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    replace_pretraining(tmp_path, "exit 0")
    write_program(tmp_path / "bin" / "runpodctl", "exit 1")
    code, printed = run(prepared, pod)
    assert code == 0, printed
    assert printed.endswith("the pod is not stopped: runpodctl failed; stop it by hand\n")

    (tmp_path / "bin" / "runpodctl").unlink()
    no_pod = {name: value for name, value in pod.items() if name != "RUNPOD_POD_ID"}
    for variables, problem in ((pod, "runpodctl is not installed"), (no_pod, "RUNPOD_POD_ID is not set")):
        code, printed = run(prepared, variables)
        assert code == 0, printed
        lines = printed.splitlines()
        assert lines[0].startswith(f"warning: STOP_POD=1 will not stop the pod: {problem}")  # also before the run
        assert lines[-1].startswith(f"the pod is not stopped: {problem}")


def test_without_variables_command_only_prints_the_duration(
    tmp_path: Path, prepared: Path, pod: dict[str, str]
) -> None:
    replace_pretraining(tmp_path, "exit 0")
    variables = {name: value for name, value in pod.items() if name not in ("HOURLY_USD", "STOP_POD")}
    code, printed = run(prepared, variables)
    assert code == 0, printed
    assert re.fullmatch(r"this session took \d+\.\d\d hours", printed.splitlines()[-1])
    assert runpodctl_calls(tmp_path) == ""


@pytest.mark.parametrize("wrong", [{"HOURLY_USD": "$2"}, {"HOURLY_USD": "1,5"}, {"STOP_POD": "yes"}])
def test_invalid_variables_are_user_errors(repository: Path, pod: dict[str, str], wrong: dict[str, str]) -> None:
    code, printed = run(repository, pod | wrong)
    assert code == 2
    ((name, value),) = wrong.items()
    assert printed.startswith("error: ")
    assert f"{name}={value}" in printed
    assert len(printed.splitlines()) == 1


def test_missing_packages_are_installed(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    log = tmp_path / "python.txt"
    write_program(tmp_path / "bin" / "python3", f'case $1 in -c) exit 1 ;; *) echo "$@" >>"{log}" ;; esac')
    assert run(prepared, pod)[0] == 0
    installing, training = log.read_text().splitlines()
    assert installing == "-m pip install --quiet -r ../requirements.txt"
    assert training.startswith("../pretraining.py ")


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_second_machine_resumes_from_the_storage(
    tmp_path: Path, repository: Path, sample_tokens: Path, pod: dict[str, str], name: str
) -> None:
    """Execute the run section of a SkyPilot task on two machines, one after the other."""
    storage = tmp_path / "storage"
    shutil.copytree(sample_tokens, storage / "001_pretok")
    task = yaml.safe_load((ROOT / name).read_text("utf-8"))
    assert "/storage" in (task.get("file_mounts") or task["volumes"])
    script = task["run"].replace("/storage", str(storage))
    variables = {key: value for key, value in pod.items() if key != "STOP_POD"} | {"EXP_DIR": "exp002"}
    for n_steps, machine in ((6, repository), (8, new_machine(tmp_path / "another"))):
        change_script(machine, "--max_steps 6", f"--max_steps {n_steps}")
        result = subprocess.run(["bash", "-c", script], cwd=machine, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"finished {n_steps} steps" in result.stdout
        assert newest(storage / "exp002").name == f"step_{n_steps:08d}"
    assert "resuming from" in result.stdout


CU126 = "https://download.pytorch.org/whl/cu126"


@pytest.mark.parametrize(
    ("default", "cu126"), [("0", "0"), ("1", "0"), ("1", "1")], ids=["new driver", "old driver", "no driver"]
)
def test_skypilot_falls_back_to_wheels_for_older_drivers(tmp_path: Path, default: str, cu126: str) -> None:
    """Execute the setup section with a Python whose torch uses the GPU as `default` says, and as `cu126` after pip."""
    write_program(tmp_path / "quickstart.sh", "exit 0")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = f'[ -e fallen_back ] && code={cu126} || code={default}; echo "$@" >>calls.txt'
    script += '; case $* in *torch.zeros*) exit $code ;; *"pip install"*) touch fallen_back ;; esac'
    write_program(tmp_path / ".venv" / "bin" / "python", script)
    setup = yaml.safe_load((ROOT / TASKS[0]).read_text("utf-8"))["setup"]
    result = subprocess.run(["bash", "-c", setup], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == int(cu126), result.stderr
    checked, *rest = (tmp_path / "calls.txt").read_text().splitlines()
    assert checked.startswith("-c import torch")
    pip = ["-m pip uninstall --quiet --yes torch", f"-m pip install --quiet --index-url {CU126} torch", checked]
    assert rest == (pip if default == "1" else [])


def test_the_docker_image_can_have_wheels_for_older_drivers(tmp_path: Path) -> None:
    """Execute what the image installs, with a pip that only records its arguments and its constraints."""
    text = (ROOT / "cloud" / "Dockerfile").read_text("utf-8")
    assert f"--build-arg TORCH_INDEX={CU126} " in text
    install = re.search(r"^RUN (if \[ -n .*?[^\\])$", text, re.MULTILINE | re.DOTALL)
    assert install
    write_program(
        tmp_path / "pip", f'echo "$@ / $(grep ^torch== "{tmp_path}/constraints.txt")" >>"{tmp_path}/calls.txt"'
    )
    for index, calls in (
        ("", ["install --no-cache-dir -r requirements.txt -c constraints.txt / torch==9.9"]),
        (
            CU126,
            [
                f"install --no-cache-dir --index-url {CU126} torch / ",
                "install --no-cache-dir -r requirements.txt -c constraints.txt / ",
            ],
        ),
    ):
        (tmp_path / "constraints.txt").write_text("numpy==1\ntorch==9.9\n")
        (tmp_path / "calls.txt").unlink(missing_ok=True)
        variables = os.environ | {"TORCH_INDEX": index, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["sh", "-ec", install[1].replace("\\\n", "")], cwd=tmp_path, env=variables, check=True)
        assert (tmp_path / "calls.txt").read_text().splitlines() == calls


@pytest.mark.parametrize("name", TASKS)
def test_skypilot_tasks_request_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Check the tasks, also by SkyPilot's own parser where it is installed: tests/requirements.txt does without it."""
    task = yaml.safe_load((ROOT / name).read_text("utf-8"))
    resources = task["resources"]
    assert resources["any_of"] == [{"use_spot": True}, {"use_spot": False}]
    assert resources["job_recovery"]["recover_on_exit_codes"] == [EXIT_STOPPED]
    assert (ROOT / task["envs"]["EXP_DIR"] / "command.sh").is_file()
    first = yaml.safe_load((ROOT / TASKS[0]).read_text("utf-8"))
    assert (task["setup"], task["run"]) == (first["setup"], first["run"])
    if name == TASKS[1]:
        assert resources["infra"] == "runpod"
        assert "file_mounts" not in task  # RunPod has no buckets to mount
    else:
        assert task["file_mounts"]["/storage"]["mode"] == "MOUNT_CACHED"
    monkeypatch.setenv("HOME", str(tmp_path))  # SkyPilot writes there
    try:
        import sky
    except ImportError:
        return
    parsed = sky.Task.from_yaml_config(task, env_overrides=[("BUCKET", "a-bucket")])
    assert {each.use_spot for each in parsed.resources} == {True, False}
    assert {tuple(each.job_recovery["recover_on_exit_codes"]) for each in parsed.resources} == {(EXIT_STOPPED,)}
    unsupported = sky.clouds.RunPod._CLOUD_UNSUPPORTED_FEATURES.keys()
    assert parsed.get_required_cloud_features().isdisjoint(unsupported) == (name == TASKS[1])


def test_a_second_command_leaves_the_pod_to_the_first(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    """Its run is refused, since the first one trains there."""
    output = prepared / "exp002" / "model_checkpoints"
    replace_pretraining(tmp_path, "exit 2")
    with file_lock(output / LOCK_FILE):
        code, printed = run(prepared, pod)
    assert code == 2, printed
    assert printed.endswith("the pod is not stopped: another run is training in model_checkpoints\n")
    assert runpodctl_calls(tmp_path) == ""
    code, printed = run(prepared, pod)
    assert code == 2, printed
    assert runpodctl_calls(tmp_path) == "stop pod pod123\n"
