// ucm.hpp: C++17 on top of ucm.h. Header only.
//
// SPDX-License-Identifier: Apache-2.0
//
// Three ways to use it, all over the same move-only handles:
//
//   without exceptions   if (auto store = ucm::Store::open(options)) use(*store); else log(store.error().message());
//   with exceptions      ucm::Store store = ucm::Store::open(options).value();      // throws ucm::Exception
//   beside the C API     ucm_lookup(store.get(), ...);  ucm::Store owned(raw);  ucm_store_t *raw = store.release();
//
// Nothing here throws but value() and what allocates. With -fno-exceptions value() is an ordinary accessor
// that ends the program where it would throw. Times are std::chrono durations; runs of objects are
// ucm::Span, which is std::span from C++20 on and a small equal of it before.

#ifndef UCM_HPP
#define UCM_HPP

#include "ucm.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#if defined(__has_include)
#if __has_include(<version>)
#include <version>
#endif
#endif
#if defined(__cpp_lib_span)
#include <span>
#endif

#if defined(__cpp_exceptions) && !defined(UCM_NO_EXCEPTIONS)
#define UCM_HPP_THROWS 1
#include <stdexcept>
#else
#define UCM_HPP_THROWS 0
#endif

static_assert(UCM_API_VERSION_MAJOR == 0, "ucm.hpp and ucm.h are of different versions");

