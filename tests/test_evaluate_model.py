"""evaluate_model.py on a checkpoint of a tiny run: figures computed token by token, and what users get wrong."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import SAMPLE_TOKENIZER, assert_user_error, call_command, write_jsonl
from safetensors.torch import load_file, save_file

import evaluate_model
from evaluate_model import EvaluationConfig
from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.training.checkpoints import write_checksums

CONTEXT = 16  # of `trained`
DOCUMENTS = ["雨が降る。\n　猫が鳴いた。ABC𠮟る\n" * 5, "風。", "「行こう」と言って、二人は坂を下りた。"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)


@pytest.fixture
def measured(capsys: pytest.CaptureFixture[str]):
    """A function that evaluates, and returns what was printed to standard output and to standard error."""

    def measure(exp_dir: Path, text_path: Path, **settings: object) -> tuple[dict, str]:
        evaluate_model.run(EvaluationConfig(exp_dir=(str(exp_dir),), text_path=str(text_path), **settings))
        out, err = capsys.readouterr()
        assert out.endswith("}\n")
        return json.loads(out), err

    return measure


def checkpoint_of(trained: Path) -> Path:
    (folder,) = trained.glob("model_checkpoints/step_*")
    return folder


def bits_token_by_token(folder: Path, documents: list[str], stride: int) -> tuple[float, int]:
    """Return (bits, tokens), computing each token alone, in the first window that has half a context before it."""
    dimensions = json.loads((folder / "state.json").read_text("utf-8"))["identity"]["model"]
    model = GPTModel(GPTConfig(**dimensions)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(next(SAMPLE_TOKENIZER.glob("*.model"))))
    bits, n_tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([processor.eos_id(), *processor.encode(document), processor.eos_id()])
        n_tokens += len(ids) - 1
        for i in range(1, len(ids)):
            starts = (s for s in range(0, i, stride) if i - s <= CONTEXT and (s == 0 or i - s >= CONTEXT / 2))
            with torch.no_grad():
                logits = model(ids[None, next(starts) : i])[0, -1].double()
            bits -= logits.log_softmax(0)[ids[i]].item() / math.log(2)
    return bits, n_tokens


def test_the_command_prints_one_object(trained: Path, text: Path) -> None:
    result = call_command("evaluate_model.py", "--exp_dir", trained, "--text_path", text)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    folder = checkpoint_of(trained)
    bits, n_tokens = bits_token_by_token(folder, DOCUMENTS, stride=CONTEXT // 2)
    assert n_tokens > 5 * CONTEXT  # so that documents are longer than the context
    assert found == {
        "bits_per_char": pytest.approx(bits / sum(map(len, DOCUMENTS)), rel=1e-5),
        "loss": pytest.approx(bits * math.log(2) / n_tokens, rel=1e-5),
        "perplexity": pytest.approx(2 ** (bits / n_tokens), rel=1e-4),
        "tokens": n_tokens,
        "characters": sum(map(len, DOCUMENTS)),
        "works": 3,
        "unknown_tokens": 0,
        "checkpoint": str(folder),
        "tokenizer": str(SAMPLE_TOKENIZER),
    }
    assert "\r" not in result.stderr  # no progress bar in a file
    assert f"{n_tokens} of {n_tokens} tokens, " in result.stderr


def test_stride_batch_size_and_precision(measured, trained: Path, text: Path) -> None:
    first, _ = measured(trained, text)
    for batch_size in (1, 3):
        again, _ = measured(trained, text, batch_size=batch_size)
        assert again["bits_per_char"] == pytest.approx(first["bits_per_char"], rel=1e-6)
    closer, _ = measured(trained, text, stride=3)
    assert closer["bits_per_char"] == pytest.approx(
        bits_token_by_token(checkpoint_of(trained), DOCUMENTS, stride=3)[0] / sum(map(len, DOCUMENTS)), rel=1e-5
    )
    for dtype, tolerance in (("bfloat16", 0.02), ("float16", 0.002)):
        rough, _ = measured(trained, text, dtype=dtype)
        assert rough["bits_per_char"] != first["bits_per_char"]
        assert rough["bits_per_char"] == pytest.approx(first["bits_per_char"], rel=tolerance)


def test_the_first_documents_alone(measured, trained: Path, text: Path) -> None:
    found, _ = measured(trained, text, max_chars=len(DOCUMENTS[0]) + 2)
    assert (found["works"], found["characters"]) == (2, len(DOCUMENTS[0]) + 2)


def sign(checkpoint: Path) -> None:
    """Write checksums of the files that a test has changed."""
    write_checksums(checkpoint, [path for path in checkpoint.rglob("*.*") if path.is_file()])


def test_newest_and_best(measured, trained: Path, text: Path, tmp_path: Path) -> None:
    """The newest checkpoint has a higher validation loss and weights that are all zero."""
    copy = Path(shutil.copytree(trained, tmp_path / "exp"))
    best = checkpoint_of(copy)
    newest = Path(shutil.copytree(best, best.with_name("step_00000003")))
    save_file({k: w * 0 for k, w in load_file(best / "model.safetensors").items()}, newest / "model.safetensors")
    state = json.loads((newest / "state.json").read_text("utf-8"))
    (newest / "state.json").write_text(json.dumps(state | {"val_loss": state["val_loss"] + 1}), "utf-8")
    sign(newest)

    found, _ = measured(copy, text)
    assert found["checkpoint"] == str(newest)
    assert found["perplexity"] == pytest.approx(state["identity"]["model"]["vocab_size"], rel=1e-5)
    found, _ = measured(copy, text, checkpoint="best")
    assert found["checkpoint"] == str(best)
    assert found["bits_per_char"] == measured(trained, text)[0]["bits_per_char"]


def test_without_dropout(measured, trained: Path, text: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "exp"))
    state = json.loads((checkpoint_of(copy) / "state.json").read_text("utf-8"))
    state["identity"]["model"]["drop_rate"] = 0.5
    (checkpoint_of(copy) / "state.json").write_text(json.dumps(state), "utf-8")
    sign(checkpoint_of(copy))
    assert measured(copy, text)[0]["loss"] == measured(trained, text)[0]["loss"]


def test_progress(measured, trained: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, quiet = measured(trained, text)
    assert quiet.count(" tokens/s, ETA ") == 1  # the last line, as less than a minute passed
    monkeypatch.setattr("gptkit.base.cli.QUIET_S", -1)
    _, chatty = measured(trained, text, batch_size=1)
    assert chatty.count(" tokens/s, ETA ") > found["tokens"] / CONTEXT
    assert f"\n{CONTEXT} of {found['tokens']} tokens, " in chatty

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, bar = measured(trained, text)
    assert " tokens/s, ETA " not in bar
    assert "evaluate: 100%" in bar


def test_out_of_memory(measured, trained: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate_model, "score_documents", fail)
    with pytest.raises(UserError, match="out of memory with --batch_size 4; give a smaller one"):
        measured(trained, text, batch_size=4)


def test_a_model_whose_loss_is_not_finite(measured, trained: Path, text: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "exp"))
    weights = checkpoint_of(copy) / "model.safetensors"
    known = load_file(weights)
    for value, message in ((3e38, "step_00000002 has a loss of "), (math.nan, "are not finite")):
        broken = known["final_norm.weight"].clone().fill_(value)
        save_file(known | {"final_norm.weight": broken}, weights)
        sign(weights.parent)
        with pytest.raises(UserError, match=message):
            measured(copy, text)


def test_settings_that_cannot_be(measured, trained: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--stride 17 is more than the model's context; give at most 16"):
        measured(trained, text, stride=17)
    with pytest.raises(UserError, match=f"--text_path {tmp_path} is not a file"):
        measured(trained, tmp_path)
    with pytest.raises(UserError, match="cuda:99"):
        measured(trained, text, device="cuda:99")


def test_what_users_get_wrong(trained: Path, text: Path, tmp_path: Path) -> None:
    def evaluate(text_path: Path, *more: object, exp_dir: Path = trained):
        result = call_command("evaluate_model.py", "--exp_dir", exp_dir, "--text_path", text_path, *more)
        assert result.stdout == ""
        return result

    assert_user_error(evaluate(tmp_path / "document.jsonl"), "--text_path", f"did you mean {text}?")
    (tmp_path / "empty").mkdir()
    assert_user_error(evaluate(text, exp_dir=tmp_path / "empty"), "empty", "holds no checkpoint")
    assert_user_error(evaluate(text, "--batch_size", 0), "--batch_size 0")
    (tmp_path / "blank.txt").write_text(" \n　\n", "utf-8")
    assert_user_error(evaluate(tmp_path / "blank.txt"), "blank.txt", "only blank documents")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text.read_text("utf-8") + "雨が降る。\n", "utf-8")
    result = evaluate(bad)
    assert_user_error(result, "bad.jsonl: line 4: not JSON")
    assert "parameters on" not in result.stderr  # it is found before the long computation
