"""The house rules that a reader relies on: one direction of imports, files of one subject, nothing swallowed."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "encoder": set(),
    "mllm": {"encoder"},
    "eval": {"encoder", "mllm"},
    "demo": {"encoder", "mllm"},
    "scripts": {"encoder", "mllm", "eval"},
    "benchmarks": {"encoder", "mllm", "eval"},
}
PACKAGES = {"encoder", "mllm", "eval", "demo", "scripts", "benchmarks", "tests"}
MAX_LINES = 400
SHAPELESS_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
SOURCES = [path for package in sorted(MAY_IMPORT) for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} imports relatively; write the package's name"
            names.add((node.module or "").split(".")[0])
    return names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check():
    assert len(SOURCES) > 30 and {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {"encoder", "mllm", "eval", "scripts"}


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_run_one_way(package):
    wrong = {}
    for path in (ROOT / package).rglob("*.py"):
        bad = (imported(path) & PACKAGES) - MAY_IMPORT[package] - {package}
        if bad:
            wrong[relative(path)] = sorted(bad)
    assert not wrong


def test_files_have_one_subject():
    long = {relative(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: two subjects in one file"
    shapeless = [relative(path) for path in SOURCES if SHAPELESS_NAMES & {part.removesuffix(".py") for part in path.parts}]
    assert not shapeless


def test_no_exception_is_swallowed():
    """A handler does something with what it caught: re-raises, returns, counts, reports."""
    silent = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            only_passes = all(
                isinstance(statement, ast.Pass | ast.Continue)
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                for statement in node.body
            )
            if node.type is None or only_passes:
                silent.append(f"{relative(path)}:{node.lineno}")
    assert not silent
    suppressed = [relative(path) for path in SOURCES if "contextlib.suppress" in path.read_text()]
    assert not suppressed


def test_no_script_hides_a_library():
    """The folder of a launched file is first on sys.path: `eval/datasets.py` would be found before the library."""
    libraries = {"datasets", "transformers", "torch", "deepspeed", "evaluate", "gradio", "numpy", "peft", "PIL"}
    launched = [path for package in ("eval", "scripts", "demo") for path in (ROOT / package).glob("*.py")]
    assert not [relative(path) for path in launched if path.stem in libraries | set(sys.stdlib_module_names)]


def test_every_public_module_class_and_function_of_the_libraries_is_explained():
    """A docstring on every module, public class and public function of what others import; a one-liner needs none."""
    bare = []
    for path in SOURCES:
        if path.name == "__init__.py" or path.relative_to(ROOT).parts[0] not in ("encoder", "mllm"):
            continue
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            bare.append(relative(path))
        for node in tree.body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            trivial = isinstance(node, ast.FunctionDef) and len(node.body) == 1
            if public and not trivial and not ast.get_docstring(node):
                bare.append(f"{relative(path)}: {node.name}")
    assert not bare


def test_the_product_does_not_speak_of_how_it_was_made():
    """No machine paths and no private addresses in what is shipped."""
    leaks = []
    files = [*SOURCES, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("Makefile"), ROOT / "pyproject.toml"]
    for path in files:
        text = path.read_text()
        leaks += [f"{relative(path)}: {word}" for word in (f"{ROOT}/", f"{Path.home()}/", "file://") if word in text]
    assert not leaks
