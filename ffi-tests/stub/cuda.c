/* A fake libcuda.so.1: the functions that UCM calls, with the signatures of the public driver API, over
 * the machine of machine.c; its kernels are in cuda_kernels.c. -DUCM_STUB_OLD leaves out what came with CUDA 12.8;
 * -DUCM_STUB_HEADER compiles it against a real cuda.h, which checks the signatures. */
#include "cuda.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

struct context {
    int retained;
    bool destroyed;
};

static struct context contexts[DEVICES];
static bool initialised, capturing;
static struct stub_stream *default_stream;
static pthread_mutex_t context_lock = PTHREAD_MUTEX_INITIALIZER;

#define STACK_MAX 16
static __thread struct context *stack[STACK_MAX];
static __thread int depth;
static __thread int capture_mode; /* 0: global */

/* ---- what a test can say and ask, of CUDA alone ---- */

/* A graph is being captured somewhere in the process: calls of threads that are not relaxed break it. */
STUB_EXPORT void ucm_stub_capture(int on) {
    capturing = on;
}

/* Somebody resets the device: its work ends, then every call says so. */
STUB_EXPORT void ucm_stub_reset_device(void) {
    stub_quiesce();
    stub_unregister_all();
    for (int i = 0; i < DEVICES; i++) {
        contexts[i].destroyed = true;
    }
}

STUB_EXPORT void ucm_stub_revive(void) {
    for (int i = 0; i < DEVICES; i++) {
        contexts[i].destroyed = false;
    }
}

/* Contexts on this thread's stack. */
STUB_EXPORT int ucm_stub_depth(void) {
    return depth;
}

STUB_EXPORT int ucm_stub_retained(void) {
    return contexts[0].retained + contexts[1].retained;
}

/* ---- entering ---- */

int cuda_enter(const char *call) {
    int status = stub_enter(call);
    if (!status && !initialised) {
        stub_misuse(call, "called before cuInit");
    }
    return status;
}

int cuda_enter_context(const char *call) {
    int status = cuda_enter(call);
    if (status) {
        return status;
    }
    if (!depth) {
        stub_misuse(call, "called without a current context");
    }
    if (stack[depth - 1]->destroyed) {
        return CONTEXT_IS_DESTROYED;
    }
    if (!stack[depth - 1]->retained) {
        stub_misuse(call, "the primary context was released");
    }
    if (capturing && capture_mode != RELAXED) {
        stub_misuse(call, "breaks a capture: the thread is not relaxed");
    }
    return OK;
}

struct stub_stream *cuda_stream_of(const char *call, CUstream stream) {
    if ((uintptr_t)stream <= 2) {
        pthread_mutex_lock(&context_lock);
        if (!default_stream) {
            default_stream = stub_stream_new(NULL);
        }
        pthread_mutex_unlock(&context_lock);
        return default_stream;
    }
    stub_stream_check(call, (struct stub_stream *)stream, depth ? stack[depth - 1] : NULL);
    return (struct stub_stream *)stream;
}

/* ---- the API ---- */

API cuInit(unsigned int flags) {
    int status = stub_enter("cuInit");
    if (status) {
        return (CUresult)status;
    }
    if (flags) {
        stub_misuse("cuInit", "flags must be 0");
    }
    initialised = true;
    return OK;
}

API cuDriverGetVersion(int *version) {
    *version = VERSION;
#ifdef UCM_STUB_OLD
    *version = 12000;
#endif
    return OK;
}

API cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount");
    *count = DEVICES;
    return OK;
}

API cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER("cuDeviceGet");
    if (ordinal < 0 || ordinal >= DEVICES) {
        stub_misuse("cuDeviceGet", "no device %d", ordinal);
    }
    *device = ordinal;
    return OK;
}

API cuDeviceGetName(char *name, int length, CUdevice device) {
    ENTER("cuDeviceGetName");
    snprintf(name, (size_t)length, "pretend device %d", device);
    return OK;
}

API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER("cuDeviceGetAttribute");
    (void)device;
    if (attribute != 16) {
        stub_misuse("cuDeviceGetAttribute", "attribute %d is not one that UCM needs", (int)attribute);
    }
    *value = 8;
    return OK;
}

API cuDeviceGetPCIBusId(char *id, int length, CUdevice device) {
    ENTER("cuDeviceGetPCIBusId");
    snprintf(id, (size_t)length, "FFFF:%02X:00.0", device);
    return OK;
}

