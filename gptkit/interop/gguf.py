"""Write a GGUF file for llama.cpp with the library gguf: weights, dimensions and tokenizer in one file.

Both architectures are supported, with a SentencePiece tokenizer. llama.cpp's own tokenizers read SentencePiece's pieces
and scores: its "llama" is BPE, its "t5" is unigram. A tokenizer that they would read otherwise, such as a unigram model
with byte fallback, is refused. A text begins with end-of-text, as in training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gptkit.base.cli import UserError

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer


def write_gguf(
    path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], tokenizer: "Tokenizer", kind: str
) -> None:
    """Write the tensors and config of transformers' model (huggingface.to_hf) with the tokenizer into one file.

    kind is the type of matrices: f32, f16 or q8_0. Raises UserError, before it writes, as refuse_unreadable does.
    """
    refuse_unreadable(tokenizer)
    import gguf

    is_gpt2 = config["model_type"] == "gpt2"
    arch = gguf.MODEL_ARCH.GPT2 if is_gpt2 else gguf.MODEL_ARCH.QWEN3
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_dimensions(writer, config)
    _add_tokenizer(writer, tokenizer)
    writer.add_file_type(
        getattr(gguf.LlamaFileType, {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[kind])
    )
    names = gguf.get_tensor_name_map(arch, config.get("n_layer") or config["num_hidden_layers"])
    for name, tensor in tensors.items():
        is_conv1d = is_gpt2 and tensor.dim() == 2 and ".h." in name  # (inputs, outputs) in transformers
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        _add_tensor(writer, gguf_name, (tensor.t() if is_conv1d else tensor).contiguous().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    """Add a matrix in the type `kind`, where its rows are full blocks of that type; norms, biases, positions in float32."""
    import gguf
    from gguf import quants

    if values.ndim < 2 or kind == "f32" or name.startswith("position_embd"):
        writer.add_tensor(name, values.astype(np.float32))
    elif kind == "q8_0" and values.shape[1] % 32 == 0:
        packed = quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, values.astype(np.float16))


def _add_dimensions(writer: Any, config: Mapping[str, Any]) -> None:
    """Add the dimensions under llama.cpp's names."""
    if config["model_type"] == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])


def refuse_unreadable(tokenizer: "Tokenizer") -> None:
    """Raise UserError where gguf is missing, or where llama.cpp would give other ids than the tokenizer of training.

    What it does otherwise was measured with llama-cpp-python 0.3.36 (tests/test_llama_cpp.py): its unigram ("t5") has no
    bytes for unknown characters; its BPE ("llama") ends the process without them, and normalizes nothing.
    """
    from gptkit.text.backends import SentencePieceBackend

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format gguf needs gguf ({error}); pip install gguf")
    if not isinstance(tokenizer.backend, SentencePieceBackend):
        raise UserError(
            f"--format gguf supports SentencePiece tokenizers only, and {tokenizer.name} is of another kind; export it with --format hf"
        )
    model = tokenizer.backend.proto()
    normalizer, trainer, kind = model.normalizer_spec, model.trainer_spec, type(model.pieces[0])
    kinds = {piece.type for piece in model.pieces}
    n_bytes = sum(piece.type == kind.BYTE for piece in model.pieces)
    is_bpe, special = trainer.model_type == trainer.BPE, _mistaken_special(model)
    adds, removes = normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces
    for is_so, reason in (
        (trainer.model_type not in (trainer.UNIGRAM, trainer.BPE), "supports unigram and BPE only"),
        (is_bpe and n_bytes < 256, "needs the pieces of all bytes in BPE"),
        (n_bytes and not is_bpe, "has no bytes for the unknown characters of a unigram model"),
        (tokenizer.lower_case, "does not lower-case text"),
        (is_bpe and normalizer.precompiled_charsmap, f"does not normalize text for BPE ({normalizer.name})"),
        (removes and (is_bpe or not adds), "removes extra spaces for unigram models only, where it puts one before the text"),
        (trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces, "reads spaces otherwise"),
        (kind.UNUSED in kinds, "uses unused pieces"),
        ((adds or removes) and kind.USER_DEFINED in kinds, "puts a space after user-defined symbols"),
        (is_bpe and special, f"would read {special} in a text as the special token"),
    ):  # fmt: skip
        if is_so:
            raise UserError(
                f"--format gguf: llama.cpp {reason}, so it would not read text as {tokenizer.name} does; train the tokenizer"
                " with dataset/train_tokenizer.py --model_type bpe, or export this one with --format hf"
            )


def _mistaken_special(model: Any) -> str | None:
    """Return the name of a special piece or byte that llama.cpp could join from characters and pieces, or None."""
    kind = type(model.pieces[0])
    names = {piece.piece for piece in model.pieces}
    return next(
        (
            name
            for name, number in ((piece.piece, piece.type) for piece in model.pieces)
            if number not in (kind.NORMAL, kind.USER_DEFINED)
            and any({name[:cut], name[cut:]} <= {*names, name[0], name[-1]} for cut in range(1, len(name)))
        ),
        None,
    )


def _add_tokenizer(writer: Any, tokenizer: "Tokenizer") -> None:
    """Add the pieces, scores and special tokens of a tokenizer that refuse_unreadable accepts."""
    import gguf

    model = tokenizer.backend.proto()  # type: ignore[attr-defined]
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    tokens = [piece.piece.encode() for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    types = [int(piece.type) for piece in model.pieces]  # GGUF uses SentencePiece's numbers
    if tokenizer.newline_id is not None:
        tokens, scores, types = [*tokens, b"\n"], [*scores, 0.0], [*types, int(gguf.TokenType.USER_DEFINED)]
    if trainer.model_type == trainer.UNIGRAM:
        writer.add_tokenizer_model("t5")
        writer.add_remove_extra_whitespaces(normalizer.remove_extra_whitespaces)
        if normalizer.precompiled_charsmap:
            writer.add_precompiled_charsmap(normalizer.precompiled_charsmap)
    else:
        writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(normalizer.add_dummy_prefix)
    writer.add_bos_token_id(tokenizer.end_of_text_id)
    writer.add_eos_token_id(tokenizer.end_of_text_id)
    if tokenizer.unknown_id is not None:
        writer.add_unk_token_id(tokenizer.unknown_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
