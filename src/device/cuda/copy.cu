/* Gather and scatter kernels. copy.ptx is made from this file, and committed, by

       cargo xtask ptx        (nvcc -ptx -arch=compute_75 --std=c++17 -O3 copy.cu)

   so that building UCM needs no CUDA toolkit; the driver translates the PTX for its GPU. */
#include "copy_args.h"

/* Streaming accesses: nothing here is read twice. */
template <typename Element> __device__ Element take(const char *from) {
    return __ldcs(reinterpret_cast<const Element *>(from));
}

template <typename Element> __device__ void put(char *to, Element value) {
    __stcs(reinterpret_cast<Element *>(to), value);
}

/* One thread block moves one tile at a time; neighbouring threads move neighbouring elements of the
   linear side, which may lie across the bus and so wants whole lines. Four elements are in flight per
   thread, because a read across the bus takes about a microsecond. */
template <typename Element, typename Offset>
__device__ void move_tile(char *memory, char *linear, unsigned begin, unsigned end, bool scatter,
                          Offset offset) {
    const unsigned step = blockDim.x * sizeof(Element);
    unsigned at = begin + threadIdx.x * sizeof(Element);
    while (at + 3 * step < end) {
        Element held[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned here = at + i * step;
            held[i] = take<Element>(scatter ? linear + here : memory + offset(here));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned here = at + i * step;
            put<Element>(scatter ? memory + offset(here) : linear + here, held[i]);
        }
        at += 4 * step;
    }
    for (; at < end; at += step) {
        put<Element>(scatter ? memory + offset(at) : linear + at,
                     take<Element>(scatter ? linear + at : memory + offset(at)));
    }
}

/* Walks the tiles of all pieces: block b takes tiles b, b + blocks, ... */
template <typename Args, typename Move> __device__ void walk(const Args &args, Move move) {
    unsigned piece = 0;
    for (unsigned tile = blockIdx.x; tile < args.head.tiles; tile += gridDim.x) {
        while (piece + 1 < args.head.pieces && args.pieces[piece + 1].first_tile <= tile) {
            piece++;
        }
        const unsigned begin = (tile - args.pieces[piece].first_tile) * UCM_TILE_BYTES;
        const unsigned left = args.pieces[piece].bytes - begin;
        move(piece, begin, begin + (left < UCM_TILE_BYTES ? left : UCM_TILE_BYTES));
    }
}

template <typename Element> __device__ void move_runs(const ucm_runs_args &args) {
    walk(args, [&](unsigned piece, unsigned begin, unsigned end) {
        const ucm_run &run = args.pieces[piece];
        move_tile<Element>(reinterpret_cast<char *>(run.memory), reinterpret_cast<char *>(run.linear),
                           begin, end, args.head.scatter, [](unsigned at) { return at; });
    });
}

template <typename Element> __device__ void move_rows(const ucm_rows_args &args) {
    walk(args, [&](unsigned piece, unsigned begin, unsigned end) {
        const ucm_rows &rows = args.pieces[piece];
        move_tile<Element>(reinterpret_cast<char *>(rows.memory), reinterpret_cast<char *>(rows.linear),
                           begin, end, args.head.scatter, [&](unsigned at) {
                               const unsigned run = at / rows.run;
                               const unsigned outer = run / rows.count2;
                               return outer / rows.count1 * rows.stride[0] +
                                      outer % rows.count1 * rows.stride[1] +
                                      run % rows.count2 * rows.stride[2] + at % rows.run;
                           });
    });
}

#define BY_WIDTH(move)                                                                                       \
    switch (args.head.width) {                                                                               \
    case 16: move<uint4>(args); break;                                                                       \
    case 8: move<uint2>(args); break;                                                                        \
    case 4: move<unsigned>(args); break;                                                                     \
    case 2: move<unsigned short>(args); break;                                                               \
    default: move<unsigned char>(args); break;                                                               \
    }

extern "C" __global__ void __launch_bounds__(256) ucm_copy_runs(const __grid_constant__ ucm_runs_args args) {
    BY_WIDTH(move_runs)
}

extern "C" __global__ void __launch_bounds__(256) ucm_copy_rows(const __grid_constant__ ucm_rows_args args) {
    BY_WIDTH(move_rows)
}
