// Goal: a store may be closed by any thread while others submit, wait and look up: close returns within the
// deadline, everybody gets an answer, and afterwards there is only CLOSED.
#include "check.h"

#include <ucm.hpp>

#include <chrono>
#include <thread>
#include <vector>

namespace {

constexpr unsigned blocks_each = 8;

// Saves in a loop until the store is closed; every answer on the way must be one that is allowed.
void work(ucm_store_t *store, unsigned thread) {
    std::vector<unsigned char *> memories;
    std::vector<ucm_task_t *> tasks;
    for (unsigned round = 0;; ++round) {
        std::vector<ucm_block_id_t> blocks;
        std::vector<void *> addresses;
        for (unsigned i = 0; i < blocks_each; ++i) {
            memories.push_back(test_memory(BLOCK_BYTES));
            const unsigned number = (thread * 1000 + round) * blocks_each + i;
            fill(memories.back(), BLOCK_BYTES, number);
            blocks.push_back(test_block(number));
            addresses.push_back(memories.back());
        }
        const ucm_batch_t batch = test_batch(blocks.data(), addresses.data(), blocks.size());
        ucm_task_t *task = nullptr;
        const ucm_status_t submitted = ucm_save(store, &batch, &task);
        if (submitted == UCM_STATUS_CLOSED) break;
        CHECK(submitted == UCM_STATUS_OK || submitted == UCM_STATUS_BUSY);
        if (submitted == UCM_STATUS_OK) {
            tasks.push_back(task);
            const ucm_status_t waited = ucm_task_wait(task, UCM_STAGE_PERSISTED, -1);
            CHECK(waited == UCM_STATUS_OK || waited == UCM_STATUS_CLOSED || waited == UCM_STATUS_CANCELLED ||
                  waited == UCM_STATUS_BUSY || waited == UCM_STATUS_NO_SPACE);
        }
        std::uint8_t found = 0;
        const ucm_status_t looked = ucm_lookup(store, blocks.data(), 1, &found);
        CHECK(looked == UCM_STATUS_OK || looked == UCM_STATUS_CLOSED);
    }
    // The memory is freed only here, after close has returned to its caller.
    for (ucm_task_t *task : tasks) ucm_task_free(task);
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    for (unsigned char *memory : memories) free(memory);
}

} // namespace

int main() {
    for (int milliseconds : {0, 5, 50}) {
        ucm_store_t *store = test_store(BLOCK_BYTES);
        std::vector<std::thread> workers;
        for (unsigned thread = 0; thread < 4; ++thread) workers.emplace_back(work, store, thread);
        std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
        const auto start = std::chrono::steady_clock::now();
        std::thread second([store] { ucm_store_close(store); });
        ucm_store_close(store);
        second.join();
        CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(35));
        for (std::thread &worker : workers) worker.join();
        std::size_t hits = 0;
        const ucm_block_id_t block = test_block(1);
        EXPECT(UCM_STATUS_CLOSED, ucm_lookup_prefix(store, &block, 1, &hits));
    }
    // What was acknowledged is there.
    ucm_store_t *store = test_store(BLOCK_BYTES);
    save_block(store, 1u << 30);
    ucm_store_close(store);
    store = test_store(BLOCK_BYTES);
    OK(load_block(store, 1u << 30));
    ucm_store_close(store);
    return passed();
}
