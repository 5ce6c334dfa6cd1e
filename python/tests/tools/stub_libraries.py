"""Makes ``import torch`` work without NVIDIA's libraries, where no GPU will ever be used.

PyPI's torch is built for CUDA and asks the loader for libraries of 2.7 GB. This writes empty stand-ins,
each with the name that is asked for, into torch's own library directory: every function in them fails
with 1. Libraries that are there are left alone. Needs gcc and readelf.

usage: stub_libraries.py SITE_PACKAGES
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

VENDOR_LIBRARY = re.compile(r"lib(cu|nccl|nv)\w*\.so")
VENDOR_SYMBOL = re.compile(
    r"(cu[A-Z]|cu(da|blas|dnn|fft|rand|solver|sparse|File)|p?nccl|nv(rtc|shmem|JitLink|ml))"
)


def readelf(flags: str, file: Path) -> list[str]:
    return subprocess.run(
        ["readelf", "-W", flags, file], capture_output=True, text=True, check=False
    ).stdout.splitlines()


class Wanted:
    """What torch's libraries ask for."""

    def __init__(self, files: list[Path]) -> None:
        self.libraries: set[str] = set()
        self.versioned: dict[tuple[str, str], set[str]] = defaultdict(set)
        """Symbols by (library, version)."""
        self.plain: set[str] = set()
        defined: set[str] = set()
        for file in files:
            self.libraries.update(re.findall(r"NEEDED.*\[(.*?)\]", "\n".join(readelf("-d", file))))
            homes = self._homes(file)
            for line in readelf("--dyn-syms", file):
                fields = line.split()
                if len(fields) < 8 or not fields[0].rstrip(":").isdigit():
                    continue
                name, _, version = fields[7].partition("@")
                if fields[6] != "UND":
                    defined.add(name)
                elif version:
                    for home in homes.get(version.lstrip("@"), ()):
                        self.versioned[home, version.lstrip("@")].add(name)
                elif VENDOR_SYMBOL.match(name):
                    self.plain.add(name)
        self.plain -= defined

    @staticmethod
    def _homes(file: Path) -> dict[str, set[str]]:
        """From the names of symbol versions to the libraries that have them."""
        homes: dict[str, set[str]] = defaultdict(set)
        library = ""
        for line in readelf("-V", file):
            if found := re.search(r"File: (\S+)", line):
                library = found[1]
            elif found := re.search(r"Name: (\S+)", line):
                homes[found[1]].add(library)
        return homes


def present(site: Path) -> set[str]:
    """Libraries that the loader can find."""
    cached = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    here = {path.name for folder in ("torch/lib", "nvidia") for path in (site / folder).rglob("*.so*")}
    return here | set(re.findall(r"^\s*(\S+) \(", cached, re.M))


def stub(path: Path, versions: dict[str, set[str]]) -> None:
    """One library with these functions; the version of unversioned ones is the empty string."""
    names = sorted(set().union(*versions.values())) if versions else []
    body = "".join(f'.globl "{n}"\n.type "{n}",@function\n"{n}":\n' for n in names)
    code = f'.text\n{body} mov $1, %eax\n ret\n.section .note.GNU-stack,"",@progbits\n'
    if (
        "aarch64"
        in subprocess.run(["gcc", "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    ):
        code = code.replace("mov $1, %eax", "mov w0, #1")
    script = "".join(
        f"{version} {{ global: {' '.join(f'{n};' for n in sorted(listed))} }};\n"
        for version, listed in versions.items()
        if version
    )
    with tempfile.TemporaryDirectory() as scratch:
        source, exports = Path(scratch, "stub.S"), Path(scratch, "exports")
        source.write_text(code)
        exports.write_text(script)
        how = [f"-Wl,--version-script={exports}"] if script else []
        subprocess.run(
            ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{path.name}", *how, "-o", path, source],
            check=True,
        )  # fmt: skip


def main(site: Path) -> None:
    target = site / "torch" / "lib"
    wanted = Wanted(sorted(target.glob("*.so*")))
    missing = sorted(n for n in wanted.libraries - present(site) if VENDOR_LIBRARY.match(n))
    for i, name in enumerate(missing):
        versions = {v: s for (home, v), s in wanted.versioned.items() if home == name}
        if i == 0:
            # Symbols without a version are looked for in all libraries, so one may have them all.
            versions[""] = wanted.plain
        stub(target / name, versions)
    print(f"made {len(missing)} stand-ins in {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
