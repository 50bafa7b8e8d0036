"""Several processes, started by torchrun as a user starts them: the same run whatever their number, and none is lost.

gloo on loopback. A run of one process, started plainly, is what all others are compared with.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    LINUX_ONLY,
    ROOT,
    SAMPLE_TOKENIZER,
    assert_user_error,
    curve,
    environment,
    newest,
    run_command,
)
from safetensors.torch import load_file

from gpt_model import GPTModel
from gptkit.distributed import fsdp
from gptkit.training.checkpoints import verify_checkpoint
from gptkit.training.loading import load_checkpoint

pytestmark = pytest.mark.slow  # each starts several processes
needs_fsdp = pytest.mark.skipif(not fsdp.is_correct(), reason="this torch shards wrongly: --parallel fsdp is refused")
STEPS = 40
RUN = (
    *("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER, "--use_pretokenized"),
    *("--device", "cpu", "--dtype", "float32"),  # in bfloat16 the order of sums shows
    *("--n_layers", 2, "--emb_dim", 32, "--n_heads", 2, "--context_length", 32, "--batch_size", 4, "--eval_iter", 3),
    *("--eval_freq", 10, "--save_ckpt_freq", 10, "--print_sample_iter", 20, "--bigram_steps", 2),
    *("--average_epochs", 0.1),
)


def torchrun(
    n_processes: int, *arguments: object, script: Path = ROOT / "pretraining.py", flags: tuple[str, ...] = ()
) -> list[str]:
    """The command line that starts a script n times on this machine; with flags for a rendezvous, by one of its agents."""
    flags = flags or ("--standalone",)
    start = (sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1", *flags)
    return [*start, f"--nproc-per-node={n_processes}", str(script), *map(str, arguments)]


def start(command: list[str]) -> subprocess.Popen[str]:
    variables = environment() | {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def finish(process: subprocess.Popen[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    out, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def workers_of(agent: subprocess.Popen[str]) -> dict[int, int]:
    """The ids of the processes that torchrun started, by rank."""
    found = {}
    for children in Path(f"/proc/{agent.pid}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            found |= {int(each.removeprefix("RANK=")): pid for each in variables if each.startswith("RANK=")}
    return found


def wait_for_checkpoint(output: Path, *agents: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not any(output.glob("step_*")):
        assert all(agent.poll() is None for agent in agents), agents[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, sample_shards: Path) -> Path:
    return Path(shutil.copytree(sample_shards, tmp_path_factory.mktemp("parallel") / "001"))


def arguments(shards: Path, output: Path, grad_accum_steps: int, *more: object) -> tuple[object, ...]:
    accum = ("--grad_accum_steps", grad_accum_steps, "--max_steps", STEPS)
    return (*RUN, *accum, "--data_dir", shards, "--output_dir", output, *more)


@pytest.fixture(scope="module")
def alone(shards: Path) -> Path:
    """Run with one process, 16 sequences per step; return its output folder."""
    output = shards.parent / "alone"
    result = run_command("pretraining.py", *arguments(shards, output, 4))
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def pair(shards: Path, alone: Path) -> Path:
    """The run by two processes."""
    output = shards.parent / "pair"
    result = finish(start(torchrun(2, *arguments(shards, output, 2))))
    assert result.returncode == 0, result.stderr
    assert "x 2 micro-steps x 2 processes (ddp)" in result.stdout
    assert result.stdout.count("data: ") == 1  # one process speaks
    assert result.stdout.count("sample after step 20") == 1
    return output


def assert_same_run(found: Path, wanted: Path) -> None:
    """The same reports and weights but for the rounding of sums in another order."""
    assert [r["step"] for r in curve(found)] == [r["step"] for r in curve(wanted)] == [10, 20, 30, 40]
    for ours, theirs in zip(curve(found), curve(wanted), strict=True):
        for name in ("train_loss", "val_loss", "averaged_val_loss", "lr"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), (ours, theirs)
        assert ours["tokens"] == theirs["tokens"]
    verify_checkpoint(newest(found))
    for file in ("model.safetensors", "averaged.safetensors"):
        weights, expected = (load_file(newest(output) / file) for output in (found, wanted))
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3, msg=f"{file}: {name}")
    state = load_file(newest(found) / "training.safetensors")
    wanted_state = load_file(newest(wanted) / "training.safetensors")
    assert {name: tensor.shape for name, tensor in state.items() if not name.startswith("random.")} == {
        name: tensor.shape for name, tensor in wanted_state.items() if not name.startswith("random.")
    }


def test_two_processes_are_one_run(pair: Path, alone: Path) -> None:
    assert_same_run(pair, alone)


@needs_fsdp
def test_sharded_in_two_is_one_run(tmp_path: Path, shards: Path, alone: Path) -> None:
    """The checkpoint has the plain form, which a model reads as any other."""
    output = tmp_path / "out"
    more = ("--parallel", "fsdp", "--activation_checkpointing")
    result = finish(start(torchrun(2, *arguments(shards, output, 2, *more))))
    assert result.returncode == 0, result.stderr
    assert_same_run(output, alone)
    state = json.loads((newest(output) / "state.json").read_bytes())
    model, tokenizer = load_checkpoint(newest(output), GPTModel.from_dimensions, torch.device("cpu"))
    assert tokenizer.vocab_size == state["identity"]["model"]["vocab_size"]
    assert isinstance(model, GPTModel)


@pytest.mark.parametrize(("scaling", "parallel"), [("rows", "ddp"), pytest.param("neurons", "fsdp", marks=needs_fsdp)])
def test_variants_of_the_recipe_by_two_processes_are_one_run(
    tmp_path: Path, shards: Path, scaling: str, parallel: str
) -> None:
    varied = (
        *("--lr_schedule", "linear", "--decay_schedule", "dip", "--cautious_decay", "--muon_scaling", scaling),
        *("--momentum_warmup", 20, "--embedding_decay", 0.1, "--share_characters", 0.5),
    )
    varied += ("--further_tokens", 0.5) if parallel == "ddp" else ()
    result = run_command("pretraining.py", *arguments(shards, tmp_path / "alone", 4, *varied))
    assert result.returncode == 0, result.stderr
    more = (*varied, "--parallel", parallel)
    result = finish(start(torchrun(2, *arguments(shards, tmp_path / "pair", 2, *more))))
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "pair", tmp_path / "alone")
    moments = [name for name in load_file(newest(tmp_path / "pair") / "training.safetensors") if "row_moment" in name]
    assert bool(moments) == (scaling == "neurons")


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def test_a_chain_by_two_processes_is_that_of_one(tmp_path: Path, shards: Path, parallel: str) -> None:
    """The teacher is the same full model in each; with fsdp, too."""
    chain = ("--chain", 2, "--arch", "gpt2")
    result = run_command("pretraining.py", *arguments(shards, tmp_path / "alone", 4, *chain))
    assert result.returncode == 0, result.stderr
    output = tmp_path / "pair"
    result = finish(start(torchrun(2, *arguments(shards, output, 2, *chain, "--parallel", parallel))), timeout=400)
    assert result.returncode == 0, result.stderr
    assert f"x 2 processes ({parallel})" in result.stdout
    assert result.stdout.count("teacher: ") == 1
    for link in ("link_1", "."):
        assert_same_run(output / link, tmp_path / "alone" / link)


UNLIKE = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import pretraining

torch.cpu.get_capabilities = lambda: {{"avx512_bf16": os.environ["RANK"] == "0"}}
pretraining.process_group.silence_other_ranks()
pretraining.run_command(pretraining.PretrainingConfig, pretraining.launch)
"""


