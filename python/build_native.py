"""Builds the native parts of the wheel: ``libucm.so``, ``ucm``, ``ucm-bench``, ``ucm-proxy``.

A hook of the hatchling build backend. It runs cargo in the source tree above this directory, copies
what came out into the package, and tags the wheel ``py3-none-<platform>``: nothing in it depends on
a CPython ABI. ``UCM_CARGO_PROFILE=dev`` builds without optimization; ``UCM_PREBUILT=DIR`` takes the
files from a directory instead of running cargo.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "libucm.so"
PROGRAMS = ("ucm", "ucm-bench", "ucm-proxy")
OLDEST_GLIBC = (2, 17)


def glibc_needed(files: list[Path]) -> tuple[int, int]:
    """The newest glibc symbol version that any of the files asks for."""
    needed = OLDEST_GLIBC
    for file in files:
        for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)", file.read_bytes()):
            needed = max(needed, (int(major), int(minor)))
    return needed


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc,type-arg]
    """Called by hatchling before it packs a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        here = Path(self.root)
        if version == "editable":
            return  # the binding finds libucm.so in the cargo target directory
        built = self._build(here.parent)
        package = here / "ucm"
        library = self._copy(built / LIBRARY, package / "_lib" / LIBRARY)
        programs = [built / name for name in PROGRAMS if (built / name).exists()]
        for example in sorted((here.parent / "examples").glob("*.yaml")):
            self._copy(example, package / "examples" / example.name)
        build_data["shared_scripts"] = {str(path): path.name for path in programs}
        major, minor = glibc_needed([library, *programs])
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_{major}_{minor}_{platform.machine()}"

    @staticmethod
    def _build(root: Path) -> Path:
        prebuilt = os.environ.get("UCM_PREBUILT")
        if prebuilt:
            return Path(prebuilt)
        profile = os.environ.get("UCM_CARGO_PROFILE", "release")
        subprocess.run(
            ["cargo", "build", "--locked", "--workspace", "--lib", "--bins", "--profile", profile],
            cwd=root,
            check=True,
        )
        target = Path(os.environ.get("CARGO_TARGET_DIR", root / "target"))
        return target / ("debug" if profile == "dev" else profile)

    @staticmethod
    def _copy(source: Path, target: Path) -> Path:
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(source, target)
        return target
