"""Events of the compute stream, on a stand-in for torch: it needs neither torch nor a device."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from ucm.integration.vllm.streams import ComputeStream

EVENT, STREAM = 0x100, 0x200


class Queue:
    """The dispatch queue of torch_npu: recordings reach the runtime when it is emptied."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self.recorded: list[int] = []

    def empty(self) -> None:
        self.recorded += self.waiting
        self.waiting = []


class Stream:
    """A stream whose handle is given once the queue is empty."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @property
    def npu_stream(self) -> int:
        self._queue.empty()
        return STREAM


class Event:
    """An event whose recordings are only queued."""

    npu_event = EVENT

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)
        self._queue.waiting.append(self.npu_event)


def test_queued_recording_is_made_before_its_handle_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: the engine never sees an event that torch_npu has only queued, at first nor when it is recorded
    again; the runtime would take it for done, and a save would gather what is not computed yet."""
    queue = Queue()
    torch = ModuleType("torch")
    npu = SimpleNamespace(Event=lambda: Event(queue), current_stream=lambda: Stream(queue))
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    stream = ComputeStream("npu")
    for times in (1, 2):
        assert stream.record() == EVENT
        assert queue.recorded == [EVENT] * times
        assert not queue.waiting
    assert stream.handle() == STREAM
