/* Streams of the pretended machine, which are threads, events, and the work that they order. */
#define _GNU_SOURCE
#include "inside.h"

#include <stdlib.h>
#include <string.h>

#define STREAM_MAGIC 0x73747265616d3031ull
#define EVENT_MAGIC 0x6576656e74303031ull
#define DEAD_MAGIC 0xdeadull
#define EVENTS_MAX (1 << 20)

static unsigned random_state = 12345;
static uint64_t enqueued;
__thread uint64_t stub_order;

struct token {
    int references;
    bool done;
    int waiting;
};

enum kind { COPY, KERNEL, RECORD, WAIT, HOST, MODEL_WRITE, MODEL_TAKE, MODEL_READ };

struct operation {
    struct operation *next;
    uint64_t order;
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
    const void *context;
    pthread_t thread;
    pthread_cond_t work; /* something was queued, or the stream destroyed */
    struct operation *first, *last;
    int queued;
    bool destroyed;
};

struct stub_event {
    uint64_t magic;
    const void *context;
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
    operation->order = ++enqueued;
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
    stub_order = operation->order;
    switch (operation->kind) {
    case COPY:
        pthread_mutex_lock(&stub_lock);
        stub_check_fills(operation->call, operation->copy.from, span(&operation->copy, operation->copy.from_pitch));
        stub_check_fills(operation->call, operation->copy.to, span(&operation->copy, operation->copy.to_pitch));
        pthread_mutex_unlock(&stub_lock);
        copy_rows(&operation->copy);
        break;
    case KERNEL:
        operation->run(operation->data);
        free(operation->data);
        break;
    case RECORD:
        pthread_mutex_lock(&stub_lock);
        operation->token->done = true;
        release(operation->token);
        pthread_cond_broadcast(&stub_changed);
        pthread_mutex_unlock(&stub_lock);
        break;
    case WAIT:
        pthread_mutex_lock(&stub_lock);
        while (!operation->token->done && !stub_dead_status) {
            pthread_cond_wait(&stub_changed, &stub_lock);
        }
        operation->token->waiting--;
        release(operation->token);
        pthread_mutex_unlock(&stub_lock);
        break;
    case HOST:
        stub_in_host = true;
        operation->function(operation->data);
        stub_in_host = false;
        break;
    case MODEL_WRITE:
    case MODEL_TAKE:
        pthread_mutex_lock(&stub_lock);
        stub_begin_fill(operation->order);
        pthread_mutex_unlock(&stub_lock);
        stub_pause(operation->micros);
        memcpy(stub_reach(operation->to), operation->data, operation->bytes);
        free(operation->data);
        if (operation->kind == MODEL_WRITE) {
            pthread_mutex_lock(&stub_lock);
            stub_end_fill(operation->order);
            pthread_mutex_unlock(&stub_lock);
        }
        break;
    case MODEL_READ:
        memcpy(operation->to, stub_reach(operation->from), operation->bytes);
        break;
    }
}

static bool is_transfer(const struct operation *operation) {
    return operation->kind == COPY || operation->kind == KERNEL;
}

static int stopped;

int ucm_stub_stopped(void) {
    pthread_mutex_lock(&stub_lock);
    int streams = stopped;
    pthread_mutex_unlock(&stub_lock);
    return streams;
}

static bool is_held(const struct operation *operation) {
    return (stub_held == HOLD_ALL && is_transfer(operation)) || (stub_held == HOLD_HASHES && !strcmp(operation->call, STUB_HASH));
}

static void *stream_main(void *argument) {
    struct stub_stream *stream = argument;
    pthread_mutex_lock(&stub_lock);
    for (;;) {
        while (!stream->first && !stream->destroyed) {
            pthread_cond_wait(&stream->work, &stub_lock);
        }
        struct operation *operation = stream->first;
        if (!operation) {
            break;
        }
        while (is_held(operation) && !stub_dead_status) {
            stopped++;
            pthread_cond_wait(&stub_changed, &stub_lock);
            stopped--;
        }
        /* A dead device stops where it is: what is queued never happens. */
        bool dead = stub_dead_status != 0;
        unsigned pause = 0;
        if (!dead && stub_delay_micros && is_transfer(operation)) {
            random_state = random_state * 1103515245u + 12345u;
            pause = (random_state >> 8) % stub_delay_micros;
        }
        pthread_mutex_unlock(&stub_lock);
        if (pause) {
            stub_pause(pause);
        }
        if (!dead) {
            execute(operation);
        }
        pthread_mutex_lock(&stub_lock);
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
        pthread_cond_broadcast(&stub_changed);
    }
    pthread_mutex_unlock(&stub_lock);
    return NULL;
}

static bool differ(const void *one, const void *other) {
    return one && other && one != other;
}

struct stub_stream *stub_stream_new(const void *context) {
    struct stub_stream *stream = calloc(1, sizeof *stream);
    stream->context = context;
    stream->magic = STREAM_MAGIC;
    pthread_cond_init(&stream->work, NULL);
    pthread_mutex_lock(&stub_lock);
    live_streams++;
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (!streams[i]) {
            streams[i] = stream;
            break;
        }
    }
    pthread_mutex_unlock(&stub_lock);
    pthread_create(&stream->thread, NULL, stream_main, stream);
    return stream;
}

