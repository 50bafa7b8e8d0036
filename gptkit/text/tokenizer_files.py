"""Find and read the files of a tokenizer in a folder, where systems, editors and people leave others beside them.

A SentencePiece model must not be passed over for what lies beside it: transformers' conversion, which would then be
used, makes unknown characters end-of-text.
"""

import sys
from pathlib import Path

from gptkit.base.cli import UserError
from gptkit.base.files import is_stray

MODEL_NAMES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")  # that libraries give the file
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def find_models(folder: Path) -> list[Path]:
    """Return the SentencePiece models (*.model) of a folder that may be meant; a note names the files passed over.

    Those with one of MODEL_NAMES go before others, and of equal ones the first counts; hidden files and what systems
    leave are never meant. Raises UserError where one that is meant is not a file.
    """
    found = sorted(path for path in folder.iterdir() if path.name.endswith(".model"))
    named = [path for path in found if path.name in MODEL_NAMES]
    meant = named or [path for path in found if not is_stray(path.name) and not path.is_dir()]
    broken = next((path for path in meant if not path.is_file()), None)
    if broken:
        raise UserError(f"{broken} is a folder, or a link to a file that does not exist; put the model there")
    models = list({path.read_bytes(): path for path in reversed(named)}.values())[::-1] or meant
    passed_over = [path.name for path in found if path not in models]
    if models and passed_over:
        names = " and ".join(path.name for path in models)
        print(f"note: {folder} is read from {names}; passed over: {', '.join(passed_over)}", file=sys.stderr)
    return models


def read_file(path: Path) -> bytes:
    """Return the content of a file. Raises ValueError where it is only a pointer to the content."""
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise ValueError("a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    return content
