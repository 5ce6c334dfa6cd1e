// Random saves and loads through a store that evicts, from plain C++ and the driver API, on a GPU or a pretended one.
//
//     traffic FOLDER MODEL_PTX OPERATIONS SEED
//
// Several of them may run on one FOLDER at a time: they share its blocks. Every byte that is loaded is compared; a
// block that has been evicted is a miss, never another's bytes. The first thing that is wrong ends the program.
#include "gpu.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <random>

namespace {

constexpr std::size_t slice_bytes = 16 << 10;
constexpr std::size_t slices = 4;
constexpr std::size_t block_bytes = slices * slice_bytes;
constexpr std::size_t pages = 12;             // of each thread's paged cache
constexpr std::size_t batch_max = 4;          // blocks of one operation
constexpr unsigned universe = 800;            // blocks there are: far more than DRAM or storage hold
constexpr unsigned threads = 4;
constexpr std::chrono::seconds patience{30};  // of a task, on a busy machine too
constexpr unsigned long long kernel_cycles = 20'000; // a kernel that is still running when its save is submitted

// What block `number` holds in a slice: decided by both, whoever saves it.
unsigned seed_of(unsigned number, std::size_t slice) {
    return number * 2246822519u + static_cast<unsigned>(slice) * 3266489917u;
}

ucm::BlockId id_of(unsigned number) {
    ucm::BlockId id{};
    for (unsigned i = 0; i < 4; ++i) id.bytes[i] = id.bytes[12 - i] = static_cast<unsigned char>(number >> (8 * i));
    return id;
}

ucm::Store open_store(const std::string &folder) {
    ucm::Options options = ucm::Options::make().value();
    options.set("storage_backends", folder).value();
    options.set("tensor_size", slice_bytes).value();
    options.set("block_size", block_bytes).value();
    options.set("device", "cuda").value();
    options.set("device_id", 0).value();
    options.set("cache_buffer_capacity_gb", "0.006").value(); // some 90 blocks
    options.set("posix_capacity_gb", "0.03").value();         // some 450 blocks
    options.set("posix_gc_trigger_threshold_ratio", "0.6").value();
    options.set("posix_gc_recycle_percent", "0.3").value();
    options.set("segment_size_mb", 2).value();
    options.set("lookup_refresh_ms", 50).value();
    options.set("timeout_ms", 500).value(); // space that is given up comes back after so long
    options.set("model_id", "gpu-traffic").value();
    return ucm::Store::open(options).value();
}

struct Totals {
    std::atomic<unsigned long> saved{0}, refused{0}, loaded{0}, missed{0}, waited{0};
};

// One thread of a server: a paged cache in one allocation, a stream and an event of its own.
class Server {
public:
    Server(Gpu &gpu, ucm::Store &store, Totals &totals, unsigned seed)
        : gpu_(gpu), store_(store), totals_(totals), random_(seed), cache_(gpu.allocate(pages * block_bytes)),
          copy_(gpu.allocate(pages * block_bytes)), stream_(gpu.stream(1)), event_(gpu.event()) {}

    Server(const Server &) = delete;
    Server &operator=(const Server &) = delete;

    ~Server() {
        gpu_.call<void *>("cuStreamSynchronize", stream_);
        gpu_.destroy_stream(stream_);
        gpu_.destroy(event_);
        gpu_.free(cache_);
        gpu_.free(copy_);
    }

    void operate() {
        choose();
        if (random_() % 2 == 0) save();
        else load();
    }

private:
    // Some blocks and a page for each: distinct ones, in no order.
    void choose() {
        const std::size_t count = 1 + random_() % batch_max;
        const std::size_t first = random_() % pages;
        numbers_.clear();
        ids_.clear();
        rows_.clear();
        places_.clear();
        for (std::size_t i = 0; i < count; ++i) {
            unsigned number = random_() % universe;
            while (std::find(numbers_.begin(), numbers_.end(), number) != numbers_.end()) number = random_() % universe;
            const std::size_t page = (first + 5 * i) % pages;
            numbers_.push_back(number);
            ids_.push_back(id_of(number));
            places_.push_back(page);
            for (std::size_t slice = 0; slice < slices; ++slice) {
                rows_.push_back(reinterpret_cast<void *>(address(page, slice)));
            }
        }
    }

    unsigned long long address(std::size_t page, std::size_t slice) const { return cache_ + offset(page, slice); }

    static std::size_t offset(std::size_t page, std::size_t slice) { return (slice * pages + page) * slice_bytes; }

    ucm::Batch batch(void *event) const {
        ucm::Batch batch;
        batch.blocks = {ids_.data(), ids_.size()};
        batch.addresses = {rows_.data(), rows_.size()};
        batch.wait_event = event;
        batch.timeout = patience;
        return batch;
    }

