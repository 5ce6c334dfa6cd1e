#define _GNU_SOURCE
#include "machine.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define STREAM_MAGIC 0x73747265616d3031ull
#define EVENT_MAGIC 0x6576656e74303031ull
#define DEAD_MAGIC 0xdeadull
#define RANGES_MAX 4096
#define FILLS_MAX 256
#define EVENTS_MAX (1 << 20)

/* One lock for everything: the machine is for finding wrong order, not for speed. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static __thread bool in_host_function;

static long calls, fail_at, named_at;
static int fail_status, fail_sticky, named_status, dead_status;
static char named[64], failed[64];
static unsigned delay_micros;
static bool held;
static unsigned random_state = 12345;

#define NAMES_MAX 128
static struct {
    const char *name;
    long count;
} counts[NAMES_MAX];

void stub_misuse(const char *call, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "fake driver: %s: ", call);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    abort();
}

static void pause_micros(unsigned micros) {
    struct timespec time = {micros / 1000000, (long)(micros % 1000000) * 1000};
    nanosleep(&time, NULL);
}

/* ---- failures on request ---- */

static void count(const char *call) {
    for (int i = 0; i < NAMES_MAX; i++) {
        if (!counts[i].name || !strcmp(counts[i].name, call)) {
            counts[i].name = call;
            counts[i].count++;
            return;
        }
    }
}

