// The store under plain C++ and the CUDA driver API, on a real GPU: no runtime, no toolkit, no framework.
//
// `cargo xtask gpu-test` compiles it with the system's C++ compiler, links libucm.so and runs it:
//
//     driver FOLDER MODEL_PTX      FOLDER is made and filled; MODEL_PTX is tests/gpu/model.ptx
//
// Each part says its goal. The first thing that is wrong ends the program with a sentence and status 1.
#include "gpu.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t slice_bytes = 128 << 10; // Qwen2.5-7B, blocks of 128 tokens, K and V apart
constexpr std::size_t slices = 56;
constexpr std::size_t block_bytes = slice_bytes * slices;
constexpr std::size_t blocks = 64;
constexpr unsigned long long slow_cycles = 60'000'000; // some tens of milliseconds


// A paged cache in one allocation: slice s of page p lies at (s * blocks + p) * slice_bytes.
struct Cache {
    unsigned long long base;

    std::vector<void *> addresses(std::size_t first) const {
        std::vector<void *> rows;
        for (std::size_t block = 0; block < blocks; ++block) {
            const std::size_t page = (first + 37 * block) % blocks;
            for (std::size_t slice = 0; slice < slices; ++slice) {
                const auto address = base + (slice * blocks + page) * slice_bytes;
                rows.push_back(reinterpret_cast<void *>(address));
            }
        }
        return rows;
    }
};

// Ids that differ by place and by salt.
std::vector<ucm::BlockId> ids(unsigned salt) {
    std::vector<ucm::BlockId> made(blocks);
    for (std::size_t block = 0; block < blocks; ++block) {
        made[block] = {};
        made[block].bytes[0] = static_cast<unsigned char>(block);
        for (unsigned i = 0; i < 4; ++i) made[block].bytes[4 + i] = static_cast<unsigned char>(salt >> (8 * i));
    }
    return made;
}

ucm::Store open_store(const std::string &folder, const std::string &pipeline) {
    ucm::Options options = ucm::Options::make().value();
    std::string sizes = "[";
    for (std::size_t slice = 0; slice < slices; ++slice) {
        sizes += (slice == 0 ? "" : ", ") + std::to_string(slice_bytes);
    }
    options.set("store_pipeline", pipeline).value();
    if (pipeline != "Cache|Empty") options.set("storage_backends", folder).value();
    options.set("tensor_size_list", sizes + "]").value();
    options.set("shard_size", block_bytes).value();
    options.set("block_size", block_bytes).value();
    options.set("device", "cuda").value();
    options.set("device_id", 0).value();
    options.set("cache_buffer_capacity_gb", 2).value();
    options.set("model_id", "gpu-driver").value();
    return ucm::Store::open(options).value();
}

ucm::Batch batch_of(const std::vector<ucm::BlockId> &names, const std::vector<void *> &rows, void *event = nullptr) {
    ucm::Batch batch;
    batch.blocks = {names.data(), names.size()};
    batch.addresses = {rows.data(), rows.size()};
    batch.wait_event = event;
    return batch;
}

// Words of `target` where its page p must be the source's page q, for the pages that two caches used.
bool same(Gpu &gpu, const Cache &target, std::size_t to, std::size_t from, unsigned seed) {
    const auto words = gpu.read(target.base, blocks * block_bytes);
    const std::size_t per_slice = slice_bytes / 4;
    for (std::size_t block = 0; block < blocks; ++block) {
        const std::size_t mine = (to + 37 * block) % blocks, theirs = (from + 37 * block) % blocks;
        for (std::size_t slice = 0; slice < slices; ++slice) {
            const std::size_t at = (slice * blocks + mine) * per_slice, source = (slice * blocks + theirs) * per_slice;
            for (std::size_t word = 0; word < per_slice; ++word) {
                if (words[at + word] != filled(source + word, seed)) return false;
            }
        }
    }
    return true;
}