API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER("cuDevicePrimaryCtxRetain");
    pthread_mutex_lock(&context_lock);
    contexts[device].retained++;
    pthread_mutex_unlock(&context_lock);
    *context = (CUcontext)&contexts[device];
    return OK;
}

API cuDevicePrimaryCtxRelease(CUdevice device) {
    ENTER("cuDevicePrimaryCtxRelease");
    pthread_mutex_lock(&context_lock);
    if (contexts[device].retained-- <= 0) {
        stub_misuse("cuDevicePrimaryCtxRelease", "released more often than retained");
    }
    pthread_mutex_unlock(&context_lock);
    return OK;
}

API cuDevicePrimaryCtxGetState(CUdevice device, unsigned int *flags, int *active) {
    ENTER("cuDevicePrimaryCtxGetState");
    *flags = 0;
    *active = contexts[device].retained && !contexts[device].destroyed;
    return OK;
}

API cuCtxGetId(CUcontext context, unsigned long long *id) {
    ENTER("cuCtxGetId");
    *id = (unsigned long long)(uintptr_t)context;
    return OK;
}

API cuCtxPushCurrent(CUcontext context) {
    ENTER("cuCtxPushCurrent");
    struct context *pushed = (struct context *)context;
    if (pushed < contexts || pushed >= contexts + DEVICES || !pushed->retained) {
        stub_misuse("cuCtxPushCurrent", "not a retained context");
    }
    if (pushed->destroyed) {
        return (CUresult)CONTEXT_IS_DESTROYED;
    }
    if (depth == STACK_MAX) {
        stub_misuse("cuCtxPushCurrent", "contexts are pushed and never popped");
    }
    stack[depth++] = pushed;
    return OK;
}

API cuCtxGetCurrent(CUcontext *context) {
    *context = depth ? (CUcontext)stack[depth - 1] : NULL;
    return OK;
}

/* What programs that own their threads call instead of push and pop; the store does not. */
API cuCtxSetCurrent(CUcontext context) {
    depth = depth ? depth : 1;
    stack[depth - 1] = (struct context *)context;
    return OK;
}

/* Popping and the capture mode never fail on request: no caller could do anything about it. */
API cuCtxPopCurrent(CUcontext *context) {
    if (!depth) {
        stub_misuse("cuCtxPopCurrent", "nothing was pushed");
    }
    *context = (CUcontext)stack[--depth];
    return OK;
}

API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    int given = (int)*mode;
    if (given < 0 || given > RELAXED) {
        stub_misuse("cuThreadExchangeStreamCaptureMode", "mode %d", given);
    }
    *mode = (CUstreamCaptureMode)capture_mode;
    capture_mode = given;
    return OK;
}

API cuStreamCreateWithPriority(CUstream *stream, unsigned int flags, int priority) {
    ENTER_CONTEXT("cuStreamCreateWithPriority");
    (void)priority;
    if (flags != 1) {
        stub_misuse("cuStreamCreateWithPriority", "the stream would wait for the default stream");
    }
    *stream = (CUstream)stub_stream_new(stack[depth - 1]);
    return OK;
}

/* What programs beside the store make their streams with. */
API cuStreamCreate(CUstream *stream, unsigned int flags) {
    (void)flags;
    *stream = (CUstream)stub_stream_new(NULL);
    return OK;
}

API cuCtxSynchronize(void) {
    stub_quiesce();
    return (CUresult)stub_dead();
}

API cuStreamDestroy(CUstream stream) {
    ENTER_CONTEXT("cuStreamDestroy");
    stub_stream_destroy("cuStreamDestroy", (struct stub_stream *)stream);
    return OK;
}

API cuStreamQuery(CUstream stream) {
    ENTER_CONTEXT("cuStreamQuery");
    return (CUresult)(stub_stream_idle(cuda_stream_of("cuStreamQuery", stream)) ? OK : NOT_READY);
}

API cuStreamSynchronize(CUstream stream) {
    ENTER_CONTEXT("cuStreamSynchronize");
    stub_stream_wait_idle(cuda_stream_of("cuStreamSynchronize", stream));
    return (CUresult)stub_dead();
}

API cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
    ENTER_CONTEXT("cuStreamWaitEvent");
    if (!stub_event_known((struct stub_event *)event)) {
        return (CUresult)INVALID_HANDLE;
    }
    if (flags) {
        stub_misuse("cuStreamWaitEvent", "flags %u", flags);
    }
    stub_wait(cuda_stream_of("cuStreamWaitEvent", stream), (struct stub_event *)event);
    return OK;
}

API cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    ENTER_CONTEXT("cuStreamIsCapturing");
    (void)stream;
    *status = 0;
    return OK;
}

