// Goal: what no sound program does is answered, never a crash or a hang: handles made up at random in several threads
// while real ones come and go, tasks freed by one thread while another waits for them, entries that name one block or
// one address twice, addresses of any alignment, memory registered again and again, capacities of 0, stores that come
// and go without leaving descriptors, threads or shared memory behind.
#include "check.h"

#include <ucm.hpp>

#include <dirent.h>
#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

// Entries of a directory, such as the threads or descriptors of this process, with `part` in their names.
unsigned entries(const char *path, const char *part) {
    DIR *directory = opendir(path);
    CHECK(directory != nullptr);
    unsigned count = 0;
    while (const dirent *entry = readdir(directory)) {
        count += entry->d_name[0] != '.' && strstr(entry->d_name, part) != nullptr;
    }
    closedir(directory);
    return count;
}

// Tokens near real ones: their kinds, small slots and generations.
void make_up_handles(ucm_store_t *store, unsigned seed, std::atomic<bool> &stop) {
    std::mt19937_64 random(seed);
    unsigned char page[64] = {};
    const ucm_block_id_t block = test_block(1);
    while (!stop) {
        const std::uint64_t kinds[] = {0xa1, 0xb2, 0xc3, 0xff, 0, random() & 0xff};
        const std::uint64_t kind = kinds[random() % 6] << 56;
        // Generations that the real handles of this test do not reach: a made-up one must not hit a real one.
        const std::uint64_t generation = (1u << 20 | (random() & 0xffff)) << 28;
        const std::uint64_t token = kind | (random() % 4 == 0 ? random() >> 8 : generation | (random() & 15));
        auto *task = reinterpret_cast<ucm_task_t *>(token);
        auto *other = reinterpret_cast<ucm_store_t *>(token);
        auto *options = reinterpret_cast<ucm_options_t *>(token);
        ucm_store_t *made = nullptr;
        ucm_status_t status;
        std::size_t number;
        const auto refused = [](ucm_status_t answer) {
            CHECK(answer == UCM_STATUS_INVALID_ARGUMENT || answer == UCM_STATUS_CLOSED);
        };
        refused(ucm_task_wait(task, UCM_STAGE_RELEASED, -1));
        refused(ucm_task_poll(task, UCM_STAGE_LOADED));
        refused(ucm_task_cancel(task));
        refused(ucm_task_statuses(task, &status, 1));
        refused(ucm_task_stream_wait(task, nullptr));
        refused(ucm_lookup(other, &block, 1, page));
        refused(ucm_lookup_prefix(other, &block, 1, &number));
        refused(ucm_store_refresh(other, -1));
        refused(ucm_memory_register(other, page, 4096));
        refused(ucm_store_open(options, &made));
        refused(ucm_options_set(options, "io_depth", "8"));
        CHECK(ucm_store_completion_fd(other) == -1);
        CHECK(ucm_task_error(task, nullptr, 0) > 0);
        ucm_task_free(task);
        ucm_store_close(other);
        ucm_options_free(options);
        (void)store;
    }
}

// Real work under that: every block comes back right.
void work(ucm_store_t *store, unsigned base) {
    for (unsigned number = base; number < base + 24; ++number) {
        save_block(store, number);
        OK(load_block(store, number));
    }
}

// One thread waits for ever for a part that never becomes whole; another one frees the handle, then cancels by closing.
void freed_while_waited_for() {
    ucm_store_t *layers = test_store(SHARD_BYTES);
    unsigned char *memory = test_memory(SHARD_BYTES);
    const ucm_block_id_t block = test_block(500);
    void *address = memory;
    ucm_batch_t batch = test_batch(&block, &address, 1);
    batch.timeout_ms = -1;
    ucm_task_t *task = nullptr;
    OK(ucm_save(layers, &batch, &task));
    std::atomic<int> waiting{0};
    std::vector<std::thread> waiters;
    for (int i = 0; i < 4; ++i) {
        waiters.emplace_back([&] {
            ++waiting;
            const ucm_status_t answer = ucm_task_wait(task, UCM_STAGE_PERSISTED, -1);
            CHECK(answer == UCM_STATUS_CLOSED || answer == UCM_STATUS_CANCELLED);
        });
    }
    while (waiting < 4) std::this_thread::yield();
    ucm_task_free(task);
    ucm_task_free(task);
    EXPECT(UCM_STATUS_CLOSED, ucm_task_cancel(task));
    ucm_store_close(layers);
    for (std::thread &waiter : waiters) waiter.join();
    free(memory);
}

