# yolo_qc_plugin, AGPL-3.0
"""The start-up hook as users get it: a real wheel in a fresh virtual environment, seen from new processes."""

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import types
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTUP = ROOT / "yolo_qc_plugin" / "startup"
ROOT_FILES = {"_yolo_qc_startup.py", "yolo_qc_plugin.pth", "yolo_qc_plugin.start"}
PTH_LINE = (STARTUP / "yolo_qc_plugin.pth").read_text().splitlines()[-1]

# Prints, as JSON on the last line of stdout, what a process knows of the plugin.
REPORT = """
import json, sys
print(json.dumps({
    "modules": sorted(m for m in sys.modules if "yolo_qc" in m),
    "finders": sum(type(f).__module__ == "_yolo_qc_startup" for f in sys.meta_path),
}))
"""

# Does what the console script `yolo` does up to the call of the entry point.
YOLO = """
import json, sys
from ultralytics.cfg import entrypoint
cfg = sys.modules["ultralytics.cfg"]
print(json.dumps({
    "entrypoint": entrypoint.__module__,
    "modules": sorted(m for m in sys.modules if "yolo_qc" in m),
    "finders": sum(type(f).__module__ == "_yolo_qc_startup" for f in sys.meta_path),
    "loaders": [type(cfg.__loader__).__name__, type(cfg.__spec__.loader).__name__],
}))
"""


