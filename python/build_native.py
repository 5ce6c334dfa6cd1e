"""Builds the native parts of the wheel: ``libucm.so``, ``ucm``, ``ucm-bench``, ``ucm-proxy``.

A hook of the hatchling build backend. It runs cargo in the source tree above this directory, copies
what came out into the package, and tags the wheel ``py3-none-<platform>``: nothing in it depends on
a CPython ABI. The platform is what the files themselves say: their processor, and the newest glibc
they ask for. Files that would not load on every host of that platform are refused.

``CARGO_BUILD_TARGET=aarch64-unknown-linux-gnu`` builds for another processor; cargo knows the variable.
``UCM_CARGO_PROFILE=dev`` builds without optimization; ``UCM_PREBUILT=DIR`` takes the files from a
directory instead of running cargo.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "libucm.so"
PROGRAMS = ("ucm", "ucm-bench", "ucm-proxy")
OLDEST_GLIBC = (2, 17)
# e_machine of elf.h, the name that platform tags have for it, and the largest page of its Linux kernels,
# which segments must be aligned to or the library does not load there.
PROCESSORS = {62: ("x86_64", 4 << 10), 183: ("aarch64", 64 << 10)}
# What every manylinux host has (PEP 600), of what Rust programs need; each processor has a loader of its own.
LIBRARIES = frozenset(
    {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1"}
)
LOADERS = frozenset({"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"})
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5


class Elf:
    """What a 64-bit little-endian ELF file says of the hosts it runs on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        if self.data[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path}: no 64-bit little-endian ELF file")
        (machine,) = struct.unpack_from("<H", self.data, 18)
        if machine not in PROCESSORS:
            raise ValueError(
                f"{path}: built for ELF machine {machine}; wheels are made for x86_64 and aarch64"
            )
        self.processor, self.largest_page = PROCESSORS[machine]

    def _segments(self, kind: int) -> Iterator[tuple[int, int, int, int]]:
        """Offset, address, bytes and alignment of each program header of a kind."""
        (table,) = struct.unpack_from("<Q", self.data, 32)
        size, count = struct.unpack_from("<HH", self.data, 54)
        for at in range(table, table + size * count, size):
            fields = struct.unpack_from("<IIQQQQQQ", self.data, at)
            if fields[0] == kind:
                yield fields[2], fields[3], fields[5], fields[7]

    def _offset_of(self, address: int) -> int:
        for offset, start, size, _ in self._segments(PT_LOAD):
            if start <= address < start + size:
                return offset + address - start
        raise ValueError(f"{self.path}: no segment holds address {address:#x}")

    def needed(self) -> list[str]:
        """The shared libraries that it names."""
        entries: list[tuple[int, int]] = []
        for offset, _, size, _ in self._segments(PT_DYNAMIC):
            entries.extend(struct.iter_unpack("<QQ", self.data[offset : offset + size]))
        end = next((at for at, (tag, _) in enumerate(entries) if tag == DT_NULL), len(entries))
        entries = entries[:end]
        names = [value for tag, value in entries if tag == DT_NEEDED]
        if not names:
            return []
        strings = self._offset_of(next(value for tag, value in entries if tag == DT_STRTAB))
        starts = [strings + name for name in names]
        return [self.data[start : self.data.index(b"\0", start)].decode() for start in starts]

    def glibc(self) -> tuple[int, int]:
        """The newest glibc symbol version that it asks for."""
        found = re.findall(rb"GLIBC_(\d+)\.(\d+)", self.data)
        return max([OLDEST_GLIBC, *((int(major), int(minor)) for major, minor in found)])

    def check(self) -> None:
        """Refuses what would not load on every host of the platform."""
        foreign = sorted(set(self.needed()) - LIBRARIES - LOADERS)
        if foreign:
            raise ValueError(f"{self.path}: needs {', '.join(foreign)}, which not every Linux host has")
        alignment = min(alignment for *_, alignment in self._segments(PT_LOAD))
        if alignment < self.largest_page:
            raise ValueError(
                f"{self.path}: segments aligned to {alignment} do not load on {self.processor} kernels with "
                f"pages of {self.largest_page}; link with -z max-page-size={self.largest_page}"
            )


def platform_of(files: list[Path]) -> str:
    """The platform tag for files that go into one wheel."""
    read = [Elf(file) for file in files]
    for file in read:
        file.check()
    processors = {file.processor for file in read}
    if len(processors) != 1:
        raise ValueError(f"files for {' and '.join(sorted(processors))} do not go into one wheel: {files}")
    major, minor = max(file.glibc() for file in read)
    return f"manylinux_{major}_{minor}_{processors.pop()}"


def cargo_environment(target: str | None) -> dict[str, str]:
    """The environment of cargo, with the linker that Debian has for another processor unless one is named."""
    environment = dict(os.environ)
    processor = (target or "").split("-", 1)[0]
    if target and processor != platform.machine():
        variable = f"CARGO_TARGET_{target.upper().replace('-', '_')}_LINKER"
        environment.setdefault(variable, f"{processor}-linux-gnu-gcc")
    return environment


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
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_of([library, *programs])}"

    @staticmethod
    def _build(root: Path) -> Path:
        prebuilt = os.environ.get("UCM_PREBUILT")
        if prebuilt:
            return Path(prebuilt)
        profile = os.environ.get("UCM_CARGO_PROFILE", "release")
        target = os.environ.get("CARGO_BUILD_TARGET")
        subprocess.run(
            ["cargo", "build", "--locked", "--workspace", "--lib", "--bins", "--profile", profile],
            cwd=root,
            check=True,
            env=cargo_environment(target),
        )
        built = Path(os.environ.get("CARGO_TARGET_DIR", root / "target"), target or "")
        return built / ("debug" if profile == "dev" else profile)

    @staticmethod
    def _copy(source: Path, target: Path) -> Path:
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(source, target)
        return target
