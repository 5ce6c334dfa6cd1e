// Goal: all functions may be called from many threads at once; each thread has its own last error; a reaper may free
// a task before the thread that submitted it has come back from ucm_save.
#include "check.h"

#include <ucm.hpp>

#include <poll.h>

#include <atomic>
#include <thread>
#include <vector>

namespace {

constexpr unsigned threads = 8;
constexpr unsigned rounds = 12;

void save_load_lookup(ucm_store_t *store, unsigned thread) {
    for (unsigned round = 0; round < rounds; ++round) {
        const unsigned own = 1000 + thread * rounds + round;
        const unsigned shared = 1 + round; // all threads save the same block
        save_block(store, own);
        save_block(store, shared);
        OK(load_block(store, own));
        OK(load_block(store, shared));
        const ucm_block_id_t blocks[2] = {test_block(own), test_block(shared)};
        std::uint8_t found[2] = {};
        OK(ucm_lookup(store, blocks, 2, found));
        CHECK(found[0] == 1 && found[1] == 1);
        OK(ucm_store_refresh(store, 0));
    }
}

void own_last_error(unsigned thread) {
    ucm_options_t *options = nullptr;
    const std::string key = "no_such_key_" + std::to_string(thread);
    OK(ucm_options_new(&options));
    for (int round = 0; round < 200; ++round) {
        REFUSED(UCM_STATUS_INVALID_CONFIG, key.c_str(), ucm_options_set(options, key.c_str(), "1"));
    }
    ucm_options_free(options);
}

// One thread submits and never looks at its handles; another reaps and frees.
void reaper_frees() {
    constexpr unsigned count = 200;
    ucm_store_t *store = test_store(BLOCK_BYTES);
    save_block(store, 1);
    unsigned char *memory = test_memory(BLOCK_BYTES);
    std::thread reaper([store] {
        const int descriptor = ucm_store_completion_fd(store);
        for (unsigned reaped = 0; reaped < count;) {
            pollfd poller{descriptor, POLLIN, 0};
            CHECK(poll(&poller, 1, 30000) == 1);
            ucm_completion_t completions[8];
            std::size_t taken = 0;
            OK(ucm_store_reap(store, completions, 8, &taken));
            for (std::size_t i = 0; i < taken; ++i) {
                OK(completions[i].status);
                OK(ucm_task_wait(completions[i].task, UCM_STAGE_RELEASED, 30000));
                ucm_task_free(completions[i].task);
                EXPECT(UCM_STATUS_CLOSED, ucm_task_poll(completions[i].task, UCM_STAGE_RELEASED));
            }
            reaped += static_cast<unsigned>(taken);
        }
    });
    for (unsigned i = 0; i < count; ++i) {
        const ucm_block_id_t block = test_block(1);
        void *address = memory;
        ucm_batch_t batch = test_batch(&block, &address, 1);
        batch.flags = UCM_BATCH_NOTIFY;
        ucm_task_t *task = nullptr;
        ucm_status_t status;
        while ((status = ucm_load(store, &batch, &task)) == UCM_STATUS_BUSY) std::this_thread::yield();
        OK(status);
    }
    reaper.join();
    ucm_store_close(store);
    free(memory);
}

} // namespace

int main() {
    ucm_store_t *store = test_store(BLOCK_BYTES);
    std::vector<std::thread> all;
    for (unsigned thread = 0; thread < threads; ++thread) {
        all.emplace_back(save_load_lookup, store, thread);
        all.emplace_back(own_last_error, thread);
    }
    for (std::thread &thread : all) thread.join();
    ucm_store_close(store);
    reaper_frees();
    return passed();
}
