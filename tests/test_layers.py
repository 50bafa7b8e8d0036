"""Who imports whom, read in the sources: the layers of the design, what an import may cost, and the size of files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

# The packages of gptkit from the lowest layer up: each may import those of the layers below it (and itself).
LAYERS = (
    {"base"},
    {"distributed"},
    {"text"},
    {"data"},
    {"evaluation", "generation"},
    {"training"},
    {"interop", "report"},
)
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
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

GPTKIT = sorted(path for path in (ROOT / "gptkit").rglob("*.py") if path.stem != "__init__")
PACKAGES = sorted(path.parent.name for path in (ROOT / "gptkit").glob("*/__init__.py"))
COMMANDS = sorted(path for path in ROOT.glob("*.py") if path.stem != "gpt_model")
SCRIPTS = sorted((ROOT / "dataset").glob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
OURS = {"gptkit", "gpt_model", "tests", "benchmarks"} | {path.stem for path in COMMANDS + SCRIPTS}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(source: str, everywhere: bool = True) -> set[str]:
    """Return the modules that a source imports, `from gptkit.a import b` as gptkit.a.b, also for types only.

    Without `everywhere`, only those that importing the source imports too.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            is_package = module == "gptkit" or (module.startswith("gptkit.") and module.count(".") == 1)
            found.update(f"{module}.{alias.name}" if is_package else module for alias in node.names)
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if everywhere or not (is_function or is_for_types):
                visit(child)

    visit(ast.parse(source))
    return found


def imports_of(path: Path, everywhere: bool = True) -> set[str]:
    return imported(path.read_text("utf-8"), everywhere)


def top_level(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def of_gptkit(modules: set[str]) -> set[tuple[str, str]]:
    """Return (package, module) of each import from gptkit: ("base", "cli") of gptkit.base.cli."""
    parts = [module.split(".") for module in modules if module.startswith("gptkit.")]
    return {(part[1], part[2] if len(part) > 2 else "") for part in parts if part[1:] != ["__version__"]}


def allowed(package: str) -> set[str]:
    """Return the packages of the layers below that of a package, and itself."""
    number = next(n for n, layer in enumerate(LAYERS) if package in layer)
    return set().union(*LAYERS[:number]) | {package}


def test_the_reader_of_imports_sees_them() -> None:
    source = (
        "import a.b as c, d\nfrom gptkit.e import f\nfrom gptkit.e.g import h\nfrom . import i\n"
        "if TYPE_CHECKING:\n    from gptkit.for_types.x import y\n"
        "try:\n    import j\nexcept ImportError:\n    pass\n"
        "def k():\n    import inner\nclass L:\n    import m\n"
    )
    at_import = {"a.b", "d", "gptkit.e.f", "gptkit.e.g", ".", "j", "m"}
    assert imported(source, everywhere=False) == at_import
    assert imported(source) == at_import | {"inner", "gptkit.for_types.x"}
    assert of_gptkit(imported(source)) == {("e", "f"), ("e", "g"), ("for_types", "x")}


def test_every_package_has_its_layer() -> None:
    assert PACKAGES == sorted(set().union(*LAYERS))
    assert all(path.parent.parent.name == "gptkit" for path in GPTKIT)  # no module lies outside of a package
    assert {"pretraining", "inference", "pretokenize"} <= {path.stem for path in COMMANDS}
    assert ROOT / "dataset" / "prepare_aozora_jsonl.py" in SCRIPTS
    assert allowed("base") == {"base"}
    assert allowed("generation") == {"base", "distributed", "text", "data", "generation"}


def test_the_model_imports_torch_only() -> None:
    assert top_level(imports_of(ROOT / "gpt_model.py")) - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("path", GPTKIT, ids=name_of)
def test_gptkit_imports_only_layers_below(path: Path) -> None:
    modules = imports_of(path)
    assert top_level(modules) & OURS <= {"gptkit"}  # no model, no command
    assert "gptkit" not in modules
    assert {package for package, _ in of_gptkit(modules)} <= allowed(path.parent.name)


def test_modules_of_a_package_import_each_other_without_circles() -> None:
    edges = {path: {ROOT / "gptkit" / p / f"{m}.py" for p, m in of_gptkit(imports_of(path))} for path in GPTKIT}
    left = dict(edges)
    while left:
        free = [path for path, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {[name_of(path) for path in left]}"
        for path in free:
            del left[path]


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_commands_import_the_model_and_gptkit_and_not_each_other(path: Path) -> None:
    assert top_level(imports_of(path)) & OURS <= {"gpt_model", "gptkit"}


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_dataset_scripts_stand_alone(path: Path) -> None:
    assert top_level(imports_of(path)) & OURS <= {"_script", "_unigram"}


@pytest.mark.parametrize("path", [*GPTKIT, *COMMANDS, *SCRIPTS, ROOT / "gpt_model.py"], ids=name_of)
def test_what_is_optional_or_slow_is_imported_where_it_is_used(path: Path) -> None:
    assert not top_level(imports_of(path, everywhere=False)) & HEAVY
    assert not top_level(imports_of(path)) & UNSAFE
    assert "" not in top_level(imports_of(path))  # relative imports hide who is meant


def test_an_import_prints_nothing_and_loads_nothing_heavy() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in GPTKIT + COMMANDS]
    code = f"import sys\nimport {', '.join([*modules, 'gpt_model'])}\nassert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("path", [*GPTKIT, *COMMANDS, *SCRIPTS, *BENCHMARKS, ROOT / "gpt_model.py"], ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text("utf-8")
    assert source.count("\n") <= MAX_FILE_LINES
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}
