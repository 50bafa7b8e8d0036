"""export_hf.py and --init_from: against transformers, which loads what was written, and sentencepiece and tiktoken."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SAMPLE, SAMPLE_TOKENIZER, SHARED, assert_user_error, run_command, save_experiment
from safetensors.torch import load_file, save_file
from test_strangers import small_tokenizer
from test_tokenization import OFFLINE

from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.base.files import replace_folder
from gptkit.generation.generate import generate
from gptkit.generation.sampling import SamplingSettings
from gptkit.interop import huggingface
from gptkit.interop.tokenizer_export import compare_tokenizers, export_tokenizer
from gptkit.text.backends import SentencePieceBackend
from gptkit.text.tokenizer import Tokenizer, load_hf, load_sentencepiece, load_tiktoken
from gptkit.training.checkpoints import choose_checkpoint, read_tensors
from gptkit.training.run_log import read_jsonl

CONTEXT = 48
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"arch": "gpt2", "n_heads": 4},
    "gpt2 without biases": {"arch": "gpt2", "n_heads": 2, "qkv_bias": False},
    "modern": {"arch": "modern", "n_heads": 4, "n_kv_heads": 2, "rope_base": 5000.0},
    "modern tied": {"arch": "modern", "n_heads": 3, "head_width": 20, "ff_width": 72, "tied_head": True},
}
TRAPS = ["", " ", "  二つの空白  ", "　全角", "ABC Ａｂｃ １２３", "𠮟る😀", "</s><unk>[PAD]<|endoftext|>", "\t", "か\u3099が", "a\u00a0b", "ﾊﾝｶｸ…", "ﾊﾟﾘのｶﾞｽ"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_sentencepiece(str(SAMPLE_TOKENIZER))


@pytest.fixture(scope="module")
def lines(sample_works: list[str]) -> list[str]:
    found = [line for work in sample_works for line in work.split("\n")]
    return [*TRAPS, *found[:300], *sample_works[:5]]


def random_model(vocab_size: int, **kind: Any) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size, context_length=CONTEXT, emb_dim=48, n_layers=2, **kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    return model


@pytest.fixture(scope="module", params=KINDS, ids=str)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> tuple[GPTModel, Path, Path]:
    """A model, its experiment, and the folder that the real command made of it."""
    folder = tmp_path_factory.mktemp("export")
    model = random_model(tokenizer.vocab_size, **KINDS[request.param])
    save_experiment(folder / "exp", model)
    result = run_command("export_hf.py", "--exp_dir", folder / "exp", "--output_dir", folder / "hf")
    assert result.returncode == 0, result.stderr
    return model, folder / "exp", folder / "hf"


def test_transformers_computes_and_writes_the_same(exported: tuple[GPTModel, Path, Path], tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, _, folder = exported
    theirs, reads = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == {"gpt2": "GPT2LMHeadModel", "modern": "Qwen3ForCausalLM"}[model.config.arch]
    assert theirs.dtype == torch.float32
    ids = torch.randint(model.config.vocab_size, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, expected = theirs(ids).logits, model(ids)[..., : model.config.vocab_size]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    prompt = reads("雨の日に", return_tensors="pt")["input_ids"]  # it puts end-of-text before it, as in training
    assert prompt[0].tolist() == [tokenizer.end_of_text_id, *tokenizer.encode("雨の日に")]
    written = theirs.generate(prompt, do_sample=False, max_new_tokens=20)[0, prompt.shape[1] :].tolist()
    ours = generate(
        model, [prompt[0].tolist()], SamplingSettings(temperature=0), max_new_tokens=20, context_length=CONTEXT,
        end_of_text_id=tokenizer.end_of_text_id, banned_ids=tokenizer.never_generated, generators=[torch.Generator()],
    )  # fmt: skip
    expected_ids = [new[0] for new in ours]
    assert len(set(expected_ids)) > 5
    assert written == expected_ids + [tokenizer.end_of_text_id] * (len(written) - len(expected_ids))


def test_the_way_back_gives_the_same_weights(exported: tuple[GPTModel, Path, Path], tokenizer: Tokenizer) -> None:
    model, _, folder = exported
    dimensions = huggingface.read_dimensions(str(folder))
    assert dimensions.pop("vocab_size") == tokenizer.vocab_size
    back = GPTModel(GPTConfig(tokenizer.vocab_size, **dimensions))
    huggingface.load_weights(str(folder), back)
    expected = model.state_dict()
    if not model.config.qkv_bias and model.config.arch == "gpt2":  # GPT-2's form has such biases
        expected |= {f"trf_blocks.{i}.att.qkv.bias": torch.zeros(3 * 48) for i in range(2)}
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        n_words = tokenizer.vocab_size if name in ("tok_emb.weight", "out_head.weight") else len(tensor)
        assert torch.equal(tensor[:n_words], expected[name][:n_words]), name
    again, _ = huggingface.to_hf(back.state_dict(), vars(back.config), tokenizer.end_of_text_id)
    known = load_file(folder / "model.safetensors")
    assert again.keys() == known.keys()
    assert all(torch.equal(again[name], known[name]) for name in known)


def test_what_stands_in_the_folder(exported: tuple[GPTModel, Path, Path]) -> None:
    model, _, folder = exported
    card = (folder / "README.md").read_text("utf-8")
    for part in (f"{model.n_parameters():,}", "language: ja", "吾輩は", "使い方 / Use", "限界 / Limits"):
        assert part in card
    assert "aozorabunko" not in card  # nobody said that it was trained on that
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    names = {"README.md", "config.json", "export.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}


def rinna_like(works: list[str], folder: Path, model_type: str) -> Tokenizer:
    """A tokenizer with the habits of rinna's: lower case only, NFKC, a space before each line, no newline, no bytes."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.lower() for work in works for line in work.split("\n") if line),
        model_prefix=str(folder / "spiece"), model_type=model_type, vocab_size=1500, character_coverage=0.98,
        user_defined_symbols=["[CLS]"], pad_id=3, pad_piece="[PAD]", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "eos_token": "</s>"}')
    return load_hf(str(folder))


