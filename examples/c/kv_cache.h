/*
 * What prefill.c and decode.c share: the shape of a model's KV, paged memory to hold it, a prompt, and the
 * command line. A real server has all of this already.
 */

#ifndef EXAMPLE_KV_CACHE_H
#define EXAMPLE_KV_CACHE_H

#include <ucm.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BLOCK_TOKENS 128u
#define RANKS_MAX 8

/* How the KV of one block is made up. A part is what cannot be cut further by tensor parallelism. */
typedef struct {
    const char *name;
    size_t layers;
    size_t tensors_per_layer; /* K and V: 2; MLA, which keeps one latent: 1 */
    size_t slice_bytes;       /* of one tensor, one block, one part */
    size_t part_count;        /* parts of a block */
    size_t ranks;             /* tensor parallelism */
} model_t;

static const model_t models[] = {
    {"qwen2.5-7b", 28, 2, 4 * 128 * 2 * BLOCK_TOKENS, 1, 1},
    {"deepseek-v3", 61, 1, 576 * 2 * BLOCK_TOKENS, 1, 1},
    {"llama-3-70b", 80, 2, 128 * 2 * BLOCK_TOKENS, 8, 8},
};

typedef struct {
    model_t model;
    const char *directory;
    size_t tokens;
    uint64_t prompt;
    long expect_hits;
} arguments_t;

/* The KV memory of one rank: for every layer a K and a V tensor of [pages][slice bytes]. */
typedef struct {
    const model_t *model;
    size_t part; /* each rank has one part */
    size_t pages;
    unsigned char *base;
} paged_kv_t;

static inline size_t slices_of(const model_t *model) { return model->layers * model->tensors_per_layer; }
static inline size_t part_bytes(const model_t *model) { return slices_of(model) * model->slice_bytes; }

/* Ends the program with the message of the last failure when a call has failed. */
static inline void check(ucm_status_t status, const char *what) {
    if (status != UCM_STATUS_OK) {
        char message[1024];
        ucm_last_error(message, sizeof message);
        fprintf(stderr, "%s: %s: %s\n", what, ucm_status_name(status), message);
        exit(EXIT_FAILURE);
    }
}

static inline void *allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (memory == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(EXIT_FAILURE);
    }
    return memory;
}

static inline arguments_t parse(int count, char **words) {
    arguments_t arguments = {models[0], NULL, 4096, 1, -1};
    for (int i = 1; i + 1 < count; i += 2) {
        const char *value = words[i + 1];
        if (strcmp(words[i], "--directory") == 0) arguments.directory = value;
        if (strcmp(words[i], "--tokens") == 0) arguments.tokens = strtoull(value, NULL, 10);
        if (strcmp(words[i], "--prompt") == 0) arguments.prompt = strtoull(value, NULL, 10);
        if (strcmp(words[i], "--expect-hits") == 0) arguments.expect_hits = strtol(value, NULL, 10);
        if (strcmp(words[i], "--model") == 0) {
            arguments.model.name = NULL;
            for (size_t m = 0; m < sizeof models / sizeof *models; ++m) {
                if (strcmp(models[m].name, value) == 0) arguments.model = models[m];
            }
        }
    }
    if (arguments.directory == NULL || arguments.model.name == NULL || arguments.tokens < BLOCK_TOKENS) {
        fprintf(stderr, "usage: %s --directory DIR [--model qwen2.5-7b|deepseek-v3|llama-3-70b] [--tokens N]\n"
                        "       [--prompt NUMBER] [--expect-hits BLOCKS]\n", words[0]);
        exit(EXIT_FAILURE);
    }
    return arguments;
}

/* Opens the store of one rank; with device_id -1 one that only looks up, as a scheduler has. */
static inline ucm_store_t *open_store(const arguments_t *arguments, size_t rank, int device_id) {
    const model_t *model = &arguments->model;
    char yaml[4096];
    int used = snprintf(yaml, sizeof yaml,
                        "store_pipeline: Cache|Posix\n"
                        "storage_backends: [\"%s\"]\n"
                        "cache_buffer_capacity_gb: 0.5\n"
                        "model_id: %s\n"
                        "dtype: bfloat16\n"
                        "block_tokens: %u\n"
                        "part_count: %zu\n"
                        "part_index: %zu\n"
                        "block_size: %zu\n"
                        "device: host\n"
                        "device_id: %d\n",
                        arguments->directory, model->name, BLOCK_TOKENS, model->part_count, rank,
                        part_bytes(model), device_id);
    if (used > (int)sizeof yaml - 128) {
        fprintf(stderr, "the directory's name is too long\n");
        exit(EXIT_FAILURE);
    }
    if (device_id >= 0) {
        used += snprintf(yaml + used, sizeof yaml - (size_t)used, "shard_size: %zu\ntensor_size: %zu\n",
                         part_bytes(model), model->slice_bytes);
    }

    ucm_options_t *options = NULL;
    ucm_store_t *store = NULL;
    check(ucm_options_from_yaml(yaml, (size_t)used, &options), "options");
    check(ucm_store_open(options, &store), "open");
    ucm_options_free(options);
    return store;
}

