# yolo_qc_plugin, AGPL-3.0
"""The package's shape: which folder may import which, what an import costs, docstrings, version."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from importlib import import_module, metadata
from itertools import chain
from pathlib import Path

import pytest
import torch

import yolo_qc_plugin
from yolo_qc_plugin.config import QCConfig

PACKAGE = Path(yolo_qc_plugin.__file__).parent

# folder, or file beside the folders -> those that it may import beside itself
MAY_IMPORT = {
    "options": set(),
    "targets": set(),
    "config": {"options", "targets"},
    "files": set(),
    "keys": set(),
    "cfg": {"config"},
    "coco": set(),
    "startup": {"config", "cfg", "run"},
    "quant": {"config", "files"},
    "qat": {"config", "files", "quant"},
    "deploy": {"config", "files", "quant"},
    "host": {"config", "files", "quant", "qat", "deploy"},
    "report": {"config", "files", "quant", "deploy", "host"},
    "run": {"options", "config", "files", "quant", "qat", "deploy", "host", "coco", "report"},
    "data": {"config", "files"},
    "tools": {"config", "files", "keys", "quant", "qat", "deploy", "host", "coco", "report", "run"},
    "cli": {"config", "keys", "startup", "data", "coco", "tools", "run"},
    "_build": set(),
}
WITHOUT_ULTRALYTICS = {
    "options", "targets", "config", "files", "keys", "cfg", "startup", "quant", "qat", "deploy", "cli", "_build",
}  # fmt: skip
LATE = {"startup"}  # imports what a command needs when it runs; all others import at the top of the file

# module name, relative to the package -> its source
SOURCES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(p.read_text("utf-8"))
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.name != "_yolo_qc_startup.py"  # not of the package: it is copied to the root of site-packages
}
MODULES = sorted(set(SOURCES) - {"__init__"})


def room(module: str) -> str:
    """The folder that a module is in, or the file itself beside the folders."""
    return module.partition(".")[0]


def imports(name: str):
    """(module, whether at module level) of all that a file imports; the package's own relative to it, after a dot."""
    tree = SOURCES[name]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    package = name if (PACKAGE / name.replace(".", "/") / "__init__.py").exists() else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package and name != "__init__" else []
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            # names are modules where there are such, else what a module defines
            found = [f".{base}.{a.name}".replace("..", ".") for a in node.names]
            found = [m if m[1:] in SOURCES else f".{base}" for m in found]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module]
        else:
            continue
        for module in found:
            assert not module.startswith("yolo_qc_plugin"), f"{name} imports {module} by its absolute name"
            yield module, id(node) not in inside


def test_the_table_has_every_folder():
    assert {room(name) for name in MODULES} == set(MAY_IMPORT)
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} <= set(MAY_IMPORT)
    assert all(allowed <= set(MAY_IMPORT) for allowed in MAY_IMPORT.values())
    list(TopologicalSorter(MAY_IMPORT).static_order())  # raises where folders could import each other in a circle


def test_the_map_for_contributors_is_this_table():
    text = (Path(__file__).parents[1] / "docs" / "contributing.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", text, re.M)
    shown = {place: set() if names == "nothing" else set(names.split(", ")) for place, names in rows}
    assert shown == MAY_IMPORT


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_what_its_folder_may(name):
    for module, at_top in imports(name):
        if module == ".":  # the package itself: its version alone
            continue
        if module.startswith("."):
            assert room(module[1:]) in MAY_IMPORT[room(name)] | {room(name)}, f"{name} imports {module}"
            assert at_top or room(name) in LATE, f"{name} imports {module} within a function"


def test_commands_are_in_folders_that_the_program_may_import():
    """It imports them by name, when they are called."""
    from yolo_qc_plugin.cli import COMMANDS

    assert {room(form.module) for _, forms in COMMANDS.values() for form in forms} <= MAY_IMPORT["cli"]