def same_there(tokenizer: Tokenizer, folder: Path, lines: list[str]) -> tuple[str | None, int]:
    folder.mkdir()
    for name, content in export_tokenizer(tokenizer, CONTEXT).items():
        (folder / name).write_bytes(content)
    return compare_tokenizers(tokenizer, folder, lines)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_tokenizer_like_rinnas(model_type: str, tmp_path: Path, sample_works: list[str], lines: list[str]) -> None:
    tokenizer = rinna_like(sample_works, tmp_path, model_type)
    assert tokenizer.newline_id is not None
    assert tokenizer.unknown_id in [i for line in lines for i in tokenizer.encode(line)]
    different, n_ties = same_there(tokenizer, tmp_path / "hf", lines)
    assert different is None
    assert n_ties <= 1  # the names of special tokens, all of whose characters are unknown here
    again = load_hf(str(tmp_path / "hf"))  # what --init_from reads
    texts = lines[len(TRAPS) :]
    assert [again.encode(line) for line in texts] == [tokenizer.encode(line) for line in texts]
    assert again.end_of_text_id == tokenizer.end_of_text_id


@pytest.mark.skipif(not SHARED.is_dir(), reason="rinna's tokenizer is not part of the repository")
def test_rinnas_tokenizer(tmp_path: Path, lines: list[str]) -> None:
    different, n_ties = same_there(load_hf(str(SHARED / "rinna-japanese-gpt2-small")), tmp_path / "hf", lines)
    assert different is None
    assert n_ties <= 1


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers", "tiktoken", "cl100k"])
def test_other_tokenizers(kind: str, tmp_path: Path, lines: list[str]) -> None:
    if kind == "tiktoken":  # of so few bytes that what is between them has no id
        lines = ["のの のの", "の"]
    tokenizer = load_tiktoken(OFFLINE) if kind == "cl100k" else small_tokenizer(kind)
    assert same_there(tokenizer, tmp_path / "hf", lines) == (None, 0)


def test_a_tokenizer_that_comes_out_otherwise_is_seen(tmp_path: Path, tokenizer: Tokenizer, lines: list[str]) -> None:
    same_there(tokenizer, tmp_path / "hf", [])
    path = tmp_path / "hf" / "tokenizer.json"
    made = json.loads(path.read_text("utf-8"))
    made["model"]["merges"] = made["model"]["merges"][:200]
    path.write_text(json.dumps(made), "utf-8")
    different, _ = compare_tokenizers(tokenizer, tmp_path / "hf", lines)
    assert different in lines


