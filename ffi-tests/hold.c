/* Goal: held blocks are there until the task is freed: while it lives no other load pushes them out, and a load of
 * them succeeds; each entry has its status; what does not fit is BUSY; the stages are those of a load; freeing at
 * any time and closing with holds are harmless. */
#include "check.h"

#define BLOCKS 80

static void hold_blocks(ucm_store_t *store, unsigned first, size_t count, ucm_task_t **task) {
    ucm_block_id_t blocks[BLOCKS];
    for (size_t i = 0; i < count; ++i) blocks[i] = test_block(first + (unsigned)i);
    OK(ucm_hold(store, blocks, count, 0, task));
    memset(blocks, 0x77, sizeof blocks); /* copied before the call returned */
}

/* Loads a block; returns how many loads had to read storage for it. */
static uint64_t misses_of(ucm_store_t *store, unsigned number) {
    ucm_stats_t before, after;
    before.struct_size = after.struct_size = sizeof before;
    OK(ucm_store_stats(store, &before));
    OK(load_block(store, number));
    OK(ucm_store_stats(store, &after));
    return after.cache_misses - before.cache_misses;
}

static void stages_and_statuses(ucm_store_t *store) {
    ucm_block_id_t blocks[3];
    ucm_status_t statuses[3];
    ucm_task_t *task = NULL;
    blocks[0] = test_block(1);
    blocks[1] = test_block(9999);
    blocks[2] = test_block(2);
    OK(ucm_hold(store, blocks, 3, -1, &task));
    EXPECT(UCM_STATUS_NOT_FOUND, ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    OK(ucm_task_statuses(task, statuses, 3));
    CHECK(statuses[0] == UCM_STATUS_OK && statuses[1] == UCM_STATUS_NOT_FOUND && statuses[2] == UCM_STATUS_OK);
    REFUSED(UCM_STATUS_INVALID_ARGUMENT, "hold", ucm_task_wait(task, UCM_STAGE_PERSISTED, 0));
    EXPECT(UCM_STATUS_NOT_FOUND, ucm_task_wait(task, UCM_STAGE_LOADED, 0));
    OK(ucm_task_cancel(task)); /* lets go of nothing that is held */
    ucm_task_free(task);
    OK(ucm_hold(store, blocks, 1, 0, &task));
    OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    REFUSED(UCM_STATUS_INVALID_ARGUMENT, "hold", ucm_task_stream_wait(task, NULL));
    ucm_task_free(task);
    EXPECT(UCM_STATUS_CLOSED, ucm_task_poll(task, UCM_STAGE_LOADED));
}

static void held_until_freed(ucm_store_t *store) {
    ucm_task_t *task = NULL;
    hold_blocks(store, 1, 5, &task);
    OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    for (unsigned number = 6; number < BLOCKS; ++number) OK(load_block(store, number));
    for (unsigned number = 1; number <= 5; ++number) CHECK(misses_of(store, number) == 0);
    ucm_task_free(task);
    for (unsigned number = 6; number < BLOCKS; ++number) OK(load_block(store, number));
    CHECK(misses_of(store, 1) == 1);
}

static void half_of_the_slots(ucm_store_t *store) {
    ucm_status_t statuses[BLOCKS];
    ucm_task_t *task = NULL;
    ucm_stats_t stats;
    size_t held = 0, busy = 0;
    stats.struct_size = sizeof stats;
    OK(ucm_store_stats(store, &stats));
    CHECK(stats.slots < BLOCKS);
    hold_blocks(store, 0, BLOCKS, &task);
    EXPECT(UCM_STATUS_BUSY, ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    OK(ucm_task_statuses(task, statuses, BLOCKS));
    for (int i = 0; i < BLOCKS; ++i) {
        held += statuses[i] == UCM_STATUS_OK;
        busy += statuses[i] == UCM_STATUS_BUSY;
    }
    CHECK(held == stats.slots / 2 && held + busy == BLOCKS);
    for (unsigned number = 0; number < BLOCKS; ++number) OK(load_block(store, number));
    ucm_task_free(task);
    hold_blocks(store, BLOCKS - 10, 10, &task);
    OK(ucm_task_wait(task, UCM_STAGE_LOADED, 30000));
    ucm_task_free(task);
}

int main(void) {
    ucm_store_t *writer = test_store(BLOCK_BYTES), *store;
    ucm_task_t *task = NULL;
    for (unsigned number = 0; number < BLOCKS; ++number) save_block(writer, number);
    ucm_store_close(writer);
    store = test_store(BLOCK_BYTES);
    stages_and_statuses(store);
    held_until_freed(store);
    half_of_the_slots(store);
    for (int i = 0; i < 20; ++i) { /* freed while it reads */
        hold_blocks(store, (unsigned)(3 * i), 7, &task);
        ucm_task_free(task);
    }
    hold_blocks(store, 20, 7, &task);
    ucm_store_close(store);
    EXPECT(UCM_STATUS_CLOSED, ucm_task_wait(task, UCM_STAGE_LOADED, 0));
    ucm_task_free(task);
    return passed();
}
