// What prefill.cpp and decode.cpp share: the shape of a model's KV, paged memory to hold it, a prompt, and
// the command line. A real server has all of this already.

#pragma once

#include <ucm.hpp>

#include <sys/mman.h>
#include <sys/resource.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace example {

constexpr std::uint32_t block_tokens = 128;

// How the KV of one block is made up. A part is what cannot be cut further by tensor parallelism.
struct Model {
    const char *name;
    int layers;
    int tensors_per_layer;   // K and V: 2; MLA, which keeps one latent: 1
    std::size_t slice_bytes; // of one tensor, one block, one part
    int part_count;          // parts of a block
    int tensor_parallel;     // ranks by default

    int slices_per_part() const { return layers * tensors_per_layer; }
    std::size_t part_bytes() const { return slices_per_part() * slice_bytes; }
    std::size_t block_bytes() const { return part_bytes() * part_count; }
};

constexpr Model models[] = {
    // 4 KV heads x 128 x 2 bytes x 128 tokens
    {"qwen2.5-7b", 28, 2, 4 * 128 * 2 * block_tokens, 1, 1},
    // MLA: (512 + 64) x 2 bytes x 128 tokens, the same on every rank, so one part at any TP
    {"deepseek-v3", 61, 1, 576 * 2 * block_tokens, 1, 1},
    // 8 KV heads: one part each
    {"llama-3-70b", 80, 2, 128 * 2 * block_tokens, 8, 8},
};

// Command line.
struct Arguments {
    Model model = models[0];
    std::string directory;
    std::string cache_gb = "0.5";
    int tokens = 4096;
    int shared_tokens = 0; // tokens at the front that every prompt has
    std::uint64_t prompt = 1;
    int tensor_parallel = 0;
    long expect_hits = -1;

    Arguments(int count, char **words) {
        for (int i = 1; i + 1 < count; i += 2) {
            const std::string word = words[i];
            const char *value = words[i + 1];
            if (word == "--model") model = find(value);
            else if (word == "--directory") directory = value;
            else if (word == "--cache-gb") cache_gb = value;
            else if (word == "--tokens") tokens = std::atoi(value);
            else if (word == "--shared-tokens") shared_tokens = std::atoi(value);
            else if (word == "--prompt") prompt = std::strtoull(value, nullptr, 10);
            else if (word == "--tp") tensor_parallel = std::atoi(value);
            else if (word == "--expect-hits") expect_hits = std::atol(value);
            else throw std::invalid_argument("unknown option " + word);
        }
        if (directory.empty() || count % 2 == 0 || tokens <= 0) {
            throw std::invalid_argument(
                "usage: --directory DIR [--model qwen2.5-7b|deepseek-v3|llama-3-70b] [--tp RANKS] [--tokens N]\n"
                "       [--prompt NUMBER] [--shared-tokens N] [--cache-gb N] [--expect-hits BLOCKS]");
        }
        if (tensor_parallel == 0) tensor_parallel = model.tensor_parallel;
        if (model.part_count % tensor_parallel != 0 && model.part_count != 1) {
            throw std::invalid_argument("--tp must divide the model's KV heads");
        }
        // KV that all ranks hold alike is saved and loaded by one of them.
        if (model.part_count == 1) tensor_parallel = 1;
    }

    static Model find(const std::string &name) {
        for (const Model &model : models)
            if (name == model.name) return model;
        throw std::invalid_argument("unknown model " + name);
    }

    // Token ids of the prompt: some numbers that depend on the prompt from shared_tokens on.
    std::vector<std::uint32_t> prompt_tokens() const {
        std::vector<std::uint32_t> ids;
        for (int i = 0; i < tokens; ++i) {
            const std::uint64_t seed = i < shared_tokens ? 0 : prompt;
            ids.push_back(static_cast<std::uint32_t>((seed * 1000003 + i) * 2654435761u % 150000));
        }
        return ids;
    }
};

