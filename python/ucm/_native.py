"""The C ABI of ``libucm.so``, one to one.

Owns the loading of the library, the declarations and the mirror of its structs. Knows nothing of
tensors, exceptions by status or vLLM. ctypes releases the GIL around every call; id lists and
pointer matrices cross as addresses of numpy buffers, so nothing here loops over pointers.
"""

from __future__ import annotations

import ctypes as C
import os
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar, Final

LIBRARY_ENV: Final = "UCM_LIBRARY"
"""Names another ``libucm.so``, for development."""

API_MAJOR: Final = 0
"""The major version of the ABI that this binding is written for."""

BLOCK_ID_BYTES: Final = 16

BATCH_NOTIFY: Final = 1
BATCH_NOTIFY_COPIED: Final = 2


class Batch(C.Structure):
    """``ucm_batch_t``; pointers are kept as integers, so that no object is made per pointer."""

    _fields_: ClassVar = [
        ("struct_size", C.c_size_t),
        ("blocks", C.c_void_p),
        ("shards", C.c_void_p),
        ("addresses", C.c_void_p),
        ("count", C.c_size_t),
        ("wait_event", C.c_void_p),
        ("flags", C.c_uint32),
        ("user_data", C.c_uint64),
        ("timeout_ms", C.c_int64),
    ]


class Completion(C.Structure):
    """``ucm_completion_t``."""

    _fields_: ClassVar = [
        ("task", C.c_void_p),
        ("user_data", C.c_uint64),
        ("stage", C.c_uint32),
        ("status", C.c_int32),
    ]


LOG_FN = C.CFUNCTYPE(None, C.c_void_p, C.c_uint32, C.c_char_p)

_STATUS = C.c_int32
_PTR = C.c_void_p
_OUT = C.POINTER(C.c_void_p)
_SIZE_OUT = C.POINTER(C.c_size_t)

_FUNCTIONS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "ucm_api_version": (C.c_uint32, ()),
    "ucm_version": (C.c_char_p, ()),
    "ucm_status_name": (C.c_char_p, (_STATUS,)),
    "ucm_last_error": (C.c_size_t, (_PTR, C.c_size_t)),
    "ucm_options_new": (_STATUS, (_OUT,)),
    "ucm_options_from_yaml_file": (_STATUS, (C.c_char_p, _OUT)),
    "ucm_options_from_yaml": (_STATUS, (C.c_char_p, C.c_size_t, _OUT)),
    "ucm_options_set": (_STATUS, (_PTR, C.c_char_p, C.c_char_p)),
    "ucm_options_free": (None, (_PTR,)),
    "ucm_store_open": (_STATUS, (_PTR, _OUT)),
    "ucm_store_close": (None, (_PTR,)),
    "ucm_lookup": (_STATUS, (_PTR, _PTR, C.c_size_t, _PTR)),
    "ucm_lookup_prefix": (_STATUS, (_PTR, _PTR, C.c_size_t, _SIZE_OUT)),
    "ucm_prefetch": (_STATUS, (_PTR, _PTR, C.c_size_t)),
    "ucm_save": (_STATUS, (_PTR, C.POINTER(Batch), _OUT)),
    "ucm_load": (_STATUS, (_PTR, C.POINTER(Batch), _OUT)),
    "ucm_task_poll": (_STATUS, (_PTR, C.c_uint32)),
    "ucm_task_wait": (_STATUS, (_PTR, C.c_uint32, C.c_int64)),
    "ucm_task_stream_wait": (_STATUS, (_PTR, _PTR)),
    "ucm_task_statuses": (_STATUS, (_PTR, _PTR, C.c_size_t)),
    "ucm_task_error": (C.c_size_t, (_PTR, _PTR, C.c_size_t)),
    "ucm_task_cancel": (_STATUS, (_PTR,)),
    "ucm_task_free": (None, (_PTR,)),
    "ucm_store_completion_fd": (C.c_int, (_PTR,)),
    "ucm_store_reap": (_STATUS, (_PTR, C.POINTER(Completion), C.c_size_t, _SIZE_OUT)),
    "ucm_store_refresh": (_STATUS, (_PTR, C.c_int64)),
    "ucm_memory_register": (_STATUS, (_PTR, _PTR, C.c_size_t)),
    "ucm_memory_unregister": (_STATUS, (_PTR, _PTR)),
    "ucm_hash_tokens": (
        _STATUS,
        (_PTR, _PTR, C.c_size_t, C.c_uint32, _PTR, _PTR, C.c_size_t, _PTR, C.c_size_t, _SIZE_OUT),
    ),
    "ucm_hash_blocks": (
        _STATUS,
        (_PTR, _PTR, C.c_size_t, C.c_uint32, _PTR, _PTR, _PTR, _PTR, C.c_size_t, _SIZE_OUT),
    ),
    "ucm_store_stats": (_STATUS, (_PTR, _PTR)),
    "ucm_store_metrics": (_STATUS, (_PTR, _PTR, C.c_size_t, _SIZE_OUT)),
    "ucm_log_callback": (_STATUS, (LOG_FN, _PTR, C.c_uint32)),
}

