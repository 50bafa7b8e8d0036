"""Convert weights and dimensions of a GPT to those of transformers' models and back, exactly; read such folders.

arch gpt2 becomes GPT2LMHeadModel, modern becomes Qwen3ForCausalLM. Rows of the embedding that only pad the vocabulary
are left out there, and added again here. Weights are read from safetensors only: pickles are refused. Dimensions are
GPTConfig's fields by name, since this module knows no model class.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gptkit.base.cli import UserError, first_line, one_line
from gptkit.base.files import load_tensors, read_json
from gptkit.base.paths import hub_folder

FLAG = "--init_from"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = ["config.json", WEIGHTS, "model-*.safetensors", INDEX]
Tensors = dict[str, torch.Tensor]
RMS_NORM_EPS, LAYER_NORM_EPS = 1e-6, 1e-5
MAX_PADDING = 1024  # how many rows more (Qwen3 has 267 more) or fewer than token ids an embedding may have
GPT2_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "att.qkv": "attn.c_attn",
    "att.out_proj": "attn.c_proj",
    "ff.up_proj": "mlp.c_fc",
    "ff.out_proj": "mlp.c_proj",
}
QWEN3_BLOCK = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "att.q_norm": "self_attn.q_norm",
    "att.k_norm": "self_attn.k_norm",
    "att.out_proj": "self_attn.o_proj",
    "ff.out_proj": "mlp.down_proj",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def torchvision_problem() -> str | None:
    """Return in one line why transformers cannot import its models and pipelines; None where it can.

    It imports torchvision with them where that is installed, and a torchvision that was built for another torch fails.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError (operator torchvision::nms does not exist), ImportError, OSError
        installed = "torchvision"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # built from source, it may have no metadata
            installed += f" {importlib.metadata.version('torchvision')}"
        return (
            f"{installed}, which transformers imports, does not fit torch {torch.__version__}"
            f" ({first_line(error)}); run {sys.executable} -m pip uninstall torchvision, which no command here needs,"
            " or install the torchvision that belongs to this torch"
        )
    return None


def to_hf(
    weights: Mapping[str, torch.Tensor], dimensions: Mapping[str, Any], end_of_text_id: int
) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the config.json of transformers' model that computes the same."""
    tensors = {
        name: tensor[: dimensions["vocab_size"]] if name in ("tok_emb.weight", "out_head.weight") else tensor
        for name, tensor in weights.items()
    }
    config = _gpt2_config(dimensions) if dimensions["arch"] == "gpt2" else _qwen3_config(weights, dimensions)
    config |= {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id, "dtype": "float32", "use_cache": True}
    convert = _to_gpt2 if dimensions["arch"] == "gpt2" else _to_qwen3
    return {name: tensor.contiguous() for name, tensor in convert(tensors, dimensions).items()}, config


def from_hf(
    tensors: Mapping[str, torch.Tensor], dimensions: Mapping[str, Any], vocab_size: int, n_rows: int
) -> Tensors:
    """Return the weights of a GPT of those dimensions (dimensions_from_config) in float32, extended to vocab_size tokens.

    n_rows counts the rows of the padded vocabulary. New tokens start as the mean of the others (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"). Learned positions beyond the context length are
    left out. Raises UserError where tensors are missing, or the vocabulary differs by more than MAX_PADDING.
    """
    convert: Callable[..., Tensors] = _from_gpt2 if dimensions["arch"] == "gpt2" else _from_qwen3
    try:
        weights = {name: tensor.float() for name, tensor in convert(tensors, dimensions).items()}
    except KeyError as error:
        raise UserError(f"the weights lack {error}; choose a folder of a GPT2LMHeadModel or a Qwen3ForCausalLM")
    n_loaded = len(weights["tok_emb.weight"])
    if abs(n_loaded - vocab_size) > MAX_PADDING:
        raise UserError(
            f"the model has {n_loaded} tokens and its tokenizer {vocab_size}; choose the tokenizer it was trained with"
        )
    for name in ("tok_emb.weight", "out_head.weight"):
        if name in weights:
            weights[name] = _extend_rows(weights[name][:vocab_size], vocab_size, n_rows)
    if "pos_emb.weight" in weights:
        weights["pos_emb.weight"] = weights["pos_emb.weight"][: dimensions["context_length"]]
    return weights


def _extend_rows(matrix: torch.Tensor, vocab_size: int, n_rows: int) -> torch.Tensor:
    """Append the mean row for each new token, and zeros for the rows that only pad the vocabulary."""
    new = matrix.mean(0, keepdim=True).expand(vocab_size - len(matrix), -1)
    return torch.cat([matrix, new, matrix.new_zeros(n_rows - vocab_size, matrix.shape[1])])


