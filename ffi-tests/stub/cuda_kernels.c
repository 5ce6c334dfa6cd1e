/* Kernels of the fake libcuda: UCM's own, which copy and hash, and the one that stands for a model. */
#include "cuda.h"

#include <stdlib.h>
#include <string.h>

#include "../../src/device/cuda/copy_args.h"
#include "../../src/device/cuda/hash_args.h"
#include "xxh3.h"

static int loaded_module, runs_function, rows_function, loaded_hash, hash_function;
/* The model's own kernels (tests/gpu/model.cu), of which the one that faults is never launched here. */
static int model_module, fill_function, fault_function;

API cuModuleLoadData(CUmodule *module, const void *image) {
    ENTER_CONTEXT("cuModuleLoadData");
    const char *text = image;
    if (strstr(text, ".entry slow_fill(")) {
        *module = (CUmodule)&model_module;
        return OK;
    }
    if (strstr(text, ".version") && strstr(text, ".entry ucm_hash(")) {
        *module = (CUmodule)&loaded_hash;
        return OK;
    }
    if (!strstr(text, ".version") || !strstr(text, ".entry ucm_copy_runs(") || !strstr(text, ".entry ucm_copy_rows(")) {
        stub_misuse("cuModuleLoadData", "not the PTX of the copy kernels");
    }
    *module = (CUmodule)&loaded_module;
    return OK;
}

API cuModuleUnload(CUmodule module) {
    ENTER_CONTEXT("cuModuleUnload");
    if ((void *)module != &loaded_module && (void *)module != &loaded_hash) {
        stub_misuse("cuModuleUnload", "not a loaded module");
    }
    return OK;
}

API cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    ENTER_CONTEXT("cuModuleGetFunction");
    if ((void *)module == &model_module && !strcmp(name, "slow_fill")) {
        *function = (CUfunction)&fill_function;
        return OK;
    }
    if ((void *)module == &model_module && !strcmp(name, "fault")) {
        *function = (CUfunction)&fault_function;
        return OK;
    }
    if ((void *)module == &loaded_hash && !strcmp(name, "ucm_hash")) {
        *function = (CUfunction)&hash_function;
        return OK;
    }
    if ((void *)module != &loaded_module) {
        stub_misuse("cuModuleGetFunction", "not a loaded module");
    }
    if (!strcmp(name, "ucm_copy_runs")) {
        *function = (CUfunction)&runs_function;
    } else if (!strcmp(name, "ucm_copy_rows")) {
        *function = (CUfunction)&rows_function;
    } else {
        return (CUresult)NOT_FOUND;
    }
    return OK;
}

static void check_head(const struct ucm_head *head, unsigned most) {
    unsigned width = head->width;
    if (!head->pieces || head->pieces > most || !head->tiles || head->scatter > 1 || width > 16 || !width ||
        (width & (width - 1))) {
        stub_misuse("cuLaunchKernel", "head");
    }
}

/* What one kernel thread does for each element, in the order of the linear side. */
static void move(const struct ucm_head *head, uint64_t memory, uint64_t linear, size_t bytes) {
    if (memory % head->width || linear % head->width || bytes % head->width) {
        stub_misuse("kernel", "misaligned address for accesses of %u bytes", head->width);
    }
    char *outside = (char *)(uintptr_t)memory, *inside = (char *)(uintptr_t)linear;
    if (head->scatter) {
        stub_kernel_move(outside, inside, bytes);
    } else {
        stub_kernel_move(inside, outside, bytes);
    }
}

static unsigned tiles_of(unsigned bytes) {
    return (bytes + UCM_TILE_BYTES - 1) / UCM_TILE_BYTES;
}

static void run_runs(const void *data) {
    const struct ucm_runs_args *args = data;
    check_head(&args->head, UCM_RUNS_MAX);
    unsigned tiles = 0;
    for (unsigned i = 0; i < args->head.pieces; i++) {
        const struct ucm_run *run = &args->pieces[i];
        if (run->first_tile != tiles) {
            stub_misuse("kernel", "piece %u begins at tile %u, not %u", i, run->first_tile, tiles);
        }
        tiles += tiles_of(run->bytes);
        move(&args->head, run->memory, run->linear, run->bytes);
    }
    if (tiles != args->head.tiles) {
        stub_misuse("kernel", "%u tiles, not %u", args->head.tiles, tiles);
    }
}