@needs_fsdp
def test_processes_on_unlike_machines_round_alike(tmp_path: Path, shards: Path, alone: Path) -> None:
    """The main process's machine multiplies bfloat16, the other's does not: sharded, a weight has one type for both."""
    script, output = tmp_path / "unlike.py", tmp_path / "out"
    script.write_text(UNLIKE.format(root=str(ROOT)), "utf-8")
    more = ("--parallel", "fsdp", "--dtype", "auto")
    result = finish(start(torchrun(2, *arguments(shards, output, 2, *more), script=script)))
    assert result.returncode == 0, result.stderr
    assert ", torch.bfloat16, " in result.stdout
    for ours, theirs in zip(curve(output), curve(alone), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=0.02)


@needs_fsdp
def test_a_run_resumes_with_another_number_of_processes(tmp_path: Path, shards: Path) -> None:
    """Two, stopped by a signal to torchrun; four, sharded, stopped by the clock; then one alone: by one command line."""
    output, alone = tmp_path / "out", tmp_path / "alone"
    result = run_command("pretraining.py", *arguments(shards, alone, 4, "--optimizer", "adamw"))
    assert result.returncode == 0, result.stderr
    same = arguments(shards, output, 2, "--optimizer", "adamw")
    agent = start(torchrun(2, *same))
    wait_for_checkpoint(output, agent)
    agent.send_signal(signal.SIGTERM)
    stopped = finish(agent)
    assert "stopped by SIGTERM" in stopped.stderr
    assert stopped.stderr.count("run the same command to resume") == 1
    verify_checkpoint(newest(output))
    assert 10 <= int(newest(output).name[-8:]) < STEPS

    result = finish(start(torchrun(4, *same, "--parallel", "fsdp", "--max_minutes", 1e-5)))
    assert result.returncode == 0, result.stderr
    assert "4 sequences x 32 tokens x 1 micro-steps x 4 processes (fsdp)" in result.stdout
    assert "stopped at step" in result.stdout
    assert int(newest(output).name[-8:]) < STEPS

    result = run_command("pretraining.py", *same)
    assert result.returncode == 0, result.stderr
    assert "4 sequences x 32 tokens x 4 micro-steps x 1 process" in result.stdout
    assert_same_run(output, alone)

    refused = run_command("pretraining.py", *arguments(shards, output, 3, "--optimizer", "adamw"))
    assert_user_error(refused, "number of sequences per step", "16, now 12")


