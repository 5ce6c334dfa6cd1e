"""Models with several KV cache groups under vLLM's real schedulers: full attention, and a sliding window."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from simulation import BLOCK, Simulation
from standin import World
from test_scheduling import MODES, WINDOWS, check, vllm_config

from ucm.integration.vllm.metadata import CAN_FAIL_REQUESTS

if not CAN_FAIL_REQUESTS:
    pytest.skip("this vLLM takes no load failures by request", allow_module_level=True)

WINDOW = WINDOWS[1]


def serve(sim: Simulation, asked: dict[str, list[int]], count: int = 8, depth: int = 1) -> None:
    for name, prompt in asked.items():
        sim.add(name, prompt, count)
    sim.run(steps=4000, depth=depth)
    check(sim, asked, count)


@pytest.mark.parametrize(("saved", "loaded"), [(0, WINDOW), (WINDOW, 0), (WINDOW, WINDOW)])
def test_groups_do_not_decide_who_shares(model: str, saved: int, loaded: int) -> None:
    """A block is the KV of all layers: what a server saved with one group is loaded with two, and the
    reverse. Of a layer with a window only the window is loaded."""
    world, asked = World(), {"r": [7, *range(11 * BLOCK + 3)]}
    serve(Simulation(vllm_config(model, caching=False), world, window=saved), asked)
    assert len(world.blocks) == 11
    serve(Simulation(vllm_config(model, caching=False), world, window=loaded), asked)
    in_window = (WINDOW - 2) // BLOCK + 1
    assert world.loaded == (11 + in_window if loaded else 11)


@pytest.mark.parametrize(("asynchronous", "depth"), MODES)
def test_block_that_left_its_window_was_saved_with_the_bytes_of_the_next(
    model: str, asynchronous: bool, depth: int
) -> None:
    """vLLM gives a block back when it leaves the window, in the middle of the request. Copies that are late
    still find in it what they were to save."""
    world, asked = World(), {f"r{i}": [i, *range(20 * BLOCK)] for i in range(4)}
    config = vllm_config(model, caching=False, tokens=2 * BLOCK)
    sim = Simulation(config, world, blocks=200, asynchronous=asynchronous, window=WINDOW)
    for name, prompt in asked.items():
        sim.add(name, prompt)
    pool = sim.scheduler.kv_cache_manager.block_pool
    while sim.scheduler.has_requests():
        # For six steps, which give blocks back and take new ones, no copy is done.
        for world.hold in [True] * 6 + [False]:
            sim.schedule()
            while len(sim.pending) >= depth:
                sim.deliver()
    while sim.pending:
        sim.deliver()
    check(sim, asked)
    assert pool.get_num_free_blocks() == 199
    assert len(world.blocks) == 4 * 20
    for block in world.blocks.values():  # here both layers have the same KV
        assert block[: len(block) // 2] == block[len(block) // 2 :]


def test_prefix_that_cannot_be_saved_any_more_is_not_promised(model: str) -> None:
    """vLLM's own cache keeps of a layer with a window the window alone. A prompt that it holds, and the store
    does not, is announced to nobody, so that nobody waits for it."""
    world, prompt = World(refuse_saves=True), list(range(8 * BLOCK + 3))
    sim = Simulation(vllm_config(model), world, window=WINDOW)
    serve(sim, {"dropped": prompt})
    world.refuse_saves = False
    serve(sim, {"again": prompt})
    assert 0 < len(world.blocks) < 8
    assert sim.results["again"].params is None
    serve(sim, {"other": [9, *prompt]})
    assert sim.results["other"].params["ucm"]["blocks"] == 8
