/* Goal: what a program does to its own process does not harm what is stored: it changes its directory after it opened
 * a store by a relative path; it has closed its standard descriptors, as a daemon does, and writes to them; it runs out
 * of descriptors; it exits without closing, and closes in an exit handler. */
#define _GNU_SOURCE
#include "check.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void relative_directory(const char *parent) {
    ucm_options_t *options = test_options(BLOCK_BYTES);
    ucm_store_t *store = NULL, *reader = NULL;
    CHECK(chdir(parent) == 0);
    OK(ucm_options_set(options, "storage_backends", "relative"));
    OK(ucm_store_open(options, &store));
    CHECK(chdir("/") == 0);
    for (unsigned number = 0; number < 80; ++number) save_block(store, number); /* more than a segment, and than DRAM */
    OK(load_block(store, 0));
    CHECK(chdir(parent) == 0);
    OK(ucm_store_open(options, &reader));
    CHECK(chdir("/") == 0);
    for (unsigned number = 0; number < 80; ++number) OK(load_block(reader, number));
    save_block(store, 80);
    OK(ucm_store_refresh(reader, 0));
    OK(load_block(reader, 80));
    ucm_store_close(store);
    ucm_store_close(reader);
    ucm_options_free(options);
}

/* A program that puts descriptors back must not do so while another thread opens files: threads of a closed store may
 * take a moment to end. */
static void wait_for_threads(void) {
    for (int wait = 0; wait < 3000; ++wait, usleep(10000)) {
        unsigned count = 0;
        DIR *tasks = opendir("/proc/self/task");
        CHECK(tasks != NULL);
        for (struct dirent *task; (task = readdir(tasks)) != NULL;) count += task->d_name[0] != '.';
        closedir(tasks);
        if (count == 1) return;
    }
}

static void closed_descriptors(void) {
    static const char noise[] = "noise that a program prints where its standard error was\n";
    char link[64], target[4096];
    ucm_store_t *store;
    int kept[3];
    for (int i = 0; i < 3; ++i) {
        kept[i] = fcntl(i, F_DUPFD_CLOEXEC, 100);
        CHECK(kept[i] >= 100 || errno == EBADF);
        close(i);
    }
    store = test_store(BLOCK_BYTES);
    for (unsigned number = 200; number < 220; ++number) save_block(store, number);
    for (int i = 0; i < 3; ++i) {
        ssize_t length, ignored;
        ignored = write(i, noise, sizeof noise);
        (void)ignored;
        snprintf(link, sizeof link, "/proc/self/fd/%d", i);
        length = readlink(link, target, sizeof target - 1);
        if (length > 0) {
            target[length] = 0;
            if (strstr(target, test_directory()) != NULL) {
                dprintf(kept[2], "descriptor %d is %s\n", i, target);
                _exit(1);
            }
        }
    }
    ucm_store_close(store);
    store = test_store(BLOCK_BYTES);
    for (unsigned number = 200; number < 220; ++number) {
        if (load_block(store, number) != UCM_STATUS_OK) {
            dprintf(kept[2], "block %u is gone\n", number);
            _exit(1);
        }
    }
    ucm_store_close(store);
    wait_for_threads();
    for (int i = 0; i < 3; ++i) {
        if (kept[i] >= 0) dup2(kept[i], i), close(kept[i]);
    }
}

static unsigned open_descriptors(void) {
    unsigned count = 0;
    for (int i = 0; i < 1024; ++i) count += fcntl(i, F_GETFD) >= 0;
    return count;
}

/* With any number of descriptors left, an open works or says why not, and leaves none behind. */
static void few_descriptors(void) {
    enum { limit = 128 };
    struct rlimit old, few;
    ucm_options_t *options = test_options(BLOCK_BYTES);
    const unsigned before = open_descriptors();
    int opened = 0, refused = 0;
    CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
    few = old;
    few.rlim_cur = limit;
    for (unsigned spare = 0; spare <= 24; spare += 2) {
        int taken[limit], count = 0;
        ucm_store_t *store = NULL;
        ucm_status_t status;
        CHECK(setrlimit(RLIMIT_NOFILE, &few) == 0);
        while ((taken[count] = dup(0)) >= 0) ++count;
        for (unsigned i = 0; i < spare; ++i) close(taken[--count]);
        status = ucm_store_open(options, &store);
        while (count > 0) close(taken[--count]);
        CHECK(setrlimit(RLIMIT_NOFILE, &old) == 0);
        if (status == UCM_STATUS_OK) {
            ++opened;
            save_block(store, 300 + spare);
            ucm_store_close(store);
        } else {
            char text[512];
            CHECK(store == NULL && ucm_last_error(text, sizeof text) > 0);
            ++refused;
        }
        /* Threads that close what a store held may take a moment. */
        for (int wait = 0; open_descriptors() > before && wait < 3000; ++wait) usleep(10000);
        if (open_descriptors() > before) {
            fprintf(stderr, "%u descriptors, %u before, with %u to spare (%s)\n", open_descriptors(), before, spare,
                    ucm_status_name(status));
            exit(1);
        }
    }
    CHECK(opened > 0 && refused > 0);
    ucm_options_free(options);
}

static ucm_store_t *global;

static void close_at_exit(void) { ucm_store_close(global); }

/* A child opens, saves, begins another save and leaves in its own way. */
static void leave(int way) {
    int state = 0;
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        const ucm_block_id_t block = test_block(401);
        void *memory = test_memory(BLOCK_BYTES);
        ucm_batch_t batch = test_batch(&block, &memory, 1);
        ucm_task_t *task = NULL;
        if (way == 1) atexit(close_at_exit);
        global = test_store(BLOCK_BYTES);
        save_block(global, 400 + 2 * (unsigned)way);
        memset(memory, 1, BLOCK_BYTES);
        OK(ucm_save(global, &batch, &task));
        if (way == 2) _exit(0);
        exit(0);
    }
    CHECK(waitpid(child, &state, 0) == child);
    if (!WIFEXITED(state) || WEXITSTATUS(state) != 0) {
        fprintf(stderr, "way %d to leave: state %x\n", way, state);
        exit(1);
    }
}

int main(void) {
    char parent[4096];
    ucm_store_t *store;
    /* First the children: they must be forked before the first open. */
    for (int way = 0; way < 3; ++way) leave(way);
    store = test_store(BLOCK_BYTES);
    for (int way = 0; way < 3; ++way) OK(load_block(store, 400 + 2 * (unsigned)way));
    ucm_store_close(store);

    snprintf(parent, sizeof parent, "%s-parent", test_directory());
    CHECK(mkdir(parent, 0700) == 0);
    relative_directory(parent);
    closed_descriptors();
    few_descriptors();
    return passed();
}
