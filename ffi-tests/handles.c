/* Goal: handles that were closed or freed answer CLOSED for ever, tasks outlive their store as CLOSED, and a handle
 * may be freed at any time and twice. */
#include "check.h"

#define GONE(call) REFUSED(UCM_STATUS_CLOSED, "close", call)

static void every_store_function_answers_closed(ucm_store_t *store) {
    const ucm_block_id_t block = test_block(1);
    const uint32_t tokens[4] = {1, 2, 3, 4};
    const void *extra = NULL;
    void *memory = test_memory(BLOCK_BYTES);
    ucm_batch_t batch = test_batch(&block, &memory, 1);
    ucm_task_t *task = NULL;
    ucm_completion_t completion;
    ucm_block_id_t id;
    ucm_stats_t stats;
    uint8_t found;
    size_t number, zero = 0;
    char text[8];
    stats.struct_size = sizeof stats;
    GONE(ucm_lookup(store, &block, 1, &found));
    GONE(ucm_lookup_prefix(store, &block, 1, &number));
    GONE(ucm_prefetch(store, &block, 1));
    GONE(ucm_hold(store, &block, 1, 0, &task));
    GONE(ucm_abandon(store, &block, 1));
    GONE(ucm_abandon_promise(store, &block, 1, 7));
    GONE(ucm_lookup_abandoned(store, &block, 1, &found));
    GONE(ucm_lookup_abandoned_promise(store, &block, 1, 7, &found));
    GONE(ucm_save(store, &batch, &task));
    GONE(ucm_load(store, &batch, &task));
    CHECK(ucm_store_completion_fd(store) == -1);
    GONE(ucm_store_reap(store, &completion, 1, &number));
    GONE(ucm_store_refresh(store, 0));
    GONE(ucm_memory_register(store, memory, 4096));
    GONE(ucm_memory_unregister(store, memory));
    GONE(ucm_hash_tokens(store, tokens, 4, 4, NULL, NULL, 0, &id, 1, &number));
    GONE(ucm_hash_blocks(store, tokens, 4, 4, NULL, &extra, &zero, &id, 1, &number));
    GONE(ucm_store_stats(store, &stats));
    GONE(ucm_store_metrics(store, text, sizeof text, &number));
    ucm_store_close(store);
    free(memory);
}

static void every_task_function_answers_closed(ucm_task_t *task) {
    ucm_status_t status;
    char text[128];
    for (uint32_t stage = UCM_STAGE_COPIED; stage <= UCM_STAGE_ENQUEUED; ++stage) {
        EXPECT(UCM_STATUS_CLOSED, ucm_task_poll(task, stage));
        EXPECT(UCM_STATUS_CLOSED, ucm_task_wait(task, stage, -1));
    }
    EXPECT(UCM_STATUS_CLOSED, ucm_task_stream_wait(task, NULL));
    EXPECT(UCM_STATUS_CLOSED, ucm_task_statuses(task, &status, 1));
    EXPECT(UCM_STATUS_CLOSED, ucm_task_cancel(task));
    CHECK(ucm_task_error(task, text, sizeof text) > 0);
    CHECK(strstr(text, "closed") != NULL);
}

int main(void) {
    const ucm_block_id_t block = test_block(7);
    void *memory = test_memory(BLOCK_BYTES);
    ucm_batch_t batch = test_batch(&block, &memory, 1);
    ucm_store_t *store = test_store(BLOCK_BYTES), *other = test_store(BLOCK_BYTES);
    ucm_task_t *save = NULL, *load = NULL, *freed = NULL, *kept = NULL;
    fill((unsigned char *)memory, BLOCK_BYTES, 7);
    OK(ucm_save(store, &batch, &save));
    OK(ucm_task_wait(save, UCM_STAGE_RELEASED, 30000));
    OK(ucm_load(store, &batch, &load));
    OK(ucm_task_wait(load, UCM_STAGE_RELEASED, 30000));
    OK(ucm_load(store, &batch, &freed));
    OK(ucm_task_wait(freed, UCM_STAGE_RELEASED, 30000));
    ucm_task_free(freed);
    every_task_function_answers_closed(freed);
    ucm_task_free(freed);

    /* A freed task goes on. */
    save_block(other, 8);
    for (int i = 0; i < 100; ++i) {
        ucm_task_t *task = NULL;
        OK(ucm_load(other, &batch, &task));
        ucm_task_free(task);
    }
    OK(ucm_load(other, &batch, &kept));
    OK(ucm_task_wait(kept, UCM_STAGE_RELEASED, 30000));

    ucm_store_close(store);
    every_store_function_answers_closed(store);
    every_task_function_answers_closed(save);
    every_task_function_answers_closed(load);
    ucm_task_free(save);
    ucm_task_free(load);
    every_task_function_answers_closed(save);

    /* The other store is not disturbed, and new handles are not those of old things. */
    OK(ucm_task_poll(kept, UCM_STAGE_RELEASED));
    store = test_store(BLOCK_BYTES);
    OK(load_block(store, 8));
    every_task_function_answers_closed(load);
    ucm_store_close(store);
    ucm_store_close(other);
    every_task_function_answers_closed(kept);
    free(memory);
    return passed();
}