@LINUX_ONLY
def test_a_killed_process_is_started_again_and_nothing_is_lost(tmp_path: Path, shards: Path, pair: Path) -> None:
    output = tmp_path / "out"
    agent = start(torchrun(2, *arguments(shards, output, 2), flags=("--standalone", "--max-restarts=1")))
    wait_for_checkpoint(output, agent)
    os.kill(workers_of(agent)[1], signal.SIGKILL)
    result = finish(agent)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert result.stderr.count("error: another process of the run ended or hangs (rank 1 of 2)") == 1
    assert curve(output) == curve(pair)
    for name in ("model.safetensors", "training.safetensors", "averaged.safetensors"):
        assert (newest(output) / name).read_bytes() == (newest(pair) / name).read_bytes()


@LINUX_ONLY
def test_two_machines(tmp_path: Path, shards: Path, pair: Path) -> None:
    """Two agents that know of each other by a rendezvous; a process of the second is killed."""
    output = tmp_path / "out"
    port = free_port()
    flags = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=2")
    agents = [start(torchrun(1, *arguments(shards, output, 2), flags=flags)) for _ in range(2)]
    wait_for_checkpoint(output, *agents)
    (second,) = [worker for agent in agents for rank, worker in workers_of(agent).items() if rank == 1]
    os.kill(second, signal.SIGKILL)
    results = [finish(agent) for agent in agents]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert "resuming from" in results[0].stdout + results[1].stdout
    assert curve(output) == curve(pair)
    assert (newest(output) / "model.safetensors").read_bytes() == (newest(pair) / "model.safetensors").read_bytes()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


HANGS = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import pretraining
from gptkit.data import batches

read = batches.TrainingBatches.micro_batch

def waits_for_ever(self, step, micro_step):
    while self.rank == 1 and step == 15:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun waits for half a minute
        time.sleep(0.1)
    return read(self, step, micro_step)

batches.TrainingBatches.micro_batch = waits_for_ever
pretraining.process_group.silence_other_ranks()
pretraining.run_command(pretraining.PretrainingConfig, pretraining.launch)
"""


def test_a_process_that_hangs_is_noticed_with_its_stack(tmp_path: Path, shards: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS.format(root=str(ROOT)), "utf-8")
    more = ("--hang_timeout_s", 6)
    began = time.monotonic()
    result = finish(start(torchrun(2, *arguments(shards, tmp_path / "out", 2, *more), script=script)))
    assert result.returncode != 0
    assert time.monotonic() - began < 60
    assert re.search(r'File ".*hangs\.py", line \d+ in waits_for_ever', result.stderr)
    assert result.stderr.count("error: another process of the run ended or hangs (rank 1 of 2)") == 1
    assert newest(tmp_path / "out").name == "step_00000010"


NESTS = """
import sys
sys.path.insert(0, {root!r})
import torch
from gptkit.distributed import process_group
from gptkit.distributed.process_group import main_process

@main_process
def inner(value):
    return value + 1

