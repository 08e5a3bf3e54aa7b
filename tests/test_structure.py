# yolo_qc_plugin, AGPL-3.0
"""The package's shape: who imports whom, what an import costs, docstrings, version."""

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module, metadata
from pathlib import Path

import pytest

import yolo_qc_plugin
from yolo_qc_plugin.config import QCConfig

PACKAGE = Path(yolo_qc_plugin.__file__).parent

# A file may import, at module level, files above it only.
ORDER = """config models native kernels functional foreach observers quantizer offsets layers weights
           oscillation dampening freezing trace deploy snap inject equalization optimizer ema distributed
           correction reestimation bounds qdq exported codes distillation architecture compat checkpoint host telemetry
           report validation randomness resume finish steps standalone callbacks evaluate check plot scenes
           digits hook cli""".split()
WITHOUT_HOST = ORDER[: ORDER.index("codes") + 1]
LATE = {("checkpoint", "callbacks")}  # imported in a function, though below
FREE = {"cli", "__init__"}  # import what they need when they need it

SOURCES = {p.stem: ast.parse(p.read_text(encoding="utf-8")) for p in sorted(PACKAGE.glob("*.py"))}


def imports(name):
    """(module, whether at module level) of everything that a file imports; the package's own as '.name'."""
    tree = SOURCES[name]
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found = [f".{node.module}"] if node.module else [f".{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module]
        else:
            continue
        for module in found:
            own = re.fullmatch(r"yolo_qc_plugin(?:\.(\w+))?.*", module)
            yield (f".{own[1] or ''}" if own else module), id(node) not in inside


def test_the_list_of_files_is_complete():
    assert set(SOURCES) == {*ORDER, "__init__", "_build"}
    assert {m for name in SOURCES for m, _ in imports(name) if m.startswith(".")} <= {
        ".__version__", *(f".{name}" for name in ORDER)
    }  # fmt: skip


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_files_above_it_only(name):
    above = {f".{n}" for n in ORDER[: ORDER.index(name)]} | {".__version__"}
    own = [(m, top) for m, top in imports(name) if m.startswith(".")]
    assert {m for m, top in own if top} <= above
    late = {(name, m[1:]) for m, top in own if not top}
    assert name in FREE or late <= LATE
    assert {pair for pair in LATE if pair[0] == name} <= late  # the list of exceptions is not longer than needed


def test_init_and_build_import_nothing_of_the_package():
    for name in ("__init__", "_build"):
        assert not [m for m, _ in imports(name) if m.startswith((".", "torch", "ultralytics"))]


@pytest.mark.parametrize("name", WITHOUT_HOST)
def test_the_core_does_not_know_the_host(name):
    assert not [m for m, _ in imports(name) if m.partition(".")[0] == "ultralytics"]
    assert "ultralytics" in {m.partition(".")[0] for m, _ in imports("host")}  # the search finds what is there


def loaded_after(statement):
    """Which of the heavy packages a new process has loaded after a statement."""
    heavy = "torch", "ultralytics", "numpy"
    code = f"{statement}\nimport json, sys\nprint(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("statement,expected", [
    ("import yolo_qc_plugin", []),
    ("import yolo_qc_plugin; yolo_qc_plugin.QCConfig(bits=3); dir(yolo_qc_plugin)", []),
    ("import yolo_qc_plugin.cli", []),
    ("import yolo_qc_plugin; yolo_qc_plugin.QuantConv2d", ["torch", "numpy"]),
    ("import yolo_qc_plugin.correction, yolo_qc_plugin.inject, yolo_qc_plugin.ema", ["torch", "numpy"]),
])  # fmt: skip
def test_what_an_import_loads(statement, expected):
    found = loaded_after(statement)
    assert [m for m in found if m != "numpy"] == [m for m in expected if m != "numpy"]
    assert expected or "numpy" not in found


@pytest.mark.parametrize("name", [n for n in yolo_qc_plugin.__all__ if n != "__version__"])
def test_a_public_name_stays_itself_whatever_was_imported_before(name):
    """Importing a submodule binds its name in the package, over a function of the same name."""
    for module in ORDER:
        import_module(f"yolo_qc_plugin.{module}")
    assert callable(getattr(yolo_qc_plugin, name)) and getattr(yolo_qc_plugin, name).__name__ == name


def test_public_names():
    assert set(dir(yolo_qc_plugin)) == set(yolo_qc_plugin.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        yolo_qc_plugin.missing


def public(tree, prefix=""):
    """Public functions and classes of a file, and the public methods of these classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


INHERITED = {"extra_repr"}  # documented by torch


@pytest.mark.parametrize("name", SOURCES)
def test_everything_public_has_a_docstring(name):
    assert ast.get_docstring(SOURCES[name])
    missing = [n for n, node in public(SOURCES[name]) if not ast.get_docstring(node)]
    assert [n for n in missing if n.rpartition(".")[2] not in INHERITED] == []


def test_the_installed_version_is_this_one():
    try:
        installed = metadata.version("yolo-qc-plugin")
    except metadata.PackageNotFoundError:
        pytest.skip("run from a checkout without installing")
    assert installed == yolo_qc_plugin.__version__


def test_the_config_documents_every_field_in_order():
    arguments = inspect.getdoc(QCConfig).partition("Args:")[2].partition("Raises:")[0]
    documented = re.findall(r"^    (\w+):", arguments, re.M)
    assert documented == [f.name for f in fields(QCConfig)]


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_evaluated_or_unpickled(name):
    """Text is data, and checkpoints go through the host's loader, which has the switch for restricted loading."""
    calls = {ast.unparse(n.func): ast.unparse(n) for n in ast.walk(SOURCES[name]) if isinstance(n, ast.Call)}
    assert not calls.keys() & {"eval", "exec", "compile", "__import__", "torch_load"}
    assert "weights_only=True" in calls.get("torch.load", "weights_only=True")
    used = {ast.unparse(n) for n in ast.walk(SOURCES[name]) if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert not [u for u in used if re.search("pickle|marshal|shelve", u) and u != "from pickle import UnpicklingError"]
