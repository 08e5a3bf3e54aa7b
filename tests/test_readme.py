# yolo_qc_plugin, AGPL-3.0
"""Every command of README.md runs as it is written there, beside files of the names that it uses, with small sizes."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from conftest import TINY_YAML
from ultralytics import YOLO
from ultralytics.utils import YAML

ROOT = Path(__file__).resolve().parents[1]
SMALL = {  # the program in Python searches for widths
    "train": ["epochs=1", "batch=8", "workers=0", "imgsz=64", "plots=False", "qc_budget=none"],
    "val": ["workers=0", "imgsz=64"],
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(kind):
    """The fenced blocks of README.md of a kind; "" are those of a shell."""
    return [text for found, text in BLOCK.findall((ROOT / "README.md").read_text("utf-8")) if found == kind]


def commands():
    """Lines of the shell's blocks without their comments."""
    lines = (line.partition(" #")[0].split() for text in blocks("") for line in text.splitlines())
    return [words for words in lines if words]


def test_commands_of_the_readme(digits, tmp_path):
    env = {**os.environ, "YOLO_CONFIG_DIR": str(tmp_path / "settings"), "YOLO_OFFLINE": "1"}
    env.pop("PYTEST_CURRENT_TEST")  # under which Ultralytics writes elsewhere
    scripts = Path(sys.executable).parent

    def run(*words):
        done = subprocess.run([scripts / words[0], *words[1:]], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    run("yolo", "settings", f"runs_dir={tmp_path / 'runs'}")
    wide = YAML.load(TINY_YAML)  # Ultralytics takes files of less than 0.1 MB for broken ones
    for layer in (layer for part in ("backbone", "head") for layer in wide[part] if layer[2] in {"Conv", "C3"}):
        layer[3][0] *= 4
    YAML.save(tmp_path / "wide.yaml", wide)
    start = YOLO(tmp_path / "wide.yaml")
    start.model.names = YAML.load(digits)["names"]
    for name in ("yolo11n.pt", "start.pt"):
        start.save(tmp_path / name)
    shutil.copyfile(digits, tmp_path / "coco8.yaml")
    best, ran = tmp_path / "runs/detect/train/weights/best.pt", []
    for words in commands():
        if words[0] == "pip" or ("format=litert" in words and not find_spec("ai_edge_litert")):
            continue  # installing is what CI begins with
        run(*words, *SMALL.get(words[1], []))
        ran.append(words)
        if best.exists():
            shutil.copyfile(best, tmp_path / "best.pt")
    assert {words[0] for words in ran} == {"yolo", "yolo-qc"} and len(ran) >= 6
    (program,) = blocks("python")
    assert program.count("epochs=10") == 1
    small = program.replace("epochs=10", "epochs=1, batch=8, workers=0, imgsz=64, plots=False")
    run("python", "-c", small)
    assert (tmp_path / "runs/detect/train-2/weights/best.pt").exists()
