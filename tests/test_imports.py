"""The shape of the source: who may import whom, how long files are, and how fast a mistake is answered."""

import ast
import io
import resource
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("launch", "data_tools", "trainer")
PRODUCT = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))] + [ROOT / "train.py"]
# Third-party packages of the base install; psutil and pydantic are all that launch adds to numpy and onnxruntime.
LAUNCH_MAY = {"launch", "pydantic", "ruamel", "psutil"}
DATA_TOOLS_MAY_NOT = {"torch", "transformers", "sentence_transformers", "trainer"}
VERIFY_MAY = {"numpy", "onnxruntime", "tokenizers"}
STDLIB = sys.stdlib_module_names


def _imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it; `from a import b` counts as a.b too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in _imports(path)} - STDLIB


def _own_file(module: str) -> Path | None:
    """The file of ours that an imported name lies in."""
    while module:
        for path in (
            ROOT / f"{module.replace('.', '/')}.py",
            ROOT / module.replace(".", "/") / "__init__.py",
        ):
            if path.is_file() and module.partition(".")[0] in PACKAGES:
                return path
        module = module.rpartition(".")[0]
    return None


@pytest.mark.parametrize("path", sorted((ROOT / "launch").rglob("*.py")), ids=lambda p: p.name)
def test_launch_is_torch_free(path: Path) -> None:
    assert _roots(path) <= LAUNCH_MAY


@pytest.mark.parametrize("path", sorted((ROOT / "data_tools").rglob("*.py")), ids=lambda p: p.name)
def test_data_tools_know_neither_torch_nor_trainer(path: Path) -> None:
    assert not _roots(path) & DATA_TOOLS_MAY_NOT


def test_verify_needs_numpy_onnxruntime_and_tokenizers_only() -> None:
    todo, seen = [ROOT / "trainer/export/verify.py"], set()
    while todo:
        path = todo.pop()
        seen.add(path)
        for name in _imports(path):
            own = _own_file(name)
            if own is not None and own not in seen:
                todo.append(own)
            elif own is None and name.partition(".")[0] not in STDLIB:
                assert name.partition(".")[0] in VERIFY_MAY, f"{path} imports {name}"
    assert seen


@pytest.mark.parametrize("package", [*PACKAGES, "trainer/export"])
def test_package_files_are_empty(package: str) -> None:
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PRODUCT}
    assert {str(path): count for path, count in lines.items() if count > 400} == {}
    assert lines[ROOT / "train.py"] <= 27
    # docs/decisions/0002 says what counts.
    assert sum(map(_lines_of_code, PRODUCT)) < 12900


def _lines_of_code(path: Path) -> int:
    """Lines that hold code: no blank line, no comment, no docstring."""
    text = path.read_text(encoding="utf-8")
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            held |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            held -= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return len(held)


def test_code_is_ascii() -> None:
    assert [str(path) for path in PRODUCT if not path.read_text(encoding="utf-8").isascii()] == []


def test_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys, launch.cli, launch.preflight, launch.world; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "launch" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "pyarrow", "numpy", "sentence_transformers"}


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["-m", "launch.cli", "--help"], 0),
        (["-m", "launch.cli", "check", "BAD"], 2),
        (["train.py", "BAD"], 2),
    ],
    ids=["help", "check", "train.py"],
)
def test_answers_within_a_second_of_cpu(command: list[str], code: int, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("train: {learing_rate: 1}\n")
    command = [str(bad) if word == "BAD" else word for word in command]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == code, done.stderr
        assert code == 0 or "learing_rate" in done.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0
