# yolo_qc_plugin, AGPL-3.0
"""Start-up hook: makes the stock `yolo` program accept `callbacks=qc` and `qc_*` arguments.

Python calls main() while it starts, because `yolo_qc_plugin.pth` (`.start` from Python 3.15 on) lies next to this file.
Unless the program is `yolo` and an argument asks for the plugin, nothing happens. Otherwise the plugin gets to replace
`ultralytics.cfg.entrypoint` right after that module is loaded. YOLO_QC_HOOK=0 in the environment switches the hook off.
"""

import os
import sys

PROGRAMS = ("yolo", "ultralytics")  # console scripts of Ultralytics
TARGET = "ultralytics.cfg"  # module that holds their entry point


class ImportHook:
    """Finder and loader for one import of TARGET: the real loader does the work, then the plugin wraps the result."""

    def find_spec(self, name, path=None, target=None):
        """Stand in for the real loader of TARGET, and for nothing else."""
        if name != TARGET or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # one import only; also keeps the search below from ending here again
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        """Leave the module object to the real loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module):
        """Put the real loader back, so that the module looks as if it had never been hooked, run it, then wrap it."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        wrap(module)


def wrap(module):
    """Hand the module to the plugin; a broken plugin costs one line on stderr, never the `yolo` program."""
    try:
        from yolo_qc_plugin.cli import wrap_entrypoint

        wrap_entrypoint(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"yolo_qc_plugin: the plugin does not load ({reason}), yolo continues without it. "
            f"Reinstall yolo-qc-plugin, or delete yolo_qc_plugin.* in {os.path.dirname(__file__)}",
            file=sys.stderr,
        )


def main():
    """Arm the hook if this process is `yolo` with an argument meant for the plugin."""
    program, *arguments = getattr(sys, "argv", None) or [""]  # an embedded interpreter may have no argv
    name = os.path.basename(program).removesuffix(".exe").removesuffix("-script.py")
    # "=" is added because the host also accepts `callbacks = qc`, which arrives as three arguments.
    asked = any((a.lstrip("-") + "=").startswith(("callbacks=", "qc_")) for a in arguments)
    if name in PROGRAMS and asked and os.environ.get("YOLO_QC_HOOK") != "0":
        # In a virtual environment Python runs start-up files twice.
        if not any(isinstance(finder, ImportHook) for finder in sys.meta_path):
            sys.meta_path.insert(0, ImportHook())
