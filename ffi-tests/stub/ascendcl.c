/* A fake libascendcl.so: the functions that UCM calls, with the signatures of the public CANN
 * documentation, over the machine of machine.c. -DUCM_STUB_OLD is an early CANN 8: no host functions, no
 * pinned registration, no batched copy, no attributes of pointers. */
#include "machine.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

typedef int aclError;
typedef void *aclrtContext, *aclrtStream, *aclrtEvent;
typedef struct {
    uint32_t id;
    int type;
} aclrtMemLocation;
typedef struct {
    aclrtMemLocation dstLoc, srcLoc;
    uint8_t rsv[16];
} aclrtMemcpyBatchAttr;
typedef struct {
    aclrtMemLocation location;
    uint32_t pageSize;
    uint32_t rsv[4];
} aclrtPtrAttributes;

#define API STUB_EXPORT aclError
#define OK 0
#define INVALID_PARAM 107000
#define CONTEXT_NULL 107002
#define REPEAT_INITIALIZE 100002
#define NOT_REGISTERED 507911
#define DEVICES 2
#define RELAXED 2

static int contexts[DEVICES];
static bool initialised, capturing, reset;
static struct stub_stream *default_stream;
static pthread_mutex_t stream_lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int *current;
static __thread int capture_mode;

/* A graph is being captured somewhere in the process. */
STUB_EXPORT void ucm_stub_capture(int on) {
    capturing = on;
}

/* Somebody resets the device: its work ends, and its default context is gone. */
STUB_EXPORT void ucm_stub_reset_device(void) {
    stub_quiesce();
    stub_unregister_all();
    reset = true;
}

STUB_EXPORT void ucm_stub_revive(void) {
    reset = false;
}

#define ENTER(call)                                                                                                    \
    do {                                                                                                               \
        int status_ = stub_enter(call);                                                                                \
        if (status_) {                                                                                                 \
            return status_;                                                                                            \
        }                                                                                                              \
        if (!initialised) {                                                                                            \
            stub_misuse(call, "called before aclInit");                                                                \
        }                                                                                                              \
    } while (0)

#define ENTER_CONTEXT(call)                                                                                            \
    do {                                                                                                               \
        ENTER(call);                                                                                                   \
        if (!current) {                                                                                                \
            stub_misuse(call, "called without a current context");                                                     \
        }                                                                                                              \
        if (reset) {                                                                                                   \
            return CONTEXT_NULL;                                                                                       \
        }                                                                                                              \
        if (capturing && capture_mode != RELAXED) {                                                                    \
            stub_misuse(call, "breaks a capture: the thread is not relaxed");                                          \
        }                                                                                                              \
    } while (0)

static struct stub_stream *stream_of(const char *call, aclrtStream stream) {
    if (!stream) {
        pthread_mutex_lock(&stream_lock);
        if (!default_stream) {
            default_stream = stub_stream_new(NULL);
        }
        pthread_mutex_unlock(&stream_lock);
        return default_stream;
    }
    stub_stream_check(call, stream, current);
    return stream;
}

API aclInit(const char *path) {
    int status = stub_enter("aclInit");
    if (status) {
        return status;
    }
    if (path) {
        stub_misuse("aclInit", "a configuration path");
    }
    if (initialised) {
        return REPEAT_INITIALIZE;
    }
    initialised = true;
    return OK;
}

API aclrtGetVersion(int *major, int *minor, int *patch) {
    *major = 1;
    *minor = 16;
    *patch = 0;
    return OK;
}

STUB_EXPORT const char *aclGetRecentErrMsg(void) {
    return "pretended failure";
}

STUB_EXPORT const char *aclrtGetSocName(void) {
    return "Ascend pretended";
}

API aclrtGetDeviceCount(uint32_t *count) {
    ENTER("aclrtGetDeviceCount");
    *count = DEVICES;
    return OK;
}

API aclrtSetDevice(int32_t device) {
    ENTER("aclrtSetDevice");
    if (device < 0 || device >= DEVICES) {
        stub_misuse("aclrtSetDevice", "no device %d", device);
    }
    current = &contexts[device];
    return OK;
}

API aclrtGetCurrentContext(aclrtContext *context) {
    ENTER("aclrtGetCurrentContext");
    if (!current || reset) {
        return CONTEXT_NULL;
    }
    *context = current;
    return OK;
}

API aclrtSetCurrentContext(aclrtContext context) {
    ENTER("aclrtSetCurrentContext");
    if ((int *)context < contexts || (int *)context >= contexts + DEVICES) {
        stub_misuse("aclrtSetCurrentContext", "%p is not a context", context);
    }
    if (reset) {
        return CONTEXT_NULL;
    }
    current = context;
    return OK;
}

API aclmdlRICaptureThreadExchangeMode(int *mode) {
    int given = *mode;
    if (given < 0 || given > RELAXED) {
        stub_misuse("aclmdlRICaptureThreadExchangeMode", "mode %d", given);
    }
    *mode = capture_mode;
    capture_mode = given;
    return OK;
}