def read_dimensions(name: str) -> dict[str, Any]:
    """Return GPTConfig's fields for the model in a folder or a repository of the hub. Raises UserError."""
    folder = hub_folder(name, FLAG, PATTERNS)
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        raise UserError(
            f"{FLAG} {name} has no {WEIGHTS}, and pickles are not read; save the model again with transformers"
        )
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{FLAG} {name} has no readable config.json ({error}); name a folder that transformers wrote")
    return dimensions_from_config(config)


def load_weights(name: str, model: Any) -> None:
    """Load the weights of a folder or repository into a model whose config has GPTConfig's fields. Raises UserError."""
    folder = hub_folder(name, FLAG, PATTERNS)
    config = model.config
    try:
        files = [WEIGHTS]
        if (folder / INDEX).is_file():
            files = sorted({Path(file).name for file in read_json(folder / INDEX)["weight_map"].values()})
        tensors = {
            key: tensor for file in files for key, tensor in load_tensors(folder / file, torch.device("cpu")).items()
        }
        for key, tensor in tensors.items():
            if not tensor.is_floating_point() and tensor.dtype not in (torch.bool, torch.uint8):  # old files hold masks
                raise ValueError(f"{key} is {tensor.dtype}; choose weights that are not quantized")
            if not tensor.isfinite().all():
                raise ValueError(f"{key} has values that are not finite")
        if any(f".{kind}.{config.n_layers}." in f".{key}" for key in tensors for kind in ("h", "layers")):
            raise ValueError(f"there are more layers than the {config.n_layers} of its config.json")
        model.load_state_dict(from_hf(tensors, dataclasses.asdict(config), config.vocab_size, config.padded_vocab_size))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{FLAG} {name}: its weights cannot be used ({one_line(error, max_chars=300)})")
    n_new = config.vocab_size - len(
        next(t for key, t in tensors.items() if key.endswith(("wte.weight", "embed_tokens.weight")))
    )
    print(f"start: the weights of {name}" + (f", and {n_new} new tokens" if n_new > 0 else ""), flush=True)


def dimensions_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return GPTConfig's fields for the contents of a config.json. Raises UserError where GPTModel cannot be that model."""
    kind = config.get("model_type")
    try:
        if kind == "gpt2":
            return _gpt2_dimensions(config)
        if kind == "qwen3":
            return _qwen3_dimensions(config)
    except KeyError as error:
        raise UserError(f"config.json lacks {error}; choose a folder that transformers wrote")
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"config.json holds an invalid value ({error}); choose a folder that transformers wrote")
    raise UserError(f"models of type {kind!r} are not supported; choose a model of type gpt2 or qwen3")


# GPT-2


def _gpt2_config(dimensions: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": dimensions["vocab_size"],
        "n_positions": dimensions["context_length"],
        "n_embd": dimensions["emb_dim"],
        "n_layer": dimensions["n_layers"],
        "n_head": dimensions["n_heads"],
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPS,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dimensions["drop_rate"]),
        "tie_word_embeddings": True,
    }


