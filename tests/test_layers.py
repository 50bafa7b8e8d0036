"""Who imports whom, read in the sources: the floors of the design, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

# Leaf modules of gptkit: they know nothing of ours, and the other modules of gptkit know only them.
FLOOR_0 = {
    "schedules",
    "losses",
    "budget",
    "devices",
    "token_shards",
    "run_log",
    "run_records",
    "charts",
    "command_line",
    "files",
    "engines",
    "tokenizer_backends",
    "parallel",
    "sharding",
}
HEAVY = {
    "transformers",
    "huggingface_hub",
    "matplotlib",
    "tiktoken",
    "sentencepiece",
    "tokenizers",
    "galore_torch",
    "tensorboard",
    "wandb",
    "trackio",
}
# A pickle runs code when it is read; nothing here needs one.
UNSAFE = {"pickle", "shelve", "dill", "joblib"}

GPTKIT = sorted(path for path in (ROOT / "gptkit").glob("*.py") if path.stem != "__init__")
COMMANDS = sorted(path for path in ROOT.glob("*.py") if path.stem != "gpt_model")
SCRIPTS = sorted((ROOT / "dataset").glob("*.py"))
OURS = {"gptkit", "gpt_model", "tests", "benchmarks"} | {path.stem for path in COMMANDS + SCRIPTS}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(source: str, everywhere: bool = True) -> set[str]:
    """The modules that a source imports, `from gptkit import x` as gptkit.x; else only what its import imports too."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            whole = [f"{module}.{alias.name}" for alias in node.names] if module == "gptkit" else [module]
            found.update(whole)
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            if not is_for_types_only(child) and (everywhere or not is_function):
                visit(child)

    visit(ast.parse(source))
    return found


def imports_of(path: Path, everywhere: bool = True) -> set[str]:
    return imported(path.read_text("utf-8"), everywhere)


def packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def of_gptkit(modules: set[str]) -> set[str]:
    """tokenization of gptkit.tokenization."""
    return {module.split(".")[1] for module in modules if module.startswith("gptkit.")}


def test_the_reader_of_imports_sees_them() -> None:
    source = (
        "import a.b as c, d\nfrom gptkit import e, f\nfrom gptkit.g import h\nfrom . import i\n"
        "if TYPE_CHECKING:\n    import unseen\nelse:\n    import unseen_too\n"
        "try:\n    import j\nexcept ImportError:\n    pass\n"
        "def k():\n    import inner\nclass L:\n    import m\n"
    )
    at_import = {"a.b", "d", "gptkit.e", "gptkit.f", "gptkit.g", ".", "j", "m"}
    assert imported(source, everywhere=False) == at_import
    assert imported(source) == at_import | {"inner"}
    assert of_gptkit(at_import) == {"e", "f", "g"}


def test_the_floors_are_there() -> None:
    assert {path.stem for path in GPTKIT} > FLOOR_0
    assert {"pretraining", "inference", "pretokenize"} <= {path.stem for path in COMMANDS}
    assert ROOT / "dataset" / "prepare_aozora_jsonl.py" in SCRIPTS


def test_the_model_imports_torch_only() -> None:
    assert packages(imports_of(ROOT / "gpt_model.py")) - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("path", GPTKIT, ids=name_of)
def test_gptkit_stands_on_its_leaves(path: Path) -> None:
    modules = imports_of(path)
    assert packages(modules) & OURS <= {"gptkit"}  # no model, no command: an engine that knows no architecture
    assert "gptkit" not in modules
    assert of_gptkit(modules) <= (set() if path.stem in FLOOR_0 else FLOOR_0)


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_commands_import_the_model_and_gptkit_and_not_each_other(path: Path) -> None:
    modules = imports_of(path)
    assert packages(modules) & OURS <= {"gpt_model", "gptkit"}
    assert of_gptkit(modules) <= {module.stem for module in GPTKIT}


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_dataset_scripts_stand_alone(path: Path) -> None:
    assert packages(imports_of(path)) & OURS <= {"_script"}


@pytest.mark.parametrize("path", [*GPTKIT, *COMMANDS, *SCRIPTS, ROOT / "gpt_model.py"], ids=name_of)
def test_what_is_optional_or_slow_is_imported_where_it_is_used(path: Path) -> None:
    assert not packages(imports_of(path, everywhere=False)) & HEAVY
    assert not packages(imports_of(path)) & UNSAFE
    assert "" not in packages(imports_of(path))  # relative imports hide who is meant


def test_an_import_says_nothing_and_loads_nothing_heavy() -> None:
    modules = [f"gptkit.{path.stem}" for path in GPTKIT] + [path.stem for path in COMMANDS] + ["gpt_model"]
    code = f"import sys\nimport {', '.join(modules)}\nassert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
