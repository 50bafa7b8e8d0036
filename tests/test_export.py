"""export_hf.py and --init_from: the exported folder against transformers, and the way from a run to it and back."""

import importlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import HAS_LINKS, SAMPLE, SAMPLE_TOKENIZER, assert_user_error, call_command, save_experiment
from random_models import CONTEXT, KINDS, random_model
from safetensors.torch import load_file

import export_hf
from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.base.files import replace_folder
from gptkit.generation.generate import generate
from gptkit.generation.sampling import SamplingSettings
from gptkit.interop import huggingface, tokenizer_export
from gptkit.interop.model_card import model_card
from gptkit.text.tokenizer import Tokenizer, load_sentencepiece
from gptkit.training.checkpoints import read_tensors
from gptkit.training.loading import choose_checkpoint
from gptkit.training.run_log import read_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_sentencepiece(str(SAMPLE_TOKENIZER))


@pytest.fixture(scope="module", params=KINDS, ids=str)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> tuple[GPTModel, Path]:
    """A model of each kind, and the folder that the command exported it to."""
    folder = tmp_path_factory.mktemp("export")
    model = random_model(tokenizer.vocab_size, **KINDS[request.param])
    save_experiment(folder / "exp", model)
    result = call_command("export_hf.py", "--exp_dir", folder / "exp", "--output_dir", folder / "hf")
    assert result.returncode == 0, result.stderr
    return model, folder / "hf"


