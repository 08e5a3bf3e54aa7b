# yolo_qc_plugin, AGPL-3.0
"""Put the start-up hook into this interpreter's site-packages, or take it out again.

A wheel brings the hook along. An editable install does not, hence `yolo-qc hook action=install`. Errors are OSErrors
with a message for the user.
"""

import os
import site
import sysconfig
from importlib.util import cache_from_source
from pathlib import Path
from typing import Literal

STARTUP = Path(__file__).parent
FILES = ("_yolo_qc_startup.py", "yolo_qc_plugin.pth", "yolo_qc_plugin.start")  # the module before those that call it
MARKER = b"# yolo_qc_plugin"  # first bytes of every file of ours


def manage(action: Literal["install", "remove", "status"]) -> str:
    """Install the hook, remove it, or say whether it is there.

    Args:
        action: What to do.

    Returns:
        What was done, in words.
    """
    if action == "status":
        return status()
    done = install() if action == "install" else remove()
    return "\n".join(f"{action.removesuffix('e')}ed {path}" for path in done) or "nothing to remove"


def install() -> list[Path]:
    """Copy the start-up files to site-packages and return where they are now."""
    folder = _writable_folder()
    targets = {folder / source.name: source for source in _sources()}
    for target in targets:
        if target.exists() and not _is_ours(target):
            raise FileExistsError(f"{target} does not belong to yolo_qc_plugin; move it away and try again")
    folder.mkdir(parents=True, exist_ok=True)  # the user's site-packages may not exist yet
    for target, source in targets.items():
        target.write_bytes(source.read_bytes())
    return list(targets)


def remove() -> list[Path]:
    """Delete the start-up files from site-packages and return what was deleted; files of others stay."""
    removed = []
    for folder in _folders():
        for target in reversed([folder / source.name for source in _sources()]):
            if _is_ours(target):
                target.unlink()
                removed.append(target)
                if target.suffix == ".py":
                    Path(cache_from_source(str(target))).unlink(missing_ok=True)
    return removed


def status() -> str:
    """Say in words whether the hook is installed, where, and whether the environment switches it off."""
    lines = [line for line in map(_folder_status, _folders()) if line]
    if not lines:
        return "hook: not installed; `yolo-qc hook action=install` puts it into site-packages"
    switch = "switched off by YOLO_QC_HOOK=0" if os.environ.get("YOLO_QC_HOOK") == "0" else "enabled"
    return "\n".join([*lines, f"hook: {switch}"])


def _folder_status(folder: Path) -> str:
    """Describe the hook in one folder; empty if there is none."""
    present = [source for source in _sources() if _is_ours(folder / source.name)]
    if not present:
        return ""
    if len(present) < len(_sources()):
        detail = " (incomplete; `yolo-qc hook action=install` completes it)"
    elif any((folder / source.name).read_bytes() != source.read_bytes() for source in present):
        detail = " (of another version; `yolo-qc hook action=install` updates it)"
    else:
        detail = ""
    return f"hook: installed in {folder}{detail}"


def _sources() -> list[Path]:
    """Return the start-up files of this package, the module before the files that make Python call it."""
    return [STARTUP / name for name in FILES]


def _folders() -> list[Path]:
    """Return the folders whose start-up files this interpreter reads, preferred first."""
    folders = [Path(sysconfig.get_path("purelib"))]
    if site.ENABLE_USER_SITE:  # off in a virtual environment
        folders.append(Path(site.getusersitepackages()))
    return folders


def _writable_folder() -> Path:
    """Return the first folder that can be written to."""
    for folder in _folders():
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if os.access(existing, os.W_OK):
            return folder
    raise PermissionError(f"no permission to write to {' or '.join(map(str, _folders()))}")


def _is_ours(path: Path) -> bool:
    """Tell a start-up file of this package, whatever its version, from a file of the same name by someone else."""
    return path.is_file() and path.read_bytes().startswith(MARKER)
