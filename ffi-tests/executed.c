/* Goal: what a process had in DRAM is gone when it executes another program without closing its store: a store that
 * only looks up, in another process, stops finding it, though the process lives on under its number. */
#define _GNU_SOURCE
#include "check.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static ucm_options_t *dram_options(void) {
    ucm_options_t *options = test_options(BLOCK_BYTES);
    OK(ucm_options_set(options, "store_pipeline", "Cache|Empty"));
    OK(ucm_options_set(options, "unique_id", test_directory())); /* apart from what else runs on this host */
    return options;
}

static void saves_and_executes(int told, int go) {
    ucm_options_t *options = dram_options();
    ucm_store_t *store = NULL;
    char byte = 1;
    OK(ucm_store_open(options, &store));
    save_block(store, 1);
    CHECK(write(told, &byte, 1) == 1);
    CHECK(read(go, &byte, 1) == 1);
    execlp("sleep", "sleep", "600", (char *)NULL);
    _exit(1);
}

int main(void) {
    const ucm_block_id_t block = test_block(1);
    ucm_options_t *options;
    ucm_store_t *scheduler = NULL;
    int told[2], go[2], state;
    uint8_t found = 9;
    char byte;
    pid_t child;
    CHECK(pipe(told) == 0 && pipe(go) == 0);
    child = fork();
    CHECK(child >= 0);
    if (child == 0) saves_and_executes(told[1], go[0]);
    CHECK(read(told[0], &byte, 1) == 1);

    options = dram_options();
    OK(ucm_options_set(options, "device_id", "-1"));
    OK(ucm_store_open(options, &scheduler));
    OK(ucm_lookup(scheduler, &block, 1, &found));
    CHECK(found == 1);
    CHECK(write(go[1], &byte, 1) == 1);
    for (int i = 0; found == 1 && i < 1000; ++i) {
        usleep(10000);
        OK(ucm_lookup(scheduler, &block, 1, &found));
    }
    CHECK(found == 0);
    CHECK(kill(child, 0) == 0); /* it lives, as sleep */
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, &state, 0) == child);
    ucm_store_close(scheduler);
    ucm_options_free(options);
    return passed();
}
