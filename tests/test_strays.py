"""What systems, editors and people leave beside the files that are meant: it is passed over, or refused by name."""

import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from conftest import SAMPLE, SAMPLE_TOKENIZER, SAMPLE_TOKENS, SEPARATOR, TINY_MODEL, assert_user_error, call_command
from test_tokenizer import hf_folder, sentencepiece_model
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from gptkit.base.cli import UserError
from gptkit.base.files import is_stray
from gptkit.base.paths import likely_path
from gptkit.data.text_shards import find_text_shards
from gptkit.text.check import raise_on_damage
from gptkit.text.tokenizer import Tokenizer, load_hf, load_sentencepiece
from gptkit.training.checkpoints import find_checkpoints, save_checkpoint, verify_checkpoint
from gptkit.training.loading import choose_checkpoint

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
STRAYS = (
    "._a.txt", ".DS_Store", "Thumbs.db", "desktop.ini", "a.txt~", "#a.txt#", ".a.txt.swp", ".#a.txt", "~$a.txt",
    "._train_combined_0001.npy", "._manifest.json", "._config.json", "._step_00000040", "._spiece.model",
)  # fmt: skip
FOLDERS = (".ipynb_checkpoints", "lost+found", ".Trash-1000")


def litter(folder: Path) -> Path:
    """Put such files and folders into a folder, and return it; none is text, or a file of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in STRAYS:
        (folder / name).write_bytes(APPLE_DOUBLE)
    for name in FOLDERS:
        (folder / name).mkdir()
        (folder / name / "a-checkpoint.txt").write_bytes(b"\xff")
    return folder


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} & {*STRAYS, *FOLDERS}


def test_which_names_are_strays() -> None:
    assert [name for name in (*STRAYS, *FOLDERS, "THUMBS.DB") if not is_stray(name)] == []
    meant = ("a.txt", "spiece.model", "spiece (1).model", "step_00000040", "#1.txt", "_a.txt", "manifest.json", "~.txt")
    assert [name for name in meant if is_stray(name)] == []


# Tokenizers


@pytest.fixture(scope="module")
def model(sample_texts: list[str]) -> bytes:
    """Return a model without byte fallback, so that characters can be unknown."""
    return sentencepiece_model(sample_texts, vocab_size=2000, normalization_rule_name="nmt_nfkc")


@pytest.fixture
def folder(tmp_path: Path, model: bytes) -> Path:
    return Path(hf_folder(tmp_path / "hf", model, eos_token="</s>", tokenizer_class="T5Tokenizer"))


def assert_reads_the_model(tokenizer: Tokenizer, model: bytes) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.encode("彼を𠮟る") == reference.encode("彼を𠮟る")
    assert reference.unk_id() in tokenizer.encode("彼を𠮟る")
    assert tokenizer.end_of_text_id != tokenizer.unknown_id == reference.unk_id()


@pytest.mark.parametrize(
    "name", ["._spiece.model", "spiece (1).model", "b.model", "a.model/", ".x.model", "spiece.model.bak", "a.model@"]
)
def test_what_lies_beside_a_model_is_passed_over(
    folder: Path,
    model: bytes,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By transformers' conversion, which two models gave before, unknown characters are end-of-text."""
    stray = folder / name.rstrip("/@")
    if name.endswith("/"):
        stray.mkdir()
    elif name.endswith("@"):
        stray.symlink_to(folder / "nowhere")
    else:
        stray.write_bytes(APPLE_DOUBLE)
    for load in (load_hf, load_sentencepiece):
        assert_reads_the_model(load(str(folder)), model)
        printed = capsys.readouterr().err
        note = f"note: {folder} is read from spiece.model; passed over: {stray.name}\n"
        assert printed == ("" if name.endswith(".bak") else note)


