/* Goal: a child forked before the first open may use the library; a child forked while a store is open gets CLOSED
 * from every call at once, its close and free disturb nobody, and the parent goes on. */
#include "check.h"

#include <sys/wait.h>
#include <unistd.h>

#define GONE(call) REFUSED(UCM_STATUS_CLOSED, "fork", call)

static void expect_success(pid_t child) {
    int state = 0;
    CHECK(child > 0);
    CHECK(waitpid(child, &state, 0) == child);
    CHECK(WIFEXITED(state) && WEXITSTATUS(state) == 0);
}

static void child_of_an_open_store(ucm_options_t *options, ucm_store_t *store, ucm_task_t *task) {
    const ucm_block_id_t block = test_block(1);
    const uint32_t tokens[4] = {1, 2, 3, 4};
    const void *extra = NULL;
    void *memory = test_memory(BLOCK_BYTES);
    ucm_batch_t batch = test_batch(&block, &memory, 1);
    ucm_options_t *new_options = NULL;
    ucm_store_t *new_store = NULL;
    ucm_task_t *new_task = NULL;
    ucm_completion_t completion;
    ucm_block_id_t id;
    ucm_stats_t stats;
    ucm_status_t status;
    uint8_t found;
    size_t number, zero = 0;
    char text[256];
    stats.struct_size = sizeof stats;
    GONE(ucm_options_new(&new_options));
    GONE(ucm_options_from_yaml("", 0, &new_options));
    GONE(ucm_options_from_yaml_file("/dev/null", &new_options));
    GONE(ucm_options_set(options, "io_depth", "8"));
    GONE(ucm_store_open(options, &new_store));
    GONE(ucm_lookup(store, &block, 1, &found));
    GONE(ucm_lookup_prefix(store, &block, 1, &number));
    GONE(ucm_prefetch(store, &block, 1));
    GONE(ucm_hold(store, &block, 1, 0, &new_task));
    GONE(ucm_abandon(store, &block, 1));
    GONE(ucm_abandon_promise(store, &block, 1, 7));
    GONE(ucm_lookup_abandoned(store, &block, 1, &found));
    GONE(ucm_lookup_abandoned_promise(store, &block, 1, 7, &found));
    GONE(ucm_save(store, &batch, &new_task));
    GONE(ucm_load(store, &batch, &new_task));
    GONE(ucm_task_poll(task, UCM_STAGE_RELEASED));
    GONE(ucm_task_wait(task, UCM_STAGE_RELEASED, -1));
    GONE(ucm_task_stream_wait(task, NULL));
    GONE(ucm_task_statuses(task, &status, 1));
    GONE(ucm_task_cancel(task));
    CHECK(ucm_task_error(task, text, sizeof text) > 0 && strstr(text, "fork") != NULL);
    CHECK(ucm_store_completion_fd(store) == -1);
    GONE(ucm_store_reap(store, &completion, 1, &number));
    GONE(ucm_store_refresh(store, -1));
    GONE(ucm_memory_register(store, memory, 4096));
    GONE(ucm_memory_unregister(store, memory));
    GONE(ucm_hash_tokens(store, tokens, 4, 4, NULL, NULL, 0, &id, 1, &number));
    GONE(ucm_hash_blocks(store, tokens, 4, 4, NULL, &extra, &zero, &id, 1, &number));
    GONE(ucm_store_stats(store, &stats));
    GONE(ucm_store_metrics(store, text, sizeof text, &number));
    GONE(ucm_log_callback(NULL, NULL, UCM_LOG_ERROR));
    ucm_task_free(task);
    ucm_store_close(store);
    ucm_options_free(options);
    CHECK(ucm_api_version() == UCM_API_VERSION);
    CHECK(strcmp(ucm_status_name(UCM_STATUS_CLOSED), "UCM_STATUS_CLOSED") == 0);
    free(memory);
    _exit(0);
}

int main(void) {
    const ucm_block_id_t block = test_block(1);
    void *memory = test_memory(BLOCK_BYTES);
    ucm_batch_t batch = test_batch(&block, &memory, 1);
    ucm_options_t *options = test_options(BLOCK_BYTES);
    ucm_store_t *store = NULL;
    ucm_task_t *task = NULL;
    pid_t child = fork();
    if (child == 0) { /* options made before the fork are fine too */
        OK(ucm_store_open(options, &store));
        save_block(store, 1);
        ucm_store_close(store);
        _exit(0);
    }
    expect_success(child);

    OK(ucm_store_open(options, &store));
    OK(load_block(store, 1));
    fill((unsigned char *)memory, BLOCK_BYTES, 1);
    OK(ucm_save(store, &batch, &task));
    child = fork();
    if (child == 0) child_of_an_open_store(options, store, task);
    expect_success(child);

    OK(ucm_task_wait(task, UCM_STAGE_PERSISTED, 30000));
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    ucm_task_free(task);
    save_block(store, 2);
    OK(load_block(store, 2));
    ucm_store_close(store);
    ucm_options_free(options);
    free(memory);
    return passed();
}