def test_transformers_computes_and_generates_the_same(exported: tuple[GPTModel, Path], tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, folder = exported
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == {"gpt2": "GPT2LMHeadModel", "modern": "Qwen3ForCausalLM"}[model.config.arch]
    assert theirs.dtype == torch.float32
    ids = torch.randint(model.config.vocab_size, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, expected = theirs(ids).logits, model(ids)[..., : model.config.vocab_size]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    prompt = their_tokenizer("雨の日に", return_tensors="pt")["input_ids"]  # it begins with end-of-text, as in training
    assert prompt[0].tolist() == [tokenizer.end_of_text_id, *tokenizer.encode("雨の日に")]
    generated = theirs.generate(prompt, do_sample=False, max_new_tokens=20)[0, prompt.shape[1] :].tolist()
    ours = generate(
        model, [prompt[0].tolist()], SamplingSettings(temperature=0), max_new_tokens=20, context_length=CONTEXT,
        end_of_text_id=tokenizer.end_of_text_id, banned_ids=tokenizer.never_generated, generators=[torch.Generator()],
    )  # fmt: skip
    expected_ids = [new[0] for new in ours]
    assert len(set(expected_ids)) > 5
    assert generated == expected_ids + [tokenizer.end_of_text_id] * (len(generated) - len(expected_ids))


def test_loading_an_export_gives_the_same_weights(exported: tuple[GPTModel, Path], tokenizer: Tokenizer) -> None:
    model, folder = exported
    dimensions = huggingface.read_dimensions(str(folder))
    assert dimensions.pop("vocab_size") == tokenizer.vocab_size
    loaded = GPTModel(GPTConfig(tokenizer.vocab_size, **dimensions))
    huggingface.load_weights(str(folder), loaded)
    expected = model.state_dict()
    if not model.config.qkv_bias and model.config.arch == "gpt2":  # transformers' GPT-2 has these biases
        expected |= {f"trf_blocks.{i}.att.qkv.bias": torch.zeros(3 * 48) for i in range(2)}
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        n_rows = tokenizer.vocab_size if name in ("tok_emb.weight", "out_head.weight") else len(tensor)
        assert torch.equal(tensor[:n_rows], expected[name][:n_rows]), name
    again, _ = huggingface.to_hf(loaded.state_dict(), vars(loaded.config), tokenizer.end_of_text_id)
    known = load_file(folder / "model.safetensors")
    assert again.keys() == known.keys()
    assert all(torch.equal(again[name], known[name]) for name in known)


def test_the_folder_holds_a_card_and_what_transformers_reads(exported: tuple[GPTModel, Path]) -> None:
    model, folder = exported
    card = (folder / "README.md").read_text("utf-8")
    for part in (f"{model.n_parameters():,}", "language: ja", "吾輩は", "使い方 / Use", "限界 / Limits"):
        assert part in card
    assert "aozorabunko" not in card  # nothing says that it was trained on that
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    names = {"README.md", "config.json", "export.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}


def test_new_tokens_start_as_the_mean_of_the_others(exported: tuple[GPTModel, Path], tokenizer: Tokenizer) -> None:
    model, folder = exported
    dimensions = huggingface.read_dimensions(str(folder)) | {"vocab_size": tokenizer.vocab_size + 1}
    wider = GPTModel(GPTConfig(**dimensions))
    huggingface.load_weights(str(folder), wider)
    known = model.tok_emb.weight[: tokenizer.vocab_size]
    torch.testing.assert_close(wider.tok_emb.weight[tokenizer.vocab_size], known.mean(0))
    assert torch.equal(wider.tok_emb.weight[: tokenizer.vocab_size], known)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, sample_shards: Path) -> tuple[Path, list[object]]:
    """The folder of a run that has learned something and of its export, and the run's arguments."""
    folder = tmp_path_factory.mktemp("learned")
    arguments: list[object] = [
        "--data_dir", sample_shards, "--use_pretokenized", "--pretokenized_dir", folder / "pretok", "--batch_size", 8,
        "--eval_freq", 20, "--device", "cpu", "--val_fraction", 0.2,
    ]  # fmt: skip
    size = ("--context_length", 32, "--emb_dim", 32, "--n_layers", 1, "--n_heads", 2, "--max_steps", 60)
    tokenizer = ("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER)
    result = call_command("pretraining.py", *arguments, *size, *tokenizer, "--output_dir", folder / "exp")
    assert result.returncode == 0, result.stderr
    result = call_command("export_hf.py", "--exp_dir", folder / "exp", "--output_dir", folder / "hf")
    assert result.returncode == 0, result.stderr
    return folder, arguments


@pytest.mark.slow
def test_training_starts_from_an_export_and_resumes_without_it(
    learned: tuple[Path, list[object]], tmp_path: Path
) -> None:
    folder, arguments = learned
    start = Path(shutil.copytree(folder / "hf", tmp_path / "hf"))
    before = read_jsonl(folder / "exp" / "metrics.jsonl")
    run = ("pretraining.py", *arguments, "--output_dir", tmp_path / "exp", "--lr", 0.002, "--adam_lr", 0.002)
    result = call_command(*run, "--init_from", start, "--max_steps", 100)
    assert result.returncode == 0, result.stderr
    assert f"start: the weights of {start}" in result.stdout
    after = read_jsonl(tmp_path / "exp" / "metrics.jsonl")
    assert after[-1]["step"] == 100
    assert before[0]["train_loss"] > before[-1]["train_loss"] + 0.2
    assert after[0]["train_loss"] < before[-1]["train_loss"] + 0.05  # it starts where the other run ended

    start.rename(tmp_path / "moved")  # a resumed run does not need it, and does not start from it again
    result = call_command(*run, "--init_from", start, "--max_steps", 102)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert "start: the weights" not in result.stdout
    (tmp_path / "moved").rename(start)
    assert_user_error(call_command(*run, "--init_from", "moved", "--max_steps", 104), "--init_from")

    models = ("--exp_dir", folder / "exp", tmp_path / "exp", "--hf_model", folder / "hf")
    result = call_command("evaluate_model.py", *models, "--text_path", SAMPLE, "--max_chars", 3000)
    assert result.returncode == 0, result.stderr
    first, second, exported = json.loads(result.stdout)
    assert exported["bits_per_char"] == pytest.approx(first["bits_per_char"], rel=1e-3)
    assert second["bits_per_char"] != pytest.approx(first["bits_per_char"], rel=1e-3)
    table = result.stderr.splitlines()[-4:]
    assert table[0].split()[0] == "bits/char"
    assert [row.split()[0] for row in table[1:]] == sorted(row.split()[0] for row in table[1:])


def test_the_card_names_the_loss_and_the_dataset(learned: tuple[Path, list[object]], tmp_path: Path) -> None:
    folder, _ = learned
    val_loss = read_jsonl(folder / "exp" / "metrics.jsonl")[-1]["val_loss"]
    card = (folder / "hf" / "README.md").read_text("utf-8")
    assert f"{val_loss:.4f} nats/token" in card
    assert "datasets:" not in card  # the text is not from there
    shutil.copytree(folder / "exp", tmp_path / "exp")
    run = json.loads((tmp_path / "exp" / "config.json").read_text("utf-8"))
    assert run["text"] == "sample.jsonl"
    (tmp_path / "exp" / "config.json").write_text(json.dumps(run | {"text": "aozorabunko-dedupe-clean.jsonl"}))
    result = call_command("export_hf.py", "--exp_dir", tmp_path / "exp", "--output_dir", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert "license: cc-by-4.0" in card
    assert "globis-university/aozorabunko-clean" in card


def test_an_export_of_an_unchanged_import_is_the_same(learned: tuple[Path, list[object]], tmp_path: Path) -> None:
    """Where training changes no weight, the weights that are exported are those that were loaded, bit for bit."""
    folder, arguments = learned
    line = [*arguments, "--init_from", folder / "hf", "--output_dir", tmp_path / "exp", "--optimizer", "adamw"]
    result = call_command("pretraining.py", *line, "--max_steps", 1, "--warmup_steps", 1, "--lr", 1e-30)
    assert result.returncode == 0, result.stderr
    assert read_tensors(choose_checkpoint(str(tmp_path / "exp"), "newest"), "model.safetensors", torch.device("cpu"))
    result = call_command("export_hf.py", "--exp_dir", tmp_path / "exp", "--output_dir", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (folder / "hf" / "model.safetensors").read_bytes()


def test_mistakes_are_errors_of_one_line(
    learned: tuple[Path, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments = learned
    (tmp_path / "mine.txt").write_text("mine")
    export = ("export_hf.py", "--exp_dir", folder / "exp", "--output_dir")
    assert_user_error(call_command(*export, tmp_path), str(tmp_path), "mine.txt")
    assert_user_error(call_command(*export, tmp_path / "mine.txt"), "is a file")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert_user_error(call_command(*export, tmp_path / "x", "--text_path", tmp_path / "no.txt"), "no.txt")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    push = call_command(*export, tmp_path / "hf", "--push_to_hub", "me/model")
    assert_user_error(push, "--push_to_hub me/model", "is written", "hf auth login")
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert_user_error(call_command(*export, "."), "is in use")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "export.json").write_text('{"mine": true}')
    assert_user_error(call_command(*export, tmp_path / "foreign"), "export.json")
    shutil.copytree(folder / "hf", tmp_path / "both")
    shutil.copytree(
        folder / "exp", tmp_path / "both" / "model_checkpoints"
    )  # it must not be taken for a part of the export
    assert_user_error(call_command(*export, tmp_path / "both"), "model_checkpoints")
    assert (tmp_path / "both" / "model_checkpoints" / "latest").exists()
    if HAS_LINKS:
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        assert_user_error(call_command(*export, tmp_path / "loop"), "loop")
    init = ("pretraining.py", *arguments, "--output_dir", tmp_path / "next", "--init_from")
    assert_user_error(call_command(*init, folder / "hf", "--n_layers", 3), "--n_layers", "leave it out")
    assert_user_error(call_command(*init, folder / "hf", "--context_length", 64), "--context_length 64", "32")
    assert_user_error(call_command(*init, folder / "hff"), "--init_from", "did you mean")
    shutil.copytree(folder / "hf", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert_user_error(call_command(*init, tmp_path / "pickled"), "no model.safetensors", "pickle")
    assert not (tmp_path / "next").exists()
    evaluate = ("evaluate_model.py", "--text_path", SAMPLE)
    assert_user_error(call_command(*evaluate), "--exp_dir", "--hf_model")
    assert_user_error(call_command(*evaluate, "--hf_model", tmp_path / "pickled"), "--hf_model", "pickled")


def test_a_tokenizer_that_cannot_be_exported_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier export stays as it was, and no folder is made. A unigram model with bytes goes to transformers only."""
    unigram = load_sentencepiece(str(Path(__file__).parent / "data" / "llama_cpp" / "unigram.model"))
    model = random_model(unigram.vocab_size, **KINDS["modern"])
    save_experiment(tmp_path / "exp", model, unigram)
    gguf = ("export_hf.py", "--exp_dir", tmp_path / "exp", "--format", "gguf", "--output_dir")
    why = ("llama.cpp has no bytes for the unknown characters of a unigram model", "--model_type bpe", "--format hf")
    assert_user_error(call_command(*gguf, tmp_path / "new" / "gguf"), *why)
    assert not (tmp_path / "new").exists()
    hf = ("export_hf.py", "--exp_dir", tmp_path / "exp", "--output_dir", tmp_path / "hf")
    assert call_command(*hf).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert_user_error(call_command(*gguf, tmp_path / "hf"), *why)
    monkeypatch.setattr(tokenizer_export, "compare_tokenizers", lambda *_: ("雨の日に", 0))
    assert_user_error(call_command(*hf), "'雨の日に'", "nothing is written", "train one by dataset/train_tokenizer.py")
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["exp", "hf"]


def test_llama_cpp_generates_the_same(learned: tuple[Path, list[object]], tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Where llama-cpp-python is installed, which has to be compiled; benchmarks/checks/export_truth.py checks more."""
    llama_cpp = pytest.importorskip("llama_cpp")
    folder, _ = learned
    result = call_command(
        "export_hf.py", "--exp_dir", folder / "exp", "--output_dir", tmp_path / "out", "--format", "gguf"
    )
    assert result.returncode == 0, result.stderr
    llama = llama_cpp.Llama(str(tmp_path / "out" / "model-f16.gguf"), n_ctx=32, verbose=False, n_threads=1)
    text = "雨の日に𠮟られた。\n　「ABC」"
    assert llama.tokenize(text.encode()) == [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    prompt = llama.tokenize("雨の".encode())
    found = list(itertools.islice(llama.generate(prompt, temp=0, top_k=1, repeat_penalty=1.0), 20))
    model = GPTModel(GPTConfig(**huggingface.read_dimensions(str(folder / "hf")))).eval()
    huggingface.load_weights(str(folder / "hf"), model)
    ours = generate(
        model, [prompt], SamplingSettings(temperature=0), max_new_tokens=20, context_length=32, end_of_text_id=-1,
        banned_ids=(), generators=[torch.Generator()],
    )  # fmt: skip
    assert found == [new[0] for new in ours]


def test_an_interrupted_export_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hf"
    for content in ("first", "second"):
        with replace_folder(folder) as partial:
            (partial / "x").write_text(content)
        assert (folder / "x").read_text() == content
    replace = os.replace

    def interrupt(source: Any, target: Any) -> None:
        if Path(target) == folder and ".partial" in str(source):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt), replace_folder(folder) as partial:
        (partial / "x").write_text("third")
    monkeypatch.undo()
    assert (folder / "x").read_text() == "second"
    assert os.listdir(tmp_path) == ["hf"]
    replace(folder, tmp_path / ".hf.old")  # as after a kill between the two renames
    with pytest.raises(ZeroDivisionError), replace_folder(folder):
        _ = 1 / 0
    assert (folder / "x").read_text() == "second"


def test_the_card_of_an_odd_run_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer.vocab_size, **KINDS["modern"])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": "x", "val_loss": [1]}\n{"step": 4}\n')
    for run in (
        [],
        {"settings": []},
        {"tokens": "<script>\n---\nx: 1; a path", "settings": {"init_from": "rinna/gpt"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(run))
        card = model_card(tmp_path, {"step": 4}, model, tokenizer, ["雨が\n降る"], is_averaged=False)
        assert card.count("\n---\n") == 1
        assert "a path" not in card
    assert "base_model: rinna/gpt" in card


def test_upload_without_a_network_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = next(base for base in huggingface_hub.errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    client = importlib.import_module(base.__module__.partition(".")[0])  # httpx or httpx2, as the hub's library has it

    class Api:
        def create_repo(self, *args: Any, **settings: Any) -> str:
            raise client.ConnectError("no route to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(UserError, match=r"--push_to_hub me/model: .* \(no route to host\); log in"):
        export_hf.upload(tmp_path, "me/model", private=True)


def test_upload_makes_the_repository_and_leaves_out_our_own_file(
    learned: tuple[Path, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Api:
        def create_repo(self, *args: Any, **settings: Any) -> str:
            calls.append((args, settings))
            return "https://hub/me/model"

        def upload_folder(self, **settings: Any) -> None:
            calls.append(((), settings))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder, _ = learned
    export_hf.upload(folder / "hf", "me/model", private=True)
    assert calls == [
        (("me/model",), {"private": True, "exist_ok": True}),
        ((), {"repo_id": "me/model", "folder_path": folder / "hf", "ignore_patterns": ["export.json"]}),
    ]
