# yolo_qc_plugin, AGPL-3.0
"""Start-up hook: the stock `yolo` accepts `callbacks=qc`, `qc_*` and our models, restricted loading our layers.

Python calls main() while it starts, because `yolo_qc_plugin.pth` (`.start` from Python 3.15 on) lies next to this file.
Two things are ever done, each right after Ultralytics has loaded the module concerned, and only where asked for:

- the program is `yolo` and an argument asks for the plugin, or names a model of ours: it gets to replace
  `ultralytics.cfg.entrypoint`;
- ULTRALYTICS_SAFE_LOAD is set: the plugin adds its layers to the classes that such a load may build.

Otherwise nothing happens. YOLO_QC_HOOK=0 in the environment switches the hook off.
"""

import os
import sys

PROGRAMS = ("yolo", "ultralytics")  # console scripts of Ultralytics
MODELS = ("yolov7-tiny.yaml",)  # model YAMLs of ours; the .pth file names them too
ENTRY = "ultralytics.cfg"  # module that holds their entry point
LOADER = "ultralytics.nn.tasks"  # module that loads checkpoints


class ImportHook:
    """Finder and loader for one import of `name`: the real loader does the work, then `action` gets the module."""

    def __init__(self, name, action):
        self.name, self.action = name, action

    def find_spec(self, name, path=None, target=None):
        """Stand in for the real loader of the one module, and for nothing else."""
        if name != self.name or self not in sys.meta_path:
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
        """Put the real loader back, so that the module looks as if it had never been hooked, run it, then act on it.

        A broken plugin costs one line on stderr, never the program.
        """
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            self.action(module)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"yolo_qc_plugin: the plugin does not load ({reason}), yolo continues without it. "
                f"Reinstall yolo-qc-plugin, or delete yolo_qc_plugin.* in {os.path.dirname(__file__)}",
                file=sys.stderr,
            )


def wrap(module):
    """Let the plugin read its own arguments before Ultralytics sees the rest."""
    from yolo_qc_plugin.startup.command import wrap_entrypoint

    wrap_entrypoint(module)


def allow(module):
    """Import what adds our layers to those that a restricted load builds, where Ultralytics is to load so."""
    if module.SAFE_LOAD:
        import yolo_qc_plugin.run.opening  # noqa: F401


def main():
    """Arm the hooks that this process asks for."""
    program, *arguments = getattr(sys, "argv", None) or [""]  # an embedded interpreter may have no argv
    name = os.path.basename(program).removesuffix(".exe").removesuffix("-script.py")
    # "=" is added because Ultralytics also accepts `callbacks = qc`, which arrives as three arguments.
    asked = any(
        (a.lstrip("-") + "=").startswith(("callbacks=", "qc_")) or a.rpartition("=")[2] in MODELS for a in arguments
    )
    hooks = [ImportHook(ENTRY, wrap)] * (asked and name in PROGRAMS)
    hooks += [ImportHook(LOADER, allow)] * ("ULTRALYTICS_SAFE_LOAD" in os.environ)
    # In a virtual environment Python runs start-up files twice.
    armed = any(isinstance(finder, ImportHook) for finder in sys.meta_path)
    if os.environ.get("YOLO_QC_HOOK") != "0" and not armed:
        sys.meta_path[:0] = hooks
