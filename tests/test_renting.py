"""Test exp001/command.sh and SkyPilot's tasks on a machine that has only the repository, with stand-ins for the hub, for
runpodctl, for the mounted storage and for torch._dynamo. The model is tiny; everything else is what a rented machine runs.
"""

import gzip
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SAMPLE, SAMPLE_TOKENIZER, environment, n_reported, newest, reset_signals
from test_download import Hub, address, hub, settings  # noqa: F401  hub is a fixture
from test_drivers import driver, with_driver  # noqa: F401  driver is a fixture

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
# Stand-ins for runpodctl 2 and 1, which record their arguments. The second reports in a table, and its `stop` ends with
# exit code 0 where the pod keeps running (runpod/runpodctl, cmd/pod/stop.go, getPod.go, stopPod.go).
NEW_RUNPODCTL = """echo "$@" >>"${0%/*}/calls.txt"
status=RUNNING
grep -q stop "${0%/*}/calls.txt" && status=${POD_STATUS:-EXITED}
case "$1 $2" in
  "pod stop") echo '{"id": "pod123"}' ;;
  "pod get") printf '{\n  "id": "pod123",\n  "desiredStatus": "%s",\n  "env": {\n    "A": "RUNNING"\n  }\n}\n' $status ;;
  *) exit 1 ;;
esac"""
OLD_RUNPODCTL = """case "$1 $2" in pod*) echo 'unknown command "pod" for "runpodctl"' >&2; exit 1 ;; esac
echo "$@" >>"${0%/*}/calls.txt"
status=RUNNING
grep -q stop "${0%/*}/calls.txt" && status=${POD_STATUS:-EXITED}
case "$1 $2" in
  "stop pod") echo "pod \"pod123\" stop failed; status is $status" ;;
  "get pod") printf 'ID\tNAME\tGPU\tIMAGE NAME\tSTATUS\npod123\tmine\t1 A40\trunpod/x\t%s\n' $status ;;
esac"""
STOPPED = "pod stop pod123\npod get pod123\n"


def new_machine(folder: Path) -> Path:
    """Make the repository of a new machine: no .venv, no data, and exp002, a copy of exp001 with a few changes."""
    folder.mkdir()
    for name in PROGRAMS:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "gptkit", folder / "gptkit", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "cloud").mkdir()
    for name in ("machine.sh", "install_packages.py"):
        shutil.copy(ROOT / "cloud" / name, folder / "cloud")
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
    write_program(programs / "runpodctl", NEW_RUNPODCTL)
    write_program(programs / "sleep", ":")
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
    assert runpodctl_calls(tmp_path) == STOPPED
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
    assert runpodctl_calls(tmp_path) == STOPPED


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
    assert runpodctl_calls(tmp_path) == STOPPED


