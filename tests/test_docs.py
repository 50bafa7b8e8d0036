"""Compare what the documents and the project's settings say with the tree and with each other."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

import gptkit

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

READMES = ("README.md", "README.en.md")
DOCUMENTS = (*READMES, "CONTRIBUTING.md", "exp001/README.md", "docs/clouds.md", "docs/recipe.md")
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z]\w+")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?", re.ASCII)
SUFFIXES = set(re.findall(r"\w+", "cff gz html json jsonl log md model npy png py safetensors sh svg toml txt xz yaml"))
# The paths that commands or readers create, and what only looks like a path: names on a hub, of a data center.
CREATED = re.compile(
    r"dataset/(001|sample_001|aozorabunko)[\w.-]*/?|exp00[2-9]/?.*|(exp001/)?model_checkpoints(/.*)?|\.venv"
    r"|(manifest|config|state|tokenizer)\.json|(metrics|samples|sessions|heldout|texts)\.jsonl|combined_0001\.txt"
    r"|step_\d+/|loss_curve\.png|(training|run)\.log|report\.html|prompts\.txt|beginning\.txt|SHA256SUMS|\.jsonl(\.gz|\.xz)?"
    r"|aozorabunko[\w.-]+|(tokens|wandb|trackio|tensorboard)/|\.(gz|txt|model)"
    r"|(rinna|globis-university)/[\w.-]+|runpod/COUNTRY/DATA-CENTER|NAME/MODEL"
)
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?(>=[\d.]+)?")


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def code_blocks(text: str) -> list[list[str]]:
    """Return the lines of each code block, without comments and empty lines."""
    blocks = [[re.sub(r"(^|\s)#.*", "", line).rstrip() for line in block.splitlines()] for block in FENCE.findall(text)]
    return [[line for line in block if line] for block in blocks]


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .*$", FENCE.sub("", text), re.MULTILINE)


def paths(text: str) -> set[str]:
    """Return the paths that code spans, code blocks and links name, without a leading ./ or ../.

    Those that match CREATED are left out.
    """
    prose = FENCE.sub("", text)
    code = [line for block in code_blocks(text) for line in block] + SPAN.findall(prose)
    words = [word.strip("\"'") for line in code for word in line.split()]
    words += [link.partition("#")[0] for link in LINK.findall(prose) if "://" not in link]
    words = [re.sub(r"^(\.\.?/)+", "", word) for word in words]
    found = {
        w for w in words if PATH.fullmatch(w) and ("/" in w or w == "Dockerfile" or w.rpartition(".")[2] in SUFFIXES)
    }
    return {path for path in found if not CREATED.fullmatch(path)}


def test_paths_are_found_in_code_and_links() -> None:
    text = "`a.py` and [b](docs/b.md#c), [d](https://e.org/f.md) `--g` `/h/i`\n```bash\npython ../j/k.py --l x > m.log # n.py\n```\nand `report.html`"
    assert paths(text) == {"a.py", "docs/b.md", "j/k.py", "m.log"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_in_documents_exist(name: str) -> None:
    named = paths(read(name))
    assert named
    folders = (ROOT, ROOT / "exp001", (ROOT / name).parent)  # some commands are run in exp001
    assert [path for path in sorted(named) if not any((folder / path).exists() for folder in folders)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_to_headings_exist(name: str) -> None:
    """Anchors are those of GitHub: lower case, without punctuation, hyphens for spaces."""
    for link in LINK.findall(read(name)):
        target, _, anchor = link.partition("#")
        if anchor and "://" not in link:
            document = (ROOT / name).parent / target if target else ROOT / name
            titles = [heading.lstrip("# ").lower() for heading in headings(document.read_text("utf-8"))]
            assert anchor in {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_contributing_lists_all_modules_of_gptkit() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)` \| ([^|]+) \|", read("CONTRIBUTING.md"), re.MULTILINE)
    assert [int(layer) for layer, _, _ in rows] == sorted(int(layer) for layer, _, _ in rows)
    listed = {package: sorted(SPAN.findall(modules)) for _, package, modules in rows}
    assert listed == {
        package.parent.name: sorted(path.stem for path in package.parent.glob("*.py") if path != package)
        for package in (ROOT / "gptkit").glob("*/__init__.py")
    }


def test_readmes_agree() -> None:
    japanese, english = map(read, READMES)
    levels = [[heading.partition(" ")[0] for heading in headings(text)] for text in (japanese, english)]
    assert levels[0] == levels[1]
    assert code_blocks(japanese) == code_blocks(english)
    assert set(FLAG.findall(japanese)) == set(FLAG.findall(english))
    assert paths(japanese) ^ paths(english) == set(READMES)  # each links to the other
    rows = [len(re.findall(r"^\|", text, re.MULTILINE)) for text in (japanese, english)]
    assert rows[0] == rows[1]


def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


def requirements(name: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in read(name).splitlines()]
    return [line for line in lines if line and not line.startswith("-r ")]


def expand(extras: dict[str, list[str]], name: str) -> list[str]:
    """Return the requirements of an extra, with those of the project's extras that it names."""
    found = []
    for requirement in extras[name]:
        own = re.fullmatch(r"aozora-gpt\[(.*)\]", requirement)
        found += [r for each in own[1].split(",") for r in expand(extras, each)] if own else [requirement]
    return found


def test_requirements_and_extras_agree() -> None:
    table = project()["project"]
    assert table["dependencies"] == requirements("requirements.txt")
    extras = table["optional-dependencies"]
    assert sorted(expand(extras, "dev")) == sorted(requirements("tests/requirements.txt"))
    for name in extras.keys() - {"dev"}:
        assert set(extras[name]) < set(expand(extras, "dev"))


def test_constraints_pin_all_requirements() -> None:
    def normalized(requirement: str) -> str:
        match = REQUIREMENT.match(requirement)
        assert match, requirement
        return match[1].replace("_", "-").lower()

    pinned = {normalized(line) for line in requirements("constraints.txt")}
    assert {normalized(line) for line in requirements("tests/requirements.txt")} < pinned
    assert {normalized(line) for line in requirements("requirements.txt")} < pinned


def test_version_has_one_place() -> None:
    settings = project()
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gptkit.__version__"}
    newest = re.search(r"^## \[([^\]]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert newest
    assert newest[1] == gptkit.__version__


def test_pre_commit_runs_the_linters_of_run_tests() -> None:
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    linters = re.findall(r"^(?:ruff|mypy|shellcheck)\b.*", read("run_tests.sh"), re.MULTILINE)
    assert len(linters) == 4
    assert [hook["entry"] for hook in hooks] == [f".venv/bin/{linter}" for linter in linters]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)


def test_shellcheck_reads_all_shell_scripts() -> None:
    (shellcheck,) = re.findall(r"^shellcheck (.*)", read("run_tests.sh"), re.MULTILINE)
    scripts: list[Path] = []
    for pattern in ("*.sh", "exp001/*.sh", "cloud/*.sh", "benchmarks/**/*.sh", ".ci/*"):
        scripts += ROOT.glob(pattern)
    assert sorted(shellcheck.split()) == sorted(str(path.relative_to(ROOT)) for path in scripts)