_OPTIONAL: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    # Added to the ABI after its first listing; absent from an older library.
    "ucm_abandon": (_STATUS, (_PTR, _PTR, C.c_size_t)),
    "ucm_abandon_promise": (_STATUS, (_PTR, _PTR, C.c_size_t, C.c_uint64)),
    "ucm_hold": (_STATUS, (_PTR, _PTR, C.c_size_t, C.c_int64, _OUT)),
    "ucm_lookup_abandoned": (_STATUS, (_PTR, _PTR, C.c_size_t, _PTR)),
    "ucm_lookup_abandoned_promise": (_STATUS, (_PTR, _PTR, C.c_size_t, C.c_uint64, _PTR)),
}

_lock = threading.Lock()
_library: Any = None


def library_path() -> Path:
    """Where ``libucm.so`` is: ``UCM_LIBRARY``, beside this file, or a cargo target directory above it."""
    override = os.environ.get(LIBRARY_ENV)
    if override:
        return Path(override)
    here = Path(__file__).resolve().parent
    candidates = [here / "_lib" / "libucm.so"]
    root = here.parent.parent
    if (root / "Cargo.toml").exists():  # an editable install inside the source tree
        candidates += [root / "target" / kind / "libucm.so" for kind in ("release", "debug")]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ImportError(
        "libucm.so was not found; looked in "
        + ", ".join(map(str, candidates))
        + f". Install the wheel, or build it with `cargo build --release`, or set {LIBRARY_ENV}."
    )


def _declare(handle: Any) -> None:
    for name, (restype, argtypes) in _FUNCTIONS.items():
        function = getattr(handle, name)
        function.restype = restype
        function.argtypes = list(argtypes)
    for name, (restype, argtypes) in _OPTIONAL.items():
        function = getattr(handle, name, None)
        if function is not None:
            function.restype = restype
            function.argtypes = list(argtypes)


def library() -> Any:
    """The loaded library; the first call loads it."""
    global _library
    if _library is None:
        with _lock:
            if _library is None:
                if not sys.platform.startswith("linux"):
                    raise ImportError("libucm.so runs on Linux only")
                path = library_path()
                handle = C.CDLL(str(path))
                _declare(handle)
                major = int(handle.ucm_api_version()) >> 16
                if major != API_MAJOR:
                    raise ImportError(
                        f"{path} has ABI major {major}, this binding needs {API_MAJOR}: "
                        "install the package again, so that both come from one wheel"
                    )
                _library = handle
    return _library


def has(name: str) -> bool:
    """Whether the loaded library exports a function."""
    return hasattr(library(), name)


def last_error() -> str:
    """The message of the last failed call on this thread."""
    handle = library()
    buffer = C.create_string_buffer(1024)
    needed = int(handle.ucm_last_error(buffer, len(buffer)))
    if needed >= len(buffer):
        buffer = C.create_string_buffer(needed + 1)
        handle.ucm_last_error(buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")