/* Block ids of the prompt; the caller frees them. */
static inline ucm_block_id_t *hash_prompt(const arguments_t *arguments, ucm_store_t *store, size_t *count) {
    uint32_t *tokens = allocate(arguments->tokens, sizeof *tokens);
    for (size_t i = 0; i < arguments->tokens; ++i) {
        tokens[i] = (uint32_t)((arguments->prompt * 1000003 + i) * 2654435761u % 150000);
    }
    const size_t capacity = arguments->tokens / BLOCK_TOKENS;
    ucm_block_id_t *blocks = allocate(capacity, sizeof *blocks);
    check(ucm_hash_tokens(store, tokens, arguments->tokens, BLOCK_TOKENS, NULL, NULL, 0, blocks, capacity,
                          count), "hash");
    free(tokens);
    return blocks;
}

static inline paged_kv_t new_pages(const model_t *model, size_t part, size_t pages) {
    paged_kv_t kv = {model, part, pages, allocate(pages, part_bytes(model))};
    memset(kv.base, 0xee, pages * part_bytes(model));
    return kv;
}

static inline void *slice_address(const paged_kv_t *kv, size_t page, size_t slice) {
    return kv->base + (slice * kv->pages + page) * kv->model->slice_bytes;
}

/* "Computes" the KV of a block, or compares: every word depends on the block, the part, the slice and its place. */
static inline int each_word(const paged_kv_t *kv, size_t page, const ucm_block_id_t *block, int compute) {
    uint64_t id;
    int all = 1;
    memcpy(&id, block->bytes, sizeof id);
    for (size_t slice = 0; slice < slices_of(kv->model); ++slice) {
        unsigned char *bytes = slice_address(kv, page, slice);
        const uint64_t seed = id ^ (kv->part * 1000003ull + slice) << 20;
        for (size_t i = 0; i < kv->model->slice_bytes / sizeof(uint64_t); ++i) {
            const uint64_t value = (seed + i) * 0x9e3779b97f4a7c15ull;
            if (compute) memcpy(bytes + i * sizeof value, &value, sizeof value);
            else all &= memcmp(bytes + i * sizeof value, &value, sizeof value) == 0;
        }
    }
    return all;
}

/* Submits blocks first to first + count - 1 of a rank: block number i goes from or to page page_of[i]. */
static inline ucm_task_t *submit(ucm_status_t (*function)(ucm_store_t *, const ucm_batch_t *, ucm_task_t **),
                                 ucm_store_t *store, const paged_kv_t *kv, const ucm_block_id_t *blocks,
                                 size_t count, const size_t *page_of) {
    const size_t slices = slices_of(kv->model);
    void **addresses = allocate(count * slices, sizeof *addresses);
    for (size_t i = 0; i < count; ++i) {
        for (size_t slice = 0; slice < slices; ++slice) {
            addresses[i * slices + slice] = slice_address(kv, page_of[i], slice);
        }
    }
    ucm_batch_t batch;
    memset(&batch, 0, sizeof batch);
    batch.struct_size = sizeof batch;
    batch.blocks = blocks;
    batch.addresses = addresses;
    batch.count = count;
    ucm_task_t *task = NULL;
    check(function(store, &batch, &task), "submit");
    free(addresses); /* the arrays were copied */
    return task;
}

/* Waits for a stage; on failure tells the task's own message. */
static inline void wait_for(ucm_task_t *task, uint32_t stage) {
    const ucm_status_t status = ucm_task_wait(task, stage, -1);
    if (status != UCM_STATUS_OK) {
        char message[1024];
        ucm_task_error(task, message, sizeof message);
        fprintf(stderr, "task: %s: %s\n", ucm_status_name(status), message);
        exit(EXIT_FAILURE);
    }
}

static inline double now(void) {
    struct timespec time;
    timespec_get(&time, TIME_UTC);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static inline void report(const char *what, size_t blocks, const model_t *model, double seconds) {
    const double gigabytes = (double)(blocks * part_bytes(model) * model->part_count) / 1e9;
    printf("  %s %zu blocks: %.3f GB in %.3f s = %.2f GB/s\n", what, blocks, gigabytes, seconds,
           gigabytes / seconds);
}

static inline void expect_hits(const arguments_t *arguments, size_t hits) {
    if (arguments->expect_hits >= 0 && hits != (size_t)arguments->expect_hits) {
        fprintf(stderr, "expected %ld hits, found %zu\n", arguments->expect_hits, hits);
        exit(EXIT_FAILURE);
    }
}

#endif
