"""``python3 toy_proxy_server.py ...``: starts ``ucm-proxy`` with the same arguments.

The name is the one that people's scripts call; the proxy itself is a binary. It is looked for in
this order: the file that the environment variable ``UCM_PROXY`` names, the directory of scripts
that belongs to the installed package (where the wheel puts it; also when another Python runs this
file), those of this Python and of this user, ``PATH``. Nothing but the standard library is imported,
so that the file also runs by itself, without the package.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Final, NoReturn

BINARY: Final = "ucm-proxy"
ENVIRONMENT: Final = "UCM_PROXY"


class BinaryNotFoundError(RuntimeError):
    """There is no proxy binary to start."""


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _folders() -> list[Path]:
    """Where installers put a package's programs."""
    packages = Path(__file__).resolve().parents[2]  # .../lib/python3.x/site-packages
    prefix = packages.parents[min(2, len(packages.parents) - 1)]
    scripts = [sysconfig.get_path("scripts")]
    if "posix_user" in sysconfig.get_scheme_names():
        scripts.append(sysconfig.get_path("scripts", "posix_user"))
    folders = [prefix / "bin", packages / "bin", *map(Path, scripts), Path(sys.executable).parent]
    return list(dict.fromkeys(folders))


def find_binary() -> Path:
    """The binary to start; raises `BinaryNotFoundError` with the places that were tried."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        if _is_program(Path(named)):
            return Path(named)
        raise BinaryNotFoundError(f"{ENVIRONMENT} is {named!r}, which is no program")
    for folder in (folders := _folders()):
        if _is_program(folder / BINARY):
            return folder / BINARY
    found = shutil.which(BINARY)
    if found:
        return Path(found)
    tried = ", ".join(str(folder) for folder in folders)
    raise BinaryNotFoundError(
        f"the program {BINARY} is neither in {tried} nor on PATH: install the wheel, or build "
        f"it with `cargo build --release -p ucm-proxy` and set {ENVIRONMENT} to its path"
    )


def main() -> NoReturn:
    """Becomes the proxy: signals and the exit status are the binary's own."""
    try:
        binary = find_binary()
    except BinaryNotFoundError as error:
        sys.exit(f"toy_proxy_server.py: {error}")
    os.execv(binary, [str(binary), *sys.argv[1:]])


if __name__ == "__main__":
    main()