def _gpt2_dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unsupported(config, {
        "activation_function": (None, "gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (None, LAYER_NORM_EPS),
        "n_inner": (None, 4 * config["n_embd"]), "scale_attn_weights": (None, True),
        "scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False),
        "tie_word_embeddings": (None, True),
    })  # fmt: skip
    return {
        "arch": "gpt2",
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        "emb_dim": config["n_embd"],
        "n_layers": config["n_layer"],
        "n_heads": config["n_head"],
    }


def _to_gpt2(weights: Tensors, dimensions: Mapping[str, Any]) -> Tensors:
    renamed = {"transformer.wte.weight": weights["tok_emb.weight"], "transformer.wpe.weight": weights["pos_emb.weight"]}
    renamed |= {f"transformer.ln_f.{kind}": weights[f"final_norm.{kind}"] for kind in ("weight", "bias")}
    for i in range(dimensions["n_layers"]):
        for ours, theirs in GPT2_BLOCK.items():
            weight = weights[f"trf_blocks.{i}.{ours}.weight"]
            # transformers' GPT-2 has Conv1D layers, whose matrices are (inputs, outputs).
            weight = weight.t() if weight.dim() == 2 else weight
            outputs = weight.shape[-1]
            bias = weights.get(f"trf_blocks.{i}.{ours}.bias", weight.new_zeros(outputs))
            renamed |= {f"transformer.h.{i}.{theirs}.weight": weight, f"transformer.h.{i}.{theirs}.bias": bias}
    return renamed


def _from_gpt2(tensors: Mapping[str, torch.Tensor], dimensions: Mapping[str, Any]) -> Tensors:
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}  # GPT2Model has no prefix
    renamed = {"tok_emb.weight": bare["wte.weight"], "pos_emb.weight": bare["wpe.weight"]}
    renamed |= {f"final_norm.{kind}": bare[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    for i in range(dimensions["n_layers"]):
        for ours, theirs in GPT2_BLOCK.items():
            weight = bare[f"h.{i}.{theirs}.weight"]
            renamed[f"trf_blocks.{i}.{ours}.weight"] = weight.t().contiguous() if weight.dim() == 2 else weight
            renamed[f"trf_blocks.{i}.{ours}.bias"] = bare[f"h.{i}.{theirs}.bias"]
    return renamed


# Qwen3


def _qwen3_config(weights: Mapping[str, torch.Tensor], dimensions: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = len(weights["trf_blocks.0.att.q_norm.weight"])
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": dimensions["vocab_size"],
        "max_position_embeddings": dimensions["context_length"],
        "hidden_size": dimensions["emb_dim"],
        "intermediate_size": weights["trf_blocks.0.ff.out_proj.weight"].shape[1],
        "num_hidden_layers": dimensions["n_layers"],
        "num_attention_heads": dimensions["n_heads"],
        "num_key_value_heads": dimensions["n_kv_heads"] or dimensions["n_heads"],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_theta": dimensions["rope_base"],  # for readers older than rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": dimensions["rope_base"]},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": "out_head.weight" not in weights,
    }


def _qwen3_dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    _refuse_unsupported(config, {
        "hidden_act": (None, "silu"), "rms_norm_eps": (None, RMS_NORM_EPS), "attention_bias": (None, False),
        "use_sliding_window": (None, False), "rope_scaling": (None,),
    })  # fmt: skip
    _refuse_unsupported(rope, {"rope_type": (None, "default")})
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim")
    return {
        "arch": "modern",
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "emb_dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": 0 if kv_heads == heads else kv_heads,
        "rope_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "head_width": 0 if head_dim is None else _require_width("head_dim", head_dim),
        "ff_width": _require_width("intermediate_size", config["intermediate_size"]),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }


def _to_qwen3(weights: Tensors, dimensions: Mapping[str, Any]) -> Tensors:
    renamed = {
        "model.embed_tokens.weight": weights["tok_emb.weight"],
        "model.norm.weight": weights["final_norm.weight"],
    }
    if "out_head.weight" in weights:
        renamed["lm_head.weight"] = weights["out_head.weight"]
    for i in range(dimensions["n_layers"]):
        block, layer = f"trf_blocks.{i}", f"model.layers.{i}"
        qkv, head_dim = weights[f"{block}.att.qkv.weight"], len(weights[f"{block}.att.q_norm.weight"])
        n_key_rows = (dimensions["n_kv_heads"] or dimensions["n_heads"]) * head_dim
        parts = qkv.split([len(qkv) - 2 * n_key_rows, n_key_rows, n_key_rows])
        renamed |= {f"{layer}.{name}.weight": rows for name, rows in zip(QKV, parts, strict=True)}
        halves = weights[f"{block}.ff.up_proj.weight"].chunk(2)
        renamed |= {f"{layer}.{name}.weight": rows for name, rows in zip(GATE_UP, halves, strict=True)}
        renamed |= {
            f"{layer}.{theirs}.weight": weights[f"{block}.{ours}.weight"] for ours, theirs in QWEN3_BLOCK.items()
        }
    return renamed


def _from_qwen3(tensors: Mapping[str, torch.Tensor], dimensions: Mapping[str, Any]) -> Tensors:
    renamed = {
        "tok_emb.weight": tensors["model.embed_tokens.weight"],
        "final_norm.weight": tensors["model.norm.weight"],
    }
    if not dimensions["tied_head"]:
        renamed["out_head.weight"] = tensors["lm_head.weight"]
    for i in range(dimensions["n_layers"]):
        block, layer = f"trf_blocks.{i}", f"model.layers.{i}"
        renamed[f"{block}.att.qkv.weight"] = torch.cat([tensors[f"{layer}.{name}.weight"] for name in QKV])
        renamed[f"{block}.ff.up_proj.weight"] = torch.cat([tensors[f"{layer}.{name}.weight"] for name in GATE_UP])
        renamed |= {
            f"{block}.{ours}.weight": tensors[f"{layer}.{theirs}.weight"] for ours, theirs in QWEN3_BLOCK.items()
        }
    return renamed


def _require_width(name: str, value: Any) -> int:
    """Return a width of config.json. Raises ValueError for 0 and less, which GPTConfig might take for its default."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return value


def _refuse_unsupported(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise UserError where a value of config.json is not among those that GPTModel supports."""
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise UserError(
                f"config.json has {name} {config.get(name)!r}, which is not supported; choose a model with {values[-1]!r}"
            )
