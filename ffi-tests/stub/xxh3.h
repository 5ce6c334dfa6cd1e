/* XXH3-64 of inputs above 240 bytes, one byte after another as its specification has it: what the hash kernel
 * must compute. Shares nothing with the kernel or with the crate that the engine uses. */
#ifndef UCM_STUB_XXH3_H
#define UCM_STUB_XXH3_H

#include <stddef.h>
#include <stdint.h>

uint64_t stub_xxh3(const unsigned char *input, size_t bytes, uint64_t seed);

#endif
