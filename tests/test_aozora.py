"""dataset/_aozora.py and --clean_aozora: the notation of Aozora Bunko in invented text is counted, cleaned, and nothing else."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SAMPLE, SEPARATOR, SHARED, call_command, write_jsonl

sys.path.insert(0, str(ROOT / "dataset"))  # as for `python dataset/prepare_aozora_jsonl.py`

from _aozora import clean_notation

HEADER = """\
灯台の犬
山野花子

-------------------------------------------------------
【テキスト中に現れる記号について】

《》：ルビ
（例）灯台《とうだい》

｜：ルビの付く文字列の始まりを特定する記号
（例）若い｜医者《いしゃ》

［＃］：入力者注　主に外字の説明や、傍点の位置の指定
（例）※［＃「てへん＋劣」、第3水準1-84-77］
-------------------------------------------------------

"""
COLOPHON = """

底本：「灯台の犬」架空文庫、架空社
　　　1990（平成2）年1月1日初版発行
※底本は、物を数える際に用いる「ヶ」を大振りにつくっています。
入力：川辺
校正：坂本
2001年1月1日公開
2011年1月1日修正
青空文庫作成ファイル：
このファイルは、インターネットの図書館、青空文庫で作られました。
"""
CASES: dict[str, tuple[str, str]] = {
    "ruby": ("灯台《とうだい》の犬は、坂の上《うえ》で吠《ほ》えた。", "灯台の犬は、坂の上で吠えた。"),
    "ruby after a bar": ("若い｜お医者さま《いしゃ》と｜ＡＢＣ《エービーシー》。", "若いお医者さまとＡＢＣ。"),
    "ruby over letters": ("milk《ミルク》と霧々《きりぎり》。", "milkと霧々。"),
    "ruby of another script": ("｜海《mer》と｜アイス《氷菓》と｜いろは《イロハ》。", "海とアイスといろは。"),
    "titles beside ruby": (
        "雑誌《白い犬》と小説《朝の, 歌》と山羊《やぎ》。",
        "雑誌《白い犬》と小説《朝の, 歌》と山羊。",
    ),
    "a quotation after ruby": ("重《かさ》ねて《テスト》と", "重ねて《テスト》と"),
    "gaiji that names numbers": ("※［＃「1-2-3」の形、第3水準1-15-3］", "\u54ff"),
    "gaiji by two code points": ("※［＃「あ」に濁点、U+3042 U+3099］", "あ\u3099"),
    "gaiji with a page and a line": ("※［＃「木＋喬」、U+6A4B、1-12-4］", "橋"),
    "notes": ("［＃５字下げ］一［＃「一」は中見出し］\n雨［＃「雨」に傍点］が。\n", "一\n雨が。\n"),
    "lines of notes": ("前。\n［＃改ページ］\n　［＃ここから２字下げ］［＃ここから横組み］\n後。", "前。\n後。"),
    "gaiji of JIS X 0213": ("※［＃「てへん＋劣」、第3水準1-84-77］る。", "挘る。"),
    "gaiji of the second plane": ("※［＃「土へん＋竒」、第4水準2-5-1］", b"\x8f\xa5\xa1".decode("euc_jis_2004")),
    "gaiji of two code points": ("※［＃半濁点付き片仮名か、1-4-87］", "か\u309a"),
    "gaiji by code point": (
        "※［＃「木＋茲」、U+6A17、12-3］と※［＃「口＋七」、Ｕ＋２０Ｂ９Ｆ、34-5］",
        "樗と\U00020b9f",
    ),
    "gaiji with full-width digits": ("※［＃「てへん＋劣」、第３水準１－８４－７７］", "挘"),
    "unknown gaiji": ("※［＃「犬＋灯」、123-4］が鳴く。※［＃「灯」、第3水準1-99-1］", "〓が鳴く。〓"),
    "ruby over gaiji": ("※［＃「犬＋灯」、12-4］《とう》と※［＃「てへん＋劣」、第3水準1-84-77］《むし》る", "〓と挘る"),
    "gaiji in ruby": ("灯台《とう※［＃濁点付き片仮名ワ、1-7-82］い》の", "灯台の"),
    "gaiji in notes": ("挘［＃「※［＃「てへん＋劣」、第3水準1-84-77］」に傍点］る", "挘る"),
    "repetition": ("ごろ／＼と、ばら／″＼と。", "ごろ〳〵と、ばら〴〵と。"),
    "accents": ("〔Cafe'〕と〔garc,on〕と〔fu:r〕と〔L'a^me〕と〔Stras&e〕", "Caféとgarçonとfürと" + "L'âmeとStraße"),
    "ruby over accents": ("〔cafe'〕《カフェ》で", "caféで"),
    "the explanation": (HEADER + "　本文。\n", "灯台の犬\n山野花子\n\n　本文。\n"),
    "the colophon": ("　本文。\n" + COLOPHON, "　本文。\n"),
    "a quotation mark as gaiji": (
        "彼は※［＃始め二重山括弧、1-1-52］太陽※［＃終わり二重山括弧、1-1-53］と",
        "彼は《太陽》と",
    ),
    "one that would be ruby": (
        "題名※［＃始め二重山括弧、1-1-52］ソル※［＃終わり二重山括弧、1-1-53］と",
        "題名≪ソル≫と",
    ),
}
UNCHANGED = [
    "彼は《太陽》と名づけた。\n《序》\n「《月》も」と、《ああ》。",
    "東京《とうきょう\n次の行の》終り。",  # nobody closed it
    "東京とうきょう》の人",
    "［＃ここから\n２字下げ］本文。",
    "［＃閉じない注\n　本文は残る。\n",
    "※［＃「口＋\n世」、第3水準1-15-3］",
    "若い｜医者は｜来ない。",
    "表｜裏\n",
    "if (a||b) c《d》",
    "〔一字不明〕と〔ABC〕と〔no accents, here〕",
    "※印と＃印と／と＼と〓",
    "山の形。\n／＼\n",
    "〔cafe'\n〕",
    "底本：「灯台の犬」という題の話がある。\n　その話は長い。\n入力：と書いた紙。\n　終り。",
    "--------------------\n　幕間。\n--------------------\n",
]


@pytest.mark.parametrize("name", CASES)
def test_notation_is_cleaned(name: str) -> None:
    text, expected = CASES[name]
    cleaned, found = clean_notation(text)
    assert cleaned == expected
    assert found.total()
    assert clean_notation(cleaned) == (cleaned, {})


@pytest.mark.parametrize("text", UNCHANGED)
def test_what_is_no_notation_remains(text: str) -> None:
    cleaned, found = clean_notation(text)
    assert cleaned == text
    assert not found.total()


def test_cleaning_twice_changes_nothing_more() -> None:
    """Whatever stands beside each other, closed or not; and no text of other lines is lost."""
    chance = random.Random(0)
    signs = [
        "《",
        "》",
        "｜",
        "※",
        "［＃",
        "］",
        "［",
        "＃",
        "〔",
        "〕",
        "a'",
        "東",
        "か",
        "カ",
        "、",
        "\n",
        "「",
        "／＼",
        "／",
        "＼",
    ]
    signs += [
        "-" * 12 + "\n",
        "【テキスト中に現れる記号について】\n",
        "\n底本：",
        "入力：\n",
        "1-1-52",
        "U+300A",
        "1-99-1",
    ]
    signs += [f"※［＃、1-1-{cell}］" for cell in (31, 32, 35, 44, 45, 46, 47, 52, 53, 84)] + ["※［＃、1-2-8］"]
    for _ in range(5000):
        text = "".join(chance.choice(signs) for _ in range(chance.randint(1, 25)))
        cleaned, _ = clean_notation(text)
        assert clean_notation(cleaned)[0] == cleaned, text


def test_a_bracket_that_nobody_closed_costs_nothing_and_takes_no_time() -> None:
    rest = "　雨が降る。猫が鳴く。\n" * 20_000
    for sign in ("《", "［＃", "※［＃", "〔a'", "｜", "-" * 20 + "\n【テキスト中に現れる記号について】\n", "\n底本："):
        assert clean_notation("灯" + sign + rest)[0] == "灯" + sign + rest
        assert clean_notation((sign + "灯") * 20_000 + "\n" + rest)[0].endswith(rest)


def prepare(tmp_path: Path, texts: list[str], *flags: str) -> tuple[dict[str, Any], list[str], str]:
    """Return the manifest, the documents and the notes."""
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    result = call_command(
        "dataset/prepare_aozora_jsonl.py", "--jsonl_path", source, "--output_dir", tmp_path / "out", *flags
    )
    assert result.returncode == 0, result.stderr
    documents = (tmp_path / "out" / "combined_0001.txt").read_text("utf-8").split(SEPARATOR)[:-1]
    return json.loads((tmp_path / "out" / "manifest.json").read_bytes()), documents, result.stderr


RAW = "灯台《とうだい》の犬。※［＃「犬＋灯」、12-4］※［＃「てへん＋劣」、第3水準1-84-77］\n［＃改ページ］\n終り。\n"


def test_prepare_counts_notation_and_names_the_remedy(tmp_path: Path) -> None:
    manifest, documents, notes = prepare(tmp_path, [RAW, "雨。", HEADER + RAW + COLOPHON])
    assert documents == [RAW, "雨。", HEADER + RAW + COLOPHON]
    counts = {"works": 2, "colophons": 1, "gaiji": 4, "headers": 1, "notes": 2, "ruby": 2, "unknown gaiji": 2}
    assert manifest["notation"] == counts
    kinds = ", ".join(f"{kind}: {count}" for kind, count in list(counts.items())[1:])
    assert notes == (
        f"note: the notation of Aozora Bunko in 2 of 3 documents ({kinds}) is still in the text;"
        " --clean_aozora removes it\n"
    )


def test_prepare_cleans_before_it_filters(tmp_path: Path) -> None:
    cleaned = "灯台の犬。〓挘\n終り。\n"
    texts = [RAW.replace("\n", "\r\n"), "［＃改ページ］\n", "灯《ひ》"]
    manifest, documents, notes = prepare(tmp_path, texts, "--clean_aozora", "--min_chars", "2")
    assert documents == [cleaned]
    assert manifest["left_out"] == {"empty": 1, "length": 1}
    assert (manifest["characters"], manifest["notation"]["works"]) == (len(cleaned), 1)
    assert manifest["options"]["clean_aozora"] is True
    assert "was cleaned; unknown gaiji became 〓" in notes


def test_text_without_notation_is_prepared_as_before(tmp_path: Path, sample_texts: list[str]) -> None:
    manifest, documents, notes = prepare(tmp_path, sample_texts)
    assert documents == sample_texts
    assert (manifest["notation"], manifest["line_ends"], notes) == ({"works": 0}, 0, "")
    assert prepare(tmp_path, sample_texts, "--clean_aozora")[1:] == (sample_texts, "")
    assert SAMPLE.exists()


@pytest.mark.skipif(not (SHARED / "faults" / "ruby.jsonl").is_file(), reason="needs the shared inputs")
def test_the_reported_file() -> None:
    texts = [json.loads(line)["text"] for line in (SHARED / "faults" / "ruby.jsonl").read_text("utf-8").splitlines()]
    cleaned, found = clean_notation(texts[0])
    assert not set(cleaned) & set("《》｜［］＃※")
    assert found["ruby"] == found["gaiji"] * 2 > 0
