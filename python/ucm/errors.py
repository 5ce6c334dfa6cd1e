"""One exception class for every status of the C ABI.

Knows the numbers of the ABI; knows nothing of stores or tasks.
"""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """``ucm_status_t``: the numbers are fixed and never reused."""

    OK = 0
    PENDING = 1
    INVALID_ARGUMENT = 2
    INVALID_CONFIG = 3
    NOT_FOUND = 4
    CORRUPT = 5
    IO = 6
    NO_SPACE = 7
    OUT_OF_MEMORY = 8
    TIMEOUT = 9
    BUSY = 10
    CANCELLED = 11
    UNSUPPORTED = 12
    DEVICE = 13
    PERMISSION = 14
    CLOSED = 15
    INTERNAL = 16


class UcmError(Exception):
    """A call of the engine failed. ``status`` says how, the text says what and the remedy."""

    status: Status = Status.INTERNAL

    def __init__(self, message: str, status: Status | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status


class InvalidArgument(UcmError, ValueError):
    """An argument is wrong."""

    status = Status.INVALID_ARGUMENT


class InvalidConfig(UcmError, ValueError):
    """An option is unknown or out of range; the text names the key and what is allowed."""

    status = Status.INVALID_CONFIG


class NotFound(UcmError, KeyError):
    """No block of that id can be loaded."""

    status = Status.NOT_FOUND

    def __str__(self) -> str:  # KeyError would print the repr
        return Exception.__str__(self)


class Corrupt(UcmError):
    """The stored bytes do not match their checksum."""

    status = Status.CORRUPT


class StorageIO(UcmError, OSError):
    """The storage reported an error."""

    status = Status.IO


class NoSpace(UcmError, OSError):
    """The storage or its configured capacity is full."""

    status = Status.NO_SPACE


class OutOfMemory(UcmError, MemoryError):
    """Host memory for the arena could not be had."""

    status = Status.OUT_OF_MEMORY


class Timeout(UcmError, TimeoutError):
    """The deadline of the task passed."""

    status = Status.TIMEOUT


class Busy(UcmError):
    """A queue is full; nothing was submitted."""

    status = Status.BUSY


class Cancelled(UcmError):
    """The task was cancelled."""

    status = Status.CANCELLED


class Unsupported(UcmError, NotImplementedError):
    """This machine, library or store cannot do that."""

    status = Status.UNSUPPORTED


class DeviceError(UcmError):
    """The accelerator reported an error."""

    status = Status.DEVICE


class PermissionDenied(UcmError, PermissionError):
    """The system refused access."""

    status = Status.PERMISSION


class Closed(UcmError):
    """The store is closed, or the process was forked after it was opened."""

    status = Status.CLOSED


class Internal(UcmError):
    """A defect of the engine."""

    status = Status.INTERNAL


_BY_STATUS: dict[Status, type[UcmError]] = {
    cls.status: cls
    for cls in (
        InvalidArgument,
        InvalidConfig,
        NotFound,
        Corrupt,
        StorageIO,
        NoSpace,
        OutOfMemory,
        Timeout,
        Busy,
        Cancelled,
        Unsupported,
        DeviceError,
        PermissionDenied,
        Closed,
        Internal,
    )
}


def error_for(status: int, message: str) -> UcmError:
    """The exception for a status that is an error."""
    try:
        known = Status(status)
    except ValueError:
        return UcmError(f"{message or 'unknown error'} (status {status})")
    return _BY_STATUS.get(known, UcmError)(message or known.name, known)
