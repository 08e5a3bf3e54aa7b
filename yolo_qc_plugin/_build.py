# yolo_qc_plugin, AGPL-3.0
"""Build step that puts the files of `startup/` where Python reads start-up files: the root of site-packages.

Named in pyproject.toml. The build loads this file alone, so it imports nothing else of the package.
"""

from pathlib import Path

from setuptools.command.build_py import build_py

STARTUP = Path(__file__).with_name("startup")
FILES = ("_yolo_qc_startup.py", "yolo_qc_plugin.pth", "yolo_qc_plugin.start")


class BuildPy(build_py):
    """Stock `build_py`, plus the start-up files at the root of the wheel."""

    def root_files(self) -> dict[str, str]:
        """Map each start-up file's place in the wheel to its source; an editable install copies none."""
        if self.editable_mode:
            return {}
        return {str(Path(self.build_lib, name)): str(STARTUP / name) for name in FILES}

    def run(self) -> None:
        """Build the package, then add the start-up files."""
        super().run()
        for target, source in self.root_files().items():
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """List the start-up files among the outputs, for tools that ask what the build writes."""
        return [*super().get_outputs(include_bytecode), *self.root_files()]
