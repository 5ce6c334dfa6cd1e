/* Goal: every function answers NULLs, wild numbers, misaligned pointers, impossible counts and short structs with
 * a status and a message that names the argument, and never crashes. */
#include "check.h"

#include <stdint.h>

#define HUGE_COUNT ((size_t)1 << 40)
#define INVALID(word, call) REFUSED(UCM_STATUS_INVALID_ARGUMENT, word, call)
#define CONFIG(word, call) REFUSED(UCM_STATUS_INVALID_CONFIG, word, call)

/* An address that no type but a byte may have. */
#define ODD(type) ((type *)(void *)(uintptr_t)0x10001)

static void options(void) {
    ucm_options_t *made = NULL;
    INVALID("options is NULL", ucm_options_new(NULL));
    INVALID("aligned", ucm_options_new(ODD(ucm_options_t *)));
    INVALID("path is NULL", ucm_options_from_yaml_file(NULL, &made));
    INVALID("options is NULL", ucm_options_from_yaml_file("/dev/null", NULL));
    REFUSED(UCM_STATUS_NOT_FOUND, "/no/such/file", ucm_options_from_yaml_file("/no/such/file", &made));
    CHECK(made == NULL);
    INVALID("text is NULL", ucm_options_from_yaml(NULL, 3, &made));
    INVALID("text is NULL", ucm_options_from_yaml(NULL, 0, &made));
    INVALID("text", ucm_options_from_yaml("a: 1", HUGE_COUNT, &made));
    INVALID("options is NULL", ucm_options_from_yaml("", 0, NULL));
    CONFIG("UTF-8", ucm_options_from_yaml("\xff\xfe", 2, &made));
    CONFIG("no_such_key", ucm_options_from_yaml("no_such_key: 1\n", 15, &made));
    CHECK(made == NULL);

    OK(ucm_options_new(&made));
    INVALID("key is NULL", ucm_options_set(made, NULL, "1"));
    INVALID("value is NULL", ucm_options_set(made, "io_depth", NULL));
    INVALID("key is empty", ucm_options_set(made, "", "1"));
    INVALID("UTF-8", ucm_options_set(made, "\xff", "1"));
    INVALID("NULL", ucm_options_set(NULL, "io_depth", "1"));
    INVALID("not a", ucm_options_set(ODD(ucm_options_t), "io_depth", "1"));
    CONFIG("io_depth", ucm_options_set(made, "io_dept", "1")); /* the nearest known key */
    CONFIG("io_depth", ucm_options_set(made, "io_depth", "many"));
    CONFIG("durability", ucm_options_set(made, "durability", "forever"));
    ucm_options_free(made);
    REFUSED(UCM_STATUS_CLOSED, "freed", ucm_options_set(made, "io_depth", "1"));
    ucm_options_free(made);
    ucm_options_free(NULL);
    ucm_options_free(ODD(ucm_options_t));
}