@main_process
def outer(value):
    ones = torch.ones(2)
    alone = (process_group.sync_flags(False, 7.0), process_group.all_reduce_mean(ones), process_group.all_reduce_sum(ones))
    process_group.broadcast_parameters([ones])
    return inner(value) + inner(value), alone[0], alone[1].tolist(), alone[2].tolist(), process_group.world_size()

with process_group.process_group("ddp", 20):
    rank = process_group.rank()
    found = outer(rank + 1)  # the main process's argument counts
    assert found == (4, (False, (7.0,)), [1.0, 1.0], [1.0, 1.0], 2), found
    assert process_group.all_reduce_sum(torch.tensor([1.0 + rank])).item() == 3
    assert process_group.sync_flags(rank == 1, 3.0 + rank, 0.0) == (True, (3.0, 0.0))
    try:
        main_process(lambda: 1 / 0)()
    except ZeroDivisionError:
        assert rank == 0
        raise
"""


def test_functions_of_the_main_process_nest(tmp_path: Path) -> None:
    """Within one the main process acts alone: what it calls must not ask the others, which wait for it."""
    script = tmp_path / "nests.py"
    script.write_text(NESTS.format(root=str(ROOT)), "utf-8")
    result = finish(start(torchrun(2, script=script)), timeout=60)
    assert "ZeroDivisionError" in result.stderr  # only after all that stands before it held
    assert "AssertionError" not in result.stderr


def test_a_budget_of_time_ends_by_itself(tmp_path: Path, shards: Path) -> None:
    """The main process measures the machine while the others wait, and all end on time."""
    output = tmp_path / "out"
    more = ("--model_size", "nano", "--budget_minutes", 0.4, "--data_dir", shards, "--output_dir", output)
    began = time.monotonic()
    result = finish(start(torchrun(2, *RUN[:9], "--eval_iter", 2, *more)))
    elapsed_s = time.monotonic() - began
    assert result.returncode == 0, result.stderr
    assert "chosen: nano, as asked for" in result.stdout
    assert "2 processes (ddp)" in result.stdout
    assert 12 < elapsed_s < 50  # asked for were 24, and the start of Python comes on top
    rates = [report["lr"] for report in curve(output)]
    assert rates[-1] < 0.1 * max(rates)  # the schedule ended with it


THREADS = """
import sys
from pathlib import Path

import torch

sys.path.insert(0, {root!r})
from gptkit.distributed import process_group

def threads():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]

def train():
    model = torch.nn.Linear(4, 1)
    loss = process_group.wrap_ddp(model, lambda inputs, targets: (model(inputs) - targets).sum(), torch.device("cpu"))
    loss(torch.ones(2, 4), torch.ones(2, 1)).backward()
    print(f"within: {{threads()}}\\n", end="", flush=True)

with process_group.process_group("ddp", 60):
    train()
print(f"after: {{threads()}}\\n", end="", flush=True)
"""


@LINUX_ONLY
def test_no_thread_of_gloo_outlives_the_group(tmp_path: Path) -> None:
    """One that frees a tensor while Python ends aborts the process, after all the work was done."""
    script = tmp_path / "threads.py"
    script.write_text(THREADS.format(root=str(ROOT)), "utf-8")
    result = finish(start(torchrun(2, script=script)))
    assert result.returncode == 0, result.stderr
    found = [line.partition(":")[0] for line in result.stdout.splitlines() if "gloo" in line]
    assert found == ["within", "within"], result.stdout


def test_an_error_is_reported_once(tmp_path: Path, shards: Path) -> None:
    """An error that all processes meet and one that only rank 0 meets are printed once; other ranks print nothing."""
    output = tmp_path / "out"
    for more, named in ((("--emb_dim", 33), "emb_dim 33"), (("--device", "mps"), "mps")):
        result = finish(start(torchrun(2, *arguments(shards, output, 2, *more))))
        assert result.returncode != 0
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        assert named in errors[0]
    assert not output.exists()


@pytest.mark.skipif(fsdp.is_correct(), reason="this torch shards rightly")
def test_sharding_by_a_torch_that_does_it_wrongly_is_refused_once(tmp_path: Path, shards: Path) -> None:
    before = sorted(shards.parent.iterdir())
    output = tmp_path / "out"
    result = finish(start(torchrun(2, *arguments(shards, output, 2, "--parallel", "fsdp"))))
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert f"--parallel fsdp needs torch 2.9 or newer: {torch.__version__} " in errors[0]
    assert not output.exists()
    assert sorted(shards.parent.iterdir()) == before
