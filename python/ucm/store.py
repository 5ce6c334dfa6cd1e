"""``ucm.Store``: the engine by hand.

Owns handles and turns statuses into exceptions. Every call that may wait releases the GIL. Knows
nothing of vLLM.
"""

from __future__ import annotations

import asyncio
import ctypes as C
import itertools
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from enum import IntEnum
from types import TracebackType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from ucm import _native
from ucm.addresses import matrix
from ucm.errors import Status, UcmError, error_for

BlockIds: TypeAlias = npt.NDArray[np.uint8]
"""Block ids: an array of shape (count, 16)."""

ANY_PROMISE: Final = 0
"""No promise in particular: all where blocks are given up, any where somebody asks."""

REAP_CAPACITY: Final = 64
"""Completions taken from the engine with one call."""

AWAIT_POLL_SECONDS: Final = 0.001
"""Between two looks at an awaited task whose end the completion fd does not tell of."""

METRICS_BYTES: Final = 1 << 16
"""First guess of the length of the metrics text."""


class Stage(IntEnum):
    """How far a task is."""

    COPIED = 1
    """A save: the caller's memory is free again."""
    PERSISTED = 2
    """A save: any process can load the blocks."""
    LOADED = 3
    """A load: the bytes are in place."""
    RELEASED = 4
    """The engine never touches the caller's memory again."""
    ENQUEUED = 5
    """A save or a load: all copies are in a queue of the device, or over; ``stream_wait`` does not block."""


def block_ids(ids: Any) -> BlockIds:
    """Block ids as one contiguous array: takes such an array, joined bytes, or a sequence of ids."""
    if isinstance(ids, np.ndarray):
        array = np.ascontiguousarray(ids, dtype=np.uint8)
    elif isinstance(ids, (bytes, bytearray, memoryview)):
        array = np.frombuffer(ids, dtype=np.uint8)
    else:
        array = np.frombuffer(b"".join(bytes(one) for one in ids), dtype=np.uint8)
    if array.size % _native.BLOCK_ID_BYTES:
        raise ValueError(f"{array.size} bytes of ids: an id has {_native.BLOCK_ID_BYTES}")
    return array.reshape(-1, _native.BLOCK_ID_BYTES)


def pointer(array: npt.NDArray[Any]) -> int:
    """The address of a numpy array's data, the cheap way."""
    return int(array.__array_interface__["data"][0])


def option_text(value: Any) -> str:
    """An option's value as the engine reads it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(option_text(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {option_text(v)}" for k, v in value.items()) + "}"
    return str(value)


def check(status: int) -> None:
    """Raises the exception of a status that is not OK, with the engine's message."""
    if status != 0:
        raise error_for(status, _native.last_error())