API aclmdlRICaptureGetInfo(aclrtStream stream, int *status, void **model) {
    ENTER_CONTEXT("aclmdlRICaptureGetInfo");
    stream_of("aclmdlRICaptureGetInfo", stream);
    *status = 0;
    *model = NULL;
    return OK;
}

API aclrtCreateStream(aclrtStream *stream) {
    ENTER_CONTEXT("aclrtCreateStream");
    *stream = stub_stream_new(current);
    return OK;
}

API aclrtDestroyStream(aclrtStream stream) {
    ENTER_CONTEXT("aclrtDestroyStream");
    stub_stream_destroy("aclrtDestroyStream", stream);
    return OK;
}

API aclrtStreamQuery(aclrtStream stream, int *status) {
    ENTER_CONTEXT("aclrtStreamQuery");
    *status = stub_stream_idle(stream_of("aclrtStreamQuery", stream)) ? 0 : 1;
    return OK;
}

API aclrtSynchronizeStream(aclrtStream stream) {
    ENTER_CONTEXT("aclrtSynchronizeStream");
    stub_stream_wait_idle(stream_of("aclrtSynchronizeStream", stream));
    return stub_dead();
}

API aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    ENTER_CONTEXT("aclrtStreamWaitEvent");
    if (!stub_event_known(event)) {
        return INVALID_PARAM;
    }
    stub_wait(stream_of("aclrtStreamWaitEvent", stream), event);
    return OK;
}

API aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) {
    ENTER_CONTEXT("aclrtCreateEventExWithFlag");
    if (flag != 1) {
        stub_misuse("aclrtCreateEventExWithFlag", "streams cannot wait for an event of flag %u", flag);
    }
    *event = stub_event_new(current);
    return OK;
}

API aclrtDestroyEvent(aclrtEvent event) {
    ENTER_CONTEXT("aclrtDestroyEvent");
    stub_event_destroy("aclrtDestroyEvent", event);
    return OK;
}

API aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    ENTER_CONTEXT("aclrtRecordEvent");
    if (!stub_event_known(event)) {
        stub_misuse("aclrtRecordEvent", "%p is not a live event", event);
    }
    stub_record(event, stream_of("aclrtRecordEvent", stream));
    return OK;
}

API aclrtQueryEventStatus(aclrtEvent event, int *status) {
    ENTER_CONTEXT("aclrtQueryEventStatus");
    if (!stub_event_known(event)) {
        return INVALID_PARAM;
    }
    *status = stub_event_done(event) ? 1 : 0;
    return OK;
}

API aclrtMallocHost(void **base, size_t bytes) {
    ENTER_CONTEXT("aclrtMallocHost");
    *base = stub_pinned_alloc(bytes);
    return OK;
}

API aclrtFreeHost(void *base) {
    ENTER_CONTEXT("aclrtFreeHost");
    stub_free("aclrtFreeHost", base, STUB_PINNED);
    return OK;
}

API aclrtMalloc(void **base, size_t bytes, int policy) {
    ENTER_CONTEXT("aclrtMalloc");
    if (policy) {
        stub_misuse("aclrtMalloc", "policy %d", policy);
    }
    *base = stub_device_alloc(bytes);
    return OK;
}

API aclrtFree(void *base) {
    ENTER_CONTEXT("aclrtFree");
    stub_free("aclrtFree", base, STUB_DEVICE);
    return OK;
}

/* Copies when it is called, whatever streams are doing: what is copied must not be theirs. */
API aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
    ENTER_CONTEXT("aclrtMemcpy");
    if (room < bytes) {
        stub_misuse("aclrtMemcpy", "%zu bytes into %zu", bytes, room);
    }
    if (kind != 1 && kind != 2) {
        stub_misuse("aclrtMemcpy", "kind %d", kind);
    }
    const void *device = kind == 1 ? to : from, *host = kind == 1 ? from : to;
    if (stub_find(device, NULL, NULL) != STUB_DEVICE || stub_find(host, NULL, NULL) == STUB_DEVICE) {
        stub_misuse("aclrtMemcpy", "kind %d from %p to %p, which is another direction", kind, from, to);
    }
    struct stub_copy copy = {to, from, bytes, 1, bytes, bytes};
    stub_copy_now("aclrtMemcpy", &copy);
    return OK;
}

/* One side is the device's, the other page-locked: nothing else may be copied asynchronously on CANN 8. */
static void check_ends(const char *call, const void *to, const void *from, int kind) {
    if (kind != 1 && kind != 2) {
        stub_misuse(call, "kind %d", kind);
    }
    enum stub_memory device = stub_find(kind == 1 ? to : from, NULL, NULL);
    enum stub_memory host = stub_find(kind == 1 ? from : to, NULL, NULL);
    if (device != STUB_DEVICE) {
        stub_misuse(call, "the device's side is not device memory");
    }
    if (host != STUB_PINNED && host != STUB_REGISTERED) {
        stub_misuse(call, "an asynchronous copy of host memory that is not page-locked");
    }
}

API aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, aclrtStream stream) {
    ENTER_CONTEXT("aclrtMemcpyAsync");
    if (room < bytes) {
        stub_misuse("aclrtMemcpyAsync", "%zu bytes into %zu", bytes, room);
    }
    check_ends("aclrtMemcpyAsync", to, from, kind);
    struct stub_copy copy = {to, from, bytes, 1, bytes, bytes};
    stub_copy("aclrtMemcpyAsync", stream_of("aclrtMemcpyAsync", stream), &copy);
    return OK;
}

API aclrtMemcpy2dAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                       int kind, aclrtStream stream) {
    ENTER_CONTEXT("aclrtMemcpy2dAsync");
    if (to_pitch < width || from_pitch < width || height > 5u * 1024 * 1024) {
        stub_misuse("aclrtMemcpy2dAsync", "pitches or height");
    }
    check_ends("aclrtMemcpy2dAsync", to, from, kind);
    struct stub_copy copy = {to, from, width, height, to_pitch, from_pitch};
    stub_copy("aclrtMemcpy2dAsync", stream_of("aclrtMemcpy2dAsync", stream), &copy);
    return OK;
}

#ifndef UCM_STUB_OLD
/* Memory that a test calls foreign is managed. */
API aclrtPointerGetAttributes(const void *address, aclrtPtrAttributes *attributes) {
    ENTER_CONTEXT("aclrtPointerGetAttributes");
    memset(attributes, 0, sizeof *attributes);
    switch (stub_find(address, NULL, NULL)) {
    case STUB_DEVICE: attributes->location.type = stub_is_foreign(address) ? 3 : 1; break;
    case STUB_NONE: attributes->location.type = 2; break;
    default: attributes->location.type = 0; break;
    }
    return OK;
}

API aclrtLaunchHostFunc(aclrtStream stream, void (*function)(void *), void *data) {
    ENTER_CONTEXT("aclrtLaunchHostFunc");
    stub_host_function(stream_of("aclrtLaunchHostFunc", stream), function, data);
    return OK;
}

API aclrtHostRegisterV2(void *base, uint64_t bytes, uint32_t flag) {
    ENTER_CONTEXT("aclrtHostRegisterV2");
    if (flag != 0x10000000u || !bytes || (uintptr_t)base % 4096) {
        stub_misuse("aclrtHostRegisterV2", "%llu bytes at %p, flag %x", (unsigned long long)bytes, base, flag);
    }
    return stub_register(base, bytes) ? OK : INVALID_PARAM;
}

API aclrtHostUnregister(void *base) {
    ENTER_CONTEXT("aclrtHostUnregister");
    return stub_unregister("aclrtHostUnregister", base) ? OK : NOT_REGISTERED;
}

/* The arrays of a batch: nothing says that they have been read when the call returns, so they must be there, and
 * the same, when the copies are made. */
struct batch {
    void **to, **from;
    size_t *sizes, count;
    uint64_t sum;
};

static uint64_t sum_of(const struct batch *batch) {
    uint64_t sum = batch->count;
    for (size_t i = 0; i < batch->count; i++) {
        sum = sum * 31 + (uintptr_t)batch->to[i];
        sum = sum * 31 + (uintptr_t)batch->from[i];
        sum = sum * 31 + batch->sizes[i];
    }
    return sum;
}

static void check_batch(const void *data) {
    const struct batch *batch = data;
    if (sum_of(batch) != batch->sum) {
        stub_misuse("aclrtMemcpyBatchAsync", "the arrays were given up before the copies were made");
    }
}

API aclrtMemcpyBatchAsync(void **to, size_t *room, void **from, size_t *sizes, size_t count,
                          aclrtMemcpyBatchAttr *attributes, size_t *indexes, size_t attribute_count, size_t *failed,
                          aclrtStream stream) {
    ENTER_CONTEXT("aclrtMemcpyBatchAsync");
    if (!count || attribute_count != 1 || indexes[0] || !failed) {
        stub_misuse("aclrtMemcpyBatchAsync", "counts or attributes");
    }
    int kind = attributes[0].dstLoc.type == 1 ? 1 : 2;
    if (attributes[0].dstLoc.type + attributes[0].srcLoc.type != 1) {
        stub_misuse("aclrtMemcpyBatchAsync", "locations");
    }
    for (size_t i = 0; i < count; i++) {
        if (room[i] < sizes[i]) {
            stub_misuse("aclrtMemcpyBatchAsync", "%zu bytes into %zu", sizes[i], room[i]);
        }
        check_ends("aclrtMemcpyBatchAsync", to[i], from[i], kind);
        struct stub_copy copy = {to[i], from[i], sizes[i], 1, sizes[i], sizes[i]};
        stub_copy("aclrtMemcpyBatchAsync", stream_of("aclrtMemcpyBatchAsync", stream), &copy);
    }
    struct batch batch = {to, from, sizes, count, 0};
    batch.sum = sum_of(&batch);
    stub_kernel("aclrtMemcpyBatchAsync", stream_of("aclrtMemcpyBatchAsync", stream), check_batch, &batch, sizeof batch);
    return OK;
}
#endif
