"""The stream on which vLLM computes, and events on it.

Owns one event per device, recorded again for each batch: the engine captures it before the submit
call returns. On a CPU there is no stream and computation is over when a call returns.
"""

from __future__ import annotations

from typing import Any


class ComputeStream:
    """Records events on, and waits for, the current stream of a torch device."""

    def __init__(self, device_type: str) -> None:
        import torch

        self._module: Any = None if device_type == "cpu" else getattr(torch, device_type)
        self._event: Any = None

    @property
    def is_device(self) -> bool:
        """Whether there is a stream that can be made to wait."""
        return self._module is not None

    def record(self) -> int | None:
        """The native handle of an event that stands for all work enqueued so far.

        torch_npu hands recordings to a thread of its own: until that has made them, the runtime takes the
        event for done, or for its previous recording. Asking a stream for its handle waits until the queue
        is empty.
        """
        if self._module is None:
            return None
        if self._event is None:
            self._event = self._module.Event()
        stream = self._module.current_stream()
        self._event.record(stream)
        self._native(stream)
        for name in ("cuda_event", "npu_event"):
            handle = getattr(self._event, name, None)
            if handle is not None:
                return int(handle)
        raise TypeError(f"{type(self._event)} has no native event handle")

    def synchronize(self) -> None:
        """Waits on the CPU."""
        if self._module is not None:
            self._module.current_stream().synchronize()

    def handle(self) -> int | None:
        """The native handle of the current stream."""
        if self._module is None:
            return None
        return self._native(self._module.current_stream())

    @staticmethod
    def _native(stream: Any) -> int:
        for name in ("cuda_stream", "npu_stream"):
            handle = getattr(stream, name, None)
            if handle is not None:
                return int(handle)
        raise TypeError(f"{type(stream)} has no native stream handle")