/* Geometry that contradicts itself does not open, and the message names the key. */
static void geometry(void) {
    static const char *const wrong[][3] = {
        {"shard_size", "3000", "shard_size"},              /* does not divide the block */
        {"shard_size", "2048", "shard_size"},              /* layer-wise, not a multiple of 4096 */
        {"tensor_size_list", "[4096, 4096]", "tensor_size"}, /* does not add up */
        {"part_index", "1", "part_index"},                 /* beyond part_count */
        {"parts_owned", "3", "part"},                      /* more than there are */
        {"segment_size_mb", "0", "segment_size_mb"},
        {"cache_buffer_capacity_gb", "1000000", "cache_buffer_capacity_gb"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i) {
        char text[512];
        ucm_options_t *options = test_options(BLOCK_BYTES);
        ucm_store_t *store = NULL;
        ucm_status_t status = ucm_options_set(options, wrong[i][0], wrong[i][1]);
        if (status == UCM_STATUS_OK) status = ucm_store_open(options, &store);
        if (status != UCM_STATUS_INVALID_CONFIG && status != UCM_STATUS_OUT_OF_MEMORY) {
            fprintf(stderr, "%s: %s was answered with %s\n", wrong[i][0], wrong[i][1], ucm_status_name(status));
            exit(1);
        }
        CHECK(store == NULL);
        ucm_last_error(text, sizeof text);
        CHECK(strstr(text, wrong[i][2]) != NULL);
        ucm_options_free(options);
    }
}

static void store_and_lookup(ucm_store_t *store) {
    const ucm_block_id_t block = test_block(1);
    ucm_options_t *good = test_options(BLOCK_BYTES);
    ucm_store_t *none = NULL;
    uint8_t found = 9;
    size_t number = 9;
    ucm_completion_t completion;
    ucm_task_t *task = NULL;
    INVALID("NULL", ucm_store_open(NULL, &none));
    INVALID("store is NULL", ucm_store_open(good, NULL));
    INVALID("aligned", ucm_store_open(good, ODD(ucm_store_t *)));
    INVALID("not a", ucm_store_open((const ucm_options_t *)store, &none));
    ucm_store_close(NULL);
    ucm_store_close(ODD(ucm_store_t));
    ucm_options_free(good);

    INVALID("NULL", ucm_lookup(NULL, &block, 1, &found));
    INVALID("not a", ucm_lookup(ODD(ucm_store_t), &block, 1, &found));
    INVALID("blocks is NULL", ucm_lookup(store, NULL, 1, &found));
    INVALID("found is NULL", ucm_lookup(store, &block, 1, NULL));
    INVALID("blocks", ucm_lookup(store, &block, HUGE_COUNT, &found));
    OK(ucm_lookup(store, NULL, 0, NULL));
    INVALID("blocks is NULL", ucm_lookup_prefix(store, NULL, 1, &number));
    CHECK(number == 0);
    INVALID("hits is NULL", ucm_lookup_prefix(store, &block, 1, NULL));
    INVALID("hits", ucm_lookup_prefix(store, &block, 1, ODD(size_t)));
    INVALID("blocks", ucm_lookup_prefix(store, &block, HUGE_COUNT, &number));
    number = 9;
    OK(ucm_lookup_prefix(store, NULL, 0, &number));
    CHECK(number == 0);
    INVALID("NULL", ucm_prefetch(NULL, &block, 1));
    INVALID("blocks is NULL", ucm_prefetch(store, NULL, 1));
    INVALID("blocks", ucm_prefetch(store, &block, HUGE_COUNT));
    OK(ucm_prefetch(store, NULL, 0));
    INVALID("NULL", ucm_hold(NULL, &block, 1, 0, &task));
    INVALID("blocks is NULL", ucm_hold(store, NULL, 1, 0, &task));
    INVALID("task is NULL", ucm_hold(store, &block, 1, 0, NULL));
    INVALID("task", ucm_hold(store, &block, 1, 0, ODD(ucm_task_t *)));
    INVALID("count is 0", ucm_hold(store, &block, 0, 0, &task));
    INVALID("count", ucm_hold(store, &block, HUGE_COUNT, 0, &task));
    CHECK(task == NULL);
    INVALID("NULL", ucm_abandon(NULL, &block, 1));
    INVALID("blocks is NULL", ucm_abandon(store, NULL, 1));
    INVALID("blocks", ucm_abandon(store, &block, HUGE_COUNT));
    OK(ucm_abandon(store, NULL, 0));
    INVALID("NULL", ucm_abandon_promise(NULL, &block, 1, 7));
    INVALID("blocks is NULL", ucm_abandon_promise(store, NULL, 1, 7));
    INVALID("blocks", ucm_abandon_promise(store, &block, HUGE_COUNT, 7));
    OK(ucm_abandon_promise(store, NULL, 0, 7));
    INVALID("NULL", ucm_lookup_abandoned(NULL, &block, 1, &found));
    INVALID("blocks is NULL", ucm_lookup_abandoned(store, NULL, 1, &found));
    INVALID("found is NULL", ucm_lookup_abandoned(store, &block, 1, NULL));
    INVALID("blocks", ucm_lookup_abandoned(store, &block, HUGE_COUNT, &found));
    INVALID("NULL", ucm_lookup_abandoned_promise(NULL, &block, 1, 7, &found));
    INVALID("blocks is NULL", ucm_lookup_abandoned_promise(store, NULL, 1, 7, &found));
    INVALID("found is NULL", ucm_lookup_abandoned_promise(store, &block, 1, 7, NULL));
    INVALID("blocks", ucm_lookup_abandoned_promise(store, &block, HUGE_COUNT, 7, &found));

    CHECK(ucm_store_completion_fd(NULL) == -1);
    CHECK(ucm_store_completion_fd(ODD(ucm_store_t)) == -1);
    INVALID("NULL", ucm_store_reap(NULL, &completion, 1, &number));
    INVALID("completions is NULL", ucm_store_reap(store, NULL, 1, &number));
    INVALID("completions", ucm_store_reap(store, ODD(ucm_completion_t), 1, &number));
    INVALID("count is NULL", ucm_store_reap(store, &completion, 1, NULL));
    INVALID("capacity", ucm_store_reap(store, &completion, HUGE_COUNT, &number));
    OK(ucm_store_reap(store, NULL, 0, &number));
    INVALID("NULL", ucm_store_refresh(NULL, 0));
    OK(ucm_store_refresh(store, INT64_MAX));
    OK(ucm_store_refresh(store, INT64_MIN));
}

static void batches(ucm_status_t (*submit)(ucm_store_t *, const ucm_batch_t *, ucm_task_t **), ucm_store_t *store) {
    const ucm_block_id_t block = test_block(1);
    const uint32_t wild_shard = 1;
    void *address = test_memory(BLOCK_BYTES);
    void *nowhere = NULL;
    ucm_task_t *task = (ucm_task_t *)store;
    const ucm_batch_t good = test_batch(&block, &address, 1);
    ucm_batch_t bad = good;

    INVALID("NULL", submit(NULL, &good, &task));
    CHECK(task == NULL);
    INVALID("not a", submit(ODD(ucm_store_t), &good, &task));
    INVALID("task is NULL", submit(store, &good, NULL));
    INVALID("task", submit(store, &good, ODD(ucm_task_t *)));
    INVALID("batch is NULL", submit(store, NULL, &task));
    INVALID("batch", submit(store, ODD(ucm_batch_t), &task));

    bad.struct_size = 0;
    INVALID("struct_size", submit(store, &bad, &task));
    bad.struct_size = 39;
    INVALID("struct_size", submit(store, &bad, &task));
    bad.struct_size = HUGE_COUNT;
    INVALID("struct_size", submit(store, &bad, &task));
    bad = good;
    bad.count = 0;
    INVALID("count is 0", submit(store, &bad, &task));
    bad.count = HUGE_COUNT;
    INVALID("count", submit(store, &bad, &task));
    bad.count = SIZE_MAX;
    INVALID("count", submit(store, &bad, &task));
    bad = good;
    bad.blocks = NULL;
    INVALID("blocks is NULL", submit(store, &bad, &task));
    bad = good;
    bad.addresses = NULL;
    INVALID("addresses is NULL", submit(store, &bad, &task));
    bad.addresses = ODD(void *);
    INVALID("addresses", submit(store, &bad, &task));
    bad.addresses = &nowhere;
    INVALID("addresses[0] is NULL", submit(store, &bad, &task));
    nowhere = (void *)(UINTPTR_MAX - 4096);
    INVALID("addresses[0]", submit(store, &bad, &task));
    bad = good;
    bad.shards = ODD(uint32_t);
    INVALID("shards", submit(store, &bad, &task));
    bad.shards = &wild_shard;
    INVALID("shard", submit(store, &bad, &task));
    bad = good;
    bad.flags = 4;
    INVALID("flags", submit(store, &bad, &task));
    bad.flags = UINT32_MAX;
    INVALID("flags", submit(store, &bad, &task));
    CHECK(task == NULL);
    free(address);
}

static void tasks(ucm_store_t *store) {
    const ucm_block_id_t block = test_block(2);
    unsigned char *memory = test_memory(BLOCK_BYTES);
    void *address = memory;
    ucm_batch_t batch = test_batch(&block, &address, 1);
    ucm_task_t *save = NULL, *load = NULL;
    ucm_status_t statuses[2];
    char text[64];

    INVALID("NULL", ucm_task_poll(NULL, UCM_STAGE_LOADED));
    INVALID("not a", ucm_task_poll(ODD(ucm_task_t), UCM_STAGE_LOADED));
    INVALID("not a", ucm_task_poll((ucm_task_t *)store, UCM_STAGE_LOADED));
    INVALID("NULL", ucm_task_wait(NULL, UCM_STAGE_LOADED, 0));
    INVALID("NULL", ucm_task_stream_wait(NULL, NULL));
    INVALID("NULL", ucm_task_statuses(NULL, statuses, 1));
    INVALID("NULL", ucm_task_cancel(NULL));
    CHECK(ucm_task_error(NULL, text, sizeof text) > 0);
    CHECK(strstr(text, "NULL") != NULL);
    CHECK(ucm_task_error(ODD(ucm_task_t), NULL, 0) > 0);
    ucm_task_free(NULL);
    ucm_task_free(ODD(ucm_task_t));
    ucm_task_free((ucm_task_t *)store);

    fill(memory, BLOCK_BYTES, 2);
    batch.timeout_ms = INT64_MAX;
    OK(ucm_save(store, &batch, &save));
    OK(ucm_task_wait(save, UCM_STAGE_PERSISTED, INT64_MAX));
    batch.timeout_ms = INT64_MIN;
    OK(ucm_load(store, &batch, &load));
    OK(ucm_task_wait(load, UCM_STAGE_LOADED, INT64_MIN));
    for (uint32_t stage = 0; stage < 2; ++stage) {
        const uint32_t wild = stage == 0 ? 0 : 6 + (uint32_t)UINT16_MAX;
        INVALID("stage", ucm_task_poll(save, wild));
        INVALID("stage", ucm_task_wait(save, wild, 0));
    }
    INVALID("stage", ucm_task_wait(save, UCM_STAGE_LOADED, -1));
    INVALID("stage", ucm_task_wait(load, UCM_STAGE_COPIED, -1));
    INVALID("stage", ucm_task_poll(load, UCM_STAGE_PERSISTED));
    OK(ucm_task_poll(save, UCM_STAGE_ENQUEUED));
    OK(ucm_task_poll(load, UCM_STAGE_ENQUEUED));
    OK(ucm_task_stream_wait(save, NULL));
    OK(ucm_task_stream_wait(load, NULL));
    INVALID("statuses is NULL", ucm_task_statuses(load, NULL, 1));
    INVALID("statuses", ucm_task_statuses(load, ODD(ucm_status_t), 1));
    INVALID("count", ucm_task_statuses(load, statuses, 2));
    INVALID("count", ucm_task_statuses(load, statuses, 0));
    INVALID("count", ucm_task_statuses(load, statuses, HUGE_COUNT));
    CHECK(ucm_task_error(load, text, sizeof text) == 0 && text[0] == 0);
    OK(ucm_task_cancel(load));
    OK(ucm_task_wait(save, UCM_STAGE_RELEASED, -1));
    OK(ucm_task_wait(load, UCM_STAGE_RELEASED, -1));
    ucm_task_free(save);
    ucm_task_free(load);
    free(memory);
}

static void memory(ucm_store_t *store) {
    unsigned char *region = test_memory(4 * 4096);
    INVALID("NULL", ucm_memory_register(NULL, region, 4096));
    INVALID("base is NULL", ucm_memory_register(store, NULL, 4096));
    INVALID("length", ucm_memory_register(store, region, 0));
    INVALID("length", ucm_memory_register(store, region, SIZE_MAX));
    EXPECT(UCM_STATUS_INVALID_ARGUMENT, ucm_memory_register(store, region + 1, 4096));
    EXPECT(UCM_STATUS_INVALID_ARGUMENT, ucm_memory_register(store, region, 4097));
    INVALID("base is NULL", ucm_memory_unregister(store, NULL));
    INVALID("NULL", ucm_memory_unregister(NULL, region));
    EXPECT(UCM_STATUS_INVALID_ARGUMENT, ucm_memory_unregister(store, region));
    OK(ucm_memory_register(store, region, 2 * 4096));
    EXPECT(UCM_STATUS_INVALID_ARGUMENT, ucm_memory_register(store, region, 4096));
    EXPECT(UCM_STATUS_INVALID_ARGUMENT, ucm_memory_register(store, region + 4096, 2 * 4096));
    EXPECT(UCM_STATUS_INVALID_ARGUMENT, ucm_memory_unregister(store, region + 4096));
    OK(ucm_memory_unregister(store, region));
    free(region);
}

static void hashes(ucm_store_t *store) {
    const uint32_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    const void *const extras[2] = {"a", NULL};
    const size_t lengths[2] = {1, 0}, huge[2] = {HUGE_COUNT, 0}, one[2] = {1, 1};
    ucm_block_id_t ids[2], again[2];
    size_t written = 9;
    INVALID("NULL", ucm_hash_tokens(NULL, tokens, 8, 4, NULL, NULL, 0, ids, 2, &written));
    CHECK(written == 0);
    INVALID("tokens is NULL", ucm_hash_tokens(store, NULL, 8, 4, NULL, NULL, 0, ids, 2, &written));
    INVALID("tokens", ucm_hash_tokens(store, ODD(uint32_t), 8, 4, NULL, NULL, 0, ids, 2, &written));
    INVALID("block_tokens", ucm_hash_tokens(store, tokens, 8, 0, NULL, NULL, 0, ids, 2, &written));
    INVALID("extra is NULL", ucm_hash_tokens(store, tokens, 8, 4, NULL, NULL, 1, ids, 2, &written));
    INVALID("extra", ucm_hash_tokens(store, tokens, 8, 4, NULL, "x", HUGE_COUNT, ids, 2, &written));
    INVALID("ids is NULL", ucm_hash_tokens(store, tokens, 8, 4, NULL, NULL, 0, NULL, 2, &written));
    INVALID("capacity", ucm_hash_tokens(store, tokens, 8, 4, NULL, NULL, 0, ids, 1, &written));
    INVALID("written is NULL", ucm_hash_tokens(store, tokens, 8, 4, NULL, NULL, 0, ids, 2, NULL));
    INVALID("tokens", ucm_hash_tokens(store, tokens, HUGE_COUNT, 1u << 31, NULL, NULL, 0, ids, HUGE_COUNT, &written));
    OK(ucm_hash_tokens(store, NULL, 0, 4, NULL, NULL, 0, NULL, 0, &written));
    CHECK(written == 0);
    OK(ucm_hash_tokens(store, tokens, 7, 4, NULL, NULL, 0, ids, 2, &written));
    CHECK(written == 1);

    INVALID("NULL", ucm_hash_blocks(NULL, tokens, 8, 4, NULL, extras, lengths, ids, 2, &written));
    INVALID("block_tokens", ucm_hash_blocks(store, tokens, 8, 0, NULL, extras, lengths, ids, 2, &written));
    INVALID("extras is NULL", ucm_hash_blocks(store, tokens, 8, 4, NULL, NULL, lengths, ids, 2, &written));
    INVALID("extra_lengths is NULL", ucm_hash_blocks(store, tokens, 8, 4, NULL, extras, NULL, ids, 2, &written));
    INVALID("extras", ucm_hash_blocks(store, tokens, 8, 4, NULL, extras, huge, ids, 2, &written));
    INVALID("extras is NULL", ucm_hash_blocks(store, tokens, 8, 4, NULL, extras, one, ids, 2, &written));
    INVALID("capacity", ucm_hash_blocks(store, tokens, 8, 4, NULL, extras, lengths, ids, 1, &written));
    INVALID("written is NULL", ucm_hash_blocks(store, tokens, 8, 4, NULL, extras, lengths, ids, 2, NULL));

    /* One block after the other, in place, is the same chain as all at once. */
    OK(ucm_hash_blocks(store, tokens, 8, 4, NULL, extras, lengths, ids, 2, &written));
    CHECK(written == 2);
    OK(ucm_hash_tokens(store, tokens, 4, 4, NULL, "a", 1, again, 1, &written));
    CHECK(memcmp(ids, again, sizeof *ids) == 0);
    OK(ucm_hash_tokens(store, tokens + 4, 4, 4, again, NULL, 0, again, 1, &written));
    CHECK(memcmp(ids + 1, again, sizeof *ids) == 0);
}

static void numbers(ucm_store_t *store) {
    struct { ucm_stats_t stats; uint64_t later[4]; } newer;
    ucm_stats_t stats;
    char text[16];
    size_t length = 9;
    memset(&stats, 0, sizeof stats);
    INVALID("struct_size", ucm_store_stats(store, &stats));
    stats.struct_size = HUGE_COUNT;
    INVALID("struct_size", ucm_store_stats(store, &stats));
    stats.struct_size = sizeof stats;
    INVALID("stats is NULL", ucm_store_stats(store, NULL));
    INVALID("stats", ucm_store_stats(store, ODD(ucm_stats_t)));
    INVALID("NULL", ucm_store_stats(NULL, &stats));
    OK(ucm_store_stats(store, &stats));
    CHECK(stats.struct_size == sizeof stats);

    /* A program with an older header: nothing behind its struct is written. With a newer one: zeros. */
    memset(&stats, 0x77, sizeof stats);
    stats.struct_size = 16;
    OK(ucm_store_stats(store, &stats));
    CHECK(stats.lookup_hits == 0x7777777777777777u && stats.lookups != 0x7777777777777777u);
    memset(&newer, 0x77, sizeof newer);
    newer.stats.struct_size = sizeof newer;
    OK(ucm_store_stats(store, &newer.stats));
    CHECK(newer.later[0] == 0 && newer.later[3] == 0);

    INVALID("length is NULL", ucm_store_metrics(store, text, sizeof text, NULL));
    INVALID("length", ucm_store_metrics(store, text, sizeof text, ODD(size_t)));
    INVALID("buffer is NULL", ucm_store_metrics(store, NULL, 1, &length));
    INVALID("NULL", ucm_store_metrics(NULL, text, sizeof text, &length));
    CHECK(length == 0);
    OK(ucm_store_metrics(store, NULL, 0, &length));
    CHECK(length > 0);
    memset(text, 0x77, sizeof text);
    OK(ucm_store_metrics(store, text, 4, &length));
    CHECK(strlen(text) == 3 && text[4] == 0x77);
}

static void shout(void *context, uint32_t level, const char *message) {
    (void)context, (void)level, (void)message;
}

int main(void) {
    char text[4] = "...";
    ucm_store_t *store;
    CHECK(ucm_last_error(NULL, 0) == 0 && ucm_last_error(text, sizeof text) == 0 && text[0] == 0);
    INVALID("level", ucm_log_callback(shout, NULL, 5));
    INVALID("level", ucm_log_callback(NULL, NULL, UINT32_MAX));
    OK(ucm_log_callback(NULL, NULL, UCM_LOG_ERROR));
    CHECK(ucm_last_error(text, 1) > 0 && text[0] == 0);
    options();
    geometry();
    store = test_store(BLOCK_BYTES);
    store_and_lookup(store);
    batches(ucm_save, store);
    batches(ucm_load, store);
    tasks(store);
    memory(store);
    hashes(store);
    numbers(store);
    ucm_store_close(store);
    return passed();
}