void odd_batches(ucm_store_t *store) {
    constexpr unsigned count = 6;
    unsigned char *memory = test_memory(count * BLOCK_BYTES + 4096);
    ucm_task_t *task = nullptr;
    ucm_status_t statuses[count];

    // One block twice, from one address and from two.
    ucm_block_id_t blocks[count];
    void *addresses[count];
    fill(memory, BLOCK_BYTES, 600);
    fill(memory + BLOCK_BYTES, BLOCK_BYTES, 600);
    for (unsigned i = 0; i < count; ++i) blocks[i] = test_block(600), addresses[i] = memory + (i % 2) * BLOCK_BYTES;
    ucm_batch_t batch = test_batch(blocks, addresses, count);
    OK(ucm_save(store, &batch, &task));
    OK(ucm_task_wait(task, UCM_STAGE_PERSISTED, 30000));
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    ucm_task_free(task);
    for (unsigned i = 0; i < count; ++i) addresses[i] = memory + i * BLOCK_BYTES;
    memset(memory, 0, count * BLOCK_BYTES);
    OK(ucm_load(store, &batch, &task));
    OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    for (unsigned i = 0; i < count; ++i) CHECK(holds(memory + i * BLOCK_BYTES, BLOCK_BYTES, 600));
    ucm_task_free(task);

    // Blocks that are there and blocks that are not, all to one address: no crash, and each its status.
    for (unsigned i = 0; i < count; ++i) blocks[i] = test_block(i % 2 == 0 ? 600 : 7000 + i), addresses[i] = memory;
    OK(ucm_load(store, &batch, &task));
    EXPECT(UCM_STATUS_NOT_FOUND, ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    OK(ucm_task_statuses(task, statuses, count));
    for (unsigned i = 0; i < count; ++i) CHECK(statuses[i] == (i % 2 == 0 ? UCM_STATUS_OK : UCM_STATUS_NOT_FOUND));
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    CHECK(holds(memory, BLOCK_BYTES, 600));
    ucm_task_free(task);

    // Any alignment, and nothing beyond the ends.
    for (unsigned shift : {1u, 2u, 3u, 7u, 511u, 4095u}) {
        unsigned char *odd = memory + shift;
        const ucm_block_id_t block = test_block(700 + shift);
        void *address = odd;
        ucm_batch_t one = test_batch(&block, &address, 1);
        fill(odd, BLOCK_BYTES, shift);
        OK(ucm_save(store, &one, &task));
        OK(ucm_task_wait(task, UCM_STAGE_PERSISTED, 30000));
        ucm_task_free(task);
        address = odd + 1;
        memset(odd, 0x5a, BLOCK_BYTES + 2);
        OK(ucm_load(store, &one, &task));
        OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
        CHECK(odd[0] == 0x5a && odd[BLOCK_BYTES + 1] == 0x5a && holds(odd + 1, BLOCK_BYTES, shift));
        ucm_task_free(task);
    }

    // A struct of an older and of a newer program.
    struct {
        ucm_batch_t batch;
        unsigned char later[128];
    } newer;
    memset(&newer, 0xff, sizeof newer);
    addresses[0] = memory;
    newer.batch = test_batch(blocks, addresses, 1);
    newer.batch.struct_size = sizeof newer;
    OK(ucm_load(store, &newer.batch, &task));
    OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    ucm_task_free(task);
    newer.batch.struct_size = offsetof(ucm_batch_t, wait_event); // what follows is not read
    newer.batch.flags = 0xffffffffu;
    OK(ucm_load(store, &newer.batch, &task));
    OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    ucm_task_free(task);

    // More at once than the store has room for: refused as a whole, or ended entry by entry.
    constexpr std::size_t crowd = std::size_t{1} << 18;
    std::vector<ucm_block_id_t> many;
    for (unsigned i = 0; i < crowd; ++i) many.push_back(test_block(10000 + i));
    const std::vector<void *> same(crowd, memory);
    batch = test_batch(many.data(), same.data(), crowd);
    batch.timeout_ms = 200;
    const ucm_status_t answer = ucm_load(store, &batch, &task);
    CHECK(answer == UCM_STATUS_OK || answer == UCM_STATUS_BUSY);
    if (answer == UCM_STATUS_OK) {
        OK(ucm_task_cancel(task));
        OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
        ucm_task_free(task);
    }
    std::vector<std::uint8_t> found(crowd, 9);
    OK(ucm_lookup(store, many.data(), crowd, found.data()));
    for (std::uint8_t here : found) CHECK(here == 0);
    OK(ucm_prefetch(store, many.data(), crowd));
    free(memory);
}

void registered_again_and_again(ucm_store_t *store, ucm_store_t *other) {
    unsigned char *memory = test_memory(BLOCK_BYTES);
    for (unsigned round = 0; round < 50; ++round) {
        OK(ucm_memory_register(store, memory, BLOCK_BYTES));
        OK(ucm_memory_register(other, memory, BLOCK_BYTES));
        const ucm_block_id_t block = test_block(800 + round);
        void *address = memory;
        ucm_batch_t batch = test_batch(&block, &address, 1);
        ucm_task_t *task = nullptr;
        fill(memory, BLOCK_BYTES, round);
        OK(ucm_save(store, &batch, &task));
        if (round % 2 == 0) OK(ucm_task_wait(task, UCM_STAGE_PERSISTED, 30000));
        OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
        ucm_task_free(task);
        OK(ucm_memory_unregister(store, memory));
        OK(ucm_memory_unregister(other, memory));
        // Other pages at the same address, which a stale registration would not see.
        free(memory);
        memory = test_memory(BLOCK_BYTES);
    }
    free(memory);
}

void reap_nothing(ucm_store_t *store) {
    const ucm_block_id_t block = test_block(800);
    unsigned char *memory = test_memory(BLOCK_BYTES);
    void *address = memory;
    ucm_batch_t batch = test_batch(&block, &address, 1);
    batch.flags = UCM_BATCH_NOTIFY;
    ucm_task_t *task = nullptr;
    OK(ucm_load(store, &batch, &task));
    pollfd poller{ucm_store_completion_fd(store), POLLIN, 0};
    CHECK(poll(&poller, 1, 30000) == 1);
    std::size_t count = 9;
    OK(ucm_store_reap(store, nullptr, 0, &count));
    CHECK(count == 0 && poll(&poller, 1, 0) == 1); // still there
    ucm_completion_t one;
    OK(ucm_store_reap(store, &one, 1, &count));
    CHECK(count == 1 && one.task == task && poll(&poller, 1, 0) == 0);
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    ucm_task_free(task);
    free(memory);
}

} // namespace

