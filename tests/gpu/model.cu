/* Kernels that stand for a model in the GPU tests. model.ptx is made from this file by `cargo xtask ptx`. */

/* Waits, then writes words that depend on their place and a seed: whoever reads before its end sees the
   words that were there. */
extern "C" __global__ void slow_fill(unsigned *to, unsigned words, unsigned seed, unsigned long long cycles) {
    const unsigned long long begin = clock64();
    while ((unsigned long long)clock64() - begin < cycles) {
    }
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) {
        to[i] = i * 2654435761u + seed;
    }
}

/* Writes where nothing is: the context is broken from then on. */
extern "C" __global__ void fault(unsigned *nowhere) {
    *nowhere = 1;
}