def test_a_snapshot_of_links_is_read(folder: Path, model: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """As the hub's cache keeps files."""
    (folder.parent / "blob").write_bytes(model)
    (folder / "spiece.model").unlink()
    (folder / "spiece.model").symlink_to(folder.parent / "blob")
    assert_reads_the_model(load_hf(str(folder)), model)
    (folder / "tokenizer.model").symlink_to(folder.parent / "blob")  # the same model by another name
    capsys.readouterr()
    assert_reads_the_model(load_hf(str(folder)), model)
    assert "read from spiece.model; passed over: tokenizer.model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 805634\n",
            "a pointer of Git LFS.*git lfs pull",
        ),
        (APPLE_DOUBLE, "not a SentencePiece model"),
        (None, "a folder, or a link to a file that does not exist"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_by_name(folder: Path, content: bytes | None, reason: str) -> None:
    (folder / "spiece.model").unlink()
    if content is None:
        (folder / "spiece.model").symlink_to("nowhere")
    else:
        (folder / "spiece.model").write_bytes(content)
    for load in (load_hf, load_sentencepiece):
        with pytest.raises(UserError, match=rf"spiece\.model.*{reason}"):
            load(str(folder))


def test_two_models_that_may_be_meant_are_refused(folder: Path) -> None:
    shutil.copy(SAMPLE_TOKENIZER / "spiece.model", folder / "tokenizer.model")
    with pytest.raises(
        UserError, match=r"different models, spiece\.model and tokenizer\.model; remove all but the one"
    ):
        load_hf(str(folder))
    with pytest.raises(UserError, match=r"2 \.model files \(spiece\.model, tokenizer\.model\); name the one"):
        load_sentencepiece(str(folder))


def test_a_tokenizer_json_beside_a_model_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may hold added tokens, so it is read; one that makes unknown characters end-of-text is refused for any text."""
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("彼", -1.0), ("を", -1.0), ("▁", -2.0), ("\n", -2.0)]
    for unk_id in (0, 1):
        HFTokenizer(models.Unigram(vocabulary, unk_id=unk_id)).save(str(folder / "tokenizer.json"))
        tokenizer = load_hf(str(folder))
        assert (
            f"note: {folder} is read from tokenizer.json, whose pieces are not those of spiece.model"
            in capsys.readouterr().err
        )
    assert tokenizer.encode("𠮟") == [tokenizer.end_of_text_id]
    with pytest.raises(UserError, match="Unknown characters become end-of-text"):
        raise_on_damage(tokenizer, ["彼を"], accept=False)
    raise_on_damage(load_sentencepiece(str(SAMPLE_TOKENIZER)), ["彼を"], accept=False)


# Texts


@pytest.fixture
def texts(tmp_path: Path, sample_texts: list[str]) -> Path:
    folder = litter(tmp_path / "text")
    for name, documents in (("a.txt", sample_texts[:15]), ("b.txt", sample_texts[15:30])):
        (folder / name).write_text(SEPARATOR.join(documents), "utf-8")
    return folder


def test_texts_are_tokenized_and_trained_on_without_what_lies_beside_them(tmp_path: Path, texts: Path) -> None:
    assert [path.name for path in find_text_shards(texts).paths] == ["a.txt", "b.txt"]
    tokens, output = litter(tmp_path / "tokens"), litter(tmp_path / "run")
    pretokenize = ("pretokenize.py", *SAMPLE_TOKENS, "--data_dir", texts, "--num_workers", 1)
    result = call_command(*pretokenize, "--output_dir", tokens)
    assert result.returncode == 0, result.stderr
    shared = (
        "--data_dir",
        texts,
        "--use_pretokenized",
        "--pretokenized_dir",
        tokens,
        "--device",
        "cpu",
        *SAMPLE_TOKENS,
    )
    train = ("pretraining.py", *shared, *TINY_MODEL, "--output_dir", output, "--max_steps")
    for n_steps in (2, 4):
        result = call_command(*train, n_steps)
        assert result.returncode == 0, result.stderr
        assert "2 of 2 token shards reused" in result.stderr
    assert left(tokens) == left(output) == left(texts) == {*STRAYS, *FOLDERS}
    assert [path.name for path in find_checkpoints(output)] == ["step_00000002", "step_00000004"]
    litter(output / "step_00000004")
    litter(output / "step_00000004" / "tokenizer")
    assert choose_checkpoint(str(tmp_path / "run"), "newest").name == "step_00000004"


def test_a_tokenizer_is_trained_without_what_lies_beside_the_texts(tmp_path: Path, texts: Path) -> None:
    train = ("dataset/train_tokenizer.py", "--data_dir", texts, "--vocab_size", 1500, "--output_dir")
    result = call_command(*train, litter(tmp_path / "tokenizer"))
    assert result.returncode == 0, result.stderr
    clean = tmp_path / "clean"
    clean.mkdir()
    for name in ("a.txt", "b.txt"):
        shutil.copy(texts / name, clean)
    assert call_command(*train[:2], clean, *train[3:], tmp_path / "other").returncode == 0
    models = [(folder / "spiece.model").read_bytes() for folder in (tmp_path / "tokenizer", tmp_path / "other")]
    assert models[0] == models[1]


def test_a_link_to_nothing_among_texts_is_named(tmp_path: Path, texts: Path) -> None:
    (texts / "c.txt").symlink_to("nowhere")
    for command in (
        ("pretokenize.py", *SAMPLE_TOKENS, "--data_dir", texts, "--output_dir", tmp_path / "out"),
        ("dataset/train_tokenizer.py", "--data_dir", texts, "--output_dir", tmp_path / "out"),
    ):
        assert_user_error(call_command(*command), "c.txt is a link to a file that does not exist")


def test_other_outputs_beside_such_files(tmp_path: Path, trained: Path) -> None:
    prepare = ("dataset/prepare_aozora_jsonl.py", "--jsonl_path", SAMPLE, "--output_dir", litter(tmp_path / "001"))
    for _ in range(2):
        assert call_command(*prepare).returncode == 0
    assert left(tmp_path / "001") == {*STRAYS, *FOLDERS}
    exported = tmp_path / "hf"
    exported.mkdir()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._config.json"):
        (exported / name).write_bytes(APPLE_DOUBLE)
    export = ("export_hf.py", "--exp_dir", trained, "--output_dir", exported)
    assert call_command(*export).returncode == 0
    (exported / ".git").mkdir()  # an export replaces the folder, and must not remove what people made
    assert_user_error(call_command(*export), "holds something else (.git)")
    assert (exported / ".git").is_dir()


def test_a_suggestion_is_no_stray(tmp_path: Path) -> None:
    (tmp_path / "._corpus").write_bytes(APPLE_DOUBLE)
    assert likely_path(tmp_path / "corpus") is None


def test_a_file_that_a_system_adds_to_a_tokenizer_is_not_part_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some disks get one for each file that is written; no name of a checkpoint begins with a dot."""
    write_bytes = Path.write_bytes

    def with_stray(path: Path, content: bytes) -> int:
        write_bytes(path.with_name(f"._{path.name}"), APPLE_DOUBLE)
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", with_stray)
    state = {"step": 1, "val_loss": None, "identity": {}}
    folder = save_checkpoint(tmp_path, state, {}, {}, {"spiece.model": b"x"})
    assert "._spiece.model" in os.listdir(folder / "tokenizer")
    verify_checkpoint(folder)