// Goal: a save reads what a kernel has written that was still running when it was submitted, on a non-blocking
// stream, an ordinary one and the default one; without the event it does not, so a missing wait would be seen.
void saves_wait_for_kernels(Gpu &gpu, const std::string &folder) {
    ucm::Store store = open_store(folder, "Cache|Posix");
    const Cache source{gpu.allocate(blocks * block_bytes)}, target{gpu.allocate(blocks * block_bytes)};
    void *const streams[] = {gpu.stream(1), gpu.stream(0), nullptr};
    const char *const names[] = {"non-blocking", "ordinary", "default"};
    unsigned round = 0;
    for (const bool told : {true, false}) {
        for (unsigned kind = 0; kind < 3; ++kind, ++round) {
            gpu.fill(nullptr, source.base, blocks * block_bytes, ~round, 0);
            gpu.synchronize();
            gpu.fill(streams[kind], source.base, blocks * block_bytes, round, slow_cycles);
            void *event = gpu.event();
            gpu.record(event, streams[kind]);
            const auto names_of = ids(round);
            const auto rows = source.addresses(0);
            ucm::Task save = store.save(batch_of(names_of, rows, told ? event : nullptr)).value();
            gpu.destroy(event);
            save.wait(ucm::Stage::Persisted).value();
            gpu.synchronize();
            const auto to = target.addresses(5);
            store.load(batch_of(names_of, to)).value().wait(ucm::Stage::Loaded).value();
            const bool right = same(gpu, target, 5, 0, round);
            check(right == told, std::string(names[kind]) + " stream, " + (told ? "with" : "without") +
                                     " the event: " + (right ? "right" : "wrong") + " bytes");
            std::printf("  %s stream, %s the event: %s bytes\n", names[kind], told ? "with" : "without",
                        right ? "right" : "old");
        }
    }
}

// Goal: a stream that was told to wait reads loaded bytes, though nothing on the host waited for the copies.
void streams_wait_for_loads(Gpu &gpu, const std::string &folder) {
    ucm::Store store = open_store(folder, "Cache|Posix");
    const Cache source{gpu.allocate(blocks * block_bytes)}, target{gpu.allocate(blocks * block_bytes)},
        copy{gpu.allocate(blocks * block_bytes)};
    gpu.fill(nullptr, source.base, blocks * block_bytes, 77, 0);
    gpu.synchronize();
    const auto names = ids(1000);
    const auto rows = source.addresses(0), to = target.addresses(0);
    store.save(batch_of(names, rows)).value().wait(ucm::Stage::Persisted).value();
    void *const stream = gpu.stream(1);
    ucm::Task load = store.load(batch_of(names, to)).value();
    load.stream_wait(stream).value();
    gpu.call<unsigned long long, unsigned long long, std::size_t, void *>("cuMemcpyAsync", copy.base, target.base,
                                                                          blocks * block_bytes, stream);
    gpu.call<void *>("cuStreamSynchronize", stream);
    check(same(gpu, copy, 0, 0, 77), "the stream read the target before it was loaded");
    load.wait(ucm::Stage::Loaded).value();
}

// Goal: a stream that was told to wait writes over what is being saved, though nothing on the host waited for the
// copies, which wait for a slow kernel of another stream; without the wait it comes too early, and would be seen.
void streams_wait_for_saves(Gpu &gpu, const std::string &folder) {
    ucm::Store store = open_store(folder, "Cache|Posix");
    const Cache source{gpu.allocate(blocks * block_bytes)}, target{gpu.allocate(blocks * block_bytes)},
        other{gpu.allocate(4096)};
    void *const slow = gpu.stream(1), *const model = gpu.stream(1), *const event = gpu.event();
    unsigned round = 3000;
    for (const bool told : {true, false}) {
        gpu.fill(nullptr, source.base, blocks * block_bytes, ++round, 0);
        gpu.synchronize();
        gpu.fill(slow, other.base, 4096, round, slow_cycles);
        gpu.record(event, slow);
        const auto names = ids(round);
        const auto rows = source.addresses(0), to = target.addresses(0);
        ucm::Task save = store.save(batch_of(names, rows, event)).value();
        if (told) save.stream_wait(model).value();
        check(save.poll(ucm::Stage::Copied).value() == ucm::Progress::Pending, "the host waited for the copies");
        gpu.fill(model, source.base, blocks * block_bytes, ~round, 0);
        save.wait(ucm::Stage::Persisted).value();
        gpu.synchronize();
        store.load(batch_of(names, to)).value().wait(ucm::Stage::Loaded).value();
        const bool right = same(gpu, target, 0, 0, round);
        check(right == told, std::string("what was stored is ") + (right ? "right" : "wrong"));
        std::printf("  %s the wait: %s bytes\n", told ? "with" : "without", right ? "right" : "new");
    }
}

