/* XXH3-64 with a seed, of runs of device memory: the checksum of the format on storage, taken where the
   bytes are. hash.ptx is made from this file, and committed, by

       cargo xtask ptx        (nvcc -ptx -arch=compute_75 --std=c++17 -O3 hash.cu)

   XXH3 reads a long input in blocks of 1 KiB: 16 stripes of 8 lanes of 8 bytes. Inside a block the lanes
   only add, so many threads can add up many blocks at once; between blocks each lane is scrambled, one
   multiplication after another, which is all that has to be done in order.

   One thread block takes one run: it occupies one multiprocessor, and leaves the others to the model. */
#include "hash_args.h"

typedef unsigned long long u64;
typedef unsigned int u32;

#define BLOCK_BYTES 1024u
#define STRIPE_BYTES 64u
#define LANES 8u
#define STRIPES (BLOCK_BYTES / STRIPE_BYTES)
#define ADDERS 256u               /* threads that add up, a lane of a block each */
#define TILE (ADDERS / LANES)     /* blocks that are added up at a time */
#define SECRET_WORDS 24u
#define SCRAMBLE_WORD 16u         /* the last 64 bytes of the secret */
#define LAST_STRIPE_BYTE 121u     /* 7 bytes before those */
#define MERGE_BYTE 11u

#define PRIME32_1 0x9E3779B1ull
#define PRIME32_2 0x85EBCA77ull
#define PRIME32_3 0xC2B2AE3Dull
#define PRIME64_1 0x9E3779B185EBCA87ull
#define PRIME64_2 0xC2B2AE3D27D4EB4Full
#define PRIME64_3 0x165667B19E3779F9ull
#define PRIME64_4 0x85EBCA77C2B2AE63ull
#define PRIME64_5 0x27D4EB2F165667C5ull
#define PRIME_MX1 0x165667919E3779F9ull

__constant__ u64 default_secret[SECRET_WORDS] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

__constant__ u64 first_accumulators[LANES] = {
    PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
};

__device__ u64 word_at(const unsigned char *from) {
    u64 word = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        word |= static_cast<u64>(from[i]) << (8 * i);
    }
    return word;
}

__device__ u64 product(u64 keyed) { return (keyed & 0xffffffffull) * (keyed >> 32); }

__device__ u64 scrambled(u64 accumulator, u64 key) {
    return (accumulator ^ (accumulator >> 47) ^ key) * PRIME32_1;
}

__device__ u64 folded(u64 left, u64 right) { return (left * right) ^ __umul64hi(left, right); }

/* What one lane of a block adds to its accumulator. The two lanes of a pair exchange their words, so both
   must be here. */
__device__ u64 lane_of_block(const u64 *block, u32 lane, const u64 *secret, u32 pair_mask) {
    u64 products = 0, words = 0, held[STRIPES];
    /* All in flight at once: a read of device memory takes most of a microsecond. */
#pragma unroll
    for (u32 stripe = 0; stripe < STRIPES; stripe++) {
        held[stripe] = __ldcs(block + stripe * LANES + lane);
    }
#pragma unroll
    for (u32 stripe = 0; stripe < STRIPES; stripe++) {
        products += product(held[stripe] ^ secret[stripe + lane]);
        words += held[stripe];
    }
    return products + __shfl_xor_sync(pair_mask, words, 1);
}

/* What comes behind the last whole block: whole stripes, and the last 64 bytes once more. */
__device__ u64 lane_of_tail(const unsigned char *begin, u64 bytes, u64 blocks, u32 lane, const u64 *secret) {
    const u64 left = bytes - 1 - blocks * BLOCK_BYTES;
    const u64 *stripes = reinterpret_cast<const u64 *>(begin + blocks * BLOCK_BYTES);
    u64 products = 0, words = 0;
    for (u32 stripe = 0; stripe < left / STRIPE_BYTES; stripe++) {
        const u64 word = stripes[stripe * LANES + lane];
        products += product(word ^ secret[stripe + lane]);
        words += word;
    }
    const u64 word = word_at(begin + bytes - STRIPE_BYTES + lane * 8);
    const unsigned char *keys = reinterpret_cast<const unsigned char *>(secret) + LAST_STRIPE_BYTE;
    products += product(word ^ word_at(keys + lane * 8));
    words += word;
    return products + __shfl_xor_sync(0xffu, words, 1);
}

__device__ u64 merged(const u64 *accumulators, u64 bytes, const u64 *secret) {
    const unsigned char *keys = reinterpret_cast<const unsigned char *>(secret) + MERGE_BYTE;
    u64 sum = bytes * PRIME64_1;
    for (u32 i = 0; i < LANES; i += 2) {
        sum += folded(accumulators[i] ^ word_at(keys + 8 * i), accumulators[i + 1] ^ word_at(keys + 8 * i + 8));
    }
    sum = (sum ^ (sum >> 37)) * PRIME_MX1;
    return sum ^ (sum >> 32);
}

extern "C" __global__ void __launch_bounds__(UCM_HASH_THREADS) ucm_hash(const __grid_constant__ ucm_hash_args args) {
    __shared__ u64 secret[SECRET_WORDS];
    __shared__ u64 added[2][TILE][LANES];
    __shared__ u64 accumulators[LANES];
    const ucm_hash_run run = args.run[blockIdx.x];
    const unsigned char *begin = reinterpret_cast<const unsigned char *>(run.address);
    const u64 blocks = (run.bytes - 1) / BLOCK_BYTES;
    const u32 thread = threadIdx.x, lane = thread % LANES;
    const bool chains = thread >= ADDERS;
    if (thread < SECRET_WORDS) {
        secret[thread] = default_secret[thread] + (thread % 2 ? 0 - run.seed : run.seed);
    }
    __syncthreads();
    u64 accumulator = first_accumulators[lane];
    u32 turn = 0;
    /* The chain follows the adders by one tile: what it reads now is not written before the next barrier
       but one, so one barrier a tile is enough. */
    for (u64 tile = 0; tile < blocks; tile += TILE, turn ^= 1) {
        const u64 block = tile + thread / LANES;
        if (!chains) {
            const u32 pairs = __ballot_sync(0xffffffffu, block < blocks);
            if (block < blocks) {
                const u64 *words = reinterpret_cast<const u64 *>(begin + block * BLOCK_BYTES);
                added[turn][thread / LANES][lane] = lane_of_block(words, lane, secret, pairs);
            }
        }
        __syncthreads();
        if (chains && thread < ADDERS + LANES) {
            const u32 count = blocks - tile < TILE ? static_cast<u32>(blocks - tile) : TILE;
            for (u32 i = 0; i < count; i++) {
                accumulator = scrambled(accumulator + added[turn][i][lane], secret[SCRAMBLE_WORD + lane]);
            }
        }
    }
    if (chains && thread < ADDERS + LANES) {
        accumulators[lane] = accumulator + lane_of_tail(begin, run.bytes, blocks, lane, secret);
        __syncwarp(0xffu);
        if (lane == 0) {
            reinterpret_cast<u64 *>(args.sums)[blockIdx.x] = merged(accumulators, run.bytes, secret);
            __threadfence_system();
        }
    }
}