void stub_stream_check(const char *call, struct stub_stream *stream, const void *context) {
    if (!stream || stream->magic != STREAM_MAGIC) {
        stub_misuse(call, "%p is not a live stream", (void *)stream);
    }
    if (differ(stream->context, context)) {
        stub_misuse(call, "stream %p belongs to another context", (void *)stream);
    }
}

void stub_stream_destroy(const char *call, struct stub_stream *stream) {
    stub_stream_check(call, stream, NULL);
    pthread_mutex_lock(&stub_lock);
    stream->destroyed = true;
    pthread_cond_signal(&stream->work);
    pthread_mutex_unlock(&stub_lock);
    pthread_join(stream->thread, NULL);
    pthread_mutex_lock(&stub_lock);
    stream->magic = DEAD_MAGIC;
    live_streams--;
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (streams[i] == stream) {
            streams[i] = NULL;
        }
    }
    pthread_mutex_unlock(&stub_lock);
}

bool stub_stream_idle(struct stub_stream *stream) {
    pthread_mutex_lock(&stub_lock);
    bool idle = stream->queued == 0;
    pthread_mutex_unlock(&stub_lock);
    return idle;
}

static void wait_idle_locked(struct stub_stream *stream) {
    while (stream->queued && !stub_dead_status) {
        pthread_cond_wait(&stub_changed, &stub_lock);
    }
}

void stub_stream_wait_idle(struct stub_stream *stream) {
    pthread_mutex_lock(&stub_lock);
    wait_idle_locked(stream);
    pthread_mutex_unlock(&stub_lock);
}

void stub_quiesce(void) {
    pthread_mutex_lock(&stub_lock);
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (streams[i]) {
            wait_idle_locked(streams[i]);
        }
    }
    pthread_mutex_unlock(&stub_lock);
}

/* ---- events ---- */

struct stub_event *stub_event_new(const void *context) {
    pthread_mutex_lock(&stub_lock);
    if (events_made == EVENTS_MAX) {
        stub_misuse("event", "more than %d were made", EVENTS_MAX);
    }
    struct stub_event *event = &events[events_made++];
    event->magic = EVENT_MAGIC;
    event->context = context;
    live_events++;
    pthread_mutex_unlock(&stub_lock);
    return event;
}

bool stub_event_known(struct stub_event *event) {
    pthread_mutex_lock(&stub_lock);
    uintptr_t at = (uintptr_t)event, first = (uintptr_t)events;
    bool inside = at >= first && at < first + sizeof *events * (size_t)events_made && (at - first) % sizeof *events == 0;
    bool known = inside && event->magic == EVENT_MAGIC;
    pthread_mutex_unlock(&stub_lock);
    return known;
}

void stub_event_destroy(const char *call, struct stub_event *event) {
    if (!stub_event_known(event)) {
        stub_misuse(call, "%p is not a live event", (void *)event);
    }
    pthread_mutex_lock(&stub_lock);
    event->magic = DEAD_MAGIC;
    release(event->token);
    event->token = NULL;
    live_events--;
    pthread_mutex_unlock(&stub_lock);
}

void stub_record(struct stub_event *event, struct stub_stream *stream) {
    if (differ(event->context, stream->context)) {
        stub_misuse("record", "event %p and stream %p belong to different contexts", (void *)event, (void *)stream);
    }
    struct operation *operation = operation_new("record", RECORD);
    struct token *token = calloc(1, sizeof *token);
    token->references = 2;
    operation->token = token;
    pthread_mutex_lock(&stub_lock);
    release(event->token);
    event->token = token;
    enqueue(stream, operation);
    pthread_mutex_unlock(&stub_lock);
}

void stub_wait(struct stub_stream *stream, struct stub_event *event) {
    pthread_mutex_lock(&stub_lock);
    if (!event->token) {
        stub_misuse("wait", "event %p was never recorded, so nothing would be waited for", (void *)event);
    }
    struct operation *operation = operation_new("wait", WAIT);
    operation->token = event->token;
    operation->token->references++;
    operation->token->waiting++;
    enqueue(stream, operation);
    pthread_mutex_unlock(&stub_lock);
}

bool stub_event_done(struct stub_event *event) {
    pthread_mutex_lock(&stub_lock);
    bool done = !event->token || event->token->done;
    pthread_mutex_unlock(&stub_lock);
    return done;
}

/* ---- work ---- */

void stub_copy(const char *call, struct stub_stream *stream, const struct stub_copy *copy) {
    if (!copy->rows || !copy->width) {
        stub_misuse(call, "a transfer of nothing");
    }
    struct operation *operation = operation_new(call, COPY);
    operation->copy = *copy;
    pthread_mutex_lock(&stub_lock);
    operation->from_range = stub_hold_range(call, copy->from, span(copy, copy->from_pitch));
    operation->to_range = stub_hold_range(call, copy->to, span(copy, copy->to_pitch));
    enqueue(stream, operation);
    pthread_mutex_unlock(&stub_lock);
}

