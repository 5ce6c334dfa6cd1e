"""UCM: a KV-cache storage engine for LLM servers.

``ucm.Store`` saves, looks up and loads KV-cache blocks through ``libucm.so``, which ships in this
package. The vLLM connector is ``ucm.integration.vllm.ucm_connector.UCMConnector``. Importing this
package loads no library and starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ucm.errors import UcmError as UcmError
    from ucm.store import Store as Store
    from ucm.store import Task as Task

__version__ = "0.1.0"
__all__ = ["Store", "Task", "UcmError", "__version__"]

_LAZY = {"Store": "ucm.store", "Task": "ucm.store", "UcmError": "ucm.errors"}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'ucm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(module), name)
