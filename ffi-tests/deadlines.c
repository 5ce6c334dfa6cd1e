/* Goal: a task whose deadline passes ends with TIMEOUT, a cancelled one with CANCELLED, both reach RELEASED, the
 * wait's own time is PENDING, and the block can be saved anew afterwards. A part of which one shard never comes is
 * what does not end by itself. */
#include "check.h"

/* Submits one layer of a block. */
static ucm_task_t *save_layer(ucm_store_t *store, unsigned number, uint32_t layer, void *memory, int64_t timeout_ms) {
    const ucm_block_id_t block = test_block(number);
    ucm_batch_t batch = test_batch(&block, &memory, 1);
    ucm_task_t *task = NULL;
    batch.shards = &layer;
    batch.timeout_ms = timeout_ms;
    OK(ucm_save(store, &batch, &task));
    return task;
}

static void ends_with(ucm_task_t *task, ucm_status_t expected) {
    ucm_status_t status = UCM_STATUS_OK;
    char text[256];
    EXPECT(expected, ucm_task_wait(task, UCM_STAGE_PERSISTED, -1));
    EXPECT(expected, ucm_task_poll(task, UCM_STAGE_PERSISTED));
    OK(ucm_task_statuses(task, &status, 1));
    CHECK(status == expected);
    CHECK(ucm_task_error(task, text, sizeof text) > 0);
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    EXPECT(expected, ucm_task_poll(task, UCM_STAGE_PERSISTED));
    OK(ucm_task_cancel(task)); /* of a finished task: nothing */
    EXPECT(expected, ucm_task_poll(task, UCM_STAGE_PERSISTED));
    ucm_task_free(task);
}

int main(void) {
    ucm_store_t *store = test_store(SHARD_BYTES), *whole = test_store(BLOCK_BYTES);
    unsigned char *memory = test_memory(BLOCK_BYTES);
    ucm_status_t status;
    uint8_t found[2] = {9, 9};
    const ucm_block_id_t blocks[2] = {test_block(1), test_block(2)};
    ucm_task_t *task;
    fill(memory, BLOCK_BYTES, 1);

    task = save_layer(store, 1, 0, memory, 100);
    EXPECT(UCM_STATUS_PENDING, ucm_task_statuses(task, &status, 1));
    ends_with(task, UCM_STATUS_TIMEOUT);

    task = save_layer(store, 2, 3, memory, -1);
    OK(ucm_task_wait(task, UCM_STAGE_COPIED, 30000));
    EXPECT(UCM_STATUS_PENDING, ucm_task_wait(task, UCM_STAGE_PERSISTED, 50));
    OK(ucm_task_cancel(task));
    ends_with(task, UCM_STATUS_CANCELLED);

    OK(ucm_store_refresh(whole, 0));
    OK(ucm_lookup(whole, blocks, 2, found));
    CHECK(found[0] == 0 && found[1] == 0);

    /* What was given up can be saved, layer by layer or whole, and is the right bytes. */
    for (uint32_t layer = 0; layer < LAYERS; ++layer) {
        ucm_task_t *again = save_layer(store, 1, layer, memory + layer * SHARD_BYTES, 0);
        if (layer + 1 == LAYERS) OK(ucm_task_wait(again, UCM_STAGE_PERSISTED, 30000));
        OK(ucm_task_wait(again, UCM_STAGE_RELEASED, 30000));
        ucm_task_free(again);
    }
    OK(ucm_store_refresh(whole, 0));
    OK(load_block(whole, 1));
    save_block(whole, 2);
    OK(load_block(whole, 2));
    ucm_store_close(store);
    ucm_store_close(whole);
    free(memory);
    return passed();
}
