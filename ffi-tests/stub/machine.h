/* A pretend accelerator, shared by the fake libcuda and the fake libascendcl: memory, streams that are
 * threads, events, pinned ranges, and the rules whose breach ends the process with a sentence.
 *
 * Knows neither vendor's names. A test steers it through the ucm_stub_* functions below. */
#ifndef UCM_STUB_MACHINE_H
#define UCM_STUB_MACHINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define STUB_EXPORT __attribute__((visibility("default")))

/* Prints the sentence and aborts: the engine has done what a real device would punish silently. */
void stub_misuse(const char *call, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));

/* ---- failures on request ---- */

/* Counts a call. Nonzero: the status that it must return now. */
int stub_enter(const char *call);
/* Whether everything is dead: nonzero is the status that every call returns. */
int stub_dead(void);

/* ---- memory ---- */

enum stub_memory { STUB_NONE, STUB_DEVICE, STUB_PINNED, STUB_REGISTERED };

/* An address that only the device can reach, unless UCM_STUB_VISIBLE is in the environment. */
void *stub_device_alloc(size_t bytes);
void *stub_pinned_alloc(size_t bytes);
void stub_free(const char *call, void *base, enum stub_memory kind);
/* false: some of it is registered already. */
bool stub_register(void *base, size_t bytes);
/* false: not registered. */
bool stub_unregister(const char *call, void *base);
/* What a reset does: the pages may be mapped anew without anybody's word. */
void stub_unregister_all(void);
/* The range that holds the address. */
enum stub_memory stub_find(const void *address, void **base, size_t *bytes);
/* Whether the memory at the address is another device's. */
bool stub_is_foreign(const void *address);
/* The address through which the machine reaches what the caller sees at `address`. */
char *stub_reach(const void *address);

/* ---- streams and events ---- */

struct stub_stream;
struct stub_event;

/* Streams and events belong to the context that was current when they were made; NULL: the model's, or the default
 * stream's, which go with every context. */
struct stub_stream *stub_stream_new(const void *context);
/* Ends the process unless it is a live stream of this context. */
void stub_stream_check(const char *call, struct stub_stream *stream, const void *context);
void stub_stream_destroy(const char *call, struct stub_stream *stream);
bool stub_stream_idle(struct stub_stream *stream);
void stub_stream_wait_idle(struct stub_stream *stream);

struct stub_event *stub_event_new(const void *context);
/* Whether the handle is a live event. */
bool stub_event_known(struct stub_event *event);
void stub_event_destroy(const char *call, struct stub_event *event);
/* The event must belong to the context of the stream. */
void stub_record(struct stub_event *event, struct stub_stream *stream);
/* The event must have been recorded. */
void stub_wait(struct stub_stream *stream, struct stub_event *event);
bool stub_event_done(struct stub_event *event);

/* One transfer: rows of `width` bytes. The memory is checked now and when it runs. */
struct stub_copy {
    char *to;
    const char *from;
    size_t width, rows, to_pitch, from_pitch;
};
void stub_copy(const char *call, struct stub_stream *stream, const struct stub_copy *copy);
/* The same at once, on the caller's thread. */
void stub_copy_now(const char *call, const struct stub_copy *copy);
/* A kernel: `run(args)` in stream order; `args` is copied. It checks memory with stub_kernel_move. */
void stub_kernel(const char *call, struct stub_stream *stream, void (*run)(const void *args), const void *args,
                 size_t bytes);
void stub_kernel_move(void *to, const void *from, size_t bytes);
/* Where a kernel reaches this memory, all of which it must be allowed to touch. */
void *stub_kernel_reach(const void *address, size_t bytes);
void stub_host_function(struct stub_stream *stream, void (*function)(void *), void *data);
/* Whether this thread is inside a host function, where no call of the API is allowed. */
bool stub_in_host_function(void);
/* Waits for all streams' work. */
void stub_quiesce(void);

/* ---- what a test can say and ask ---- */

/* The nth counted call from now (1 is the next) returns `status`; 0: none. Sticky: the device is dead from then on:
 * streams stop where they are and every call returns `status`. */
STUB_EXPORT void ucm_stub_fail(long nth, int status, int sticky);
/* The same for calls of one name. */
STUB_EXPORT void ucm_stub_fail_call(const char *name, long nth, int status);
/* Name of the call that failed on request, or NULL. */
STUB_EXPORT const char *ucm_stub_failed(void);
/* Counted calls since the last reset. */
STUB_EXPORT long ucm_stub_calls(void);
/* Counted calls of that name since the last reset. */
STUB_EXPORT long ucm_stub_calls_of(const char *name);
/* Longest random pause before each transfer, in microseconds. */
STUB_EXPORT void ucm_stub_delay(unsigned micros);
/* Forgets counts, failures and delays. The device must be idle. */
STUB_EXPORT void ucm_stub_reset(void);
/* Live objects: "streams", "events", "device", "pinned", "registered". */
STUB_EXPORT long ucm_stub_live(const char *what);
/* A kernel of the model: takes `micros`, writes the pattern at the end. Who is enqueued later and touches the range
 * before it has ended has overtaken it; who was enqueued before and touches it once it has begun was not waited for. */
STUB_EXPORT void ucm_stub_model_write(void *stream, void *to, const void *pattern, size_t bytes, unsigned micros);
/* The same, of memory that is something else's from then on: it ends when the memory is freed. */
STUB_EXPORT void ucm_stub_model_take(void *stream, void *to, const void *pattern, size_t bytes);
/* A kernel of the model: copies what is there when the stream comes to it into host memory of the test. */
STUB_EXPORT void ucm_stub_model_read(void *stream, void *to, const void *from, size_t bytes);
/* Reads and writes device memory at once. */
STUB_EXPORT void ucm_stub_peek(void *to, const void *device, size_t bytes);
STUB_EXPORT void ucm_stub_poke(void *device, const void *from, size_t bytes);
/* The model's own memory, streams and events, as its framework would make them. */
STUB_EXPORT void *ucm_stub_device_alloc(size_t bytes);
STUB_EXPORT void ucm_stub_device_free(void *base);
/* Says that this memory is another device's: kernels of ours fault on it. On Ascend: that it is managed. */
STUB_EXPORT void ucm_stub_foreign(void *base);
STUB_EXPORT void *ucm_stub_stream_new(void);
STUB_EXPORT void ucm_stub_stream_destroy(void *stream);
STUB_EXPORT void ucm_stub_stream_sync(void *stream);
STUB_EXPORT void *ucm_stub_event_new(void);
STUB_EXPORT void ucm_stub_event_record(void *event, void *stream);
STUB_EXPORT void ucm_stub_event_destroy(void *event);
/* The call that a hash kernel says it is of. */
#define STUB_HASH "cuLaunchKernel of ucm_hash"
/* Streams stop before the next transfer, or only before the next hash, until nothing is held. */
enum { HOLD_NOTHING, HOLD_ALL, HOLD_HASHES };
STUB_EXPORT void ucm_stub_hold(int hold);
/* Hashes of so many bytes and more are wrong; 0: none (CUDA only). */
extern size_t stub_falsified;
STUB_EXPORT void ucm_stub_falsify(size_t bytes);
/* Streams that are stopped by that. */
STUB_EXPORT int ucm_stub_stopped(void);

#endif