def test_a_tie_may_fall_either_way(tmp_path: Path) -> None:
    """Two ways to read a text that a model finds equally likely are one text; two that it does not are a difference."""

    class ByCharacters(SentencePieceBackend):
        tied = True

        def encode_lines(self, lines: Any) -> list[list[int]]:
            return [
                [i for character in line for i in super(ByCharacters, self).encode_lines([character])[0]]
                for line in lines
            ]

        def score(self, ids: Any) -> float:
            return -1.0 if self.tied else super().score(ids)

    backend = ByCharacters((SAMPLE_TOKENIZER / "spiece.model").read_bytes())
    tokenizer = Tokenizer(backend, "x", "</s>")
    assert same_there(tokenizer, tmp_path / "hf", ["雨が降っていた。"]) == (None, 1)
    backend.tied = False
    assert compare_tokenizers(tokenizer, tmp_path / "hf", ["雨", "雨が降っていた。"]) == ("雨が降っていた。", 0)


def test_new_words_begin_as_the_mean_of_the_others(exported: tuple[GPTModel, Path, Path], tokenizer: Tokenizer) -> None:
    model, _, folder = exported
    dimensions = huggingface.read_dimensions(str(folder)) | {"vocab_size": tokenizer.vocab_size + 1}
    wider = GPTModel(GPTConfig(**dimensions))
    huggingface.load_weights(str(folder), wider)
    known = model.tok_emb.weight[: tokenizer.vocab_size]
    torch.testing.assert_close(wider.tok_emb.weight[tokenizer.vocab_size], known.mean(0))
    assert torch.equal(wider.tok_emb.weight[: tokenizer.vocab_size], known)