namespace ucm {
// Programs may mix translation units with different settings: what depends on them has its own name.
#if defined(__cpp_lib_span) && UCM_HPP_THROWS
inline namespace v0_span_throws {
#elif defined(__cpp_lib_span)
inline namespace v0_span {
#elif UCM_HPP_THROWS
inline namespace v0_throws {
#else
inline namespace v0 {
#endif

#if defined(__cpp_lib_span)
template <typename T>
using Span = std::span<T>;
#else
// A run of objects that somebody else owns. What is used here of std::span.
template <typename T>
class Span {
public:
    constexpr Span() noexcept = default;
    constexpr Span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
    template <std::size_t N>
    constexpr Span(T (&array)[N]) noexcept : data_(array), size_(N) {}
    template <typename Container,
              typename = std::enable_if_t<std::is_convertible_v<
                  std::remove_pointer_t<decltype(std::declval<Container &>().data())> (*)[], T (*)[]>>>
    constexpr Span(Container &&container) noexcept
        : data_(container.data()), size_(container.size()) {}

    constexpr T *data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }
    constexpr bool empty() const noexcept { return size_ == 0; }
    constexpr T &operator[](std::size_t index) const noexcept { return data_[index]; }
    constexpr T *begin() const noexcept { return data_; }
    constexpr T *end() const noexcept { return data_ + size_; }

private:
    T *data_ = nullptr;
    std::size_t size_ = 0;
};
#endif

// The numbers of ucm.h as a type of their own.
enum class Status : ucm_status_t {
    Ok = UCM_STATUS_OK,
    Pending = UCM_STATUS_PENDING,
    InvalidArgument = UCM_STATUS_INVALID_ARGUMENT,
    InvalidConfig = UCM_STATUS_INVALID_CONFIG,
    NotFound = UCM_STATUS_NOT_FOUND,
    Corrupt = UCM_STATUS_CORRUPT,
    Io = UCM_STATUS_IO,
    NoSpace = UCM_STATUS_NO_SPACE,
    OutOfMemory = UCM_STATUS_OUT_OF_MEMORY,
    Timeout = UCM_STATUS_TIMEOUT,
    Busy = UCM_STATUS_BUSY,
    Cancelled = UCM_STATUS_CANCELLED,
    Unsupported = UCM_STATUS_UNSUPPORTED,
    Device = UCM_STATUS_DEVICE,
    Permission = UCM_STATUS_PERMISSION,
    Closed = UCM_STATUS_CLOSED,
    Internal = UCM_STATUS_INTERNAL,
};

inline const char *name(Status status) noexcept {
    return ucm_status_name(static_cast<ucm_status_t>(status));
}

enum class Stage : std::uint32_t {
    Copied = UCM_STAGE_COPIED,
    Persisted = UCM_STAGE_PERSISTED,
    Loaded = UCM_STAGE_LOADED,
    Released = UCM_STAGE_RELEASED,
    Enqueued = UCM_STAGE_ENQUEUED,
};

// Answer of a poll or a wait that did not fail.
enum class Progress { Pending, Done };

// A status that is not Ok, with the library's message.
class Error {
public:
    Error(Status status, std::string message) : status_(status), message_(std::move(message)) {}

    // The last failure on this thread.
    static Error last(ucm_status_t status) {
        return Error(static_cast<Status>(status), text([](char *buffer, std::size_t capacity) {
                         return ucm_last_error(buffer, capacity);
                     }));
    }

    Status status() const noexcept { return status_; }
    const std::string &message() const noexcept { return message_; }

    // Calls a function that copies text until all of it fits.
    template <typename Copy>
    static std::string text(Copy copy) {
        std::string text(255, '\0');
        for (;;) {
            const std::size_t length = copy(&text[0], text.size() + 1);
            const bool fits = length <= text.size();
            text.resize(length);
            if (fits) return text;
        }
    }

private:
    Status status_;
    std::string message_;
};

#if UCM_HPP_THROWS
// What Result::value() throws.
class Exception : public std::runtime_error {
public:
    explicit Exception(const Error &error)
        : std::runtime_error(std::string(name(error.status())) + ": " + error.message()),
          status_(error.status()) {}
    Status status() const noexcept { return status_; }

private:
    Status status_;
};
#endif

[[noreturn]] inline void raise(const Error &error) {
#if UCM_HPP_THROWS
    throw Exception(error);
#else
    static_cast<void>(error);
    std::abort();
#endif
}

// A value, or the reason why there is none.
template <typename T>
class [[nodiscard]] Result {
public:
    Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
    Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

    bool ok() const noexcept { return state_.index() == 0; }
    explicit operator bool() const noexcept { return ok(); }
    Status status() const noexcept { return ok() ? Status::Ok : error().status(); }

    // Only of a Result that is ok().
    T &operator*() & noexcept { return *std::get_if<0>(&state_); }
    const T &operator*() const & noexcept { return *std::get_if<0>(&state_); }
    T &&operator*() && noexcept { return std::move(*std::get_if<0>(&state_)); }
    T *operator->() noexcept { return std::get_if<0>(&state_); }
    const T *operator->() const noexcept { return std::get_if<0>(&state_); }

    // Only of a Result that is not ok().
    const Error &error() const noexcept { return *std::get_if<1>(&state_); }

    // The throwing layer.
    T &value() & {
        if (!ok()) raise(error());
        return **this;
    }
    T value() && {
        if (!ok()) raise(error());
        return std::move(*std::get_if<0>(&state_));
    }

private:
    std::variant<T, Error> state_;
};

template <>
class [[nodiscard]] Result<void> {
public:
    Result() = default;
    Result(Error error) : state_(std::move(error)) {}

    bool ok() const noexcept { return state_.index() == 0; }
    explicit operator bool() const noexcept { return ok(); }
    Status status() const noexcept { return ok() ? Status::Ok : error().status(); }
    const Error &error() const noexcept { return *std::get_if<1>(&state_); }
    void value() const {
        if (!ok()) raise(error());
    }

private:
    std::variant<std::monostate, Error> state_;
};

// From a status of the C API: nothing, or the last error of this thread.
inline Result<void> check(ucm_status_t status) {
    if (status == UCM_STATUS_OK) return {};
    return Error::last(status);
}

using BlockId = ucm_block_id_t;

// Block ids in containers: std::unordered_map<ucm::BlockId, T, ucm::BlockIdHash, ucm::BlockIdEqual>.
struct BlockIdEqual {
    bool operator()(const BlockId &a, const BlockId &b) const noexcept {
        return std::memcmp(a.bytes, b.bytes, sizeof a.bytes) == 0;
    }
};
struct BlockIdHash {
    std::size_t operator()(const BlockId &id) const noexcept {
        std::size_t hash; // ids are hashes: any of their bytes will do
        std::memcpy(&hash, id.bytes, sizeof hash);
        return hash;
    }
};

// Owns one handle of the C API.
template <typename Handle, void (*Free)(Handle *)>
class Owner {
public:
    Owner() noexcept = default;
    explicit Owner(Handle *handle) noexcept : handle_(handle) {}
    Owner(Owner &&other) noexcept : handle_(other.release()) {}
    Owner &operator=(Owner &&other) noexcept {
        if (this != &other) reset(other.release());
        return *this;
    }
    Owner(const Owner &) = delete;
    Owner &operator=(const Owner &) = delete;
    ~Owner() { reset(); }

    Handle *get() const noexcept { return handle_; }
    explicit operator bool() const noexcept { return handle_ != nullptr; }
    Handle *release() noexcept { return std::exchange(handle_, nullptr); }
    void reset(Handle *handle = nullptr) noexcept {
        Handle *old = std::exchange(handle_, handle);
        if (old != nullptr) Free(old);
    }

private:
    Handle *handle_ = nullptr;
};

// Options of a store: the keys of the YAML file.
class Options : public Owner<ucm_options_t, ucm_options_free> {
public:
    using Owner::Owner;

    static Result<Options> make() {
        ucm_options_t *raw = nullptr;
        const ucm_status_t status = ucm_options_new(&raw);
        return wrap(status, raw);
    }
    static Result<Options> from_yaml_file(const std::string &path) {
        ucm_options_t *raw = nullptr;
        const ucm_status_t status = ucm_options_from_yaml_file(path.c_str(), &raw);
        return wrap(status, raw);
    }
    static Result<Options> from_yaml(std::string_view text) {
        ucm_options_t *raw = nullptr;
        const char *data = text.data() != nullptr ? text.data() : "";
        const ucm_status_t status = ucm_options_from_yaml(data, text.size(), &raw);
        return wrap(status, raw);
    }

    Result<void> set(const std::string &key, const std::string &value) {
        return check(ucm_options_set(get(), key.c_str(), value.c_str()));
    }
    template <typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number>>>
    Result<void> set(const std::string &key, Number value) {
        return set(key, std::to_string(value));
    }

private:
    static Result<Options> wrap(ucm_status_t status, ucm_options_t *raw) {
        if (status != UCM_STATUS_OK) return Error::last(status);
        return Options(raw);
    }
};

// How long to wait: a duration, or for ever.
class Timeout {
public:
    template <typename Rep, typename Period>
    constexpr Timeout(std::chrono::duration<Rep, Period> duration)
        : milliseconds_(from(std::chrono::ceil<std::chrono::milliseconds>(duration).count())) {}
    static constexpr Timeout none() { return Timeout(); }
    constexpr std::int64_t milliseconds() const noexcept { return milliseconds_; }

private:
    constexpr Timeout() = default;
    // A time that is over already is 0, because the C API takes negative ones for "no limit".
    static constexpr std::int64_t from(std::int64_t count) { return count < 0 ? 0 : count; }
    std::int64_t milliseconds_ = -1;
};

// One submitted batch. Destroying it frees the handle; the work goes on, and so does its use of memory. The
// task of a hold lets go of its blocks then.
class Task : public Owner<ucm_task_t, ucm_task_free> {
public:
    using Owner::Owner;

    // Done: every entry has reached the stage. Pending: not yet. Else the first error.
    Result<Progress> poll(Stage stage) const {
        return answer(ucm_task_poll(get(), static_cast<std::uint32_t>(stage)));
    }
    // As poll; Pending: the wait's own time is over.
    Result<Progress> wait(Stage stage, Timeout timeout) const {
        return answer(ucm_task_wait(get(), static_cast<std::uint32_t>(stage), timeout.milliseconds()));
    }
    // Until the stage is reached, or the task fails (its own deadline at the latest).
    Result<void> wait(Stage stage) const {
        return check(ucm_task_wait(get(), static_cast<std::uint32_t>(stage), -1));
    }
    Result<void> stream_wait(void *stream) const { return check(ucm_task_stream_wait(get(), stream)); }

    // One status for each of the batch's entries; Pending while some are under way.
    Result<std::vector<Status>> statuses(std::size_t count) const {
        std::vector<ucm_status_t> raw(count);
        const ucm_status_t status = ucm_task_statuses(get(), raw.data(), count);
        if (status == UCM_STATUS_PENDING) return Error(Status::Pending, "entries are still under way");
        if (status != UCM_STATUS_OK) return Error::last(status);
        std::vector<Status> statuses;
        statuses.reserve(count);
        for (ucm_status_t number : raw) statuses.push_back(static_cast<Status>(number));
        return statuses;
    }
    std::string error() const {
        return Error::text([this](char *buffer, std::size_t capacity) {
            return ucm_task_error(get(), buffer, capacity);
        });
    }
    Result<void> cancel() { return check(ucm_task_cancel(get())); }

private:
    static Result<Progress> answer(ucm_status_t status) {
        if (status == UCM_STATUS_OK) return Progress::Done;
        if (status == UCM_STATUS_PENDING) return Progress::Pending;
        return Error::last(status);
    }
};

// What to save or to load. The runs are read during the call only.
struct Batch {
    Span<const BlockId> blocks;
    Span<const std::uint32_t> shards;  // empty: all 0
    Span<void *const> addresses;       // blocks.size() x slices per shard, row-major
    void *wait_event = nullptr;        // cudaEvent_t / aclrtEvent
    bool notify = false;               // queue for reap after the last stage
    bool notify_copied = false;        // also after COPIED
    std::uint64_t user_data = 0;
    std::chrono::milliseconds timeout{0}; // of the task; 0: the store's timeout_ms, < 0: none
};

using Completion = ucm_completion_t;

// An open store. Destroying it closes it, which waits for work in flight.
class Store : public Owner<ucm_store_t, ucm_store_close> {
public:
    using Owner::Owner;

    static Result<Store> open(const Options &options) {
        ucm_store_t *raw = nullptr;
        const ucm_status_t status = ucm_store_open(options.get(), &raw);
        if (status != UCM_STATUS_OK) return Error::last(status);
        return Store(raw);
    }

    // One byte for each block: 1 where it is present.
    Result<std::vector<std::uint8_t>> lookup(Span<const BlockId> blocks) const {
        std::vector<std::uint8_t> found(blocks.size());
        const ucm_status_t status = ucm_lookup(get(), blocks.data(), blocks.size(), found.data());
        if (status != UCM_STATUS_OK) return Error::last(status);
        return found;
    }
    // Blocks from the first on that are present.
    Result<std::size_t> lookup_prefix(Span<const BlockId> blocks) const {
        std::size_t hits = 0;
        const ucm_status_t status = ucm_lookup_prefix(get(), blocks.data(), blocks.size(), &hits);
        if (status != UCM_STATUS_OK) return Error::last(status);
        return hits;
    }
    Result<void> prefetch(Span<const BlockId> blocks) const {
        return check(ucm_prefetch(get(), blocks.data(), blocks.size()));
    }

    // Brings blocks into the Cache tier and keeps them there while the task lives: a load of them is a copy
    // from memory. Stage LOADED: all are held. `timeout`: of the reads; 0: the store's timeout_ms, < 0: none.
    Result<Task> hold(Span<const BlockId> blocks,
                      std::chrono::milliseconds timeout = std::chrono::milliseconds{0}) const {
        ucm_task_t *raw = nullptr;
        const ucm_status_t status = ucm_hold(get(), blocks.data(), blocks.size(), timeout.count(), &raw);
        if (status != UCM_STATUS_OK) return Error::last(status);
        return Task(raw);
    }

    // Tells everybody who waits for these blocks, under this promise or (0) any, that they will not come from here.
    Result<void> abandon(Span<const BlockId> blocks, std::uint64_t promise = 0) const {
        return check(ucm_abandon_promise(get(), blocks.data(), blocks.size(), promise));
    }
    // One byte for each block: 1 where a writer has abandoned it, under this promise or (0) any.
    Result<std::vector<std::uint8_t>> lookup_abandoned(Span<const BlockId> blocks,
                                                       std::uint64_t promise = 0) const {
        std::vector<std::uint8_t> found(blocks.size());
        const ucm_status_t status =
            ucm_lookup_abandoned_promise(get(), blocks.data(), blocks.size(), promise, found.data());
        if (status != UCM_STATUS_OK) return Error::last(status);
        return found;
    }

    Result<Task> save(const Batch &batch) const { return submit(ucm_save, batch); }
    Result<Task> load(const Batch &batch) const { return submit(ucm_load, batch); }

    Result<int> completion_fd() const {
        const int descriptor = ucm_store_completion_fd(get());
        if (descriptor < 0) return Error::last(status_of_failure());
        return descriptor;
    }
    // Fills the front of `completions`; returns how many. Their task handles are borrowed.
    Result<std::size_t> reap(Span<Completion> completions) const {
        std::size_t count = 0;
        const ucm_status_t status =
            ucm_store_reap(get(), completions.data(), completions.size(), &count);
        if (status != UCM_STATUS_OK) return Error::last(status);
        return count;
    }

    Result<void> refresh() const { return check(ucm_store_refresh(get(), 0)); }
    Result<void> refresh(Timeout timeout) const {
        // 0 would be the store's own timeout; the shortest that can be asked for is 1 ms.
        const std::int64_t limit = timeout.milliseconds() == 0 ? 1 : timeout.milliseconds();
        return check(ucm_store_refresh(get(), limit));
    }

    Result<void> register_memory(void *base, std::size_t length) const {
        return check(ucm_memory_register(get(), base, length));
    }
    Result<void> unregister_memory(void *base) const {
        return check(ucm_memory_unregister(get(), base));
    }

    // One id for each full block of `block_tokens` tokens.
    Result<std::vector<BlockId>> hash_tokens(Span<const std::uint32_t> tokens,
                                             std::uint32_t block_tokens,
                                             const BlockId *parent = nullptr,
                                             std::string_view extra = {}) const {
        std::vector<BlockId> ids(block_tokens == 0 ? 0 : tokens.size() / block_tokens);
        std::size_t written = 0;
        const ucm_status_t status =
            ucm_hash_tokens(get(), tokens.data(), tokens.size(), block_tokens, parent, extra.data(),
                            extra.size(), ids.data(), ids.size(), &written);
        if (status != UCM_STATUS_OK) return Error::last(status);
        ids.resize(written);
        return ids;
    }
    // The same with extra bytes of its own for each full block.
    Result<std::vector<BlockId>> hash_blocks(Span<const std::uint32_t> tokens,
                                             std::uint32_t block_tokens, const BlockId *parent,
                                             Span<const std::string_view> extras) const {
        std::vector<BlockId> ids(block_tokens == 0 ? 0 : tokens.size() / block_tokens);
        if (extras.size() != ids.size()) {
            return Error(Status::InvalidArgument, "there are " + std::to_string(extras.size()) +
                                                      " extras for " + std::to_string(ids.size()) +
                                                      " full blocks");
        }
        std::vector<const void *> pointers;
        std::vector<std::size_t> lengths;
        for (std::string_view extra : extras) {
            pointers.push_back(extra.data());
            lengths.push_back(extra.size());
        }
        std::size_t written = 0;
        const ucm_status_t status =
            ucm_hash_blocks(get(), tokens.data(), tokens.size(), block_tokens, parent,
                            pointers.data(), lengths.data(), ids.data(), ids.size(), &written);
        if (status != UCM_STATUS_OK) return Error::last(status);
        ids.resize(written);
        return ids;
    }

    Result<ucm_stats_t> stats() const {
        ucm_stats_t stats{};
        stats.struct_size = sizeof stats;
        const ucm_status_t status = ucm_store_stats(get(), &stats);
        if (status != UCM_STATUS_OK) return Error::last(status);
        return stats;
    }
    // Text in the format of Prometheus.
    Result<std::string> metrics() const {
        ucm_status_t status = UCM_STATUS_OK;
        std::string text = Error::text([&](char *buffer, std::size_t capacity) {
            std::size_t length = 0;
            status = ucm_store_metrics(get(), buffer, capacity, &length);
            return length;
        });
        if (status != UCM_STATUS_OK) return Error::last(status);
        return text;
    }

private:
    using Submit = ucm_status_t (*)(ucm_store_t *, const ucm_batch_t *, ucm_task_t **);

    Result<Task> submit(Submit function, const Batch &batch) const {
        if (!batch.shards.empty() && batch.shards.size() != batch.blocks.size()) {
            return Error(Status::InvalidArgument, "there are " + std::to_string(batch.shards.size()) +
                                                      " shards for " +
                                                      std::to_string(batch.blocks.size()) + " blocks");
        }
        if (!batch.blocks.empty() && batch.addresses.size() % batch.blocks.size() != 0) {
            return Error(Status::InvalidArgument,
                         "there are " + std::to_string(batch.addresses.size()) + " addresses for " +
                             std::to_string(batch.blocks.size()) +
                             " blocks, which is not a whole number of slices each");
        }
        ucm_batch_t raw{};
        raw.struct_size = sizeof raw;
        raw.blocks = batch.blocks.data();
        raw.shards = batch.shards.empty() ? nullptr : batch.shards.data();
        raw.addresses = batch.addresses.data();
        raw.count = batch.blocks.size();
        raw.wait_event = batch.wait_event;
        raw.flags = (batch.notify ? UCM_BATCH_NOTIFY : 0u) |
                    (batch.notify_copied ? UCM_BATCH_NOTIFY_COPIED : 0u);
        raw.user_data = batch.user_data;
        raw.timeout_ms = batch.timeout.count();
        ucm_task_t *task = nullptr;
        const ucm_status_t status = function(get(), &raw, &task);
        if (status != UCM_STATUS_OK) return Error::last(status);
        return Task(task);
    }

    // The status behind a -1, which only says that there is an error.
    ucm_status_t status_of_failure() const {
        std::uint8_t none = 0;
        const ucm_status_t status = ucm_lookup(get(), nullptr, 0, &none);
        return status == UCM_STATUS_OK ? UCM_STATUS_INTERNAL : status;
    }
};

} // inline namespace
} // namespace ucm

#endif // UCM_HPP