API cuEventCreate(CUevent *event, unsigned int flags) {
    ENTER_CONTEXT("cuEventCreate");
    if ((flags & 2) == 0 || flags > 3) {
        stub_misuse("cuEventCreate", "an event with timing costs time");
    }
    *event = (CUevent)stub_event_new(stack[depth - 1]);
    return OK;
}

API cuEventDestroy(CUevent event) {
    ENTER_CONTEXT("cuEventDestroy");
    stub_event_destroy("cuEventDestroy", (struct stub_event *)event);
    return OK;
}

API cuEventRecord(CUevent event, CUstream stream) {
    ENTER_CONTEXT("cuEventRecord");
    if (!stub_event_known((struct stub_event *)event)) {
        stub_misuse("cuEventRecord", "%p is not a live event", (void *)event);
    }
    stub_record((struct stub_event *)event, cuda_stream_of("cuEventRecord", stream));
    return OK;
}

API cuEventQuery(CUevent event) {
    ENTER_CONTEXT("cuEventQuery");
    if (!stub_event_known((struct stub_event *)event)) {
        return (CUresult)INVALID_HANDLE;
    }
    return (CUresult)(stub_event_done((struct stub_event *)event) ? OK : NOT_READY);
}

API cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
    ENTER_CONTEXT("cuLaunchHostFunc");
    stub_host_function(cuda_stream_of("cuLaunchHostFunc", stream), function, data);
    return OK;
}

API cuMemHostRegister(void *base, size_t bytes, unsigned int flags) {
    ENTER_CONTEXT("cuMemHostRegister");
    if (flags != 3 || !bytes || (uintptr_t)base % 4096) {
        stub_misuse("cuMemHostRegister", "%zu bytes at %p, flags %u", bytes, base, flags);
    }
    return (CUresult)(stub_register(base, bytes) ? OK : ALREADY_REGISTERED);
}

API cuMemHostUnregister(void *base) {
    ENTER_CONTEXT("cuMemHostUnregister");
    return (CUresult)(stub_unregister("cuMemHostUnregister", base) ? OK : NOT_REGISTERED);
}

API cuMemHostGetDevicePointer(CUdeviceptr *device, void *host, unsigned int flags) {
    ENTER_CONTEXT("cuMemHostGetDevicePointer");
    enum stub_memory kind = stub_find(host, NULL, NULL);
    if (flags || (kind != STUB_REGISTERED && kind != STUB_PINNED)) {
        stub_misuse("cuMemHostGetDevicePointer", "%p is not pinned", host);
    }
    *device = (CUdeviceptr)(uintptr_t)host;
    return OK;
}

API cuMemHostAlloc(void **base, size_t bytes, unsigned int flags) {
    ENTER_CONTEXT("cuMemHostAlloc");
    (void)flags;
    *base = stub_pinned_alloc(bytes);
    return OK;
}

API cuMemFreeHost(void *base) {
    ENTER_CONTEXT("cuMemFreeHost");
    stub_free("cuMemFreeHost", base, STUB_PINNED);
    return OK;
}

API cuMemAlloc(CUdeviceptr *address, size_t bytes) {
    ENTER_CONTEXT("cuMemAlloc");
    *address = (CUdeviceptr)(uintptr_t)stub_device_alloc(bytes);
    return OK;
}

API cuMemFree(CUdeviceptr address) {
    ENTER_CONTEXT("cuMemFree");
    stub_free("cuMemFree", (void *)(uintptr_t)address, STUB_DEVICE);
    return OK;
}

API cuMemGetAddressRange(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    ENTER_CONTEXT("cuMemGetAddressRange");
    void *found = NULL;
    if (stub_find((void *)(uintptr_t)address, &found, bytes) != STUB_DEVICE) {
        return (CUresult)NOT_FOUND;
    }
    *base = (CUdeviceptr)(uintptr_t)found;
    return OK;
}

API cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
    ENTER_CONTEXT("cuPointerGetAttribute");
    if (attribute != 9) {
        stub_misuse("cuPointerGetAttribute", "attribute %d", (int)attribute);
    }
    if (!stub_find((void *)(uintptr_t)address, NULL, NULL)) {
        return (CUresult)INVALID_VALUE;
    }
    *(int *)data = stub_is_foreign((void *)(uintptr_t)address);
    return OK;
}

