"""huggingface.py: models that transformers made, and damaged or hostile configurations and weights."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLE, SAMPLE_TOKENIZER, assert_user_error, call_command, save_experiment
from safetensors.torch import load_file, save_file

from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.interop import huggingface
from gptkit.text.tokenizer import load_sentencepiece


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of one layer; not to be changed."""
    folder = tmp_path_factory.mktemp("huggingface")
    vocab_size = load_sentencepiece(str(SAMPLE_TOKENIZER)).vocab_size
    model = GPTModel(GPTConfig(vocab_size, context_length=32, emb_dim=32, n_layers=1, n_heads=2, arch="modern"))
    save_experiment(folder / "exp", model)
    result = call_command("export_hf.py", "--exp_dir", folder / "exp", "--output_dir", folder / "hf")
    assert result.returncode == 0, result.stderr
    return folder / "hf"


def test_models_that_transformers_made_are_loaded(tmp_path: Path) -> None:
    """With shapes that our presets do not have, more rows than tokens, in bfloat16, in several files."""
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "llama"), ({"hidden_act": "gelu"}, "hidden_act"), ({"hidden_size": None}, "emb_dim is None"),
        ({"num_attention_heads": 0}, "n_heads is 0"), ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"rope_parameters": ["x"]}, "invalid value"), ({"hidden_size": 2**70}, None), ({"num_hidden_layers": "x"}, None),
        ({"num_key_value_heads": 3}, None), ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"head_dim": "64"}, "head_dim is '64'"), ({"head_dim": 0}, "head_dim is 0"), ({"head_dim": -2}, "head_dim is -2"),
        ({"head_dim": 2**70}, "at most 65536"), ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"intermediate_size": None}, "intermediate_size is None"), ({"intermediate_size": 96.0}, "whole number"),
        ({"intermediate_size": True}, "whole number"), ({"intermediate_size": 2**70}, "at most 65536"),
        ({"num_hidden_layers": 1.0}, "whole number"), ({"num_hidden_layers": True}, "whole number"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_configurations_are_refused(
    hf_folder: Path, tmp_path: Path, change: dict[str, Any], named: str | None
) -> None:
    """Each is refused in one line, or describes a model that the weights do not fit."""
    shutil.copytree(hf_folder, tmp_path / "hf")
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
        (lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(10, 32)}), "10 tokens"),
    ],
)
def test_invalid_weights_are_refused(
    hf_folder: Path, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], Any], named: str
) -> None:
    shutil.copytree(hf_folder, tmp_path / "hf")
    tensors = load_file(hf_folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    model = GPTModel(GPTConfig(**huggingface.read_dimensions(str(tmp_path / "hf"))))
    with pytest.raises(UserError, match=named):
        huggingface.load_weights(str(tmp_path / "hf"), model)
    if named == "lack":  # transformers would replace missing weights by new ones without an error
        result = call_command("evaluate_model.py", "--hf_model", tmp_path / "hf", "--text_path", SAMPLE)
        assert_user_error(result, "--hf_model", "lack model.norm.weight")


def test_an_index_of_weights_never_leads_out_of_the_folder(hf_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_folder, tmp_path / "hf")
    outside = tmp_path / "outside.safetensors"
    save_file({"x": torch.zeros(1)}, outside)
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    model = GPTModel(GPTConfig(**huggingface.read_dimensions(str(tmp_path / "hf"))))
    with pytest.raises(UserError, match="No such file"):
        huggingface.load_weights(str(tmp_path / "hf"), model)


def test_widths_are_those_of_config_json(hf_folder: Path) -> None:
    config = json.loads((hf_folder / "config.json").read_text())
    dimensions = huggingface.read_dimensions(str(hf_folder))
    assert (dimensions["head_width"], dimensions["ff_width"]) == (config["head_dim"], config["intermediate_size"])
    del config["head_dim"]
    assert GPTConfig(**huggingface.dimensions_from_config(config)).head_dim == 16


def test_a_torchvision_of_another_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_folder: Path
) -> None:
    """transformers imports it with any model, and hides the reason; the export itself does without."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")\n'
    )
    (tmp_path / "torchvision-0.21.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.21.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.21.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = (f"torchvision 0.21.0, which transformers imports, does not fit torch {torch.__version__}", "::nms")
    result = call_command("evaluate_model.py", "--hf_model", hf_folder, "--text_path", SAMPLE)
    assert_user_error(result, f"--hf_model {hf_folder}: ", *named, "-m pip uninstall torchvision")
    result = call_command("export_hf.py", "--exp_dir", hf_folder.with_name("exp"), "--output_dir", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1, result.stderr
    assert all(part in warnings[0] for part in named)
    (tmp_path / "torchvision-0.21.0.dist-info" / "METADATA").unlink()  # built from source
    (tmp_path / "torchvision-0.21.0.dist-info").rmdir()
    importlib.invalidate_caches()
    assert (huggingface.torchvision_problem() or "").startswith("torchvision, which transformers imports, does not fit")