    // Writes the pages on the model's stream: their blocks, or what no block is.
    void fill(unsigned garbage) {
        for (std::size_t i = 0; i < numbers_.size(); ++i) {
            for (std::size_t slice = 0; slice < slices; ++slice) {
                const unsigned seed = seed_of(numbers_[i], slice) ^ garbage;
                gpu_.fill(stream_, address(places_[i], slice), slice_bytes, seed, kernel_cycles);
            }
        }
    }

    void save() {
        fill(0);
        gpu_.record(event_, stream_);
        ucm::Task task = submit([&] { return store_.save(batch(event_)); });
        // The model's stream waits for the copies, and writes over the pages while storage is still being written.
        task.stream_wait(stream_).value();
        fill(~0u);
        const auto ended = task.wait(ucm::Stage::Persisted);
        task.wait(ucm::Stage::Released).value();
        // What storage has no room for is refused; everything else is a failure.
        const bool full = !ended && ended.status() == ucm::Status::NoSpace;
        check(ended || full, "a save failed: " + (ended ? std::string() : ended.error().message()));
        (full ? totals_.refused : totals_.saved) += numbers_.size();
    }

    void load() {
        // A save of what was there already waits for no kernel: this page may still be written.
        gpu_.record(event_, stream_);
        ucm::Task task = submit([&] { return store_.load(batch(event_)); });
        // Where all of it is there, the model's stream waits, and copies what it sees.
        const bool waits = static_cast<bool>(task.stream_wait(stream_));
        if (waits) {
            gpu_.call<unsigned long long, unsigned long long, std::size_t, void *>("cuMemcpyAsync", copy_, cache_,
                                                                                   pages * block_bytes, stream_);
            gpu_.call<void *>("cuStreamSynchronize", stream_);
            ++totals_.waited;
        }
        const auto ended = task.wait(ucm::Stage::Loaded);
        task.wait(ucm::Stage::Released).value();
        check(ended || ended.status() == ucm::Status::NotFound,
              "a load failed: " + (ended ? std::string() : ended.error().message()));
        const auto statuses = task.statuses(numbers_.size()).value();
        const auto words = gpu_.read(waits ? copy_ : cache_, pages * block_bytes);
        for (std::size_t i = 0; i < numbers_.size(); ++i) {
            const bool there = statuses[i] == ucm::Status::Ok;
            if (there) compare(words, i);
            ++(there ? totals_.loaded : totals_.missed);
        }
    }

    void compare(const std::vector<unsigned> &words, std::size_t entry) const {
        for (std::size_t slice = 0; slice < slices; ++slice) {
            const std::size_t from = offset(places_[entry], slice) / 4;
            const unsigned seed = seed_of(numbers_[entry], slice);
            for (std::size_t word = 0; word < slice_bytes / 4; ++word) {
                check(words[from + word] == filled(word, seed), "block " + std::to_string(numbers_[entry]) +
                                                                    ", slice " + std::to_string(slice) +
                                                                    ": wrong bytes at word " + std::to_string(word));
            }
        }
    }

    Gpu &gpu_;
    ucm::Store &store_;
    Totals &totals_;
    std::mt19937 random_;
    unsigned long long cache_, copy_;
    void *stream_, *event_;
    std::vector<unsigned> numbers_;
    std::vector<ucm::BlockId> ids_;
    std::vector<void *> rows_;
    std::vector<std::size_t> places_;
};

} // namespace

int main(int count, char **arguments) {
    if (count != 5) fail("usage: traffic FOLDER MODEL_PTX OPERATIONS SEED");
    const unsigned operations = static_cast<unsigned>(std::stoul(arguments[3]));
    const unsigned seed = static_cast<unsigned>(std::stoul(arguments[4]));
    Gpu gpu(arguments[2]);
    ucm::Store store = open_store(arguments[1]);
    Totals totals;
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> servers;
    for (unsigned thread = 0; thread < threads; ++thread) {
        servers.emplace_back([&, thread] {
            gpu.enter();
            Server server(gpu, store, totals, seed * threads + thread);
            for (unsigned operation = thread; operation < operations; operation += threads) server.operate();
        });
    }
    for (auto &server : servers) server.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    const ucm_stats_t stats = store.stats().value();
    std::printf("%u saves and loads in %.1f s: %lu blocks saved (%lu refused), %lu loaded and right, %lu missed, "
                "%lu loads behind a stream's wait; %llu evicted from DRAM, %llu on storage\n",
                operations, took.count(), totals.saved.load(), totals.refused.load(), totals.loaded.load(),
                totals.missed.load(), totals.waited.load(), static_cast<unsigned long long>(stats.cache_evictions),
                static_cast<unsigned long long>(stats.parts));
    check(totals.loaded > operations / 8 && totals.waited > 0, "too little was loaded to show anything");
    check(stats.cache_evictions > operations / 8, "nothing was evicted from DRAM");
    check(stats.verify_failures == 0, "bytes on storage did not match their checksum");
}