// Options of one rank's store. `device_id` -1: a store that only looks up, as a scheduler has.
inline ucm::Options store_options(const Arguments &arguments, int rank, int device_id = 0) {
    const Model &model = arguments.model;
    const int parts_owned = model.part_count / arguments.tensor_parallel;
    ucm::Options options = ucm::Options::make().value();
    options.set("storage_backends", "[" + arguments.directory + "]").value();
    options.set("store_pipeline", "Cache|Posix").value();
    options.set("cache_buffer_capacity_gb", arguments.cache_gb).value();
    options.set("model_id", model.name).value();
    options.set("dtype", "bfloat16").value();
    options.set("block_tokens", block_tokens).value();
    options.set("part_count", model.part_count).value();
    options.set("part_index", rank * parts_owned).value();
    options.set("parts_owned", parts_owned).value();
    options.set("block_size", parts_owned * model.part_bytes()).value();
    options.set("device", "host").value();
    options.set("device_id", device_id).value();
    if (device_id >= 0) {
        options.set("shard_size", parts_owned * model.part_bytes()).value();
        options.set("tensor_size", model.slice_bytes).value(); // of every slice; else tensor_size_list
    }
    return options;
}

// The KV memory of one rank: for every layer a K and a V tensor of [pages][parts][slice bytes].
class PagedKv {
public:
    PagedKv(const Model &model, int rank, int ranks, std::size_t pages)
        : model_(model), parts_(model.part_count / ranks), first_part_(rank * parts_), pages_(pages),
          bytes_(pages * parts_ * model.part_bytes()) {
        void *base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) throw std::runtime_error("no memory for the KV pages");
        base_ = static_cast<unsigned char *>(base);
        std::memset(base_, 0xee, bytes_);
    }
    PagedKv(PagedKv &&other) noexcept
        : model_(other.model_), parts_(other.parts_), first_part_(other.first_part_),
          pages_(other.pages_), bytes_(other.bytes_), base_(std::exchange(other.base_, nullptr)) {}
    ~PagedKv() {
        if (base_ != nullptr) munmap(base_, bytes_);
    }

    // Where the slices of a page lie, in the order of the bytes of a shard: part by part, layer by layer.
    void append_addresses(std::size_t page, std::vector<void *> &addresses) const {
        for (int part = 0; part < parts_; ++part)
            for (int slice = 0; slice < model_.slices_per_part(); ++slice)
                addresses.push_back(address(page, part, slice));
    }

    // "Computes" the KV of a block: every word depends on the block, the part, the slice and its place.
    void compute(std::size_t page, const ucm::BlockId &block) {
        each_word(page, block, [](std::uint64_t &word, std::uint64_t value) { return word = value, true; });
    }
    // Whether a page holds exactly what compute() makes.
    bool verify(std::size_t page, const ucm::BlockId &block) {
        return each_word(page, block, [](std::uint64_t &word, std::uint64_t value) { return word == value; });
    }

private:
    unsigned char *address(std::size_t page, int part, int slice) const {
        return base_ + ((slice * pages_ + page) * parts_ + part) * model_.slice_bytes;
    }

    template <typename Visit>
    bool each_word(std::size_t page, const ucm::BlockId &block, Visit visit) {
        std::uint64_t id;
        std::memcpy(&id, block.bytes, sizeof id);
        bool all = true;
        for (int part = 0; part < parts_; ++part)
            for (int slice = 0; slice < model_.slices_per_part(); ++slice) {
                auto *words = reinterpret_cast<std::uint64_t *>(address(page, part, slice));
                const std::uint64_t seed = id ^ ((first_part_ + part) * 1000003ull + slice) << 20;
                for (std::size_t i = 0; i < model_.slice_bytes / sizeof *words; ++i)
                    all &= visit(words[i], (seed + i) * 0x9e3779b97f4a7c15ull);
            }
        return all;
    }

    Model model_;
    int parts_;
    int first_part_;
    std::size_t pages_;
    std::size_t bytes_;
    unsigned char *base_ = nullptr;
};

// Seconds on the wall and on the CPU since it was made.
class Stopwatch {
public:
    double wall() const {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    }
    double cpu() const { return cpu_now() - cpu_start_; }

private:
    static double cpu_now() {
        rusage usage{};
        getrusage(RUSAGE_SELF, &usage);
        const auto seconds = [](const timeval &time) { return time.tv_sec + time.tv_usec / 1e6; };
        return seconds(usage.ru_utime) + seconds(usage.ru_stime);
    }
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
    double cpu_start_ = cpu_now();
};

// One line of numbers.
inline void report(const char *what, std::size_t blocks, const Model &model, const Stopwatch &watch) {
    const double gigabytes = blocks * model.block_bytes() / 1e9;
    const double wall = watch.wall();
    std::printf("  %s %zu blocks: %.3f GB in %.3f s = %.2f GB/s, %.3f CPU s/GB\n", what, blocks, gigabytes,
                wall, gigabytes / wall, blocks ? watch.cpu() / gigabytes : 0.0);
}

} // namespace example
