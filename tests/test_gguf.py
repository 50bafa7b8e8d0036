"""gguf.py: files that the library's own reader reads back. test_export.py has llama.cpp, where it is installed."""

from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE_TOKENIZER, call_command, save_experiment
from mutations import small_tokenizer
from random_models import CONTEXT, KINDS, random_model

from gpt_model import GPTModel
from gptkit.base.cli import UserError
from gptkit.interop import huggingface
from gptkit.interop.gguf import write_gguf
from gptkit.text.tokenizer import Tokenizer, load_sentencepiece


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_sentencepiece(str(SAMPLE_TOKENIZER))


@pytest.fixture(scope="module", params=KINDS, ids=str)
def experiment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> tuple[GPTModel, Path]:
    """A model of each kind, and its experiment folder."""
    model = random_model(tokenizer.vocab_size, **KINDS[request.param])
    return model, save_experiment(tmp_path_factory.mktemp("gguf") / "exp", model)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_ggufs_own_reader_reads_the_same(
    experiment: tuple[GPTModel, Path], tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    """Weights in their type, pieces and dimensions."""
    import gguf

    model, folder = experiment
    result = call_command(
        "export_hf.py",
        "--exp_dir",
        folder,
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


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    model = random_model(500, **KINDS["modern"])
    tensors, config = huggingface.to_hf(model.state_dict(), vars(model.config), 0)
    with pytest.raises(UserError, match="supports SentencePiece tokenizers only"):
        write_gguf(tmp_path / "x.gguf", tensors, config, small_tokenizer("tokenizers"), "f16")
