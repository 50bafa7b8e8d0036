"""Two commands at once: the second waits for the first, or is refused by name; nothing finished is harmed.

Real pairs at random distances are tried by benchmarks/checks/command_pairs.py.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SAMPLE,
    SAMPLE_TOKENS,
    TINY_MODEL,
    assert_user_error,
    call_command,
    command,
    newest,
    save_experiment,
    start_process,
    untrained,
    write_jsonl,
)

from gpt_model import GPTModel
from gptkit.base.cli import UserError
from gptkit.base.locks import LOCK_FILE, file_lock
from gptkit.data.text_shards import find_text_shards
from gptkit.data.token_locks import lock_making, lock_reading
from gptkit.text import tokenizer as tokenizer_module
from gptkit.training import loading
from gptkit.training.checkpoints import find_checkpoints

sys.path.insert(0, str(ROOT / "dataset"))  # as for `python dataset/train_tokenizer.py`

from _corpus import find_corpus
from train_tokenizer import survey

ME = f"process {os.getpid()} on "


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[dict[Path, str]]:
    """Return a dict: a lock file asked of it is held by another process for a second, and its value names the process."""
    started: list[subprocess.Popen[str]] = []

    class Holders(dict[Path, str]):
        def __missing__(self, path: Path) -> str:
            code = (
                "import sys, time; from pathlib import Path; from gptkit.base.locks import file_lock\n"
                "with file_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(1)\n"
            )
            arguments = [sys.executable, "-c", code, str(path)]
            process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            started.append(process)
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            return f"process {process.pid} on "

    yield Holders()
    for process in started:
        process.wait()


def test_each_command_waits_for_the_one_that_writes_to_the_same_place(
    tmp_path: Path, holder: dict[Path, str], sample_shards: Path, trained: Path
) -> None:
    tokens = (*SAMPLE_TOKENS, "--data_dir", sample_shards)
    run = (*tokens, "--use_pretokenized", "--pretokenized_dir", tmp_path / "tokens", "--device", "cpu", *TINY_MODEL)
    vocab_size = ("--vocab_size", 400)
    cases = {
        tmp_path / "001" / LOCK_FILE: ("dataset/prepare_aozora_jsonl.py", "--jsonl_path", SAMPLE, "--output_dir", tmp_path / "001"),
        tmp_path / "spm" / LOCK_FILE: ("dataset/train_tokenizer.py", "--data_dir", sample_shards, "--output_dir", tmp_path / "spm", *vocab_size),
        tmp_path / "tokens" / LOCK_FILE: ("pretokenize.py", *tokens, "--output_dir", tmp_path / "tokens", "--num_workers", 1),
        tmp_path / "tokens" / ".lock": ("pretraining.py", *run, "--max_steps", 1, "--output_dir", tmp_path / "exp"),
        tmp_path / ".hf.lock": ("export_hf.py", "--exp_dir", trained, "--output_dir", tmp_path / "hf"),
    }  # fmt: skip
    for path, arguments in cases.items():
        name = holder[path]
        result = call_command(*arguments)  # type: ignore[arg-type]
        assert result.returncode == 0, result.stderr
        assert f"waiting for {name}" in result.stderr
        assert not path.exists()
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


def test_tokens_that_a_run_reads_are_not_changed(tmp_path: Path, sample_shards: Path, sample_tokens: Path) -> None:
    tokens = Path(shutil.copytree(sample_tokens, tmp_path / "tokens"))
    before = {path: path.read_bytes() for path in tokens.iterdir()}
    arguments = ("pretokenize.py", *SAMPLE_TOKENS, "--data_dir", sample_shards, "--output_dir", tokens)
    with lock_making(tokens), lock_reading(tokens):
        pass
    with lock_reading(tokens):
        refused = call_command(*arguments, "--num_workers", 1, "--val_fraction", 0.3)
        assert_user_error(refused, f"the token shards in {tokens} would change", f"a run reads them ({ME}")
        again = call_command(*arguments, "--num_workers", 1)  # finds all of them made
        assert again.returncode == 0, again.stderr
        assert {path: path.read_bytes() for path in tokens.iterdir() if path.suffix} == before
    assert call_command(*arguments, "--num_workers", 1, "--val_fraction", 0.3).returncode == 0
    assert {path: path.read_bytes() for path in tokens.iterdir()} != before


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_tokens_in_a_folder_without_permission_need_no_lock(
    tmp_path: Path, sample_shards: Path, sample_tokens: Path
) -> None:
    tokens = Path(shutil.copytree(sample_tokens, tmp_path / "tokens"))
    tokens.chmod(0o500)
    arguments = ("--data_dir", sample_shards, "--output_dir", tokens, "--num_workers", 1)
    assert call_command("pretokenize.py", *SAMPLE_TOKENS, *arguments).returncode == 0


def test_the_parts_of_a_job_array_work_side_by_side(tmp_path: Path, sample_shards: Path) -> None:
    arguments = ("--data_dir", sample_shards, "--output_dir", tmp_path / "tokens", "--num_workers", 1)
    with lock_making(tmp_path / "tokens", is_part=True):
        part = call_command("pretokenize.py", *SAMPLE_TOKENS, *arguments, "--part", "1/2")
        assert part.returncode == 0, part.stderr
        assert "waiting" not in part.stderr
        with pytest.raises(BlockingIOError, match=ME), file_lock(tmp_path / "tokens" / LOCK_FILE):
            pass


def test_the_same_text_prepared_again_leaves_the_files_alone(tmp_path: Path) -> None:
    arguments = ("dataset/prepare_aozora_jsonl.py", "--output_dir", tmp_path / "out")
    assert call_command(*arguments, "--jsonl_path", SAMPLE).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert call_command(*arguments, "--jsonl_path", SAMPLE).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    other = write_jsonl(tmp_path / "other.jsonl", ["雨が降る。", "春が来た。"])
    assert call_command(*arguments, "--jsonl_path", other).returncode == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["combined_0001.txt", "manifest.json"]


def test_text_that_is_being_prepared_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "001" / ".partial").mkdir(parents=True)
    with pytest.raises(UserError, match="left by a preparation that was stopped"):
        find_text_shards(tmp_path / "001")
    with file_lock(tmp_path / "001" / LOCK_FILE):
        message = f"001 is being prepared by {re.escape(ME)}.*; wait for it"
        with pytest.raises(UserError, match=message):
            find_text_shards(tmp_path / "001")
        arguments = ("--data_dir", tmp_path / "001", "--output_dir", tmp_path / "spm")
        assert_user_error(call_command("dataset/train_tokenizer.py", *arguments), "is being prepared by", ME)


@pytest.mark.parametrize("removed", [False, True])
def test_text_that_changes_while_it_is_tokenized(
    removed: bool, tmp_path: Path, sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record must not name text that its tokens are not made from."""
    text = Path(shutil.copytree(sample_shards, tmp_path / "001"))
    shard = sorted(text.glob("*.txt"))[2]
    arguments = ("pretokenize.py", *SAMPLE_TOKENS, "--data_dir", text, "--num_workers", 1)
    encode = tokenizer_module.Tokenizer.encode

    def change(self: tokenizer_module.Tokenizer, content: str) -> list[int]:
        if (tmp_path / "tokens" / "combined_0001.json").exists() and shard.exists():
            shard.unlink() if removed else shard.write_text("雨が降る。<|endoftext|>", encoding="utf-8")
        return encode(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module.Tokenizer, "encode", change)
        result = call_command(*arguments, "--output_dir", tmp_path / "tokens")
    assert_user_error(result, "combined_000", "removed while" if removed else "changed while it was read")
    assert not (tmp_path / "tokens" / "manifest.json").exists()
    assert not (tmp_path / "tokens" / f"{shard.stem}.json").exists()
    if not removed:
        for name in ("tokens", "alone"):
            assert call_command(*arguments, "--output_dir", tmp_path / name).returncode == 0
        files = [{path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("tokens", "alone")]
        assert files[0] == files[1]


def test_text_that_changes_while_a_tokenizer_is_trained(tmp_path: Path, sample_shards: Path) -> None:
    text = Path(shutil.copytree(sample_shards, tmp_path / "001"))
    corpus = find_corpus(text)
    survey(corpus)
    corpus.files[1].write_text("雨<|endoftext|>" * 1000, encoding="utf-8")  # more documents than were counted
    with pytest.raises(Exception, match=r"0002\.txt changed while the text was read"):
        survey(corpus)
    corpus.files[0].unlink()
    with pytest.raises(Exception, match=r"0001\.txt was removed while the text was read"):
        survey(corpus)


def test_a_checkpoint_that_a_run_removes_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_experiment(tmp_path, untrained())
    run, load = tmp_path / "model_checkpoints", loading.load_checkpoint

    def remove(folder: Path, *arguments: object) -> object:
        if folder.name == "step_00000001":
            folder.rename(run / "step_00000002")  # the newer one, and the older is gone
        return load(folder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "load_checkpoint", remove)
    folder, model, *_ = loading.load_chosen(str(tmp_path), "newest", GPTModel.from_dimensions, torch.device("cpu"))
    assert folder == find_checkpoints(run)[0] == run / "step_00000002"
    assert model.n_parameters() > 0


@pytest.mark.slow
def test_two_runs_that_share_tokens_which_are_not_made_yet(tmp_path: Path, sample_shards: Path) -> None:
    run = (*SAMPLE_TOKENS, "--data_dir", sample_shards, "--use_pretokenized", "--pretokenized_dir", tmp_path / "tokens")
    run = (*run, "--device", "cpu", *TINY_MODEL, "--max_steps", 30, "--eval_freq", 1)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [start_process(command("pretraining.py", *run, "--output_dir", tmp_path / n), **how) for n in "ab"]
    for process in processes:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    weights = [(newest(tmp_path / name) / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.name.startswith(".")]
