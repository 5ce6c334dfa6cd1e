/* What the files of the pretended machine know of each other. */
#ifndef UCM_STUB_INSIDE_H
#define UCM_STUB_INSIDE_H

#include "machine.h"

#include <pthread.h>

/* One lock for everything: the machine is for finding wrong order, not for speed. */
extern pthread_mutex_t stub_lock;
extern pthread_cond_t stub_changed;
/* This thread is inside a host function. */
extern __thread bool stub_in_host;
/* The number of the operation that this thread carries out, in the order in which all were enqueued. */
extern __thread uint64_t stub_order;
/* Nonzero: everything is dead, and returns this. */
extern int stub_dead_status;
extern unsigned stub_delay_micros;
/* One of the HOLD_ values. */
extern int stub_held;

void stub_pause(unsigned micros);

/* ---- memory; all with the lock held ---- */

struct range {
    char *base;
    size_t bytes;
    enum stub_memory kind;
    char *alias; /* where the machine reaches device memory */
    int pending; /* transfers enqueued that touch it */
    bool foreign;
};

/* The range that holds the address, or NULL. */
struct range *stub_range_of(const void *address);
/* The same for a transfer that is enqueued: it must end in the range, which must not go before. */
struct range *stub_hold_range(const char *call, const char *address, size_t bytes);
/* Ends the process where a kernel of the model writes there that was enqueued before this thread's operation, or one
 * that was enqueued later and has begun all the same. */
void stub_check_fills(const char *call, const char *base, size_t bytes);
/* The kernel that was enqueued as number `order` will write there, has begun to, or has ended. */
void stub_add_fill(const char *base, size_t bytes, uint64_t order);
void stub_begin_fill(uint64_t order);
void stub_end_fill(uint64_t order);
void stub_forget_fills(void);
/* Without the lock. */
long stub_live_ranges(enum stub_memory kind);

#endif