static void run_rows(const void *data) {
    const struct ucm_rows_args *args = data;
    check_head(&args->head, UCM_ROWS_MAX);
    unsigned tiles = 0;
    for (unsigned i = 0; i < args->head.pieces; i++) {
        const struct ucm_rows *rows = &args->pieces[i];
        if (rows->first_tile != tiles || !rows->run || rows->bytes % rows->run || !rows->count1 || !rows->count2) {
            stub_misuse("kernel", "piece %u", i);
        }
        tiles += tiles_of(rows->bytes);
        for (unsigned r = 0; r < rows->bytes / rows->run; r++) {
            unsigned k = r % rows->count2, outer = r / rows->count2;
            uint64_t offset = outer / rows->count1 * rows->stride[0] + outer % rows->count1 * rows->stride[1] +
                              k * rows->stride[2];
            move(&args->head, rows->memory + offset, rows->linear + (uint64_t)r * rows->run, rows->run);
        }
    }
    if (tiles != args->head.tiles) {
        stub_misuse("kernel", "%u tiles, not %u", args->head.tiles, tiles);
    }
}

/* Waits, then fills words: cycles of a GHz clock. */
static void run_fill(struct stub_stream *stream, void **params) {
    char *to = *(char **)params[0];
    unsigned words = *(unsigned *)params[1], seed = *(unsigned *)params[2];
    unsigned long long cycles = *(unsigned long long *)params[3];
    unsigned *pattern = malloc(words * sizeof *pattern);
    for (unsigned i = 0; i < words; i++) {
        pattern[i] = i * 2654435761u + seed;
    }
    ucm_stub_model_write(stream, to, pattern, words * sizeof *pattern, (unsigned)(cycles / 1000));
    free(pattern);
}

static void run_hash(const void *data) {
    const struct ucm_hash_args *args = data;
    uint64_t *sums = stub_kernel_reach((void *)(uintptr_t)args->sums, args->runs * sizeof *sums);
    for (unsigned i = 0; i < args->runs; i++) {
        const struct ucm_hash_run *run = &args->run[i];
        if (run->address % 8 || run->bytes < UCM_HASH_BYTES_MIN) {
            stub_misuse("kernel", "a hash of %llu bytes at %#llx", run->bytes, run->address);
        }
        sums[i] = stub_xxh3(stub_kernel_reach((void *)(uintptr_t)run->address, run->bytes), run->bytes, run->seed);
        if (stub_falsified && run->bytes >= stub_falsified) {
            sums[i] ^= 1;
        }
    }
}

static void launch_hash(unsigned blocks, unsigned threads, struct stub_stream *stream, const struct ucm_hash_args *args) {
    if (!args->runs || args->runs > UCM_HASH_RUNS_MAX || blocks != args->runs || threads != UCM_HASH_THREADS) {
        stub_misuse("cuLaunchKernel", "%u runs on %u blocks of %u threads", args->runs, blocks, threads);
    }
    stub_kernel(STUB_HASH, stream, run_hash, args, sizeof *args);
}

API cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                   unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared,
                   CUstream stream, void **params, void **extra) {
    ENTER_CONTEXT("cuLaunchKernel");
    bool hashes = (void *)function == &hash_function;
    if (!grid_x || grid_y != 1 || grid_z != 1 || (block_x != 256 && !hashes) || block_y != 1 || block_z != 1 || shared ||
        extra) {
        stub_misuse("cuLaunchKernel", "grid or block");
    }
    struct stub_stream *on = cuda_stream_of("cuLaunchKernel", stream);
    if ((void *)function == &fill_function) {
        run_fill(on, params);
    } else if (hashes) {
        launch_hash(grid_x, block_x, on, params[0]);
    } else if ((void *)function == &runs_function) {
        stub_kernel("cuLaunchKernel", on, run_runs, params[0], sizeof(struct ucm_runs_args));
    } else if ((void *)function == &rows_function) {
        stub_kernel("cuLaunchKernel", on, run_rows, params[0], sizeof(struct ucm_rows_args));
    } else {
        stub_misuse("cuLaunchKernel", "not a function of the module");
    }
    return OK;
}