def test_a_crash_of_training_stops_the_pod(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    replace_pretraining(tmp_path, "kill -9 $$")
    code, printed = run(prepared, pod)
    assert code == 128 + signal.SIGKILL, printed
    assert runpodctl_calls(tmp_path) == STOPPED


def test_a_killed_tee_stops_the_pod_all_the_same(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    """command.sh itself prints after the training, to a pipe that nobody reads."""
    replace_pretraining(tmp_path, "exit 0")
    process = start(prepared, pod)
    assert process.stdout
    process.stdout.close()
    assert process.wait(timeout=100) == 0
    assert runpodctl_calls(tmp_path) == STOPPED


def test_a_user_error_stops_the_pod(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    change_script(prepared, "--n_heads 2", "--n_heads 3")
    code, printed = run(prepared, pod)
    assert code == 2, printed
    assert "error: " in printed
    assert SESSION.search(printed), printed
    assert runpodctl_calls(tmp_path) == STOPPED


def test_a_step_that_fails_ends_the_command(tmp_path: Path, repository: Path, pod: dict[str, str]) -> None:
    code, printed = run(repository, pod)
    assert code == 2, printed
    assert printed.count("error: ") == 1, printed
    assert "check the network" in printed
    assert not (repository / "exp002" / "model_checkpoints").exists()


def test_command_prints_why_a_pod_is_not_stopped(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    replace_pretraining(tmp_path, "exit 0")
    by_hand = "stop it by hand (runpodctl printed: "
    code, printed = run(prepared, pod | {"POD_STATUS": "RUNNING"})  # it only says that it stops
    assert code == 0, printed
    assert printed.endswith(f'the pod is not stopped: its status is RUNNING; {by_hand}{{"id": "pod123"}})\n')
    assert runpodctl_calls(tmp_path).count("pod get") == runpodctl_calls(tmp_path).count("pod stop") == 6
    write_program(tmp_path / "bin" / "runpodctl", 'echo "error: api key not configured" >&2; exit 1')
    code, printed = run(prepared, pod)
    assert code == 0, printed
    why = "error: api key not configured error: api key not configured"
    assert printed.endswith(f"the pod is not stopped: its status is unknown; {by_hand}{why})\n")

    (tmp_path / "bin" / "runpodctl").unlink()
    no_pod = {name: value for name, value in pod.items() if name != "RUNPOD_POD_ID"}
    for variables, problem in ((pod, "runpodctl is not installed"), (no_pod, "RUNPOD_POD_ID is not set")):
        code, printed = run(prepared, variables)
        assert code == 0, printed
        lines = printed.splitlines()
        assert lines[0].startswith(f"warning: STOP_POD=1 will not stop the pod: {problem}")  # also before the run
        assert lines[-1].startswith(f"the pod is not stopped: {problem}")


def test_a_request_that_the_network_loses_is_repeated(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    replace_pretraining(tmp_path, "exit 0")
    lost = f"""first="${{0%/*}}/first.txt"
case "$1 $2" in *stop*) [ -e "$first" ] || {{ echo "no route to host" >&2; [ "$1" = pod ] || : >"$first"; exit 1; }} ;; esac
{NEW_RUNPODCTL}"""
    write_program(tmp_path / "bin" / "runpodctl", lost)
    code, printed = run(prepared, pod)
    assert code == 0, printed
    assert printed.endswith("the pod is stopped\n")
    assert runpodctl_calls(tmp_path) == "pod get pod123\n" + STOPPED


def test_an_older_runpodctl_is_spoken_to_in_its_own_form(tmp_path: Path, prepared: Path, pod: dict[str, str]) -> None:
    replace_pretraining(tmp_path, "exit 0")
    write_program(tmp_path / "bin" / "runpodctl", OLD_RUNPODCTL)
    code, printed = run(prepared, pod)
    assert code == 0, printed
    assert printed.endswith("the pod is stopped\n")
    assert runpodctl_calls(tmp_path) == "stop pod pod123\nget pod pod123\n"
    printed = run(prepared, pod | {"POD_STATUS": "RUNNING"})[1]
    assert "the pod is not stopped: its status is RUNNING; stop it by hand (runpodctl printed: unknown" in printed


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
    assert runpodctl_calls(tmp_path) == STOPPED


# What command.sh does with the Python of a machine. Each is a copy of this Python, with its standard library and its
# packages as links, except for what the machine lacks or has in another version.

PACKAGES = Path(sysconfig.get_path("purelib"))
DECOY = "raise ImportError('this torch came from pip')\n"


def make_python(folder: Path, versions: dict[str, str] | None = None, *, only: str = "") -> Path:
    """Make a Python whose packages have other versions, or "" for none; `only` names the one package that it has.

    Another version is only in the metadata, which is what pip reads.
    """
    library = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = library / PACKAGES.name
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    shutil.copy(os.path.realpath(sys.executable), folder / "bin" / "python")
    for path in Path(sysconfig.get_path("stdlib")).iterdir():
        if path.name not in ("site-packages", "dist-packages", "EXTERNALLY-MANAGED"):
            (library / path.name).symlink_to(path)
    versions = versions or {}
    for path in PACKAGES.iterdir():
        name, _, rest = path.name.partition("-")
        name = name.partition(".")[0]  # NAME.libs has shared libraries
        if path.suffix == ".pth" or name == "__pycache__" or (only and name != only) or versions.get(name) == "":
            continue
        if name in versions and rest:
            metadata = packages / f"{name}-{versions[name]}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {versions[name]}\n")
            if name != "torch":  # pip may remove it
                (metadata / "RECORD").write_text(f"{metadata.name}/METADATA,,\n{metadata.name}/RECORD,,\n")
        elif name in versions and name != "torch":  # in folders of its own: pip must not write through a link
            shutil.copytree(path, packages / path.name, copy_function=os.symlink)
        else:
            (packages / path.name).symlink_to(path)
    found = subprocess.run([folder / "bin" / "python", "-c", "import sys; print(sys.prefix)"], stdout=subprocess.PIPE)
    if found.stdout.decode().strip() != str(folder):
        pytest.skip("this Python does not run from a copy")
    return folder / "bin" / "python"


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes], requires: str = "") -> None:
    """Write a wheel for pip to find."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    about = {
        "METADATA": metadata,
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in (files | {f"{info}/{key}": text.encode() for key, text in about.items()}).items():
            wheel.writestr(path, content)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheels that pip finds: sentencepiece, also a later version that needs a newer torch, and that torch."""
    folder = tmp_path_factory.mktemp("wheels")
    distribution = importlib.metadata.distribution("sentencepiece")
    folders = ("sentencepiece", "sentencepiece.libs")
    package = [path for path in distribution.files or [] if path.parts[0] in folders and path.suffix != ".pyc"]
    write_wheel(folder, "sentencepiece", distribution.version, {str(p): p.locate().read_bytes() for p in package})
    write_wheel(folder, "sentencepiece", "99.0", {}, "Requires-Dist: torch>=98\n")
    write_wheel(folder, "torch", "99.0", {"torch/__init__.py": DECOY.encode()})
    return folder


@pytest.fixture
def machine(tmp_path: Path, prepared: Path, pod: dict[str, str], wheels: Path) -> dict[str, str]:
    """Return the variables of a machine whose programs lie in bin/, with the repository ready to train."""
    requirements = prepared / "requirements.txt"
    requirements.write_text(re.sub(r"(?m)^torch>=.*", "torch>=2.6", requirements.read_text("utf-8")), "utf-8")
    (tmp_path / "bin" / "python3").unlink()
    of_pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    variables = {name: value for name, value in pod.items() if not name.startswith(("PIP_", "VIRTUAL_ENV", "PYTHON"))}
    return variables | of_pip | {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "STOP_POD": "0"}


def name_python(tmp_path: Path, name: str, python: Path) -> None:
    (tmp_path / "bin" / name).symlink_to(python)


def version_of(python: Path, name: str) -> str:
    """Return the version of a package that a Python has by its metadata; "" for none."""
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return result.stdout.strip()


def has_trained(code: int, printed: str) -> bool:
    return code == 0 and "finished 6 steps" in printed and "came from pip" not in printed


@pytest.mark.slow
def test_an_image_with_torch_gets_what_it_lacks_and_keeps_its_torch(
    tmp_path: Path, prepared: Path, machine: dict[str, str]
) -> None:
    """As RunPod's: torch 2.8.0+cu128, no sentencepiece. pip would take a newer torch for the newest sentencepiece."""
    python = make_python(tmp_path / "image", {"torch": "2.8.0+cu128", "sentencepiece": ""})
    name_python(tmp_path, "python3", python)
    code, printed = run(prepared, machine)
    assert has_trained(code, printed), printed
    assert f"installing packages with {tmp_path}/bin/python3: sentencepiece>=" in printed
    assert version_of(python, "torch") == "2.8.0+cu128"
    assert version_of(python, "sentencepiece") == importlib.metadata.version("sentencepiece")
    assert not (prepared / ".venv").exists()


@pytest.mark.slow
def test_where_nothing_is_missing_nothing_is_installed(tmp_path: Path, prepared: Path, machine: dict[str, str]) -> None:
    """As in Colab's list of August 2026; where a version is too old, the package counts as missing."""
    colab = {"torch": "2.11.0+cu128", "transformers": "5.15.0", "tokenizers": "0.22.2", "sentencepiece": "0.2.2"}
    name_python(tmp_path, "python3", make_python(tmp_path / "colab", colab))
    code, printed = run(prepared, machine | {"PIP_FIND_LINKS": "/nonexistent"})
    assert has_trained(code, printed), printed
    assert "installing" not in printed

    old = make_python(tmp_path / "old", colab | {"sentencepiece": "0.1.99"})
    (tmp_path / "bin" / "python3").unlink()
    name_python(tmp_path, "python3", old)
    code, printed = run(prepared, machine)
    assert code == 0, printed
    assert re.search(r"installing packages with \S+/bin/python3: sentencepiece>=[\d.]+\n", printed), printed
    assert version_of(old, "torch") == "2.11.0+cu128"


def manage_externally(python: Path) -> None:
    (library,) = (python.parent.parent / "lib").iterdir()
    (library / "EXTERNALLY-MANAGED").write_text("[externally-managed]\nError=use apt\n")


@pytest.mark.slow
def test_an_externally_managed_python_is_left_alone(tmp_path: Path, prepared: Path, machine: dict[str, str]) -> None:
    """As Debian's and Ubuntu's: the packages go into .venv, which sees the system's torch."""
    python = make_python(tmp_path / "debian", {"torch": "2.8.0+cu128", "sentencepiece": ""})
    manage_externally(python)
    name_python(tmp_path, "python3", python)
    code, printed = run(prepared, machine)
    assert has_trained(code, printed), printed
    environment = prepared / ".venv" / "bin" / "python"
    assert version_of(python, "sentencepiece") == ""
    assert version_of(environment, "sentencepiece") != ""
    assert version_of(environment, "torch") == version_of(python, "torch") == "2.8.0+cu128"
    assert not [*(prepared / ".venv").rglob("site-packages/torch")]
    change_script(prepared, "--max_steps 6", "--max_steps 7")
    code, printed = run(prepared, machine)
    assert code == 0, printed
    assert "installing" not in printed


def test_without_venv_the_package_to_install_is_named(tmp_path: Path, prepared: Path, machine: dict[str, str]) -> None:
    python = make_python(tmp_path / "debian", {"torch": "2.8.0+cu128", "sentencepiece": ""})
    manage_externally(python)
    next((tmp_path / "debian" / "lib").iterdir()).joinpath("ensurepip").unlink()
    name_python(tmp_path, "python3", python)
    code, printed = run(prepared, machine)
    assert code == 2, printed
    errors = [line for line in printed.splitlines() if "error: " in line]
    assert len(errors) == 1, printed
    assert f"error: {python} cannot make the environment ../.venv; on Debian or Ubuntu, run apt install" in errors[0]
    assert not (prepared / ".venv").exists()


@pytest.mark.parametrize("target", ["/nonexistent/python", ""])
def test_an_environment_without_torch_is_left_alone(
    tmp_path: Path, prepared: Path, machine: dict[str, str], target: str
) -> None:
    """Its Python may also be a link to one that is gone."""
    python = make_python(tmp_path / "debian", {"torch": "2.8.0+cu128", "sentencepiece": ""})
    manage_externally(python)
    name_python(tmp_path, "python3", python)
    (prepared / ".venv" / "bin").mkdir(parents=True)
    (prepared / ".venv" / "bin" / "python").symlink_to(target or make_python(tmp_path / "other", only="pip"))
    settings = f"home = {tmp_path}/other/bin\ninclude-system-site-packages = false\nversion = 3.10.1\n"
    (prepared / ".venv" / "pyvenv.cfg").write_text(settings)
    code, printed = run(prepared, machine | {"PIP_BREAK_SYSTEM_PACKAGES": "0"})
    assert code == 2, printed
    errors = [line for line in printed.splitlines() if not SESSION.search(line)]
    assert errors == ["error: ../.venv is there and has no torch; remove it, and it is made anew"], printed
    assert (prepared / ".venv" / "pyvenv.cfg").read_text() == settings


def wait_for_end(pid: int) -> None:
    """Wait until a process that is not a child of this one has ended."""
    deadline = time.monotonic() + 20
    status = Path(f"/proc/{pid}/status")
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_ends_the_making_of_an_environment(tmp_path: Path, prepared: Path, machine: dict[str, str]) -> None:
    python = make_python(tmp_path / "debian", {"torch": "2.8.0+cu128", "sentencepiece": ""})
    manage_externally(python)
    (venv,) = (tmp_path / "debian" / "lib").glob("*/venv")
    venv.unlink()
    module = "import pathlib, subprocess, sys\npathlib.Path(sys.argv[2]).mkdir()\nsubprocess.run(['sleep', '100'])\n"
    venv.with_suffix(".py").write_text(module)
    started = tmp_path / "started"
    write_program(
        tmp_path / "bin" / "sleep", f"echo $$ >{started}.new; mv {started}.new {started}; exec /bin/sleep 100"
    )
    name_python(tmp_path, "python3", python)
    process = start(prepared, machine)
    while not started.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_STOPPED, printed
    assert "making the environment ../.venv\n" in printed
    assert not (prepared / ".venv").exists()
    wait_for_end(int(started.read_text()))


@pytest.mark.slow
def test_the_python_that_has_torch_is_found(tmp_path: Path, prepared: Path, machine: dict[str, str]) -> None:
    """As in RunPod's images of Ubuntu 22.04: `python` has torch and `python3` is another, with or without pip."""
    name_python(tmp_path, "python3", make_python(tmp_path / "system", only="pip"))
    python = make_python(tmp_path / "image", {"torch": "2.8.0+cu128"})
    name_python(tmp_path, "python", python)
    code, printed = run(prepared, machine)
    assert has_trained(code, printed), printed
    assert "installing" not in printed
    assert version_of(python, "torch") == "2.8.0+cu128"


def test_a_torch_that_is_too_old_is_not_replaced(tmp_path: Path, prepared: Path, machine: dict[str, str]) -> None:
    python = make_python(tmp_path / "image", {"torch": "2.5.1+cu124"})
    name_python(tmp_path, "python3", python)
    code, printed = run(prepared, machine)
    assert code == 2, printed
    assert (
        f"error: torch 2.5.1+cu124 of {tmp_path}/bin/python3 is too old for torch>=2.6, and it is not replaced"
        in printed
    )
    assert "came from pip" not in printed
    assert version_of(python, "torch") == "2.5.1+cu124"


def test_a_gpu_that_torch_cannot_use_ends_the_command_before_any_download(
    tmp_path: Path,
    repository: Path,
    pod: dict[str, str],
    driver: Path,  # noqa: F811
) -> None:
    """The driver reports CUDA 12.8 and torch is built for 13.0; --device cpu among the settings goes on."""
    pretend = "import sys, torch; torch.version.cuda = '13.0'; code = sys.argv[2]; del sys.argv[1:3]; exec(code)"
    torch_of_13 = f"""case $1 in
  -W*) shift 2; exec "{sys.executable}" -c "{pretend}" "$@" ;;
  *) exec "{sys.executable}" "$@" ;;
esac"""
    write_program(tmp_path / "bin" / "python3", torch_of_13)
    variables = with_driver(driver) | pod | {"LD_LIBRARY_PATH": str(driver)}
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    change_script(repository, "--device cpu ", "")
    (repository / "requirements.txt").write_text("a-package-that-is-missing\n")
    code, printed = run(repository, variables)
    assert code == 2, printed
    errors = [line for line in printed.splitlines() if not SESSION.search(line)]
    assert len(errors) == 2, printed
    assert errors[0].startswith("error: --device auto: torch ")
    assert "the driver is 570.86.10, for CUDA 12.8; choose a host with a newer driver" in errors[0]
    assert errors[0].endswith("use the CPU (write --device cpu into settings of command.sh)")
    assert errors[1] == "the pod is stopped"
    assert not [*(repository / "dataset").rglob("*.gz*")]

    change_script(repository, "--eval_freq 2", "--device cpu --eval_freq 2")
    code, printed = run(repository, variables)
    assert "installing packages" in printed
    assert "error: --device" not in printed
