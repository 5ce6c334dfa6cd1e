/* What the host passes to the copy kernels, by value: mirrored in kernel.rs and read by the fake driver
   of ffi-tests/stub. All kernel arguments together must stay below 4096 bytes. */
#ifndef UCM_COPY_ARGS_H
#define UCM_COPY_ARGS_H

#define UCM_TILE_BYTES 16384u /* bytes that one thread block moves at a time */
#define UCM_RUNS_MAX 165
#define UCM_ROWS_MAX 62

/* A contiguous piece. */
struct ucm_run {
    unsigned long long memory;  /* caller memory */
    unsigned long long linear;  /* staging, or a bounce buffer */
    unsigned int bytes;
    unsigned int first_tile;    /* tiles of the pieces before it */
};

/* A strided piece: run r of the linear side is at memory + i * stride0 + j * stride1 + k * stride2,
   where k = r % count2, j = r / count2 % count1, i = r / count2 / count1. */
struct ucm_rows {
    unsigned long long memory;
    unsigned long long linear;
    unsigned long long stride[3];
    unsigned int bytes;
    unsigned int first_tile;
    unsigned int run;           /* bytes of one run */
    unsigned int count1;
    unsigned int count2;
    unsigned int unused;
};

struct ucm_head {
    unsigned int pieces;
    unsigned int tiles;
    unsigned int width;         /* bytes of one access: 16, 8, 4, 2 or 1; divides all addresses and lengths */
    unsigned int scatter;       /* 0: memory to linear, 1: linear to memory */
};

struct ucm_runs_args {
    struct ucm_head head;
    struct ucm_run pieces[UCM_RUNS_MAX];
};

struct ucm_rows_args {
    struct ucm_head head;
    struct ucm_rows pieces[UCM_ROWS_MAX];
};

#endif
