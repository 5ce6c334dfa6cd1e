/* What the host passes to the hash kernel, by value: mirrored in hash.rs and read by the fake driver of
   ffi-tests/stub. All kernel arguments together must stay below 4096 bytes. */
#ifndef UCM_HASH_ARGS_H
#define UCM_HASH_ARGS_H

#define UCM_HASH_THREADS 288u /* of a thread block: 256 that add up, and a warp that chains */
#define UCM_HASH_RUNS_MAX 160
#define UCM_HASH_BYTES_MIN 241u /* XXH3 has another form for shorter inputs */

/* Bytes in device memory, from a multiple of 8 on. */
struct ucm_hash_run {
    unsigned long long address;
    unsigned long long bytes;
    unsigned long long seed;
};

struct ucm_hash_args {
    unsigned long long sums; /* where the device writes one 64-bit sum a run */
    unsigned int runs;
    unsigned int unused;
    struct ucm_hash_run run[UCM_HASH_RUNS_MAX];
};

#endif