void stub_copy_now(const char *call, const struct stub_copy *copy) {
    pthread_mutex_lock(&stub_lock);
    struct range *from = stub_hold_range(call, copy->from, span(copy, copy->from_pitch));
    struct range *to = stub_hold_range(call, copy->to, span(copy, copy->to_pitch));
    stub_order = ++enqueued;
    stub_check_fills(call, copy->from, span(copy, copy->from_pitch));
    stub_check_fills(call, copy->to, span(copy, copy->to_pitch));
    pthread_mutex_unlock(&stub_lock);
    copy_rows(copy);
    pthread_mutex_lock(&stub_lock);
    for (int side = 0; side < 2; side++) {
        struct range *range = side ? to : from;
        if (range) {
            range->pending--;
        }
    }
    pthread_mutex_unlock(&stub_lock);
}

void stub_kernel(const char *call, struct stub_stream *stream, void (*run)(const void *), const void *args,
                 size_t bytes) {
    struct operation *operation = operation_new(call, KERNEL);
    operation->run = run;
    operation->data = malloc(bytes);
    memcpy(operation->data, args, bytes);
    pthread_mutex_lock(&stub_lock);
    enqueue(stream, operation);
    pthread_mutex_unlock(&stub_lock);
}

void *stub_kernel_reach(const void *address, size_t bytes) {
    const char *begin = address;
    pthread_mutex_lock(&stub_lock);
    struct range *range = stub_range_of(begin);
    if (!range || range->foreign || begin + bytes > range->base + range->bytes) {
        stub_misuse("kernel", "illegal address %p: neither device memory nor pinned", address);
    }
    stub_check_fills("kernel", begin, bytes);
    pthread_mutex_unlock(&stub_lock);
    return stub_reach(address);
}

void stub_kernel_move(void *to, const void *from, size_t bytes) {
    memcpy(stub_kernel_reach(to, bytes), stub_kernel_reach(from, bytes), bytes);
}

void stub_host_function(struct stub_stream *stream, void (*function)(void *), void *data) {
    struct operation *operation = operation_new("host function", HOST);
    operation->function = function;
    operation->data = data;
    pthread_mutex_lock(&stub_lock);
    enqueue(stream, operation);
    pthread_mutex_unlock(&stub_lock);
}

bool stub_in_host_function(void) {
    return stub_in_host;
}

static void model_fill(enum kind kind, void *stream, void *to, const void *pattern, size_t bytes, unsigned micros) {
    struct operation *operation = operation_new("model", kind);
    operation->to = to;
    operation->bytes = bytes;
    operation->micros = micros;
    operation->data = malloc(bytes);
    memcpy(operation->data, pattern, bytes);
    pthread_mutex_lock(&stub_lock);
    enqueue(stream, operation);
    stub_add_fill(to, bytes, operation->order);
    pthread_mutex_unlock(&stub_lock);
}

void ucm_stub_model_write(void *stream, void *to, const void *pattern, size_t bytes, unsigned micros) {
    model_fill(MODEL_WRITE, stream, to, pattern, bytes, micros);
}

void ucm_stub_model_take(void *stream, void *to, const void *pattern, size_t bytes) {
    model_fill(MODEL_TAKE, stream, to, pattern, bytes, 0);
}

void ucm_stub_model_read(void *stream, void *to, const void *from, size_t bytes) {
    struct operation *operation = operation_new("model", MODEL_READ);
    operation->to = to;
    operation->from = from;
    operation->bytes = bytes;
    pthread_mutex_lock(&stub_lock);
    enqueue(stream, operation);
    pthread_mutex_unlock(&stub_lock);
}

long ucm_stub_live(const char *what) {
    if (!strcmp(what, "streams")) {
        return live_streams;
    }
    if (!strcmp(what, "events")) {
        return live_events;
    }
    return stub_live_ranges(!strcmp(what, "device")   ? STUB_DEVICE
                            : !strcmp(what, "pinned") ? STUB_PINNED
                                                      : STUB_REGISTERED);
}

/* ---- the model's own objects ---- */

void *ucm_stub_device_alloc(size_t bytes) {
    return stub_device_alloc(bytes);
}

void ucm_stub_device_free(void *base) {
    stub_free("model", base, STUB_DEVICE);
}

void *ucm_stub_stream_new(void) {
    return stub_stream_new(NULL);
}

void ucm_stub_stream_destroy(void *stream) {
    stub_stream_destroy("model", stream);
}

void ucm_stub_stream_sync(void *stream) {
    stub_stream_wait_idle(stream);
}

void *ucm_stub_event_new(void) {
    return stub_event_new(NULL);
}

void ucm_stub_event_record(void *event, void *stream) {
    stub_record(event, stream);
}

void ucm_stub_event_destroy(void *event) {
    stub_event_destroy("model", event);
}
