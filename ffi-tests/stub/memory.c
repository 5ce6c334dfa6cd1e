/* Memory of the pretended machine: ranges, what they are, and who is at them. */
#define _GNU_SOURCE
#include "inside.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RANGES_MAX 4096
#define FILLS_MAX 256

static struct range ranges[RANGES_MAX];
static int ranges_used; /* all from here on were never live */

/* What kernels of the model write, or will when their streams come to them. */
static struct fill {
    const char *base;
    size_t bytes;
    uint64_t order;
    bool begun;
} fills[FILLS_MAX];

struct range *stub_range_of(const void *address) {
    for (int i = 0; i < ranges_used; i++) {
        struct range *range = &ranges[i];
        if (range->kind && (const char *)address >= range->base && (const char *)address < range->base + range->bytes) {
            return range;
        }
    }
    return NULL;
}

static void add_range(char *base, size_t bytes, enum stub_memory kind, char *alias) {
    for (int i = 0; i < RANGES_MAX; i++) {
        if (!ranges[i].kind) {
            ranges[i] = (struct range){base, bytes, kind, alias, 0, false};
            ranges_used = i >= ranges_used ? i + 1 : ranges_used;
            return;
        }
    }
    stub_misuse("allocation", "more than %d ranges are live", RANGES_MAX);
}

/* Addresses of `length` bytes to map over, large ones at multiples of what the driver maps at once. */
static char *reserve(size_t length) {
    size_t step = length >= 2 << 20 ? 2 << 20 : 4096;
    char *found = mmap(NULL, length + step, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) {
        return NULL;
    }
    char *aligned = found + (step - (uintptr_t)found % step) % step;
    munmap(found, (size_t)(aligned - found));
    munmap(aligned + length, (size_t)(found + step - aligned));
    return aligned;
}

/* The caller sees pages that fault; the machine sees the same memory elsewhere. So an engine that reads
 * device memory with the CPU dies here as it would on a real machine. */
void *stub_device_alloc(size_t bytes) {
    size_t length = (bytes + 4095) & ~(size_t)4095;
    int file = memfd_create("ucm-stub-device", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)length)) {
        stub_misuse("allocation", "no memory for the pretend device");
    }
    /* Whole-store tests look at caller memory with the CPU. */
    int access = getenv("UCM_STUB_VISIBLE") ? PROT_READ | PROT_WRITE : PROT_NONE;
    char *seen = mmap(reserve(length), length, access, MAP_SHARED | MAP_FIXED, file, 0);
    char *alias = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (seen == MAP_FAILED || alias == MAP_FAILED) {
        stub_misuse("allocation", "no addresses for the pretend device");
    }
    pthread_mutex_lock(&stub_lock);
    add_range(seen, bytes, STUB_DEVICE, alias);
    pthread_mutex_unlock(&stub_lock);
    return seen;
}

void *stub_pinned_alloc(size_t bytes) {
    size_t length = (bytes + 4095) & ~(size_t)4095;
    char *base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        stub_misuse("allocation", "no pinned memory");
    }
    pthread_mutex_lock(&stub_lock);
    add_range(base, bytes, STUB_PINNED, base);
    pthread_mutex_unlock(&stub_lock);
    return base;
}

void stub_free(const char *call, void *base, enum stub_memory kind) {
    pthread_mutex_lock(&stub_lock);
    struct range *range = stub_range_of(base);
    if (!range || range->base != base || range->kind != kind) {
        stub_misuse(call, "%p is not memory that was allocated so, or it was freed before", base);
    }
    if (range->pending) {
        stub_misuse(call, "%p is freed while %d transfers of it are under way", base, range->pending);
    }
    size_t length = (range->bytes + 4095) & ~(size_t)4095;
    if (range->alias != range->base) {
        munmap(range->alias, length);
    }
    munmap(range->base, length);
    /* What was taken for good is so until here. */
    for (int i = 0; i < FILLS_MAX; i++) {
        if (fills[i].bytes && fills[i].base >= range->base && fills[i].base < range->base + range->bytes) {
            fills[i].bytes = 0;
        }
    }
    range->kind = STUB_NONE;
    pthread_mutex_unlock(&stub_lock);
}

bool stub_register(void *base, size_t bytes) {
    pthread_mutex_lock(&stub_lock);
    bool free = !stub_range_of(base) && !stub_range_of((char *)base + bytes - 1);
    if (free) {
        add_range(base, bytes, STUB_REGISTERED, base);
    }
    pthread_mutex_unlock(&stub_lock);
    return free;
}

