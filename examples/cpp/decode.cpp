// decode: finds what a prefill server saved of a prompt, loads it into pages of its own, verifies every byte.
//
//   g++ -std=c++17 -O2 decode.cpp -o decode -lucm && ./decode --directory /mnt/kv --model qwen2.5-7b

#include "kv_cache.hpp"

namespace {

using namespace example;

void decode(const Arguments &arguments) {
    const Model &model = arguments.model;
    const int ranks = arguments.tensor_parallel;

    std::vector<ucm::Store> stores;
    for (int rank = 0; rank < ranks; ++rank) {
        stores.push_back(ucm::Store::open(store_options(arguments, rank)).value());
    }
    // A scheduler looks up and transfers nothing. It says yes only where all parts of a block are there.
    const ucm::Store scheduler = ucm::Store::open(store_options(arguments, 0, -1)).value();

    const std::vector<ucm::BlockId> blocks =
        scheduler.hash_tokens(arguments.prompt_tokens(), block_tokens).value();
    const Stopwatch looking;
    const std::size_t hits = scheduler.lookup_prefix(blocks).value();
    std::printf("decode %s, TP %d: prompt %llu hits %zu of %zu blocks (lookup took %.0f us)\n", model.name,
                ranks, static_cast<unsigned long long>(arguments.prompt), hits, blocks.size(),
                looking.wall() * 1e6);
    if (arguments.expect_hits >= 0 && hits != static_cast<std::size_t>(arguments.expect_hits)) {
        throw std::runtime_error("expected " + std::to_string(arguments.expect_hits) + " hits");
    }
    if (hits == 0) return;

    // Other page numbers than prefill had: the last page first.
    const auto page_of = [hits](std::size_t block) { return hits - 1 - block; };
    const std::vector<ucm::BlockId> present(blocks.begin(), blocks.begin() + hits);
    std::vector<PagedKv> memories;
    for (int rank = 0; rank < ranks; ++rank) memories.emplace_back(model, rank, ranks, hits);

    const Stopwatch watch;
    std::vector<ucm::Task> tasks;
    for (int rank = 0; rank < ranks; ++rank) {
        std::vector<void *> addresses;
        for (std::size_t block = 0; block < hits; ++block) {
            memories[rank].append_addresses(page_of(block), addresses);
        }
        ucm::Batch batch;
        batch.blocks = present;
        batch.addresses = addresses;
        tasks.push_back(stores[rank].load(batch).value());
    }
    for (const ucm::Task &task : tasks) task.wait(ucm::Stage::Loaded).value();
    report("loaded", hits, model, watch);

    std::size_t wrong = 0;
    for (int rank = 0; rank < ranks; ++rank)
        for (std::size_t block = 0; block < hits; ++block)
            wrong += !memories[rank].verify(page_of(block), present[block]);
    if (wrong > 0) throw std::runtime_error(std::to_string(wrong) + " block parts have wrong bytes");
    std::printf("  verified every byte of %zu blocks\n", hits);
}

} // namespace

int main(int count, char **words) {
    try {
        decode(Arguments(count, words));
        return EXIT_SUCCESS;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "decode: %s\n", error.what());
        return EXIT_FAILURE;
    }
}
