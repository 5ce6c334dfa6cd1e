/* Goal: what is saved, whole or layer by layer, is found and loaded byte for byte, also by another store; a batch
 * with missing blocks loads the others; stages come as they are described. */
#include "check.h"

static void missing_blocks_do_not_keep_the_others(ucm_store_t *store) {
    ucm_block_id_t blocks[3];
    void *addresses[3];
    ucm_status_t statuses[3];
    uint8_t found[3] = {9, 9, 9};
    size_t hits = 9;
    char text[256];
    ucm_task_t *task = NULL;
    ucm_batch_t batch;
    blocks[0] = test_block(1);
    blocks[1] = test_block(1000);
    blocks[2] = test_block(2);
    for (int i = 0; i < 3; ++i) addresses[i] = test_memory(BLOCK_BYTES);
    OK(ucm_lookup(store, blocks, 3, found));
    CHECK(found[0] == 1 && found[1] == 0 && found[2] == 1);
    OK(ucm_lookup_prefix(store, blocks, 3, &hits));
    CHECK(hits == 1);
    OK(ucm_prefetch(store, blocks, 3));

    batch = test_batch(blocks, addresses, 3);
    OK(ucm_load(store, &batch, &task));
    EXPECT(UCM_STATUS_NOT_FOUND, ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    EXPECT(UCM_STATUS_NOT_FOUND, ucm_task_poll(task, UCM_STAGE_LOADED));
    EXPECT(UCM_STATUS_NOT_FOUND, ucm_task_stream_wait(task, NULL));
    OK(ucm_task_statuses(task, statuses, 3));
    CHECK(statuses[0] == UCM_STATUS_OK && statuses[1] == UCM_STATUS_NOT_FOUND && statuses[2] == UCM_STATUS_OK);
    CHECK(holds((unsigned char *)addresses[0], BLOCK_BYTES, 1));
    CHECK(holds((unsigned char *)addresses[2], BLOCK_BYTES, 2));
    CHECK(ucm_task_error(task, text, sizeof text) > 0);
    ucm_task_free(task);
    for (int i = 0; i < 3; ++i) free(addresses[i]);
}

/* The layers of a block in any order, each in a task of its own: published when the last is in. */
static void layers_in_any_order(void) {
    static const uint32_t order[LAYERS] = {2, 0, 3, 1};
    ucm_store_t *layerwise = test_store(SHARD_BYTES), *whole = test_store(BLOCK_BYTES);
    unsigned char *memory = test_memory(BLOCK_BYTES), *back = test_memory(BLOCK_BYTES);
    const ucm_block_id_t block = test_block(30);
    ucm_task_t *tasks[LAYERS];
    uint8_t found = 9;
    fill(memory, BLOCK_BYTES, 30);
    for (int i = 0; i < LAYERS; ++i) {
        void *address = memory + order[i] * SHARD_BYTES;
        ucm_batch_t batch = test_batch(&block, &address, 1);
        batch.shards = &order[i];
        OK(ucm_save(layerwise, &batch, &tasks[i]));
        OK(ucm_task_wait(tasks[i], UCM_STAGE_COPIED, 30000));
        if (i + 1 < LAYERS) {
            EXPECT(UCM_STATUS_PENDING, ucm_task_wait(tasks[i], UCM_STAGE_PERSISTED, 20));
            EXPECT(UCM_STATUS_PENDING, ucm_task_poll(tasks[0], UCM_STAGE_PERSISTED));
            OK(ucm_store_refresh(whole, 0));
            OK(ucm_lookup(whole, &block, 1, &found));
            CHECK(found == 0);
        }
    }
    for (int i = 0; i < LAYERS; ++i) {
        OK(ucm_task_wait(tasks[i], UCM_STAGE_PERSISTED, 30000));
        OK(ucm_task_wait(tasks[i], UCM_STAGE_RELEASED, 30000));
        ucm_task_free(tasks[i]);
    }
    OK(ucm_store_refresh(whole, 0));
    OK(ucm_lookup(whole, &block, 1, &found));
    CHECK(found == 1);
    OK(load_block(whole, 30));

    /* And what was saved whole, layer by layer, by another store. */
    save_block(whole, 31);
    OK(ucm_store_refresh(layerwise, 0));
    for (uint32_t layer = 0; layer < LAYERS; ++layer) {
        const ucm_block_id_t other = test_block(31);
        void *address = back + layer * SHARD_BYTES;
        ucm_batch_t batch = test_batch(&other, &address, 1);
        ucm_task_t *task = NULL;
        batch.shards = &layer;
        OK(ucm_load(layerwise, &batch, &task));
        OK(ucm_task_stream_wait(task, NULL));
        OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
        ucm_task_free(task);
    }
    CHECK(holds(back, BLOCK_BYTES, 31));
    ucm_store_close(layerwise);
    ucm_store_close(whole);
    free(memory);
    free(back);
}

/* Aligned memory that was registered may be read and written by the drive itself. */
static void registered_memory(ucm_store_t *store) {
    const ucm_block_id_t block = test_block(40);
    unsigned char *memory = test_memory(2 * BLOCK_BYTES);
    void *address = memory;
    ucm_batch_t batch = test_batch(&block, &address, 1);
    ucm_task_t *task = NULL;
    OK(ucm_memory_register(store, memory, 2 * BLOCK_BYTES));
    fill(memory, BLOCK_BYTES, 40);
    OK(ucm_save(store, &batch, &task));
    OK(ucm_task_wait(task, UCM_STAGE_PERSISTED, 30000));
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    ucm_task_free(task);
    address = memory + BLOCK_BYTES;
    OK(ucm_load(store, &batch, &task));
    OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    ucm_task_free(task);
    CHECK(holds(memory + BLOCK_BYTES, BLOCK_BYTES, 40));
    OK(ucm_memory_unregister(store, memory));
    free(memory);
}

/* Host memory need not be aligned, registered or not: what is not goes through the arena. */
static void unaligned_memory(ucm_store_t *store) {
    const ucm_block_id_t block = test_block(41);
    unsigned char *memory = test_memory(4 * BLOCK_BYTES);
    OK(ucm_memory_register(store, memory, 4 * BLOCK_BYTES));
    for (int way = 0; way < 2; ++way) {
        void *address = memory + 1 + 2 * BLOCK_BYTES * (size_t)way;
        ucm_batch_t batch = test_batch(&block, &address, 1);
        ucm_task_t *task = NULL;
        if (way == 0) fill((unsigned char *)address, BLOCK_BYTES, 41);
        OK((way == 0 ? ucm_save : ucm_load)(store, &batch, &task));
        OK(ucm_task_wait(task, way == 0 ? UCM_STAGE_PERSISTED : UCM_STAGE_LOADED, 30000));
        OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
        CHECK(holds((unsigned char *)address, BLOCK_BYTES, 41));
        ucm_task_free(task);
    }
    OK(ucm_memory_unregister(store, memory));
    free(memory);
}

/* A block that is given up is told to readers, who need not wait for it; other blocks are not touched. Given up under
   one promise, it is waited for under another. */
static void abandoned(ucm_store_t *writer, ucm_store_t *reader) {
    const ucm_block_id_t blocks[2] = {test_block(50), test_block(1)}, again = test_block(51);
    uint8_t found[2] = {9, 9};
    OK(ucm_lookup_abandoned(reader, blocks, 2, found));
    CHECK(found[0] == 0 && found[1] == 0);
    OK(ucm_abandon(writer, blocks, 1));
    for (int i = 0; i < 300 && found[0] == 0; ++i) {
        OK(ucm_store_refresh(reader, 0));
        OK(ucm_lookup_abandoned(reader, blocks, 2, found));
    }
    CHECK(found[0] == 1 && found[1] == 0);
    OK(ucm_lookup(reader, blocks, 2, found));
    CHECK(found[0] == 0 && found[1] == 1);
    OK(ucm_abandon_promise(writer, &again, 1, UINT64_MAX));
    for (int i = 0; i < 300 && found[0] == 0; ++i) {
        OK(ucm_store_refresh(reader, 0));
        OK(ucm_lookup_abandoned_promise(reader, &again, 1, UINT64_MAX, found));
    }
    CHECK(found[0] == 1);
    OK(ucm_lookup_abandoned(reader, &again, 1, found));
    CHECK(found[0] == 1);
    OK(ucm_lookup_abandoned_promise(reader, &again, 1, 1, found));
    CHECK(found[0] == 0);
}

/* A program that was compiled when the struct ended after count: the rest counts as 0. */
static void a_shorter_batch(ucm_store_t *store) {
    const ucm_block_id_t block = test_block(1);
    void *address = test_memory(BLOCK_BYTES);
    ucm_batch_t batch = test_batch(&block, &address, 1);
    ucm_task_t *task = NULL;
    memset((unsigned char *)&batch + offsetof(ucm_batch_t, wait_event), 0x77,
           sizeof batch - offsetof(ucm_batch_t, wait_event));
    batch.struct_size = offsetof(ucm_batch_t, wait_event);
    OK(ucm_load(store, &batch, &task));
    OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    CHECK(holds((unsigned char *)address, BLOCK_BYTES, 1));
    ucm_task_free(task);
    free(address);
}

int main(void) {
    ucm_store_t *store = test_store(BLOCK_BYTES), *reader;
    ucm_stats_t stats;
    for (unsigned number = 1; number <= 4; ++number) save_block(store, number);
    save_block(store, 1); /* present already */
    OK(load_block(store, 1));
    EXPECT(UCM_STATUS_NOT_FOUND, load_block(store, 1000));

    reader = test_store(BLOCK_BYTES);
    for (unsigned number = 1; number <= 4; ++number) OK(load_block(reader, number));
    missing_blocks_do_not_keep_the_others(reader);
    missing_blocks_do_not_keep_the_others(store);
    a_shorter_batch(reader);
    registered_memory(store);
    unaligned_memory(store);
    abandoned(store, reader);
    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    /* 4 blocks, two of three in a batch with a missing one, one in a shorter batch: all counted when they ended. */
    OK(ucm_store_stats(reader, &stats));
    CHECK(stats.loads_ok == 7 && stats.loads_failed == 1 && stats.load_bytes == 7 * BLOCK_BYTES);
    CHECK(stats.tasks == 0 && stats.running == 0 && stats.backends == 1);
    ucm_store_close(reader);
    ucm_store_close(store);
    layers_in_any_order();

    store = test_store(BLOCK_BYTES);
    OK(load_block(store, 4));
    ucm_store_close(store);
    return passed();
}
