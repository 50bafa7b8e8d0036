"""Check what a tokenizer does to a text, on sample documents, before tokens are written.

A tokenizer may change text as its own normaliser does (rinna's makes full-width letters half-width) and may lack rare
characters. Any other difference after encoding and decoding is damage.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptkit.base.cli import UserError

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer


# Between a vocabulary for Japanese and one for something else there is a wide gap: of 10,000 characters of Aozora
# Bunko, rinna's lacks about 40, one without kanji 2,700, one without kana 6,500, an English one nearly all.
MAX_UNKNOWN_PER_10000 = 500
UNKNOWN_CHARACTER = "\U0010fffd"  # of a private area: in no vocabulary
EXAMPLE_LENGTH = 24


@dataclass(frozen=True)
class TokenizerReport:
    """What was measured on sample documents."""

    characters: int
    tokens: int
    unknown_tokens: int
    unknown_characters: int  # more than the tokens: SentencePiece makes one token of a run of unknown characters
    lossless: bool  # each document came back unchanged
    newlines_kept: bool
    end_of_text_inside: int  # end-of-text ids that encode returned
    damaged_lines: int  # nothing in them is unknown, and they came back neither unchanged nor as normalised
    example: tuple[str, str] | None  # an excerpt and what came back: from a damaged line, if there is one

    @property
    def characters_per_token(self) -> float:
        return self.characters / max(self.tokens, 1)

    @property
    def unknown_per_10000(self) -> float:
        """Return the unknown characters per 10,000."""
        return self.unknown_characters / max(self.characters, 1) * 10_000


@dataclass(frozen=True)
class _Line:
    """The result of encoding and decoding one line."""

    unknown_characters: int
    damaged: bool
    example: tuple[str, str] | None


def check_tokenizer(tokenizer: "Tokenizer", documents: Iterable[str]) -> TokenizerReport:
    """Encode and decode each document, and count what changes. One document is in memory at a time."""
    characters = tokens = unknown_tokens = unknown_characters = end_of_text_inside = damaged_lines = 0
    lossless = newlines_kept = True
    example: tuple[str, str] | None = None
    for document in documents:
        ids = tokenizer.encode(document)
        back = tokenizer.decode(ids)
        characters += len(document)
        tokens += len(ids)
        unknown_tokens += _count_unknown(tokenizer, ids)
        end_of_text_inside += ids.count(tokenizer.end_of_text_id)
        if back == document:
            continue
        lossless = False
        newlines_kept = newlines_kept and back.count("\n") == document.count("\n")
        for text in document.split("\n"):
            line = _check_line(tokenizer, text)
            unknown_characters += line.unknown_characters
            if line.damaged and not damaged_lines:
                example = line.example
            damaged_lines += line.damaged
            example = example or line.example
        example = example or _excerpts(document, back)
    return TokenizerReport(
        characters,
        tokens,
        unknown_tokens,
        unknown_characters,
        lossless,
        newlines_kept,
        end_of_text_inside,
        damaged_lines,
        example,
    )


def _check_line(tokenizer: "Tokenizer", text: str) -> _Line:
    """Encode and decode a line alone, so that unknown tokens are counted on the line they come from."""
    ids = tokenizer.encode(text)
    back = tokenizer.decode(ids)
    if back == text:
        return _Line(0, False, None)
    # Tokens that begin with a space lose or gain one at a line's ends, which is no normaliser's doing.
    declared = tokenizer.backend.normalize(text.lower() if tokenizer.lower_case else text).strip(" ")
    returned = back.strip(" ")
    n_unknown = _count_unknown(tokenizer, ids)
    if n_unknown:
        n_missing = len(declared.replace(" ", "")) - len(returned.replace(" ", ""))
        return _Line(max(n_unknown, n_missing), False, _excerpts(text, back))
    return _Line(0, returned != declared, _excerpts(text, back))


def _count_unknown(tokenizer: "Tokenizer", ids: list[int]) -> int:
    return 0 if tokenizer.unknown_id is None else ids.count(tokenizer.unknown_id)


def _excerpts(text: str, back: str) -> tuple[str, str]:
    """Return an excerpt of each text around their first difference."""
    pairs = enumerate(zip(text, back, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
    start = max(0, first - EXAMPLE_LENGTH // 4)
    return text[start : start + EXAMPLE_LENGTH], back[start : start + EXAMPLE_LENGTH]


def find_problems(report: TokenizerReport) -> list[str]:
    """Return the reasons not to train on the tokens, one sentence each."""
    found = []
    if report.end_of_text_inside:
        found.append(
            f"End-of-text stands {report.end_of_text_inside:,} times inside documents; it may only end a document."
        )
    if not report.newlines_kept:
        found.append("Newlines do not come back, so a model could not write a paragraph.")
    if report.unknown_per_10000 > MAX_UNKNOWN_PER_10000:
        found.append(
            f"It does not know {report.unknown_per_10000:,.0f} of 10,000 characters (at most {MAX_UNKNOWN_PER_10000}"
            " may be unknown); its vocabulary is for another language."
        )
    if report.damaged_lines:
        text, back = report.example or ("", "")
        found.append(
            f"{report.damaged_lines:,} lines come back neither unchanged nor as its own normaliser makes them:"
            f" {text!r} as {back!r}."
        )
    return found


def describe_tokenizer(tokenizer: "Tokenizer", report: TokenizerReport | None) -> str:
    """Describe a tokenizer and, with a report, what it does to a text: one fact per line."""
    special = sorted(tokenizer.backend.special_ids)
    shown = ", ".join(map(str, special[:8])) + (", …" if len(special) > 8 else "")
    if tokenizer.newline_id is None:
        newline = ", ".join(map(str, tokenizer.encode("\n"))) + " (its own)"
    else:
        newline = f"{tokenizer.newline_id} (added)"
    facts = {
        "name": tokenizer.name,
        "backend": tokenizer.backend.kind,
        "ids": f"{tokenizer.vocab_size:,}",
        "end of text": f"{tokenizer.end_of_text_id} ({tokenizer.end_of_text})",
        "newline": newline,
        "unknown": "none" if tokenizer.unknown_id is None else str(tokenizer.unknown_id),
        "special ids": f"{len(special):,}" + (f" ({shown})" if special else ""),
        "lower-cased": "yes" if tokenizer.lower_case else "no",
        "fingerprint": tokenizer.fingerprint[:16],
    }
    if report:
        text, back = report.example or ("", "")
        facts |= {
            "lossless": "yes" if report.lossless else f"no: {text!r} comes back as {back!r}",
            "unknown characters": f"{report.unknown_per_10000:.1f} per 10,000 ({report.unknown_tokens:,} tokens)",
            "characters per token": f"{report.characters_per_token:.2f}",
        }
    return "\n".join(f"{label + ':':<22}{fact}" for label, fact in facts.items())


def raise_on_damage(tokenizer: "Tokenizer", documents: Iterable[str], accept: bool) -> None:
    """Raise UserError where the tokenizer damages these documents; with `accept`, only warn on standard error."""
    problems = find_problems(check_tokenizer(tokenizer, documents))
    if tokenizer.end_of_text_id in tokenizer.encode(UNKNOWN_CHARACTER):  # these documents may have none that is unknown
        problems.append("Unknown characters become end-of-text (transformers' conversion of SentencePiece does that).")
    found = " ".join(problems)
    if found and not accept:
        raise UserError(
            f"{tokenizer.name} damages this text. {found} Choose another tokenizer, or add --accept_problems"
        )
    if found:
        print(f"warning: {tokenizer.name} damages this text. {found}", file=sys.stderr)