def test_no_circle_of_files():
    graph = {name: {m[1:] for m, _ in imports(name) if m.startswith(".") and m != "."} for name in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises on a circle


def test_the_package_itself_imports_nothing():
    assert [m for m, _ in imports("__init__")] == ["__future__", "importlib"]


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) in WITHOUT_ULTRALYTICS])
def test_the_core_does_not_know_ultralytics(name):
    at_top = [m for m, top in imports(name) if m.partition(".")[0] == "ultralytics" and (top or room(name) not in LATE)]
    assert not at_top
    assert "ultralytics" in {m.partition(".")[0] for m, _ in imports("host.patches")}  # the search finds what is there


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
    ("import yolo_qc_plugin.cli, yolo_qc_plugin.startup.command", []),
    ("import yolo_qc_plugin; yolo_qc_plugin.QuantConv2d", ["torch", "numpy"]),
    ("import yolo_qc_plugin.qat.correction, yolo_qc_plugin.quant.inject", ["torch", "numpy"]),
    ("import yolo_qc_plugin.deploy.qdq, yolo_qc_plugin.deploy.snap", ["torch", "numpy"]),
])  # fmt: skip
def test_what_an_import_loads(statement, expected):
    found = loaded_after(statement)
    assert [m for m in found if m != "numpy"] == [m for m in expected if m != "numpy"]
    assert expected or "numpy" not in found


@pytest.mark.parametrize("name", [n for n in yolo_qc_plugin.__all__ if n != "__version__"])
def test_a_public_name_stays_itself_whatever_was_imported_before(name):
    """Importing a submodule binds its name in the package, over a function of the same name."""
    for module in MODULES:
        if module != "_build":
            import_module(f"yolo_qc_plugin.{module}")
    assert callable(getattr(yolo_qc_plugin, name)) and getattr(yolo_qc_plugin, name).__name__ == name


def test_public_names():
    assert set(dir(yolo_qc_plugin)) == set(yolo_qc_plugin.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        yolo_qc_plugin.missing


def test_a_checkpoint_names_its_classes_by_the_package_alone():
    """Every module class of ours that can be in a saved model, and the record."""
    from torch import nn

    from yolo_qc_plugin.host.record import QuantRecord
    from yolo_qc_plugin.qat.correction import CorrectedNorm
    from yolo_qc_plugin.quant.precision import KeepWide, OwnPrecision
    from yolo_qc_plugin.quant.quantizer import Quantizer

    of_the_core = [importlib.import_module(f"yolo_qc_plugin.{m}") for m in MODULES if m.startswith(("quant.", "qat."))]
    classes = {c for m in of_the_core for c in vars(m).values() if inspect.isclass(c) and issubclass(c, nn.Module)}
    bases = {KeepWide, OwnPrecision, Quantizer}
    ours = {c for c in classes if c.__module__.startswith("yolo_qc_plugin")} - bases - {CorrectedNorm}
    stored = {getattr(yolo_qc_plugin, name) for name in yolo_qc_plugin._STORED}
    assert stored <= ours | {QuantRecord}
    assert stored | {yolo_qc_plugin.QuantConv2d} <= set(torch.serialization.get_safe_globals())  # for restricted loads
    assert ours | {QuantRecord} == stored | {yolo_qc_plugin.QuantConv2d}
    assert {c.__module__ for c in ours | {QuantRecord}} == {"yolo_qc_plugin"}


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


def test_every_imported_package_is_declared():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    told = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    extras = told["project"]["optional-dependencies"].values()
    lines = chain(told["build-system"]["requires"], told["project"]["dependencies"], *extras)
    declared = {re.match(r"[\w-]+", line)[0].lower() for line in lines}
    found = {m.partition(".")[0] for name in SOURCES for m, _ in imports(name) if not m.startswith(".")}
    third_party = found - set(sys.stdlib_module_names)
    assert {"torch", "cv2", "polars", "sklearn"} <= third_party
    third_party -= {"triton"}  # which torch brings where it is of use
    distributions = metadata.packages_distributions()
    missing = {
        m for m in third_party if not declared & {d.lower() for d in distributions.get(m, [m.replace("_", "-")])}
    }
    assert not missing


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
