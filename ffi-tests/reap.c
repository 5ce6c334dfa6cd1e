/* Goal: the completion descriptor works with epoll: readable while completions wait, not before and not after; each
 * NOTIFY task is reaped once a stage with its user_data; freed tasks and tasks without the flag are not. */
#define _GNU_SOURCE
#include "check.h"

#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#define TASKS 16

static int readable(int descriptor) {
    struct pollfd poller = {descriptor, POLLIN, 0};
    return poll(&poller, 1, 0) == 1;
}

int main(void) {
    ucm_store_t *store = test_store(BLOCK_BYTES);
    const int descriptor = ucm_store_completion_fd(store);
    const int loop = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event;
    unsigned char *memory = test_memory(TASKS * BLOCK_BYTES);
    ucm_task_t *tasks[TASKS], *quiet = NULL, *dropped = NULL;
    ucm_completion_t completions[4];
    int copied[TASKS] = {0}, persisted[TASKS] = {0};
    size_t count = 9, reaped = 0;
    CHECK(descriptor >= 0 && ucm_store_completion_fd(store) == descriptor);
    CHECK(loop >= 0);
    memset(&event, 0, sizeof event);
    event.events = EPOLLIN;
    CHECK(epoll_ctl(loop, EPOLL_CTL_ADD, descriptor, &event) == 0);
    CHECK(!readable(descriptor));
    OK(ucm_store_reap(store, completions, 4, &count));
    CHECK(count == 0);

    for (unsigned i = 0; i < TASKS; ++i) {
        const ucm_block_id_t block = test_block(100 + i);
        void *address = memory + i * BLOCK_BYTES;
        ucm_batch_t batch = test_batch(&block, &address, 1);
        fill((unsigned char *)address, BLOCK_BYTES, 100 + i);
        batch.flags = UCM_BATCH_NOTIFY | UCM_BATCH_NOTIFY_COPIED;
        batch.user_data = UINT64_MAX - i;
        OK(ucm_save(store, &batch, &tasks[i]));
    }
    while (reaped < 2 * TASKS) {
        CHECK(epoll_wait(loop, &event, 1, 30000) == 1);
        OK(ucm_store_reap(store, completions, 4, &count));
        CHECK(count <= 4);
        reaped += count;
        for (size_t i = 0; i < count; ++i) {
            const size_t index = (size_t)(UINT64_MAX - completions[i].user_data);
            CHECK(index < TASKS && completions[i].task == tasks[index]);
            OK(completions[i].status);
            OK(ucm_task_poll(completions[i].task, completions[i].stage));
            if (completions[i].stage == UCM_STAGE_COPIED) {
                CHECK(persisted[index] == 0 && copied[index]++ == 0);
            } else {
                CHECK(completions[i].stage == UCM_STAGE_PERSISTED && persisted[index]++ == 0);
                ucm_task_free(completions[i].task);
            }
        }
    }
    CHECK(!readable(descriptor));

    {
        const ucm_block_id_t block = test_block(100), nowhere = test_block(9999);
        void *address = memory;
        ucm_batch_t batch = test_batch(&block, &address, 1);
        OK(ucm_load(store, &batch, &quiet)); /* no flag: not queued */
        OK(ucm_task_wait(quiet, UCM_STAGE_RELEASED, 30000));
        CHECK(!readable(descriptor));
        ucm_task_free(quiet);

        batch.flags = UCM_BATCH_NOTIFY;
        OK(ucm_load(store, &batch, &dropped)); /* freed while it waits: taken off the queue */
        OK(ucm_task_wait(dropped, UCM_STAGE_RELEASED, 30000));
        CHECK(readable(descriptor));
        ucm_task_free(dropped);
        CHECK(!readable(descriptor));
        OK(ucm_store_reap(store, completions, 4, &count));
        CHECK(count == 0);

        batch.blocks = &nowhere; /* failures are completions too */
        batch.user_data = 5;
        OK(ucm_load(store, &batch, &quiet));
        CHECK(epoll_wait(loop, &event, 1, 30000) == 1);
        OK(ucm_store_reap(store, completions, 4, &count));
        CHECK(count == 1 && completions[0].user_data == 5 && completions[0].stage == UCM_STAGE_LOADED);
        CHECK(completions[0].status == UCM_STATUS_NOT_FOUND && completions[0].task == quiet);
        OK(ucm_task_wait(quiet, UCM_STAGE_RELEASED, 30000));
        ucm_task_free(quiet);
    }
    close(loop);
    ucm_store_close(store);
    free(memory);
    return passed();
}