// Goal: saves and loads of four threads, each with a stream and events of its own, keep every byte.
void threads_share_a_store(Gpu &gpu, const std::string &folder) {
    ucm::Store store = open_store(folder, "Cache|Posix");
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < 4; ++thread) {
        threads.emplace_back([&, thread] {
            gpu.enter();
            const Cache source{gpu.allocate(blocks * block_bytes)}, target{gpu.allocate(blocks * block_bytes)};
            void *const stream = gpu.stream(1), *const event = gpu.event();
            for (unsigned round = 0; round < 4; ++round) {
                const unsigned salt = 2000 + 16 * thread + round;
                gpu.fill(stream, source.base, blocks * block_bytes, salt, slow_cycles / 10);
                gpu.record(event, stream);
                const auto names = ids(salt);
                const auto rows = source.addresses(round), to = target.addresses(2 * round);
                ucm::Task save = submit([&] { return store.save(batch_of(names, rows, event)); });
                save.wait(ucm::Stage::Persisted).value();
                submit([&] { return store.load(batch_of(names, to)); }).wait(ucm::Stage::Loaded).value();
                check(same(gpu, target, 2 * round, round, salt), "thread " + std::to_string(thread) + ": wrong bytes");
            }
        });
    }
    for (auto &thread : threads) thread.join();
}

// Goal: prints what the calls themselves cost: 64 blocks of 56 slices, whatever becomes of the event.
void submission(Gpu &gpu, const std::string &folder) {
    const Cache cache{gpu.allocate(blocks * block_bytes)};
    const auto rows = cache.addresses(0);
    void *const stream = gpu.stream(1), *const event = gpu.event();
    unsigned salt = 5000;
    for (const bool save : {true, false}) {
        for (const char *state : {"none", "done", "pending"}) {
            ucm::Store store = open_store(folder, "Cache|Empty");
            const auto known = ids(salt);
            store.save(batch_of(known, rows)).value().wait(ucm::Stage::Copied).value();
            std::vector<double> micros;
            for (unsigned round = 0; round < 100; ++round) {
                const auto names = save ? ids(++salt) : known;
                if (state[0] == 'p') gpu.fill(stream, cache.base, 4096, round, 1'000'000);
                gpu.record(event, stream);
                if (state[0] == 'd') gpu.synchronize();
                const ucm::Batch batch = batch_of(names, rows, state[0] == 'n' ? nullptr : event);
                const auto begin = std::chrono::steady_clock::now();
                auto task = save ? store.save(batch) : store.load(batch);
                const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
                micros.push_back(took.count());
                task.value().wait(save ? ucm::Stage::Copied : ucm::Stage::Loaded).value();
            }
            std::sort(micros.begin(), micros.end());
            std::printf("  %s, event %s: 64 x 56 slices: median %.0f us, 90 %% %.0f us, worst %.0f us\n",
                        save ? "save" : "load", state, micros[50], micros[90], micros[99]);
            ++salt;
        }
    }
}

} // namespace

int main(int count, char **arguments) {
    if (count != 3) fail("usage: driver FOLDER MODEL_PTX");
    const std::string folder = arguments[1];
    Gpu gpu(arguments[2]);
    const struct {
        const char *name;
        void (*run)(Gpu &, const std::string &);
    } parts[] = {
        {"saves_wait_for_kernels", saves_wait_for_kernels},
        {"streams_wait_for_loads", streams_wait_for_loads},
        {"streams_wait_for_saves", streams_wait_for_saves},
        {"threads_share_a_store", threads_share_a_store},
        {"submission", submission},
    };
    for (const auto &part : parts) {
        part.run(gpu, folder + "/" + part.name);
        std::printf("ok     %s\n", part.name);
        std::fflush(stdout);
    }
    return 0;
}
