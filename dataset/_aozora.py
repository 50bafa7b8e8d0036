"""Find and clean the notation of Aozora Bunko's text files: ruby, notes, gaiji, accents, their explanation, colophon.

    ｜東京《とうきょう》, 吾輩《わがはい》         ruby over what follows ｜, or kana over the kanji before it
    ［＃ここから２字下げ］                         a note on the layout or the text
    ※［＃「口＋世」、第3水準1-15-3］              gaiji: a character that Shift_JIS lacks, by JIS X 0213 or U+…
    〔cafe'〕, ごろ／＼                            letters with accents, and the sign that repeats what stands before it
    -----【テキスト中に現れる記号について】-----   the explanation at the beginning
    底本：…, 入力：…                              the colophon at the end

No pattern reaches over the end of a line, but for the last two, whose lines are all checked: a bracket that nobody
closed cannot take away text. 《 》 that stand for quotation marks remain. Cleaning a text twice changes nothing more.
Source: https://www.aozora.gr.jp/annotation/ and, for the accents, https://www.aozora.gr.jp/accent_separation.html
"""

import re
import sys
import unicodedata
from collections import Counter

GETA = "〓"  # written for a gaiji of which no code is named, as printers do
KANJI = "\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff々〆〇〻ヶヵ仝〓"
HIRAGANA, KATAKANA, LATIN = "ぁ-ゖゝゞ", "ァ-ヺー-ヿｦ-ﾟ", "A-Za-zＡ-Ｚａ-ｚÀ-ɏΑ-ωА-я0-9０-９.'’"
READING = f"《[{HIRAGANA}{KATAKANA}・ 　゛゜]{{1,40}}》"
ANYTHING = "《[^《》｜［］\n]{1,80}》"
MARKED_RUBY = re.compile(f"｜([^《》｜\n]{{1,80}}){ANYTHING}")
# Without ｜, only kana over kanji, katakana or letters is ruby: 小説《友情》 is a title.
RUBY = re.compile(f"(?<=[{KANJI}{KATAKANA}{LATIN}]){READING}")
# Where a text has 《 that no ruby begins with, then 《 》 are quotation marks in it, and only readings over kanji are ruby.
QUOTATION = re.compile(f"(?<![{KANJI}{KATAKANA}{LATIN}])《|(?!{READING})《")
RUBY_BESIDE_QUOTATIONS = re.compile(f"(?<=[{KANJI}]){READING}")
GAIJI = re.compile("※［[＃#]([^［］\n]*)］")
NOTE = re.compile("［[＃#][^［］\n]*］")
NOTE_LINE = re.compile("^[ 　]*(?:［[＃#][^［］\n]*］[ 　]*)+(?:\n|$)", re.MULTILINE)
PLANE_ROW_CELL = re.compile(r"(?<![\d-])([12])-(\d{1,2})-(\d{1,2})(?![\d-])")
LEVEL = re.compile(r"水準" + PLANE_ROW_CELL.pattern)
CODE_POINTS = re.compile(r"\bU\+[0-9A-F]{4,6}(?: *\+? *U\+[0-9A-F]{4,6})*\b", re.IGNORECASE)
ACCENTED = re.compile("〔([^〔〕《》［］\n]{1,400})〕")
# A letter and the sign of its accent, where the sign cannot be punctuation: no "'" of an elision (l'a^me), no comma.
ACCENT = re.compile(
    r"AE&|ae&|OE&|oe&|ss&|s&|[?!]@|[A-Za-z][`^~/]|[AUau]&|[AEIOUYaeiouy](?:_|:(?!\s))|[CSTcst],(?=[a-z])"
    r"|(?![CDJLMNSTcdjlmnst]'[AEHIOUYaehiouy])[A-Za-z]'"
)
COMBINING = dict(zip("`'^~:,&_", "\u0300\u0301\u0302\u0303\u0308\u0327\u030a\u0304", strict=True))
LETTERS = {"AE&": "Æ", "ae&": "æ", "OE&": "Œ", "oe&": "œ", "ss&": "ß", "s&": "ß", "?@": "¿", "!@": "¡"}
LETTERS |= {"O/": "Ø", "o/": "ø", "D/": "Đ", "d/": "đ", "L/": "Ł", "l/": "ł", "H/": "Ħ", "h/": "ħ"}
REPEAT = re.compile(f"(?<=[{KANJI}{HIRAGANA}{KATAKANA}])／([″゛]?)＼")
HEADER = re.compile(
    r"^[-－]{10,}[ 　]*\n(?:(?![-－]{10}).*\n){0,3}【テキスト中に現れる記号について】.*\n(?:(?![-－]{10}).*\n){0,80}[-－]{10,}[ 　]*(?:\n+|$)",
    re.MULTILINE,
)
COLOPHON_LINE = re.compile(
    "[^：\n]{0,8}(?:底本|親本|初出|入力|校正|更新|ファイル作成)[^：\n]{0,12}：|　　|※|●|青空文庫|このファイルは"
    r"|\d{4}(?:年|（).*[公開正成日]|[ 　]*$"
)
SIGNS = "《［〔＼【"  # without one of these, and 底本： near the end, there is nothing to find
MAX_COLOPHON = 10_000  # characters at the end of a text, where a colophon is looked for
# Characters that are notation themselves. As gaiji they are kept apart until the end, in the private use area, and
# replaced by others that are none where they would be read as notation in the cleaned text.
OWN, OTHERS = "《》｜［］＃※〔〕／＼", "≪≫│[]♯*()/\\"
PRIVATE = {character: chr(0xF0000 + number) for number, character in enumerate(OWN)}
RESTORED = {ord(private): character for character, private in PRIVATE.items()}
REPLACED = {ord(private): other for private, other in zip(PRIVATE.values(), OTHERS, strict=True)}