class Site:
    """A virtual environment with the wheel's files and the libraries of the running interpreter."""

    def __init__(self, folder: Path, wheel: Path):
        venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
        self.folder = folder
        self.python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.packages = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.packages)
        # Links instead of a path line, to leave out an installed copy of the plugin itself.
        libraries = folder / "libraries"
        libraries.mkdir()
        for entry in (e for p in sys.path if p.endswith(("site-packages", "dist-packages")) for e in Path(p).iterdir()):
            if "yolo_qc" not in entry.name and not (libraries / entry.name).is_symlink():
                (libraries / entry.name).symlink_to(entry)
        (self.packages / "libraries.pth").write_text(f"{libraries}\n")

    def run(self, *args, **env) -> subprocess.CompletedProcess:
        """Run the environment's Python, away from the checkout and from the caller's settings."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "YOLO_", "COV_"))}
        clean |= {"YOLO_CONFIG_DIR": str(self.folder), "YOLO_OFFLINE": "true", **env}
        command = [str(self.python), *map(str, args)]
        return subprocess.run(command, cwd=self.folder, env=clean, capture_output=True, text=True, timeout=120)

    def report(self, name: str, code: str, *args, **env) -> dict:
        """Run `code` as a program called `name` and return the JSON it prints last."""
        program = self.folder / name
        program.write_text(code)
        result = self.run(program, *args, **env)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1]) | {"stderr": result.stderr}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, so that the checkout stays free of build output."""
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    shutil.copytree(ROOT / "yolo_qc_plugin", source / "yolo_qc_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-w", str(tmp)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    result = subprocess.run(command, cwd=tmp, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(tmp.glob("*.whl"))


@pytest.fixture
def site(tmp_path, wheel) -> Site:
    return Site(tmp_path, wheel)


def load_startup() -> types.ModuleType:
    """Load the start-up module of the checkout, under a name of its own."""
    spec = importlib.util.spec_from_file_location("startup_under_test", STARTUP / "_yolo_qc_startup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wheel_ships_the_hook_at_its_root(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = archive.read(next(n for n in names if n.endswith(".dist-info/RECORD"))).decode()
        for name in ROOT_FILES:
            assert archive.read(name) == (STARTUP / name).read_bytes()
    assert {n for n in names if "/" not in n} == ROOT_FILES
    assert {line.split(",")[0] for line in record.splitlines()} == names  # so that `pip uninstall` takes all away
    assert {f"yolo_qc_plugin/startup/{n}" for n in ROOT_FILES} <= names  # what `yolo-qc hook action=install` copies
    assert "yolo_qc_plugin/cfg/yolov7-tiny.yaml" in names


def test_hook_leaves_other_processes_alone(site):
    asking = ("callbacks=qc", "qc_bits=4")
    assert site.run("-c", "pass").stderr == ""
    assert site.report("other", REPORT) == {"modules": [], "finders": 0, "stderr": ""}
    assert site.report("yolo", REPORT, "train", "model=yolo11n.pt") == {"modules": [], "finders": 0, "stderr": ""}
    # With our arguments the small start-up module looks at the program's name, and leaves it there.
    assert site.report("train.py", REPORT, *asking) == {"modules": ["_yolo_qc_startup"], "finders": 0, "stderr": ""}
    off = site.report("yolo", REPORT, *asking, YOLO_QC_HOOK="0")
    assert off == {"modules": ["_yolo_qc_startup"], "finders": 0, "stderr": ""}


def test_hook_wraps_the_entry_point_of_yolo(site):
    on = site.report("yolo", YOLO, "train", "callbacks=qc", "qc_bits=4")
    assert on["entrypoint"] == "yolo_qc_plugin.startup.command"
    assert on["finders"] == 0, "the finder has to go once its work is done"
    assert on["loaders"] == ["SourceFileLoader"] * 2, "the module has to look like any other"
    named = site.report("yolo", YOLO, "train", "model=yolov7-tiny.yaml")
    ours = {
        f"yolo_qc_plugin{name}"
        for name in ("", ".startup", ".startup.command", ".config", ".options", ".targets", ".cfg")
    }
    assert named["entrypoint"] == "yolo_qc_plugin.startup.command"
    assert set(named["modules"]) == {"_yolo_qc_startup", *ours}
    off = site.report("yolo", YOLO, "train", "callbacks=qc", YOLO_QC_HOOK="0")
    assert off["entrypoint"] == "ultralytics.cfg"
    assert off["modules"] == ["_yolo_qc_startup"]


def test_half_removed_install_leaves_yolo_working(site):
    shutil.rmtree(site.packages / "yolo_qc_plugin")
    quiet = site.run("-c", "pass")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    stock = site.report("yolo", YOLO, "train", "callbacks=qc")
    assert stock["entrypoint"] == "ultralytics.cfg"
    lines = [line for line in stock["stderr"].splitlines() if "yolo_qc_plugin" in line]
    assert len(lines) == 1 and "yolo continues without it" in lines[0]
    assert "Traceback" not in stock["stderr"]


def test_missing_start_up_module_is_no_error(site):
    """The .pth line alone, as after a removal by hand: nothing happens, and nothing is said."""
    (site.packages / "_yolo_qc_startup.py").unlink()
    shutil.rmtree(site.packages / "yolo_qc_plugin")
    found = site.report("yolo", REPORT, "train", "callbacks=qc", ULTRALYTICS_SAFE_LOAD="1")
    assert found == {"modules": [], "finders": 0, "stderr": ""}


def test_broken_package_costs_a_line_a_hook(site):
    """A syntax error within the package, an argument that asks for it, restricted loading: `yolo` goes on."""
    (site.packages / "yolo_qc_plugin" / "config.py").write_text("def broken(:\n")
    code = "import ultralytics.nn.tasks\nfrom ultralytics.cfg import entrypoint\nentrypoint('yolo version')\n" + YOLO
    found = site.report("yolo", code, "train", "callbacks=qc", ULTRALYTICS_SAFE_LOAD="1")
    assert found["entrypoint"] == "ultralytics.cfg" and found["finders"] == 0
    lines = found["stderr"].splitlines()
    assert len(lines) == 2 and all("the plugin does not load (SyntaxError" in line for line in lines)


# A program that opens a checkpoint and knows nothing of the plugin.
OPEN = """
import json, sys
from ultralytics import YOLO
model = YOLO(sys.argv[1])
layers = sum(type(m).__name__ == "QuantConv2d" for m in model.model.modules())
model.predict(sys.argv[2], imgsz=64, verbose=False)
model.val(data=sys.argv[3], imgsz=64, plots=False, verbose=False, project=sys.argv[4])
finders = sum(type(f).__module__ == "_yolo_qc_startup" for f in sys.meta_path)
print(json.dumps({"layers": layers, "finders": finders}))
"""


def test_restricted_loading_in_a_fresh_process(site, digits, tmp_path):
    """ULTRALYTICS_SAFE_LOAD=1: load, predict and val of a checkpoint that holds every class of ours."""
    import torch
    from ultralytics.nn.tasks import DetectionModel

    from yolo_qc_plugin import QCConfig
    from yolo_qc_plugin.host import architecture
    from yolo_qc_plugin.host.record import QuantRecord, write_checkpoint
    from yolo_qc_plugin.qat.correction import insert_correction
    from yolo_qc_plugin.quant.inject import inject, quantize_outputs

    model = DetectionModel("yolov5n.yaml", nc=10, verbose=False).eval()
    inject(model, QCConfig(), architecture.edge_convs(model), architecture.fixed_convs(model))
    quantize_outputs(architecture.output_blocks(model), 8)
    insert_correction(model, per_channel=True)
    model.qc, model.args, model.names = QuantRecord(QCConfig().to_dict()), {}, dict(enumerate("0123456789"))
    file = tmp_path / "best.pt"
    write_checkpoint({"model": model.half(), "train_args": {}}, file)
    image = next((digits.parent / "images" / "val").iterdir())
    arguments = (file, image, digits, tmp_path / "v")

    found = site.report("other", OPEN, *arguments, ULTRALYTICS_SAFE_LOAD="1")
    assert found["layers"] == 75 and found["finders"] == 0
    (site.folder / "off").write_text(OPEN)  # without the hook the host refuses, so the load above was restricted
    refused = site.run("off", *arguments, ULTRALYTICS_SAFE_LOAD="1", YOLO_QC_HOOK="0")
    supported = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")
    assert ("references types outside" in refused.stderr) is supported


def test_hook_can_be_removed_and_installed(site):
    def call(name: str, **env) -> str:
        result = site.run("-c", f"from yolo_qc_plugin.startup import hook; print(hook.{name}())", **env)
        return result.stdout + result.stderr

    def present() -> set[str]:
        return {name for name in ROOT_FILES if (site.packages / name).exists()}

    status = call("status")
    assert f"installed in {site.packages}\n" in status and "enabled" in status
    assert "switched off by YOLO_QC_HOOK=0" in call("status", YOLO_QC_HOOK="0")
    removed = call("remove")
    assert all(name in removed for name in ROOT_FILES) and present() == set()
    assert call("remove") == "[]\n"
    assert "not installed" in call("status")

    foreign = site.packages / "yolo_qc_plugin.start"
    foreign.write_text("someone_else:main\n")
    assert f"FileExistsError: {foreign} does not belong to yolo_qc_plugin" in call("install")
    assert present() == {foreign.name}, "a refused install must not leave a part of the hook"
    assert call("remove") == "[]\n" and foreign.exists()
    foreign.unlink()

    installed = call("install")
    assert all(name in installed for name in ROOT_FILES)
    assert all((site.packages / name).read_bytes() == (STARTUP / name).read_bytes() for name in ROOT_FILES)
    (site.packages / "yolo_qc_plugin.pth").write_bytes(b"# yolo_qc_plugin, an older version\n")
    assert "of another version" in call("status")
    (site.packages / "yolo_qc_plugin.pth").unlink()
    assert "incomplete" in call("status")
    call("install")
    assert present() == ROOT_FILES and "enabled" in call("status")


@pytest.mark.parametrize(
    "arguments, asks",
    [
        ("train callbacks=qc", True),
        ("train --callbacks=qc", True),
        ("train callbacks = qc", True),
        ("train --callbacks = qc", True),
        ("train qc_bits=4", True),
        ("train --qc_bits=4", True),
        ("train model=yolov7-tiny.yaml", True),
        ("train --model = yolov7-tiny.yaml", True),
        ("train model=yolov7-tiny.pt project=yolov7-tiny", False),
        ("train model=mine/yolov7-tiny.yaml", False),
        ("", False),
        ("train model=qc_model.pt project=callbacks=", False),
        ("train callbacks_dir=runs", False),
    ],
)
def test_arguments_that_ask_for_the_plugin(arguments, asks, monkeypatch):
    """The import line of the .pth file and main(), which Python 3.15 calls directly, agree on what concerns them."""
    called = []
    fake = types.SimpleNamespace(main=lambda: called.append(True), __spec__=True)
    monkeypatch.setitem(sys.modules, "_yolo_qc_startup", fake)
    monkeypatch.setattr(sys, "argv", ["yolo", *arguments.split()])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delenv("YOLO_QC_HOOK", raising=False)
    finders = len(sys.meta_path)
    exec(PTH_LINE, {})
    assert bool(called) is asks
    startup = load_startup()
    startup.main()
    startup.main()  # start-up files may run twice; one finder is enough
    assert len(sys.meta_path) - finders == asks


@pytest.mark.parametrize(
    "program, ours",
    [
        ("/usr/bin/yolo", True),
        ("ultralytics", True),
        ("yolo.exe", True),
        ("yolo-script.py", True),
        ("yolov5", False),
        ("-c", False),
        ("", False),
    ],
)
def test_programs_the_hook_is_for(program, ours, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "callbacks=qc"])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delenv("YOLO_QC_HOOK", raising=False)
    finders = len(sys.meta_path)
    load_startup().main()
    assert len(sys.meta_path) - finders == ours


def test_missing_or_empty_argv_is_no_error(monkeypatch):
    for argv in ([], None):
        monkeypatch.setattr(sys, "argv", argv)
        load_startup().main()
    monkeypatch.delattr(sys, "argv")
    load_startup().main()
    exec(PTH_LINE, {})


def test_start_up_files_know_the_models():
    from yolo_qc_plugin.cfg import MODELS

    assert tuple(f"{name}.yaml" for name in MODELS) == load_startup().MODELS
    assert all(f'"{name}.yaml"' in PTH_LINE for name in MODELS)


def test_start_file_names_main():
    """Python 3.15 takes lines `module:callable` from the .start file and ignores comments."""
    lines = (STARTUP / "yolo_qc_plugin.start").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["_yolo_qc_startup:main"]
    assert callable(load_startup().main)


def test_start_up_costs_every_other_process_less_than_a_millisecond(monkeypatch, capsys):
    """site.py compiles and runs the import line in every process, so both count."""
    arguments = "train model=yolo11n.pt data=coco8.yaml epochs=100 imgsz=640 batch=16 device=0 workers=8 name=run"
    monkeypatch.setattr(sys, "argv", ["yolo", *arguments.split()])
    seconds = []
    for _ in range(500):
        start = time.perf_counter()
        exec(PTH_LINE, {})
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    with capsys.disabled():
        print(f"\nstart-up hook, process without our arguments: {median * 1e6:.0f} microseconds (median of 500)")
    assert median < 1e-3