int main() {
    ucm_store_t *store = test_store(BLOCK_BYTES), *other = test_store(BLOCK_BYTES);
    std::atomic<bool> stop{false};
    std::vector<std::thread> makers, workers;
    for (unsigned seed = 0; seed < 2; ++seed) makers.emplace_back(make_up_handles, store, seed, std::ref(stop));
    for (unsigned base : {1000u, 2000u}) workers.emplace_back(work, store, base);
    for (std::thread &worker : workers) worker.join();
    stop = true;
    for (std::thread &maker : makers) maker.join();
    freed_while_waited_for();
    odd_batches(store);
    registered_again_and_again(store, other);
    reap_nothing(store);
    ucm_store_close(store);
    ucm_store_close(other);

    // Tables of what is in DRAM have the writer's number in their names.
    const std::string own = "-" + std::to_string(getpid()) + "-";
    CHECK(entries("/dev/shm", own.c_str()) == 0);
    unsigned descriptors = 0;
    for (int round = 0; round < 8; ++round) {
        store = test_store(BLOCK_BYTES);
        OK(load_block(store, 600));
        ucm_store_close(store);
        if (round == 1) descriptors = entries("/proc/self/fd", "");
    }
    for (int i = 0; i < 1000 && entries("/proc/self/fd", "") > descriptors; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    CHECK(entries("/proc/self/fd", "") <= descriptors);
    CHECK(entries("/dev/shm", own.c_str()) == 0);
    for (int i = 0; i < 2000; ++i) { // idle threads of pools leave after some seconds
        unsigned ours = entries("/proc/self/task", "");
        if (ours <= 2) break; // a sanitizer may have one
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    CHECK(entries("/proc/self/task", "") <= 2);
    return passed();
}