class Options:
    """Options of a store before it is opened: the keys are those of ``docs/configuration.md``."""

    def __init__(self, yaml: str | None = None) -> None:
        self._lib = _native.library()
        handle = C.c_void_p()
        if yaml is None:
            check(self._lib.ucm_options_new(C.byref(handle)))
        else:
            text = yaml.encode()
            check(self._lib.ucm_options_from_yaml(text, len(text), C.byref(handle)))
        self._handle: int | None = handle.value

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Options:
        """Reads a YAML file."""
        with open(path, encoding="utf-8") as file:
            return cls(file.read())

    def set(self, key: str, value: Any) -> None:
        """Sets one key."""
        check(self._lib.ucm_options_set(self._handle, key.encode(), option_text(value).encode()))

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets several keys."""
        for key, value in values.items():
            self.set(key, value)

    @property
    def handle(self) -> int | None:
        """The native handle."""
        return self._handle

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            self._lib.ucm_options_free(handle)


class Task:
    """A save or a load that is under way, or a hold. Dropping it stops no save and no load; it ends a hold.

    It keeps the tensors it was given alive until it is dropped.
    """

    __slots__ = (
        "_future", "_handle", "_keep", "_lib", "_store", "count", "last_stage", "notifies", "user_data",
    )  # fmt: skip

    def __init__(
        self, store: Store, handle: int, count: int, last_stage: Stage, user_data: int, keep: Any,
        notifies: bool = False,
    ) -> None:  # fmt: skip
        self._lib = _native.library()
        self._store = store
        self._handle: int | None = handle
        self._keep = keep
        self._future: asyncio.Future[None] | None = None
        self.count = count
        self.last_stage = last_stage
        self.user_data = user_data
        self.notifies = notifies

    def poll(self, stage: Stage | None = None) -> Status:
        """OK, PENDING, or the first error; never raises for a failed entry."""
        return Status(self._lib.ucm_task_poll(self._handle, stage or self.last_stage))

    def wait_status(self, stage: Stage | None = None, timeout_ms: int = -1) -> Status:
        """Like :meth:`wait`, but gives the status back."""
        return Status(self._lib.ucm_task_wait(self._handle, stage or self.last_stage, timeout_ms))

    def wait(self, stage: Stage | None = None, timeout: float | None = None) -> None:
        """Waits for a stage (default: the last). Raises the first error, or TimeoutError when the
        wait's own ``timeout`` seconds are over."""
        timeout_ms = -1 if timeout is None else max(0, int(timeout * 1000))
        status = self.wait_status(stage, timeout_ms)
        if status == Status.PENDING:
            raise TimeoutError(f"not {(stage or self.last_stage).name} after {timeout} s")
        if status != Status.OK:
            raise error_for(status, self.error())

    def stream_wait(self, stream: int | None = None) -> None:
        """Makes a device stream wait for this task's copies: what runs there afterwards sees what was
        loaded, or may write over what is being saved. Blocks until stage ENQUEUED; raises the first error of
        a load, and where nothing was ordered."""
        status = self._lib.ucm_task_stream_wait(self._handle, stream)
        if status != 0:
            raise error_for(status, self.error() or _native.last_error())

    def statuses(self) -> npt.NDArray[np.int32]:
        """One status per entry, once the task is done."""
        out = np.zeros(self.count, dtype=np.int32)
        check(self._lib.ucm_task_statuses(self._handle, pointer(out), self.count))
        return out

    def error(self) -> str:
        """The task's message."""
        buffer = C.create_string_buffer(1024)
        needed = int(self._lib.ucm_task_error(self._handle, buffer, len(buffer)))
        if needed >= len(buffer):
            buffer = C.create_string_buffer(needed + 1)
            self._lib.ucm_task_error(self._handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def cancel(self) -> None:
        """Stops what has not begun."""
        check(self._lib.ucm_task_cancel(self._handle))

    def free(self) -> None:
        """Gives the handle back; the work goes on."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._lib.ucm_task_free(handle)

    def __await__(self) -> Generator[Any, None, None]:
        return self._store.wait_async(self).__await__()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.free()


class Store:
    """An open store.

    ``Store("ucm.yaml")``, ``Store(storage_backends="/mnt/kv", tensor_size_list=[...], ...)``, or both:
    keywords come after the file. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Options | None = None,
        /,
        **options: Any,
    ) -> None:
        self._lib = _native.library()
        self._handle: int | None = None
        if not isinstance(config, Options):
            config = Options.from_file(config) if config is not None else Options()
        config.update(options)
        handle = C.c_void_p()
        check(self._lib.ucm_store_open(config.handle, C.byref(handle)))
        self._handle = handle.value
        self._tickets = itertools.count(1)
        self._awaited: dict[int, Task] = {}
        self._reader: tuple[asyncio.AbstractEventLoop, int] | None = None

    # -- life ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Finishes or cancels what is in flight, then frees. May be called twice."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        self._unwatch()
        self._lib.ucm_store_close(handle)
        for task in self._awaited.values():
            if task._future is not None and not task._future.done():
                task._future.set_exception(error_for(Status.CLOSED, "the store was closed"))
        self._awaited.clear()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._handle is None

    # -- what is there ------------------------------------------------------------------------

    def lookup(self, ids: Any) -> npt.NDArray[np.bool_]:
        """For each block whether all of its parts are present."""
        array = block_ids(ids)
        found = np.zeros(len(array), dtype=np.uint8)
        check(self._lib.ucm_lookup(self._handle, pointer(array), len(array), pointer(found)))
        return found.view(np.bool_)

    def lookup_prefix(self, ids: Any) -> int:
        """The length of the longest prefix that is present."""
        array = block_ids(ids)
        hits = C.c_size_t()
        check(self._lib.ucm_lookup_prefix(self._handle, pointer(array), len(array), C.byref(hits)))
        return hits.value

    def prefetch(self, ids: Any) -> None:
        """A hint: bring blocks into the Cache tier."""
        array = block_ids(ids)
        check(self._lib.ucm_prefetch(self._handle, pointer(array), len(array)))

    def hold(self, ids: Any, timeout: float | None = None) -> Task:
        """Brings blocks into the Cache tier and keeps them there until the task is freed or dropped.

        Stage LOADED (``task.wait()``): every block is held, and a load of it is a copy from memory that
        cannot miss. ``timeout``: seconds for the reads; None: the store's. Blocks that do not fit into the
        half of the arena that may be held fail with BUSY (``task.statuses()``). ``task.free()`` lets go.
        """
        if not _native.has("ucm_hold"):
            raise error_for(Status.UNSUPPORTED, "this libucm.so is too old to hold blocks")
        array = block_ids(ids)
        timeout_ms = 0 if timeout is None else max(1, int(timeout * 1000))
        handle = C.c_void_p()
        check(self._lib.ucm_hold(self._handle, pointer(array), len(array), timeout_ms, C.byref(handle)))
        assert handle.value is not None
        return Task(self, handle.value, len(array), Stage.LOADED, 0, None)

    def refresh(self, timeout: float | None = None) -> None:
        """Brings the index up to date with all writers."""
        timeout_ms = -1 if timeout is None else max(0, int(timeout * 1000))
        check(self._lib.ucm_store_refresh(self._handle, timeout_ms))

    def abandon(self, ids: Any, promise: int = ANY_PROMISE) -> bool:
        """Tells other processes that these blocks, though promised, will not be saved. ``promise``: the
        number of 64 bits that was told with the promise."""
        array = block_ids(ids)
        if _native.has("ucm_abandon_promise"):
            check(self._lib.ucm_abandon_promise(self._handle, pointer(array), len(array), promise))
        elif _native.has("ucm_abandon"):
            check(self._lib.ucm_abandon(self._handle, pointer(array), len(array)))
        else:
            return False
        return True

    def lookup_abandoned(self, ids: Any, promise: int = ANY_PROMISE) -> npt.NDArray[np.bool_]:
        """For each block whether a writer has abandoned it, under this promise."""
        array = block_ids(ids)
        found = np.zeros(len(array), dtype=np.uint8)
        count, out = len(array), pointer(found)
        if _native.has("ucm_lookup_abandoned_promise"):
            check(self._lib.ucm_lookup_abandoned_promise(self._handle, pointer(array), count, promise, out))
        elif _native.has("ucm_lookup_abandoned"):
            check(self._lib.ucm_lookup_abandoned(self._handle, pointer(array), count, out))
        return found.view(np.bool_)

    # -- transfers ----------------------------------------------------------------------------

    def save(self, ids: Any, addresses: Any, **how: Any) -> Task:
        """Starts a save; see :meth:`load` for the arguments."""
        return self._submit(self._lib.ucm_save, Stage.PERSISTED, ids, addresses, **how)

    def load(self, ids: Any, addresses: Any, **how: Any) -> Task:
        """Starts a load of ``ids`` into ``addresses``: one row per id, one column per tensor slice.

        Keywords: ``shards`` (one index per id), ``event`` (a device event that the copies wait for),
        ``timeout`` (seconds; None: the store's), ``notify`` (queue the task for the completion fd).
        """
        return self._submit(self._lib.ucm_load, Stage.LOADED, ids, addresses, **how)

    def _submit(
        self,
        call: Any,
        last_stage: Stage,
        ids: Any,
        addresses: Any,
        *,
        shards: Any = None,
        event: int | None = None,
        timeout: float | None = None,
        notify: bool = False,
    ) -> Task:
        array = block_ids(ids)
        table, keep = matrix(addresses, len(array))
        shard_array = None if shards is None else np.ascontiguousarray(shards, dtype=np.uint32)
        if shard_array is not None and shard_array.size != len(array):
            raise ValueError(f"shards has {shard_array.size} items, blocks has {len(array)}")
        ticket = next(self._tickets)
        batch = _native.Batch(
            C.sizeof(_native.Batch),
            pointer(array),
            None if shard_array is None else pointer(shard_array),
            pointer(table),
            len(array),
            event,
            _native.BATCH_NOTIFY if notify else 0,
            ticket,
            0 if timeout is None else max(1, int(timeout * 1000)),
        )
        handle = C.c_void_p()
        check(call(self._handle, C.byref(batch), C.byref(handle)))
        assert handle.value is not None
        return Task(self, handle.value, len(array), last_stage, ticket, keep, notify)

    def register(self, memory: Any) -> None:
        """Lets the engine copy straight from and to this tensor's memory."""
        from ucm.addresses import extent_of

        base, length = extent_of(memory)
        check(self._lib.ucm_memory_register(self._handle, base, length))

    def unregister(self, memory: Any) -> None:
        """Takes back :meth:`register`."""
        from ucm.addresses import address_of

        check(self._lib.ucm_memory_unregister(self._handle, address_of(memory)))

    # -- asyncio ------------------------------------------------------------------------------

    async def save_async(self, ids: Any, addresses: Any, **how: Any) -> None:
        """Saves and waits without a thread, until PERSISTED."""
        await self.wait_async(self.save(ids, addresses, notify=True, **how))

    async def load_async(self, ids: Any, addresses: Any, **how: Any) -> None:
        """Loads and waits without a thread, until LOADED."""
        await self.wait_async(self.load(ids, addresses, notify=True, **how))

    async def wait_async(self, task: Task) -> None:
        """Waits without a thread for the last stage of a task; ``await task`` is the same.

        One that was submitted with ``notify=True`` wakes the loop; any other is looked at every
        :data:`AWAIT_POLL_SECONDS`. Raises the first error.
        """
        if not task.notifies:  # the fd never tells of it
            while (status := task.poll()) == Status.PENDING:
                await asyncio.sleep(AWAIT_POLL_SECONDS)
            if status != Status.OK:
                raise error_for(status, task.error())
            return
        loop = asyncio.get_running_loop()
        task._future = loop.create_future()
        self._awaited[task.user_data] = task
        self._watch(loop)
        self._settle(task)  # it may have been reaped before it was awaited
        try:
            await task._future
        finally:
            self._awaited.pop(task.user_data, None)
            if not self._awaited:
                self._unwatch()

    @staticmethod
    def _settle(task: Task) -> None:
        status = task.poll()
        future = task._future
        if status == Status.PENDING or future is None or future.done():
            return
        if status == Status.OK:
            future.set_result(None)
        else:
            future.set_exception(error_for(status, task.error()))

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._reader is None:
            fd = int(self._lib.ucm_store_completion_fd(self._handle))
            if fd < 0:
                raise error_for(Status.UNSUPPORTED, _native.last_error())
            loop.add_reader(fd, self._reap)
            self._reader = (loop, fd)

    def _unwatch(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader[0].is_closed():
            reader[0].remove_reader(reader[1])

    def _reap(self) -> None:
        for ticket in self.reap():
            task = self._awaited.get(ticket)
            if task is not None:
                self._settle(task)

    def reap(self, capacity: int = REAP_CAPACITY) -> list[int]:
        """Takes finished notify tasks off the queue; gives their ``user_data``."""
        completions = (_native.Completion * capacity)()
        count = C.c_size_t()
        check(self._lib.ucm_store_reap(self._handle, completions, capacity, C.byref(count)))
        return [int(completions[i].user_data) for i in range(count.value)]

    # -- hashing ------------------------------------------------------------------------------

    def hash_tokens(
        self,
        tokens: Sequence[int] | npt.NDArray[np.uint32],
        block_tokens: int,
        parent: bytes | None = None,
        extra: bytes = b"",
    ) -> BlockIds:
        """Ids of the full blocks of a token sequence, chained from ``parent``."""
        array = np.ascontiguousarray(tokens, dtype=np.uint32)
        out = np.zeros((len(array) // block_tokens, _native.BLOCK_ID_BYTES), dtype=np.uint8)
        written = C.c_size_t()
        check(
            self._lib.ucm_hash_tokens(
                self._handle, pointer(array), len(array), block_tokens, parent,
                extra or None, len(extra), pointer(out), len(out), C.byref(written),
            )
        )  # fmt: skip
        return out[: written.value]

    def hash_blocks(
        self,
        tokens: Sequence[int] | npt.NDArray[np.uint32],
        block_tokens: int,
        extras: Iterable[bytes],
        parent: bytes | None = None,
    ) -> BlockIds:
        """The same, with extra bytes for each block."""
        array = np.ascontiguousarray(tokens, dtype=np.uint32)
        texts = list(extras)
        count = len(array) // block_tokens
        if len(texts) != count:
            raise ValueError(f"{len(texts)} extras for {count} blocks")
        pointers = (C.c_char_p * max(1, count))(*texts)
        lengths = np.fromiter((len(text) for text in texts), dtype=np.uintp, count=count)
        out = np.zeros((count, _native.BLOCK_ID_BYTES), dtype=np.uint8)
        written = C.c_size_t()
        check(
            self._lib.ucm_hash_blocks(
                self._handle, pointer(array), len(array), block_tokens, parent,
                C.cast(pointers, C.c_void_p), pointer(lengths), pointer(out), count,
                C.byref(written),
            )
        )  # fmt: skip
        return out[: written.value]

    # -- seeing -------------------------------------------------------------------------------

    def metrics(self) -> str:
        """Counters and histograms as Prometheus text."""
        size = METRICS_BYTES
        while True:
            buffer = C.create_string_buffer(size)
            length = C.c_size_t()
            status = self._lib.ucm_store_metrics(self._handle, buffer, size, C.byref(length))
            if length.value >= size:
                size = length.value + 1
                continue
            check(status)
            return buffer.value.decode()


__all__ = ["BlockIds", "Options", "Stage", "Store", "Task", "UcmError", "block_ids"]