bool stub_unregister(const char *call, void *base) {
    pthread_mutex_lock(&stub_lock);
    struct range *range = stub_range_of(base);
    bool known = range && range->base == base && range->kind == STUB_REGISTERED;
    if (known && range->pending) {
        stub_misuse(call, "%p is unregistered while %d transfers of it are under way", base, range->pending);
    }
    if (known) {
        range->kind = STUB_NONE;
    }
    pthread_mutex_unlock(&stub_lock);
    return known;
}

void stub_unregister_all(void) {
    pthread_mutex_lock(&stub_lock);
    for (int i = 0; i < ranges_used; i++) {
        if (ranges[i].kind == STUB_REGISTERED) {
            ranges[i].kind = STUB_NONE;
        }
    }
    pthread_mutex_unlock(&stub_lock);
}

enum stub_memory stub_find(const void *address, void **base, size_t *bytes) {
    pthread_mutex_lock(&stub_lock);
    struct range *range = stub_range_of(address);
    enum stub_memory kind = range ? range->kind : STUB_NONE;
    if (range && base) {
        *base = range->base;
    }
    if (range && bytes) {
        *bytes = range->bytes;
    }
    pthread_mutex_unlock(&stub_lock);
    return kind;
}

bool stub_is_foreign(const void *address) {
    pthread_mutex_lock(&stub_lock);
    struct range *range = stub_range_of(address);
    bool foreign = range && range->foreign;
    pthread_mutex_unlock(&stub_lock);
    return foreign;
}

void ucm_stub_foreign(void *base) {
    pthread_mutex_lock(&stub_lock);
    stub_range_of(base)->foreign = true;
    pthread_mutex_unlock(&stub_lock);
}

char *stub_reach(const void *address) {
    pthread_mutex_lock(&stub_lock);
    struct range *range = stub_range_of(address);
    char *reached = range ? range->alias + ((const char *)address - range->base) : (char *)(uintptr_t)address;
    pthread_mutex_unlock(&stub_lock);
    return reached;
}

void ucm_stub_peek(void *to, const void *device, size_t bytes) {
    memcpy(to, stub_reach(device), bytes);
}

void ucm_stub_poke(void *device, const void *from, size_t bytes) {
    memcpy(stub_reach(device), from, bytes);
}

void stub_check_fills(const char *call, const char *base, size_t bytes) {
    for (int i = 0; i < FILLS_MAX; i++) {
        struct fill *fill = &fills[i];
        if (!fill->bytes || base >= fill->base + fill->bytes || fill->base >= base + bytes) {
            continue;
        }
        if (fill->order < stub_order) {
            stub_misuse(call, "%p is touched while a kernel of the model still writes it: the copy overtook its event",
                        (const void *)base);
        }
        if (fill->begun) {
            stub_misuse(call, "%p is touched while the model writes over it: its stream did not wait for this copy",
                        (const void *)base);
        }
    }
}

static struct fill *fill_of(uint64_t order) {
    for (int i = 0; i < FILLS_MAX; i++) {
        if (fills[i].bytes && fills[i].order == order) {
            return &fills[i];
        }
    }
    return NULL;
}

void stub_add_fill(const char *base, size_t bytes, uint64_t order) {
    int at = 0;
    while (at < FILLS_MAX && fills[at].bytes) {
        at++;
    }
    if (at == FILLS_MAX) {
        stub_misuse("model", "more than %d kernels write at once", FILLS_MAX);
    }
    fills[at] = (struct fill){base, bytes, order, false};
}

void stub_begin_fill(uint64_t order) {
    struct fill *fill = fill_of(order);
    if (fill) {
        fill->begun = true;
    }
}

void stub_end_fill(uint64_t order) {
    struct fill *fill = fill_of(order);
    if (fill) {
        fill->bytes = 0;
    }
}

void stub_forget_fills(void) {
    memset(fills, 0, sizeof fills);
}

struct range *stub_hold_range(const char *call, const char *address, size_t bytes) {
    struct range *range = stub_range_of(address);
    if (!range) {
        return NULL;
    }
    if (address + bytes > range->base + range->bytes) {
        stub_misuse(call, "%zu bytes at %p end behind their allocation of %zu bytes", bytes, (const void *)address,
                    range->bytes);
    }
    range->pending++;
    return range;
}

long stub_live_ranges(enum stub_memory kind) {
    long live = 0;
    pthread_mutex_lock(&stub_lock);
    for (int i = 0; i < ranges_used; i++) {
        live += ranges[i].kind == kind;
    }
    pthread_mutex_unlock(&stub_lock);
    return live;
}
