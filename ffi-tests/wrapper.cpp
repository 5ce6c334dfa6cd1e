// Goal: ucm.hpp does what ucm.h does: handles move and end once, results carry messages, times are chrono's, and
// value() throws where there are exceptions.
#include "check.h"

#include <ucm.hpp>

#include <array>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

namespace {

using namespace std::chrono_literals;

static_assert(!std::is_copy_constructible_v<ucm::Store> && std::is_nothrow_move_constructible_v<ucm::Store>);
static_assert(!std::is_copy_constructible_v<ucm::Task> && std::is_nothrow_move_assignable_v<ucm::Task>);
static_assert(!std::is_copy_assignable_v<ucm::Options>);
static_assert(ucm::Timeout(1500us).milliseconds() == 2);
static_assert(ucm::Timeout(-1s).milliseconds() == 0);
static_assert(ucm::Timeout::none().milliseconds() == -1);

ucm::Store open_store() {
    ucm::Options options(test_options(BLOCK_BYTES));
    ucm::Result<ucm::Store> store = ucm::Store::open(options);
    CHECK(store.ok() && store.status() == ucm::Status::Ok);
    return std::move(*store);
}

void options_and_errors() {
    ucm::Options options = std::move(*ucm::Options::make());
    CHECK(options.set("io_depth", 64).ok());
    const ucm::Result<void> refused = options.set("io_dept", "64");
    CHECK(!refused && refused.status() == ucm::Status::InvalidConfig);
    CHECK(refused.error().message().find("io_depth") != std::string::npos);
    CHECK(std::string(ucm::name(refused.status())) == "UCM_STATUS_INVALID_CONFIG");
    CHECK(ucm::Options::from_yaml("").ok());
    CHECK(ucm::Options::from_yaml({}).ok());
    CHECK(ucm::Options::from_yaml_file("/no/such/file").status() == ucm::Status::NotFound);
    const std::string long_key(3000, 'x'); // a message longer than the first buffer arrives whole
    CHECK(options.set(long_key, "1").error().message().find(long_key) != std::string::npos);
    ucm_options_t *raw = options.release();
    CHECK(!options && options.set("io_depth", 1).status() == ucm::Status::InvalidArgument);
    options.reset(raw);
    CHECK(options.set("io_depth", 1).ok());
}

void save_and_load() {
    const ucm::Store store = open_store();
    std::vector<std::uint32_t> tokens(3 * 16 + 5);
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::uint32_t>(i);
    const std::vector<ucm::BlockId> blocks = *store.hash_tokens(tokens, 16);
    CHECK(blocks.size() == 3);
    CHECK(ucm::BlockIdEqual()((*store.hash_tokens(tokens, 16))[2], blocks[2]));
    const std::array<std::string_view, 3> extras = {"", "picture", ""};
    const std::vector<ucm::BlockId> salted = *store.hash_blocks(tokens, 16, nullptr, extras);
    CHECK(ucm::BlockIdEqual()(salted[0], blocks[0]) && !ucm::BlockIdEqual()(salted[1], blocks[1]));
    CHECK(store.hash_blocks(tokens, 16, nullptr, {}).status() == ucm::Status::InvalidArgument);
    CHECK(store.hash_tokens(tokens, 0).status() == ucm::Status::InvalidArgument);
    std::unordered_set<ucm::BlockId, ucm::BlockIdHash, ucm::BlockIdEqual> set(blocks.begin(), blocks.end());
    CHECK(set.size() == 3);

    std::vector<void *> addresses;
    for (unsigned i = 0; i < 3; ++i) {
        addresses.push_back(test_memory(BLOCK_BYTES));
        fill(static_cast<unsigned char *>(addresses.back()), BLOCK_BYTES, i);
    }
    ucm::Batch batch;
    batch.blocks = blocks;
    batch.addresses = addresses;
    batch.timeout = 20s;
    batch.notify = true;
    batch.user_data = 77;
    ucm::Task task = std::move(*store.save(batch));
    CHECK(task.wait(ucm::Stage::Copied).ok());
    const ucm::Result<ucm::Progress> waited = task.wait(ucm::Stage::Persisted, 20s);
    CHECK(waited.ok() && *waited == ucm::Progress::Done);
    CHECK(*task.poll(ucm::Stage::Persisted) == ucm::Progress::Done);
    CHECK(task.poll(ucm::Stage::Loaded).status() == ucm::Status::InvalidArgument);
    CHECK(task.error().empty());
    CHECK((*task.statuses(3))[2] == ucm::Status::Ok);
    CHECK(task.wait(ucm::Stage::Released).ok());
    ucm::Completion completions[2];
    CHECK(*store.completion_fd() >= 0);
    CHECK(*store.reap(completions) == 1 && completions[0].user_data == 77);
    CHECK(completions[0].task == task.get());

    const std::vector<std::uint8_t> found = *store.lookup(blocks);
    CHECK(found.size() == 3 && found[0] == 1 && found[2] == 1);
    CHECK(*store.lookup_prefix(salted) == 1);
    CHECK(store.prefetch(blocks).ok() && store.refresh().ok() && store.refresh(5s).ok());

    for (void *address : addresses) memset(address, 0xee, BLOCK_BYTES);
    batch.notify = false;
    task = store.load(batch).value();
    CHECK(task.stream_wait(nullptr).ok());
    CHECK(task.wait(ucm::Stage::Loaded).ok() && task.wait(ucm::Stage::Released).ok());
    for (unsigned i = 0; i < 3; ++i) CHECK(holds(static_cast<unsigned char *>(addresses[i]), BLOCK_BYTES, i));
    CHECK(task.cancel().ok());

    ucm::Task held = store.hold(blocks).value();
    CHECK(held.wait(ucm::Stage::Loaded).ok() && (*held.statuses(3))[1] == ucm::Status::Ok);
    held.reset();
    CHECK(store.hold({}).status() == ucm::Status::InvalidArgument);

    const std::uint32_t shards[1] = {0};
    batch.shards = shards; // one for three blocks
    CHECK(store.load(batch).status() == ucm::Status::InvalidArgument);
    batch.shards = {};
    batch.addresses = ucm::Span<void *const>(addresses.data(), 2);
    CHECK(store.load(batch).status() == ucm::Status::InvalidArgument);

    CHECK(store.stats()->saves_ok == 3 && store.stats()->loads_ok == 3 && store.stats()->tasks == 0);
    CHECK(store.metrics()->find("# TYPE") != std::string::npos || !store.metrics()->empty());
    CHECK(store.register_memory(addresses[0], BLOCK_BYTES).ok() && store.unregister_memory(addresses[0]).ok());
    for (void *address : addresses) free(address);
}

void moves() {
    ucm::Store first = open_store();
    ucm_store_t *raw = first.get();
    ucm::Store second = std::move(first);
    CHECK(!first && second.get() == raw);
    second = open_store(); // closes the one it had
    CHECK(ucm_store_refresh(raw, 0) == UCM_STATUS_CLOSED);
    raw = second.get();
    second.reset();
    CHECK(ucm_store_refresh(raw, 0) == UCM_STATUS_CLOSED);
    CHECK(second.completion_fd().status() == ucm::Status::InvalidArgument);
}

void throwing() {
#if UCM_HPP_THROWS
    try {
        ucm::Options::from_yaml("no_such_key: 1").value();
        CHECK(false);
    } catch (const ucm::Exception &exception) {
        CHECK(exception.status() == ucm::Status::InvalidConfig);
        CHECK(std::string(exception.what()).find("no_such_key") != std::string::npos);
    }
#endif
}

} // namespace

int main() {
    options_and_errors();
    save_and_load();
    moves();
    throwing();
    return passed();
}