int stub_enter(const char *call) {
    if (in_host_function) {
        stub_misuse(call, "called from a host function, where no call is allowed");
    }
    pthread_mutex_lock(&lock);
    int status = dead_status;
    calls++;
    count(call);
    if (!status && fail_at && --fail_at == 0) {
        status = fail_status;
        snprintf(failed, sizeof failed, "%s", call);
        if (fail_sticky) {
            dead_status = status;
            pthread_cond_broadcast(&changed);
        }
    } else if (!status && named_at && !strcmp(named, call) && --named_at == 0) {
        status = named_status;
        snprintf(failed, sizeof failed, "%s", call);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

int stub_dead(void) {
    return dead_status;
}

/* A process ends with its driver: what runs on then gets this status, as cuda's DEINITIALIZED. */
__attribute__((destructor)) static void deinitialise(void) {
    pthread_mutex_lock(&lock);
    dead_status = 4;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void ucm_stub_fail(long nth, int status, int sticky) {
    pthread_mutex_lock(&lock);
    fail_at = nth;
    fail_status = status;
    fail_sticky = sticky;
    failed[0] = 0;
    pthread_mutex_unlock(&lock);
}

void ucm_stub_fail_call(const char *name, long nth, int status) {
    pthread_mutex_lock(&lock);
    snprintf(named, sizeof named, "%s", name);
    named_at = nth;
    named_status = status;
    failed[0] = 0;
    pthread_mutex_unlock(&lock);
}

const char *ucm_stub_failed(void) {
    return failed[0] ? failed : NULL;
}

long ucm_stub_calls(void) {
    return calls;
}

long ucm_stub_calls_of(const char *name) {
    long total = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < NAMES_MAX && counts[i].name; i++) {
        if (!strcmp(counts[i].name, name)) {
            total = counts[i].count;
        }
    }
    pthread_mutex_unlock(&lock);
    return total;
}

void ucm_stub_delay(unsigned micros) {
    delay_micros = micros;
}

void ucm_stub_hold(int hold) {
    pthread_mutex_lock(&lock);
    held = hold;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* ---- memory ---- */

struct range {
    char *base;
    size_t bytes;
    enum stub_memory kind;
    char *alias; /* where the machine reaches device memory */
    int pending; /* transfers enqueued that touch it */
    bool foreign;
};

static struct range ranges[RANGES_MAX];
static int ranges_used; /* all from here on were never live */

static struct range *range_of(const void *address) {
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
    pthread_mutex_lock(&lock);
    add_range(seen, bytes, STUB_DEVICE, alias);
    pthread_mutex_unlock(&lock);
    return seen;
}

void *stub_pinned_alloc(size_t bytes) {
    size_t length = (bytes + 4095) & ~(size_t)4095;
    char *base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        stub_misuse("allocation", "no pinned memory");
    }
    pthread_mutex_lock(&lock);
    add_range(base, bytes, STUB_PINNED, base);
    pthread_mutex_unlock(&lock);
    return base;
}

void stub_free(const char *call, void *base, enum stub_memory kind) {
    pthread_mutex_lock(&lock);
    struct range *range = range_of(base);
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
    range->kind = STUB_NONE;
    pthread_mutex_unlock(&lock);
}

bool stub_register(void *base, size_t bytes) {
    pthread_mutex_lock(&lock);
    bool free = !range_of(base) && !range_of((char *)base + bytes - 1);
    if (free) {
        add_range(base, bytes, STUB_REGISTERED, base);
    }
    pthread_mutex_unlock(&lock);
    return free;
}

bool stub_unregister(const char *call, void *base) {
    pthread_mutex_lock(&lock);
    struct range *range = range_of(base);
    bool known = range && range->base == base && range->kind == STUB_REGISTERED;
    if (known && range->pending) {
        stub_misuse(call, "%p is unregistered while %d transfers of it are under way", base, range->pending);
    }
    if (known) {
        range->kind = STUB_NONE;
    }
    pthread_mutex_unlock(&lock);
    return known;
}

void stub_unregister_all(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < ranges_used; i++) {
        if (ranges[i].kind == STUB_REGISTERED) {
            ranges[i].kind = STUB_NONE;
        }
    }
    pthread_mutex_unlock(&lock);
}

enum stub_memory stub_find(const void *address, void **base, size_t *bytes) {
    pthread_mutex_lock(&lock);
    struct range *range = range_of(address);
    enum stub_memory kind = range ? range->kind : STUB_NONE;
    if (range && base) {
        *base = range->base;
    }
    if (range && bytes) {
        *bytes = range->bytes;
    }
    pthread_mutex_unlock(&lock);
    return kind;
}

bool stub_is_foreign(const void *address) {
    pthread_mutex_lock(&lock);
    struct range *range = range_of(address);
    bool foreign = range && range->foreign;
    pthread_mutex_unlock(&lock);
    return foreign;
}

void ucm_stub_foreign(void *base) {
    pthread_mutex_lock(&lock);
    range_of(base)->foreign = true;
    pthread_mutex_unlock(&lock);
}

char *stub_reach(const void *address) {
    pthread_mutex_lock(&lock);
    struct range *range = range_of(address);
    char *reached = range ? range->alias + ((const char *)address - range->base) : (char *)(uintptr_t)address;
    pthread_mutex_unlock(&lock);
    return reached;
}

void ucm_stub_peek(void *to, const void *device, size_t bytes) {
    memcpy(to, stub_reach(device), bytes);
}

void ucm_stub_poke(void *device, const void *from, size_t bytes) {
    memcpy(stub_reach(device), from, bytes);
}

/* ---- what the model's kernels are writing ---- */

static struct {
    const char *base;
    size_t bytes;
} fills[FILLS_MAX];

static void check_fills(const char *call, const char *base, size_t bytes) {
    for (int i = 0; i < FILLS_MAX; i++) {
        if (fills[i].bytes && base < fills[i].base + fills[i].bytes && fills[i].base < base + bytes) {
            stub_misuse(call, "%p is touched while a kernel of the model still writes it: the copy overtook its event",
                        (const void *)base);
        }
    }
}

void ucm_stub_reset(void) {
    pthread_mutex_lock(&lock);
    calls = fail_at = named_at = 0;
    failed[0] = 0;
    delay_micros = 0;
    held = false;
    dead_status = 0;
    memset(counts, 0, sizeof counts);
    memset(fills, 0, sizeof fills);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* ---- streams ---- */

struct token {
    int references;
    bool done;
    int waiting;
};

enum kind { COPY, KERNEL, RECORD, WAIT, HOST, MODEL_WRITE, MODEL_READ };

struct operation {
    struct operation *next;
    enum kind kind;
    const char *call;
    struct stub_copy copy;
    struct range *from_range, *to_range;
    void (*run)(const void *);
    void (*function)(void *);
    void *data;
    struct token *token;
    char *to;
    const char *from;
    size_t bytes;
    unsigned micros;
};

struct stub_stream {
    uint64_t magic;
    pthread_t thread;
    pthread_cond_t work; /* something was queued, or the stream destroyed */
    struct operation *first, *last;
    int queued;
    bool destroyed;
};

struct stub_event {
    uint64_t magic;
    struct token *token;
};

static long live_streams, live_events;
#define STREAMS_MAX 4096
static struct stub_stream *streams[STREAMS_MAX];
/* Handles are never used again, so that the use of a destroyed one is caught. */
static struct stub_event events[EVENTS_MAX];
static long events_made;

static void release(struct token *token) {
    if (token && --token->references == 0) {
        free(token);
    }
}

static void enqueue(struct stub_stream *stream, struct operation *operation) {
    operation->next = NULL;
    if (stream->last) {
        stream->last->next = operation;
    } else {
        stream->first = operation;
    }
    stream->last = operation;
    stream->queued++;
    pthread_cond_signal(&stream->work);
}

static struct operation *operation_new(const char *call, enum kind kind) {
    struct operation *operation = calloc(1, sizeof *operation);
    operation->call = call;
    operation->kind = kind;
    return operation;
}

/* Each side lies in one range, or outside of all: stub_copy has made sure, and holds it. */
static void copy_rows(const struct stub_copy *copy) {
    char *to = stub_reach(copy->to);
    const char *from = stub_reach(copy->from);
    for (size_t row = 0; row < copy->rows; row++) {
        memcpy(to + row * copy->to_pitch, from + row * copy->from_pitch, copy->width);
    }
}

static size_t span(const struct stub_copy *copy, size_t pitch) {
    return (copy->rows - 1) * pitch + copy->width;
}

/* Runs without the lock, except where it says so. */
static void execute(struct operation *operation) {
    switch (operation->kind) {
    case COPY:
        pthread_mutex_lock(&lock);
        check_fills(operation->call, operation->copy.from, span(&operation->copy, operation->copy.from_pitch));
        check_fills(operation->call, operation->copy.to, span(&operation->copy, operation->copy.to_pitch));
        pthread_mutex_unlock(&lock);
        copy_rows(&operation->copy);
        break;
    case KERNEL:
        operation->run(operation->data);
        free(operation->data);
        break;
    case RECORD:
        pthread_mutex_lock(&lock);
        operation->token->done = true;
        release(operation->token);
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
        break;
    case WAIT:
        pthread_mutex_lock(&lock);
        while (!operation->token->done && !dead_status) {
            pthread_cond_wait(&changed, &lock);
        }
        operation->token->waiting--;
        release(operation->token);
        pthread_mutex_unlock(&lock);
        break;
    case HOST:
        in_host_function = true;
        operation->function(operation->data);
        in_host_function = false;
        break;
    case MODEL_WRITE:
        pause_micros(operation->micros);
        memcpy(stub_reach(operation->to), operation->data, operation->bytes);
        free(operation->data);
        pthread_mutex_lock(&lock);
        for (int i = 0; i < FILLS_MAX; i++) {
            if (fills[i].base == operation->to && fills[i].bytes == operation->bytes) {
                fills[i].bytes = 0;
                break;
            }
        }
        pthread_mutex_unlock(&lock);
        break;
    case MODEL_READ:
        memcpy(operation->to, stub_reach(operation->from), operation->bytes);
        break;
    }
}

static bool is_transfer(const struct operation *operation) {
    return operation->kind == COPY || operation->kind == KERNEL;
}

static void *stream_main(void *argument) {
    struct stub_stream *stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!stream->first && !stream->destroyed) {
            pthread_cond_wait(&stream->work, &lock);
        }
        struct operation *operation = stream->first;
        if (!operation) {
            break;
        }
        while (held && is_transfer(operation) && !dead_status) {
            pthread_cond_wait(&changed, &lock);
        }
        /* A dead device stops where it is: what is queued never happens. */
        bool dead = dead_status != 0;
        unsigned pause = 0;
        if (!dead && delay_micros && is_transfer(operation)) {
            random_state = random_state * 1103515245u + 12345u;
            pause = (random_state >> 8) % delay_micros;
        }
        pthread_mutex_unlock(&lock);
        if (pause) {
            pause_micros(pause);
        }
        if (!dead) {
            execute(operation);
        }
        pthread_mutex_lock(&lock);
        if (operation->from_range) {
            operation->from_range->pending--;
        }
        if (operation->to_range) {
            operation->to_range->pending--;
        }
        stream->first = operation->next;
        if (!stream->first) {
            stream->last = NULL;
        }
        stream->queued--;
        free(operation);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

struct stub_stream *stub_stream_new(void) {
    struct stub_stream *stream = calloc(1, sizeof *stream);
    stream->magic = STREAM_MAGIC;
    pthread_cond_init(&stream->work, NULL);
    pthread_mutex_lock(&lock);
    live_streams++;
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (!streams[i]) {
            streams[i] = stream;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    pthread_create(&stream->thread, NULL, stream_main, stream);
    return stream;
}

void stub_stream_check(const char *call, struct stub_stream *stream) {
    if (!stream || stream->magic != STREAM_MAGIC) {
        stub_misuse(call, "%p is not a live stream", (void *)stream);
    }
}

void stub_stream_destroy(const char *call, struct stub_stream *stream) {
    stub_stream_check(call, stream);
    pthread_mutex_lock(&lock);
    stream->destroyed = true;
    pthread_cond_signal(&stream->work);
    pthread_mutex_unlock(&lock);
    pthread_join(stream->thread, NULL);
    pthread_mutex_lock(&lock);
    stream->magic = DEAD_MAGIC;
    live_streams--;
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (streams[i] == stream) {
            streams[i] = NULL;
        }
    }
    pthread_mutex_unlock(&lock);
}

bool stub_stream_idle(struct stub_stream *stream) {
    pthread_mutex_lock(&lock);
    bool idle = stream->queued == 0;
    pthread_mutex_unlock(&lock);
    return idle;
}

static void wait_idle_locked(struct stub_stream *stream) {
    while (stream->queued && !dead_status) {
        pthread_cond_wait(&changed, &lock);
    }
}

void stub_stream_wait_idle(struct stub_stream *stream) {
    pthread_mutex_lock(&lock);
    wait_idle_locked(stream);
    pthread_mutex_unlock(&lock);
}

void stub_quiesce(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (streams[i]) {
            wait_idle_locked(streams[i]);
        }
    }
    pthread_mutex_unlock(&lock);
}

/* ---- events ---- */

struct stub_event *stub_event_new(void) {
    pthread_mutex_lock(&lock);
    if (events_made == EVENTS_MAX) {
        stub_misuse("event", "more than %d were made", EVENTS_MAX);
    }
    struct stub_event *event = &events[events_made++];
    event->magic = EVENT_MAGIC;
    live_events++;
    pthread_mutex_unlock(&lock);
    return event;
}

bool stub_event_known(struct stub_event *event) {
    pthread_mutex_lock(&lock);
    uintptr_t at = (uintptr_t)event, first = (uintptr_t)events;
    bool inside = at >= first && at < first + sizeof *events * (size_t)events_made && (at - first) % sizeof *events == 0;
    bool known = inside && event->magic == EVENT_MAGIC;
    pthread_mutex_unlock(&lock);
    return known;
}

void stub_event_destroy(const char *call, struct stub_event *event) {
    if (!stub_event_known(event)) {
        stub_misuse(call, "%p is not a live event", (void *)event);
    }
    pthread_mutex_lock(&lock);
    event->magic = DEAD_MAGIC;
    release(event->token);
    event->token = NULL;
    live_events--;
    pthread_mutex_unlock(&lock);
}

void stub_record(struct stub_event *event, struct stub_stream *stream) {
    struct operation *operation = operation_new("record", RECORD);
    struct token *token = calloc(1, sizeof *token);
    token->references = 2;
    operation->token = token;
    pthread_mutex_lock(&lock);
    release(event->token);
    event->token = token;
    enqueue(stream, operation);
    pthread_mutex_unlock(&lock);
}

void stub_wait(struct stub_stream *stream, struct stub_event *event) {
    pthread_mutex_lock(&lock);
    if (event->token) {
        struct operation *operation = operation_new("wait", WAIT);
        operation->token = event->token;
        operation->token->references++;
        operation->token->waiting++;
        enqueue(stream, operation);
    }
    pthread_mutex_unlock(&lock);
}

bool stub_event_done(struct stub_event *event) {
    pthread_mutex_lock(&lock);
    bool done = !event->token || event->token->done;
    pthread_mutex_unlock(&lock);
    return done;
}

void stub_event_wait(struct stub_event *event) {
    pthread_mutex_lock(&lock);
    struct token *token = event->token;
    if (token) {
        token->references++;
        while (!token->done && !dead_status) {
            pthread_cond_wait(&changed, &lock);
        }
        release(token);
    }
    pthread_mutex_unlock(&lock);
}

/* ---- work ---- */

static struct range *hold_range(const char *call, const char *address, size_t bytes) {
    struct range *range = range_of(address);
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

void stub_copy(const char *call, struct stub_stream *stream, const struct stub_copy *copy) {
    if (!copy->rows || !copy->width) {
        stub_misuse(call, "a transfer of nothing");
    }
    struct operation *operation = operation_new(call, COPY);
    operation->copy = *copy;
    pthread_mutex_lock(&lock);
    operation->from_range = hold_range(call, copy->from, span(copy, copy->from_pitch));
    operation->to_range = hold_range(call, copy->to, span(copy, copy->to_pitch));
    enqueue(stream, operation);
    pthread_mutex_unlock(&lock);
}

void stub_kernel(const char *call, struct stub_stream *stream, void (*run)(const void *), const void *args,
                 size_t bytes) {
    struct operation *operation = operation_new(call, KERNEL);
    operation->run = run;
    operation->data = malloc(bytes);
    memcpy(operation->data, args, bytes);
    pthread_mutex_lock(&lock);
    enqueue(stream, operation);
    pthread_mutex_unlock(&lock);
}

void *stub_kernel_reach(const void *address, size_t bytes) {
    const char *begin = address;
    pthread_mutex_lock(&lock);
    struct range *range = range_of(begin);
    if (!range || range->foreign || begin + bytes > range->base + range->bytes) {
        stub_misuse("kernel", "illegal address %p: neither device memory nor pinned", address);
    }
    check_fills("kernel", begin, bytes);
    pthread_mutex_unlock(&lock);
    return stub_reach(address);
}

void stub_kernel_move(void *to, const void *from, size_t bytes) {
    memcpy(stub_kernel_reach(to, bytes), stub_kernel_reach(from, bytes), bytes);
}

void stub_host_function(struct stub_stream *stream, void (*function)(void *), void *data) {
    struct operation *operation = operation_new("host function", HOST);
    operation->function = function;
    operation->data = data;
    pthread_mutex_lock(&lock);
    enqueue(stream, operation);
    pthread_mutex_unlock(&lock);
}

bool stub_in_host_function(void) {
    return in_host_function;
}

void ucm_stub_model_write(void *stream, void *to, const void *pattern, size_t bytes, unsigned micros) {
    struct operation *operation = operation_new("model", MODEL_WRITE);
    operation->to = to;
    operation->bytes = bytes;
    operation->micros = micros;
    operation->data = malloc(bytes);
    memcpy(operation->data, pattern, bytes);
    pthread_mutex_lock(&lock);
    int at = 0;
    while (at < FILLS_MAX && fills[at].bytes) {
        at++;
    }
    if (at == FILLS_MAX) {
        stub_misuse("model", "more than %d kernels write at once", FILLS_MAX);
    }
    fills[at].base = to;
    fills[at].bytes = bytes;
    enqueue(stream, operation);
    pthread_mutex_unlock(&lock);
}

void ucm_stub_model_read(void *stream, void *to, const void *from, size_t bytes) {
    struct operation *operation = operation_new("model", MODEL_READ);
    operation->to = to;
    operation->from = from;
    operation->bytes = bytes;
    pthread_mutex_lock(&lock);
    enqueue(stream, operation);
    pthread_mutex_unlock(&lock);
}

long ucm_stub_live(const char *what) {
    if (!strcmp(what, "streams")) {
        return live_streams;
    }
    if (!strcmp(what, "events")) {
        return live_events;
    }
    enum stub_memory kind = !strcmp(what, "device")   ? STUB_DEVICE
                            : !strcmp(what, "pinned") ? STUB_PINNED
                                                      : STUB_REGISTERED;
    long live = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < RANGES_MAX; i++) {
        live += ranges[i].kind == kind;
    }
    pthread_mutex_unlock(&lock);
    return live;
}

/* ---- the model's own objects ---- */

void *ucm_stub_device_alloc(size_t bytes) {
    return stub_device_alloc(bytes);
}

void ucm_stub_device_free(void *base) {
    stub_free("model", base, STUB_DEVICE);
}

void *ucm_stub_stream_new(void) {
    return stub_stream_new();
}

void ucm_stub_stream_destroy(void *stream) {
    stub_stream_destroy("model", stream);
}

void ucm_stub_stream_sync(void *stream) {
    stub_stream_wait_idle(stream);
}

void *ucm_stub_event_new(void) {
    return stub_event_new();
}

void ucm_stub_event_record(void *event, void *stream) {
    stub_record(event, stream);
}

void ucm_stub_event_destroy(void *event) {
    stub_event_destroy("model", event);
}