def clean_notation(text: str) -> tuple[str, Counter[str]]:
    """Return a text without notation, and what was found by its kind: ruby, notes, gaiji, unknown gaiji, …"""
    found: Counter[str] = Counter()
    if not any(sign in text for sign in SIGNS) and "底本：" not in text[-MAX_COLOPHON:]:
        return text, found
    cleaned = _without_marks(text, found)
    if not found["gaiji"]:
        return cleaned, +found
    result = cleaned.translate(RESTORED)
    if _without_marks(result, Counter()) != result:  # what was a character now looks like notation
        result = cleaned.translate(REPLACED)
    return result, +found


def _without_marks(text: str, found: Counter[str]) -> str:
    """Return the text without marks; inner brackets go first, so that those around them are found next."""
    before = None
    while text != before:
        before = text
        n_headers = n_colophons = n_marked = n_ruby = n_repeats = 0
        if "【テキスト中に" in text:
            text, n_headers = HEADER.subn("", text)
        if "底本：" in text[-MAX_COLOPHON:]:
            text, n_colophons = _without_colophon(text)
        if "［＃" in text or "［#" in text:
            text = GAIJI.sub(lambda match: _gaiji(match[1], found), text)
            text = NOTE_LINE.sub(lambda match: _drop(match[0], found), text)
            text = NOTE.sub(lambda match: _drop(match[0], found), text)
        if "〔" in text:
            text = ACCENTED.sub(lambda match: _accents(match, found), text)
        if "《" in text:
            text, n_marked = MARKED_RUBY.subn(r"\1", text)
            text, n_ruby = (RUBY_BESIDE_QUOTATIONS if QUOTATION.search(text) else RUBY).subn("", text)
        if "＼" in text:
            text, n_repeats = REPEAT.subn(lambda match: "〴〵" if match[1] else "〳〵", text)
        found.update({"headers": n_headers, "colophons": n_colophons, "ruby": n_marked + n_ruby, "repeats": n_repeats})
    return text


def _without_colophon(text: str) -> tuple[str, int]:
    """Return the text up to a 底本： after which nothing but a colophon follows, and how many were found (0 or 1)."""
    start = text.rfind("\n底本：", max(0, len(text) - MAX_COLOPHON)) + 1
    if start and all(COLOPHON_LINE.match(line) for line in text[start:].split("\n")):
        return text[:start].rstrip("\n") + "\n", 1
    return text, 0


def _drop(notes: str, found: Counter[str]) -> str:
    found["notes"] += len(NOTE.findall(notes))
    return ""


def _gaiji(description: str, found: Counter[str]) -> str:
    """Return the character that a gaiji's description names by JIS X 0213 or a code point, else GETA."""
    found["gaiji"] += 1
    plain = unicodedata.normalize("NFKC", description)
    codes = CODE_POINTS.search(plain)
    place = LEVEL.search(plain) or (None if codes else next(reversed([*PLANE_ROW_CELL.finditer(plain)]), None))
    character = ""
    if place:
        plane, row, cell = map(int, place.groups())
        try:
            character = (b"\x8f" * (plane - 1) + bytes([0xA0 + row, 0xA0 + cell])).decode("euc_jis_2004")
        except (ValueError, UnicodeDecodeError):  # no such place
            pass
    if not character and codes:
        numbers = [int(code[2:], 16) for code in re.findall(r"U\+[0-9A-F]+", codes[0], re.IGNORECASE)]
        character = "".join(chr(number) for number in numbers if number < sys.maxunicode)
    if not character or any(unicodedata.category(each) in ("Cc", "Cs", "Cn", "Co") for each in character):
        found["unknown gaiji"] += 1
        return GETA
    return PRIVATE.get(character, character)


def _accents(match: re.Match[str], found: Counter[str]) -> str:
    """Return the letters within 〔 〕 with their accents; brackets without one stand in the text itself."""
    text = ACCENT.sub(lambda letter: _accent(letter[0]), match[1])
    if text == match[1]:
        return match[0]
    found["accents"] += 1
    return text


def _accent(mark: str) -> str:
    if mark in LETTERS:
        return LETTERS[mark]
    composed = unicodedata.normalize("NFC", mark[0] + COMBINING.get(mark[1], mark[1]))
    return composed if len(composed) == 1 else mark