def test_transformers_own_qwen3_and_gpt2_can_be_taken_in(tmp_path: Path) -> None:
    """Shapes that ours does not choose itself, more rows than words, in bfloat16, in several files."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 140, "bos_token_id": 0, "eos_token_id": 0}
    qwen3 = Qwen3Config(
        hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=64, tie_word_embeddings=True, **small,
    )  # fmt: skip
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **small)
    ids = torch.randint(100, (2, 40))
    for theirs in (Qwen3ForCausalLM(qwen3), GPT2LMHeadModel(gpt2)):
        folder = tmp_path / type(theirs).__name__
        theirs.bfloat16().save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        model = GPTModel(GPTConfig(**huggingface.read_dimensions(str(folder)) | {"vocab_size": 130})).eval()
        huggingface.load_weights(str(folder), model)
        theirs = type(theirs).from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            found, expected = model(ids)[..., :130], theirs(ids).logits[..., :130]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sample_shards: Path) -> tuple[Path, list[object]]:
    """An experiment that has learnt something, and its command line."""
    folder = tmp_path_factory.mktemp("trained")
    arguments: list[object] = [
        "--data_dir", sample_shards, "--use_pretokenized", "--pretokenized_dir", folder / "pretok", "--batch_size", 8,
        "--eval_freq", 20, "--device", "cpu", "--val_fraction", 0.2,
    ]  # fmt: skip
    size = ("--context_length", 32, "--emb_dim", 32, "--n_layers", 1, "--n_heads", 2, "--max_steps", 60)
    tokenizer = ("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER)
    result = run_command("pretraining.py", *arguments, *size, *tokenizer, "--output_dir", folder / "exp")
    assert result.returncode == 0, result.stderr
    result = run_command("export_hf.py", "--exp_dir", folder / "exp", "--output_dir", folder / "hf")
    assert result.returncode == 0, result.stderr
    return folder, arguments


def test_training_goes_on_from_a_folder(trained: tuple[Path, list[object]]) -> None:
    folder, arguments = trained
    before = read_jsonl(folder / "exp" / "metrics.jsonl")
    line = [*arguments, "--init_from", folder / "hf", "--output_dir", folder / "on", "--lr", 0.002, "--adam_lr", 0.002]
    result = run_command("pretraining.py", *line, "--max_steps", 100)
    assert result.returncode == 0, result.stderr
    assert f"start: the weights of {folder / 'hf'}" in result.stdout
    after = read_jsonl(folder / "on" / "metrics.jsonl")
    assert after[-1]["step"] == 100
    assert before[0]["train_loss"] > before[-1]["train_loss"] + 0.2
    assert after[0]["train_loss"] < before[-1]["train_loss"] + 0.05  # from where the other had ended
    card = (folder / "hf" / "README.md").read_text("utf-8")
    assert f"{before[-1]['val_loss']:.4f} nats/token" in card
    assert "datasets:" not in card  # this text is another
    run = json.loads((folder / "exp" / "config.json").read_text("utf-8"))
    assert run["text"] == "sample.jsonl"
    (folder / "exp" / "config.json").write_text(json.dumps(run | {"text": "aozorabunko-dedupe-clean.jsonl"}))
    result = run_command("export_hf.py", "--exp_dir", folder / "exp", "--output_dir", folder / "hf")
    assert result.returncode == 0, result.stderr
    card = (folder / "hf" / "README.md").read_text("utf-8")
    assert "license: cc-by-4.0" in card
    assert "globis-university/aozorabunko-clean" in card

    (folder / "hf").rename(folder / "moved")  # the run goes on without it, and does not begin with it again
    result = run_command("pretraining.py", *line, "--max_steps", 102)
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout
    assert "start: the weights" not in result.stdout
    (folder / "moved").rename(folder / "hf")
    other = ["moved" if part == folder / "hf" else part for part in line]
    assert_user_error(run_command("pretraining.py", *other, "--max_steps", 104), "--init_from")

    models = ("--exp_dir", folder / "exp", folder / "on", "--hf_model", folder / "hf")
    result = run_command("evaluate_model.py", *models, "--text_path", SAMPLE, "--max_chars", 3000)
    assert result.returncode == 0, result.stderr
    first, second, exported = json.loads(result.stdout)
    assert exported["bits_per_char"] == pytest.approx(first["bits_per_char"], rel=1e-3)
    assert second["bits_per_char"] != pytest.approx(first["bits_per_char"], rel=1e-3)
    table = result.stderr.splitlines()[-4:]
    assert table[0].split()[0] == "bits/char"
    assert [row.split()[0] for row in table[1:]] == sorted(row.split()[0] for row in table[1:])


def test_no_steps_and_an_export_again_change_nothing(trained: tuple[Path, list[object]], tmp_path: Path) -> None:
    """Training that does not move a weight: what comes out is what went in, bit for bit."""
    folder, arguments = trained
    line = [*arguments, "--init_from", folder / "hf", "--output_dir", tmp_path / "exp", "--optimizer", "adamw"]
    result = run_command("pretraining.py", *line, "--max_steps", 1, "--warmup_steps", 1, "--lr", 1e-30)
    assert result.returncode == 0, result.stderr
    assert read_tensors(choose_checkpoint(str(tmp_path / "exp"), "newest"), "model.safetensors", torch.device("cpu"))
    result = run_command("export_hf.py", "--exp_dir", tmp_path / "exp", "--output_dir", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (folder / "hf" / "model.safetensors").read_bytes()


def test_what_users_get_wrong(trained: tuple[Path, list[object]], tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder, arguments = trained
    (tmp_path / "mine.txt").write_text("mine")
    export = ("export_hf.py", "--exp_dir", folder / "exp", "--output_dir")
    assert_user_error(run_command(*export, tmp_path), str(tmp_path), "mine.txt")
    assert_user_error(run_command(*export, tmp_path / "mine.txt"), "is a file")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert_user_error(run_command(*export, tmp_path / "x", "--text_path", tmp_path / "no.txt"), "no.txt")
    push = run_command(*export, tmp_path / "hf", "--push_to_hub", "me/model")
    assert_user_error(push, "--push_to_hub me/model", "is written", "hf auth login")
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert_user_error(run_command(*export, "."), "is in use")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "export.json").write_text('{"mine": true}')
    assert_user_error(run_command(*export, tmp_path / "foreign"), "export.json")
    shutil.copytree(folder / "hf", tmp_path / "both")
    shutil.copytree(folder / "exp", tmp_path / "both" / "model_checkpoints")  # not to be taken for part of an export
    assert_user_error(run_command(*export, tmp_path / "both"), "model_checkpoints")
    assert (tmp_path / "both" / "model_checkpoints" / "latest").exists()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_user_error(run_command(*export, tmp_path / "loop"), "loop")
    on = ("pretraining.py", *arguments, "--output_dir", tmp_path / "on", "--init_from")
    assert_user_error(run_command(*on, folder / "hf", "--n_layers", 3), "--n_layers", "leave it out")
    assert_user_error(run_command(*on, folder / "hf", "--context_length", 64), "--context_length 64", "32")
    assert_user_error(run_command(*on, folder / "hff"), "--init_from", "did you mean")
    shutil.copytree(folder / "hf", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert_user_error(run_command(*on, tmp_path / "pickled"), "no model.safetensors", "pickle")
    assert not (tmp_path / "on").exists()
    evaluate = ("evaluate_model.py", "--text_path", SAMPLE)
    assert_user_error(run_command(*evaluate), "--exp_dir", "--hf_model")
    assert_user_error(run_command(*evaluate, "--hf_model", tmp_path / "pickled"), "--hf_model", "pickled")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "llama"), ({"hidden_act": "gelu"}, "hidden_act"), ({"hidden_size": None}, "cannot be"),
        ({"num_attention_heads": 0}, "n_heads is 0"), ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"rope_parameters": ["x"]}, "cannot be"), ({"hidden_size": 2**70}, None), ({"num_hidden_layers": "x"}, None),
        ({"num_key_value_heads": 3}, None), ({"intermediate_size": -1}, None), ({"head_dim": "64"}, None),
        ({"num_hidden_layers": 1.0}, "whole number"), ({"num_hidden_layers": True}, "whole number"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_of_strangers(
    trained: tuple[Path, list[object]], tmp_path: Path, change: dict[str, Any], named: str | None
) -> None:
    """Each is refused in one line, or is another form's, which the weights do not fit."""
    folder, _ = trained
    shutil.copytree(folder / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((UserError, ValueError, TypeError), match=named):
        huggingface.load_weights(
            str(tmp_path / "hf"), GPTModel(GPTConfig(**huggingface.read_dimensions(str(tmp_path / "hf"))))
        )


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), "not finite"),
        (lambda tensors: tensors.pop("model.norm.weight"), "lack"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "quantized"),
        (lambda tensors: tensors.update({"model.layers.1.x": torch.ones(2)}), "more layers"),
        (lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(10, 32)}), "10 words"),
    ],
)
def test_weights_of_strangers(
    trained: tuple[Path, list[object]], tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], Any], named: str
) -> None:
    folder, _ = trained
    shutil.copytree(folder / "hf", tmp_path / "hf")
    tensors = load_file(folder / "hf" / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    model = GPTModel(GPTConfig(**huggingface.read_dimensions(str(tmp_path / "hf"))))
    with pytest.raises(UserError, match=named):
        huggingface.load_weights(str(tmp_path / "hf"), model)
    if named == "lack":  # transformers would begin with what is missing anew, in silence
        result = run_command("evaluate_model.py", "--hf_model", tmp_path / "hf", "--text_path", SAMPLE)
        assert_user_error(result, "--hf_model", "lack model.norm.weight")


def test_a_break_in_the_middle_leaves_one_whole_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hf"
    for content in ("first", "second"):
        with replace_folder(folder) as partial:
            (partial / "x").write_text(content)
        assert (folder / "x").read_text() == content
    real = os.replace

    def breaks(source: Any, target: Any) -> None:
        if Path(target) == folder and ".partial" in str(source):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", breaks)
    with pytest.raises(KeyboardInterrupt), replace_folder(folder) as partial:
        (partial / "x").write_text("third")
    monkeypatch.undo()
    assert (folder / "x").read_text() == "second"
    assert os.listdir(tmp_path) == ["hf"]
    real(folder, tmp_path / ".hf.old")  # as a kill between the two renames leaves it
    with pytest.raises(ZeroDivisionError), replace_folder(folder):
        _ = 1 / 0
    assert (folder / "x").read_text() == "second"


def test_odd_run_folders_have_a_card_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from gptkit.interop.model_card import model_card

    model = random_model(tokenizer.vocab_size, **KINDS["modern"])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": "x", "val_loss": [1]}\n{"step": 4}\n')
    for run in (
        [],
        {"settings": []},
        {"tokens": "<script>\n---\nx: 1; a path", "settings": {"init_from": "rinna/gpt"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(run))
        card = model_card(tmp_path, {"step": 4}, model, tokenizer, ["雨が\n降る"])
        assert card.count("\n---\n") == 1
        assert "a path" not in card
    assert "base_model: rinna/gpt" in card


def test_a_sum_of_files_that_leads_out_of_the_folder_does_not(
    trained: tuple[Path, list[object]], tmp_path: Path
) -> None:
    folder, _ = trained
    shutil.copytree(folder / "hf", tmp_path / "hf")
    outside = tmp_path / "outside.safetensors"
    save_file({"x": torch.zeros(1)}, outside)
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    model = GPTModel(GPTConfig(**huggingface.read_dimensions(str(tmp_path / "hf"))))
    with pytest.raises(UserError, match="No such file"):
        huggingface.load_weights(str(tmp_path / "hf"), model)


def test_an_upload(trained: tuple[Path, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    import export_hf

    told: list[tuple[Any, ...]] = []

    class Api:
        def create_repo(self, *args: Any, **settings: Any) -> str:
            told.append((args, settings))
            return "https://hub/me/model"

        def upload_folder(self, **settings: Any) -> None:
            told.append(((), settings))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder, _ = trained
    export_hf.push(folder / "hf", "me/model", private=True)
    assert told == [
        (("me/model",), {"private": True, "exist_ok": True}),
        ((), {"repo_id": "me/model", "folder_path": folder / "hf", "ignore_patterns": ["export.json"]}),
    ]


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_gguf(exported: tuple[GPTModel, Path, Path], tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    """Read back by the library's own reader: weights in their type, pieces, dimensions."""
    import gguf

    model, experiment, _ = exported
    result = run_command(
        "export_hf.py",
        "--exp_dir",
        experiment,
        "--output_dir",
        tmp_path / "out",
        "--format",
        "gguf",
        "--gguf_type",
        kind,
    )
    assert result.returncode == 0, result.stderr
    reader = gguf.GGUFReader(tmp_path / "out" / f"model-{kind}.gguf")
    arch = "gpt2" if model.config.arch == "gpt2" else "qwen3"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == arch
    assert fields[f"{arch}.context_length"] == CONTEXT
    assert fields[f"{arch}.block_count"] == 2
    assert fields["tokenizer.ggml.tokens"][:300] == tokenizer.backend.pieces()[:300]  # type: ignore[attr-defined]
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.end_of_text_id
    assert not fields["tokenizer.ggml.add_space_prefix"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert ("output.weight" in tensors) == (not model.config.is_tied)
    found = tensors["blk.1.ffn_down.weight"]
    values = gguf.quants.dequantize(found.data, found.tensor_type)
    expected = model.trf_blocks[1].ff.out_proj.weight.detach().numpy()  # type: ignore[union-attr]
    n_inputs = expected.shape[1]
    packed = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0" if n_inputs % 32 == 0 else "F16"}[kind]
    assert found.tensor_type.name == packed
    np.testing.assert_allclose(values, expected, atol={"F32": 0, "F16": 2e-3, "Q8_0": 1e-2}[packed])
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_a_gguf_of_a_tokenizer_that_llama_cpp_has_not(tmp_path: Path) -> None:
    from gptkit.interop.gguf import write_gguf

    model = random_model(500, **KINDS["modern"])
    tensors, config = huggingface.to_hf(model.state_dict(), vars(model.config), 0)
    with pytest.raises(UserError, match="is for SentencePiece tokenizers"):
        write_gguf(tmp_path / "x.gguf", tensors, config, small_tokenizer("tokenizers"), "f16")


def test_llama_cpp_reads_and_writes_the_same(trained: tuple[Path, list[object]], tmp_path: Path) -> None:
    """Where llama-cpp-python is installed, which has to be compiled: benchmarks/checks/export_truth.py tries more."""
    llama_cpp = pytest.importorskip("llama_cpp")
    folder, _ = trained
    result = run_command(
        "export_hf.py", "--exp_dir", folder / "exp", "--output_dir", tmp_path / "out", "--format", "gguf"
    )
    assert result.returncode == 0, result.stderr
    llama = llama_cpp.Llama(str(tmp_path / "out" / "model-f16.gguf"), n_ctx=32, verbose=False, n_threads=1)
    tokenizer = load_sentencepiece(str(SAMPLE_TOKENIZER))
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
