/* What the test programs share: checks that name their line, a store on a directory, batches of one slice.
 * A program prints "ok" and exits with 0 when every check held. Works in C11 and in C++17. */

#ifndef FFI_TESTS_CHECK_H
#define FFI_TESTS_CHECK_H

#include <ucm.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                               \
    do {                                                                                               \
        if (!(condition)) {                                                                            \
            char why_[512];                                                                            \
            ucm_last_error(why_, sizeof why_);                                                         \
            fprintf(stderr, "%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, why_);     \
            exit(1);                                                                                   \
        }                                                                                              \
    } while (0)

/* A call's status, with the call, the number found and the message when it is another. */
#define EXPECT(expected, call)                                                                         \
    do {                                                                                               \
        const ucm_status_t status_ = (call);                                                           \
        if (status_ != (expected)) {                                                                   \
            char why_[512];                                                                            \
            ucm_last_error(why_, sizeof why_);                                                         \
            fprintf(stderr, "%s:%d: %s is %s, not %s (last error: %s)\n", __FILE__, __LINE__, #call,   \
                    ucm_status_name(status_), ucm_status_name(expected), why_);                        \
            exit(1);                                                                                   \
        }                                                                                              \
    } while (0)

#define OK(call) EXPECT(UCM_STATUS_OK, call)

/* The same, and that there is a message with `word` in it. */
#define REFUSED(expected, word, call)                                                                  \
    do {                                                                                               \
        char text_[512];                                                                               \
        EXPECT(expected, call);                                                                        \
        CHECK(ucm_last_error(text_, sizeof text_) > 0);                                                \
        CHECK(strstr(text_, word) != NULL);                                                            \
    } while (0)

#define BLOCK_BYTES ((size_t)1 << 20)
#define SHARD_BYTES ((size_t)1 << 18) /* of a layer-wise store */
#define LAYERS 4

static inline const char *test_directory(void) {
    const char *directory = getenv("UCM_TEST_DIRECTORY");
    CHECK(directory != NULL);
    return directory;
}

/* Options of a store of blocks of 1 MiB, whole (shard_bytes BLOCK_BYTES) or layer by layer. */
static inline ucm_options_t *test_options(size_t shard_bytes) {
    char number[32];
    ucm_options_t *options = NULL;
    OK(ucm_options_new(&options));
    OK(ucm_options_set(options, "store_pipeline", "Cache|Posix"));
    OK(ucm_options_set(options, "storage_backends", test_directory()));
    OK(ucm_options_set(options, "cache_buffer_capacity_gb", "0.0625"));
    OK(ucm_options_set(options, "segment_size_mb", "64"));
    OK(ucm_options_set(options, "model_id", "ffi"));
    OK(ucm_options_set(options, "device", "host"));
    OK(ucm_options_set(options, "device_id", "0"));
    snprintf(number, sizeof number, "%zu", BLOCK_BYTES);
    OK(ucm_options_set(options, "block_size", number));
    snprintf(number, sizeof number, "%zu", shard_bytes);
    OK(ucm_options_set(options, "shard_size", number));
    OK(ucm_options_set(options, "tensor_size_list", number));
    return options;
}

static inline ucm_store_t *test_store(size_t shard_bytes) {
    ucm_options_t *options = test_options(shard_bytes);
    ucm_store_t *store = NULL;
    OK(ucm_store_open(options, &store));
    ucm_options_free(options);
    return store;
}

static inline ucm_block_id_t test_block(unsigned number) {
    ucm_block_id_t block;
    memset(&block, 0x42, sizeof block);
    memcpy(block.bytes, &number, sizeof number);
    return block;
}

/* Page-aligned memory; freed with free. */
static inline unsigned char *test_memory(size_t bytes) {
    void *memory = aligned_alloc(4096, bytes);
    CHECK(memory != NULL);
    return (unsigned char *)memory;
}

/* Bytes that depend on the block and on the place. */
static inline void fill(unsigned char *memory, size_t bytes, unsigned number) {
    for (size_t i = 0; i < bytes; ++i) memory[i] = (unsigned char)(i * 7 + (i >> 9) + number * 31 + 1);
}

static inline int holds(const unsigned char *memory, size_t bytes, unsigned number) {
    for (size_t i = 0; i < bytes; ++i) {
        if (memory[i] != (unsigned char)(i * 7 + (i >> 9) + number * 31 + 1)) return 0;
    }
    return 1;
}

static inline ucm_batch_t test_batch(const ucm_block_id_t *blocks, void *const *addresses, size_t count) {
    ucm_batch_t batch;
    memset(&batch, 0, sizeof batch);
    batch.struct_size = sizeof batch;
    batch.blocks = blocks;
    batch.addresses = addresses;
    batch.count = count;
    return batch;
}

/* Saves one block and waits until it is PERSISTED. */
static inline void save_block(ucm_store_t *store, unsigned number) {
    unsigned char *memory = test_memory(BLOCK_BYTES);
    ucm_block_id_t block = test_block(number);
    void *address = memory;
    ucm_batch_t batch = test_batch(&block, &address, 1);
    ucm_task_t *task = NULL;
    fill(memory, BLOCK_BYTES, number);
    OK(ucm_save(store, &batch, &task));
    OK(ucm_task_wait(task, UCM_STAGE_PERSISTED, 30000));
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    ucm_task_free(task);
    free(memory);
}

/* Loads one block and compares; returns the load's status. */
static inline ucm_status_t load_block(ucm_store_t *store, unsigned number) {
    unsigned char *memory = test_memory(BLOCK_BYTES);
    ucm_block_id_t block = test_block(number);
    void *address = memory;
    ucm_batch_t batch = test_batch(&block, &address, 1);
    ucm_task_t *task = NULL;
    ucm_status_t status;
    memset(memory, 0xee, BLOCK_BYTES);
    OK(ucm_load(store, &batch, &task));
    status = ucm_task_wait(task, UCM_STAGE_LOADED, 30000);
    OK(ucm_task_wait(task, UCM_STAGE_RELEASED, 30000));
    if (status == UCM_STATUS_OK) CHECK(holds(memory, BLOCK_BYTES, number));
    ucm_task_free(task);
    free(memory);
    return status;
}

static inline int passed(void) {
    puts("ok");
    return 0;
}

#endif