/* Memory that is not pinned is copied before the call returns, as the driver does it. */
static CUresult transfer(const char *call, CUstream stream, const struct stub_copy *copy) {
    struct stub_stream *on = cuda_stream_of(call, stream);
    bool known = stub_find(copy->to, NULL, NULL) && stub_find(copy->from, NULL, NULL);
    stub_copy(call, on, copy);
    if (!known) {
        stub_stream_wait_idle(on);
    }
    return OK;
}

API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER_CONTEXT("cuMemcpyAsync");
    struct stub_copy copy = {(char *)(uintptr_t)to, (char *)(uintptr_t)from, bytes, 1, bytes, bytes};
    return transfer("cuMemcpyAsync", stream, &copy);
}

API cuMemcpy2DAsync(const CUDA_MEMCPY2D *copy, CUstream stream) {
    ENTER_CONTEXT("cuMemcpy2DAsync");
    NOT_NULL("cuMemcpy2DAsync", copy);
    if (copy->srcMemoryType != 4 || copy->dstMemoryType != 4 || copy->srcPitch < copy->WidthInBytes ||
        copy->dstPitch < copy->WidthInBytes) {
        stub_misuse("cuMemcpy2DAsync", "types or pitches");
    }
    if (copy->srcPitch > PITCH_MAX || copy->dstPitch > PITCH_MAX) {
        return (CUresult)INVALID_VALUE;
    }
    struct stub_copy rows = {(char *)(uintptr_t)copy->dstDevice, (char *)(uintptr_t)copy->srcDevice,
                             copy->WidthInBytes, copy->Height, copy->dstPitch, copy->srcPitch};
    return transfer("cuMemcpy2DAsync", stream, &rows);
}

#ifndef UCM_STUB_OLD
API cuMemcpyBatchAsync(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t count, CUmemcpyAttributes *attributes,
                       size_t *indexes, size_t attribute_count, size_t *failed, CUstream stream) {
    ENTER_CONTEXT("cuMemcpyBatchAsync");
    NOT_NULL("cuMemcpyBatchAsync", failed);
    if (!count || attribute_count != 1 || indexes[0] != 0 || attributes[0].srcAccessOrder != 1 ||
        (uintptr_t)stream <= 2) {
        stub_misuse("cuMemcpyBatchAsync", "counts, attributes or stream");
    }
    for (size_t i = 0; i < count; i++) {
        struct stub_copy copy = {(char *)(uintptr_t)to[i], (char *)(uintptr_t)from[i], sizes[i], 1, sizes[i], sizes[i]};
        if (!stub_find(copy.to, NULL, NULL) || !stub_find(copy.from, NULL, NULL)) {
            stub_misuse("cuMemcpyBatchAsync", "copy %zu is of memory that is not pinned", i);
        }
        stub_copy("cuMemcpyBatchAsync", cuda_stream_of("cuMemcpyBatchAsync", stream), &copy);
    }
    return OK;
}
#endif

/* For programs beside the store: done when they return. */
API cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
    ucm_stub_poke((void *)(uintptr_t)to, from, bytes);
    return OK;
}

API cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
    ucm_stub_peek(to, (void *)(uintptr_t)from, bytes);
    return OK;
}

/* ---- texts and entry points ---- */

API cuGetErrorName(CUresult status, const char **text) {
    *text = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_PRETENDED";
    return OK;
}

API cuGetErrorString(CUresult status, const char **text) {
    (void)status;
    *text = "pretended failure";
    return OK;
}

/* Gives the functions above under their plain names, and counts who asks with which version. */
API cuGetProcAddress(const char *symbol, void **address, int version, cuuint64_t flags,
                     CUdriverProcAddressQueryResult *found) {
    static const struct {
        const char *name;
        void *address;
    } table[] = {
        {"cuDevicePrimaryCtxRelease", (void *)cuDevicePrimaryCtxRelease},
        {"cuCtxPushCurrent", (void *)cuCtxPushCurrent},
        {"cuCtxPopCurrent", (void *)cuCtxPopCurrent},
        {"cuMemAlloc", (void *)cuMemAlloc},
        {"cuMemFree", (void *)cuMemFree},
#ifndef UCM_STUB_OLD
        {"cuMemcpyBatchAsync", (void *)cuMemcpyBatchAsync},
#endif
    };
    if (version != VERSION || flags != 1) {
        stub_misuse("cuGetProcAddress", "version %d, flags %llu", version, (unsigned long long)flags);
    }
    *address = NULL;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (!strcmp(table[i].name, symbol)) {
            *address = table[i].address;
        }
    }
    *found = *address ? 0 : 1;
    return (CUresult)(*address ? OK : NOT_FOUND);
}
