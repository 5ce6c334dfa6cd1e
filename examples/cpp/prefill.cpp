// prefill: computes the KV of a prompt in paged memory and saves it.
//
//   g++ -std=c++17 -O2 prefill.cpp -o prefill -lucm && ./prefill --directory /mnt/kv --model qwen2.5-7b

#include "kv_cache.hpp"

namespace {

using namespace example;

void prefill(const Arguments &arguments) {
    const Model &model = arguments.model;
    const int ranks = arguments.tensor_parallel;

    // One store and one KV memory for each rank; in a server each of them is a process of its own.
    std::vector<ucm::Store> stores;
    for (int rank = 0; rank < ranks; ++rank) {
        stores.push_back(ucm::Store::open(store_options(arguments, rank)).value());
    }

    const std::vector<ucm::BlockId> blocks =
        stores[0].hash_tokens(arguments.prompt_tokens(), block_tokens).value();
    stores[0].refresh().value(); // see what others have just saved
    const std::size_t hits = stores[0].lookup_prefix(blocks).value();
    std::printf("prefill %s, TP %d: prompt %llu has %d tokens, %zu blocks of %.2f MiB; %zu are stored already\n",
                model.name, ranks, static_cast<unsigned long long>(arguments.prompt), arguments.tokens,
                blocks.size(), model.block_bytes() / 1048576.0, hits);
    if (arguments.expect_hits >= 0 && hits != static_cast<std::size_t>(arguments.expect_hits)) {
        throw std::runtime_error("expected " + std::to_string(arguments.expect_hits) + " hits");
    }

    // The rest is computed: block i of them on page i.
    const std::vector<ucm::BlockId> missing(blocks.begin() + hits, blocks.end());
    if (missing.empty()) return;
    std::vector<PagedKv> memories;
    for (int rank = 0; rank < ranks; ++rank) {
        memories.emplace_back(model, rank, ranks, missing.size());
        for (std::size_t page = 0; page < missing.size(); ++page) {
            memories[rank].compute(page, missing[page]);
        }
    }

    const Stopwatch watch;
    std::vector<ucm::Task> tasks;
    for (int rank = 0; rank < ranks; ++rank) {
        std::vector<void *> addresses;
        for (std::size_t page = 0; page < missing.size(); ++page) {
            memories[rank].append_addresses(page, addresses);
        }
        ucm::Batch batch;
        batch.blocks = missing;
        batch.addresses = addresses;
        tasks.push_back(stores[rank].save(batch).value());
    }
    // COPIED: the pages could be used again. PERSISTED: any other process can load the blocks.
    for (const ucm::Task &task : tasks) task.wait(ucm::Stage::Copied).value();
    const double copied = watch.wall();
    for (const ucm::Task &task : tasks) task.wait(ucm::Stage::Persisted).value();
    report("saved", missing.size(), model, watch);
    std::printf("  the pages were free again after %.3f s\n", copied);
}

} // namespace

int main(int count, char **words) {
    try {
        prefill(Arguments(count, words));
        return EXIT_SUCCESS;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "prefill: %s\n", error.what());
        return EXIT_FAILURE;
    }
}
