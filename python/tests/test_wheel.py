"""The wheel's tag and what it refuses, from small ELF files made here."""

from __future__ import annotations

import importlib.util
import platform
import struct
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("hatchling", reason="the build backend is not installed: pip install hatchling")

X86_64, AARCH64, RISCV = 62, 183, 243
BASE = 0x40_0000


def build_hook() -> ModuleType:
    """``build_native.py``, which is no part of a package."""
    path = Path(__file__).parents[1] / "build_native.py"
    spec = importlib.util.spec_from_file_location("build_native", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_native = build_hook()


def elf(machine: int, needed: list[str], alignment: int, symbol: str = "GLIBC_2.30") -> bytes:
    """An ELF file of one loaded segment, whose dynamic section names ``needed``."""
    strings = b"\0" + symbol.encode() + b"\0"
    entries = []
    for name in needed:
        entries.append((1, len(strings)))
        strings += name.encode() + b"\0"
    dynamic_at = 64 + 2 * 56
    strings_at = dynamic_at + 16 * (len(entries) + 2)
    entries += [(5, BASE + strings_at), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    size = strings_at + len(strings)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, BASE, BASE, size, size, alignment)
    at = BASE + dynamic_at
    pointer = struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, at, at, len(dynamic), len(dynamic), 8)
    return header + load + pointer + dynamic + strings


@pytest.fixture
def file(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write(name: str, *arguments: object, **more: object) -> Path:
        path = tmp_path / name
        path.write_bytes(elf(*arguments, **more))  # type: ignore[arg-type]
        return path

    return write


def test_a_wheel_is_for_the_processor_of_its_files(file) -> None:  # type: ignore[no-untyped-def]
    # Goal: the tag said the processor of the host that built the wheel, whatever lay in it.
    libraries = ["libc.so.6", "libgcc_s.so.1", "libm.so.6"]
    arm = file("arm.so", AARCH64, [*libraries, "ld-linux-aarch64.so.1"], 65536)
    arm_tool = file("arm-tool", AARCH64, libraries, 65536, symbol="GLIBC_2.34")
    amd = file("amd.so", X86_64, libraries, 4096)
    assert build_native.platform_of([arm, arm_tool]) == "manylinux_2_34_aarch64"
    assert build_native.platform_of([amd]) == "manylinux_2_30_x86_64"
    with pytest.raises(ValueError, match="aarch64 and x86_64"):
        build_native.platform_of([arm, amd])
    with pytest.raises(ValueError, match="ELF machine 243"):
        build_native.platform_of([file("riscv.so", RISCV, libraries, 4096)])


def test_a_library_that_some_host_lacks_is_refused(file) -> None:  # type: ignore[no-untyped-def]
    # Goal: `manylinux` is a promise; a library beyond it is named.
    needy = file("needy.so", AARCH64, ["libc.so.6", "libnuma.so.1", "libssl.so.3"], 65536)
    assert build_native.Elf(needy).needed() == ["libc.so.6", "libnuma.so.1", "libssl.so.3"]
    with pytest.raises(ValueError, match=r"libnuma\.so\.1, libssl\.so\.3"):
        build_native.platform_of([needy])


def test_segments_of_4_kib_do_not_load_on_pages_of_64(file) -> None:  # type: ignore[no-untyped-def]
    # Goal: an aarch64 library that a kernel with 64 KiB pages cannot map is refused, with the linker's flag.
    small = file("small.so", AARCH64, ["libc.so.6"], 4096)
    with pytest.raises(ValueError, match="max-page-size=65536"):
        build_native.platform_of([small])


def test_another_processor_has_another_linker(monkeypatch: pytest.MonkeyPatch) -> None:
    # Goal: for another processor Debian's linker is taken, unless one is named; the host keeps its own.
    linker = "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER"
    monkeypatch.delenv(linker, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    target = "aarch64-unknown-linux-gnu"
    assert build_native.cargo_environment(target)[linker] == "aarch64-linux-gnu-gcc"
    assert linker not in build_native.cargo_environment(None)
    monkeypatch.setenv(linker, "clang")
    assert build_native.cargo_environment(target)[linker] == "clang"
    monkeypatch.delenv(linker)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert linker not in build_native.cargo_environment(target)
