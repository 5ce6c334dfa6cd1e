/* A fake libcufile.so.0: the functions that UCM calls, with the signatures of the public header. It moves bytes
 * between files and device memory by copies of the CUDA driver, which may be the fake one or a real one, checks every
 * argument, and ends the process with a sentence where the engine does what the real one would punish silently.
 *
 * As the real one (1.14 and 1.20, without a GPU, were looked at): settings are staged for the next open, which
 * forgets them also if it fails; compatibility mode is allowed unless they forbid it.
 * -DUCM_STUB_OLD leaves out the settings, which came with CUDA 12.8. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define PAGE 4096
#define FILES_MAX 1024
#define BUFFERS_MAX 64
/* Numbers of the headers of 1.14 and, from 1.19 on, of later ones. */
#define PARAMETERS_FIRST 12
#define PARAMETERS 14
#define HANDLE_MAGIC 0x63756669u

enum { OK = 0, NOT_INITIALIZED = 5001, NOT_SUPPORTED = 5008, CUDA_ERROR = 5011, IS_OPEN = 5026 };
enum { ALLOW_COMPAT = 1, FORCE_COMPAT = 2, POSIX_IO = 12, FALLBACK_IO = 13 };

typedef struct {
    int err, cu_err;
} CUfileError_t;
typedef struct {
    int type;
    union {
        int fd;
        void *handle;
    } handle;
    const void *fs_ops;
} CUfileDescr_t;
typedef struct {
    struct {
        unsigned major_version, minor_version;
        size_t poll_thresh_size, max_direct_io_size;
        unsigned dstatusflags, dcontrolflags;
    } nvfs;
    unsigned fflags, max_device_cache_size, per_buffer_cache_size, max_device_pinned_mem_size, max_batch_io_size,
        max_batch_io_timeout_msecs;
} CUfileDrvProps_t;

struct file {
    unsigned magic;
    int fd, busy;
    ino_t inode;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct file files[FILES_MAX];
static struct {
    const char *base;
    size_t bytes;
    int busy;
} buffers[BUFFERS_MAX];
static int opened, compat_of_others;
static bool staged[PARAMETERS] = {[ALLOW_COMPAT] = true};
static bool current[PARAMETERS];

#define VERSION_FIRST 1140
#define VERSION_FLAGS 1170
#define VERSION_PARAMETERS 1190
static int version = VERSION_FIRST;

static void stage_defaults(void) {
    memset(staged, 0, sizeof staged);
    staged[ALLOW_COMPAT] = true;
    staged[POSIX_IO] = staged[FALLBACK_IO] = version >= VERSION_FLAGS;
}

/* ---- what a test can say and ask ---- */

static long calls, fail_at, named_at;
static int fail_code, named_code;
static char named[64], failed[64];
static size_t longest;
static unsigned delay_micros;
static int held, unsupported, lies;

/* The nth counted call from now (1 is the next) fails with this status of cuFile, or, if it is below 5000 and the
 * call is a transfer, with this errno. */
API void ucm_cufile_fail(long nth, int code) {
    pthread_mutex_lock(&lock);
    fail_at = nth;
    fail_code = code;
    failed[0] = 0;
    pthread_mutex_unlock(&lock);
}

/* The same for calls of one name. */
API void ucm_cufile_fail_call(const char *name, long nth, int code) {
    pthread_mutex_lock(&lock);
    snprintf(named, sizeof named, "%s", name);
    named_at = nth;
    named_code = code;
    failed[0] = 0;
    pthread_mutex_unlock(&lock);
}

API const char *ucm_cufile_failed(void) {
    return failed[0] ? failed : NULL;
}

API long ucm_cufile_calls(void) {
    return calls;
}

/* Transfers move so many bytes at most, whole pages; 0: all. */
API void ucm_cufile_short(size_t bytes) {
    longest = bytes;
}

API void ucm_cufile_delay(unsigned micros) {
    delay_micros = micros;
}

/* Transfers wait until this is called with 0. */
API void ucm_cufile_hold(int hold) {
    pthread_mutex_lock(&lock);
    held = hold;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* Files are on a file system that cuFile does not know. */
API void ucm_cufile_unsupported(int on) {
    unsupported = on;
}

/* Reads say that they have moved bytes and have not. */
API void ucm_cufile_lie(int on) {
    lies = on;
}

/* Somebody else in the process has opened cuFile, with compatibility mode. */
API void ucm_cufile_of_others(int on) {
    compat_of_others = on;
    opened = on;
    current[ALLOW_COMPAT] = on;
}

/* "opens", "files", "buffers". */
API long ucm_cufile_live(const char *what) {
    long live = 0;
    pthread_mutex_lock(&lock);
    if (!strcmp(what, "opens")) {
        live = opened;
    }
    for (int i = 0; i < FILES_MAX && !strcmp(what, "files"); i++) {
        live += files[i].magic == HANDLE_MAGIC;
    }
    for (int i = 0; i < BUFFERS_MAX && !strcmp(what, "buffers"); i++) {
        live += buffers[i].base != NULL;
    }
    pthread_mutex_unlock(&lock);
    return live;
}

/* Another version, with a cufile.json that allows all of its ways through host memory. */
API void ucm_cufile_version(int number) {
    pthread_mutex_lock(&lock);
    version = number;
    stage_defaults();
    pthread_mutex_unlock(&lock);
}

/* As in a new process, where nobody has opened cuFile. */
API void ucm_cufile_reset(void) {
    pthread_mutex_lock(&lock);
    version = VERSION_FIRST;
    opened = compat_of_others = 0;
    memset(current, 0, sizeof current);
    stage_defaults();
    calls = fail_at = named_at = 0;
    failed[0] = 0;
    longest = 0;
    delay_micros = 0;
    held = unsupported = lies = 0;
    pthread_mutex_unlock(&lock);
}

/* ---- rules ---- */

__attribute__((noreturn, format(printf, 2, 3))) static void misuse(const char *call, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "fake cuFile: %s: ", call);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    abort();
}

static int enter(const char *call) {
    int code = 0;
    pthread_mutex_lock(&lock);
    calls++;
    if (fail_at && --fail_at == 0) {
        code = fail_code;
    } else if (named_at && !strcmp(named, call) && --named_at == 0) {
        code = named_code;
    }
    if (code) {
        snprintf(failed, sizeof failed, "%s", call);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static CUfileError_t status(int code) {
    return (CUfileError_t){code, code == CUDA_ERROR ? 2 : 0};
}

static void must_be_open(const char *call) {
    if (!opened) {
        misuse(call, "cuFile is not open");
    }
    if (!compat_of_others && (current[ALLOW_COMPAT] || current[FORCE_COMPAT])) {
        misuse(call, "compatibility mode was not forbidden");
    }
}

/* ---- the CUDA driver ---- */

static int (*to_device)(unsigned long long, const void *, size_t), (*to_host)(void *, unsigned long long, size_t);
/* A plain copy of pageable memory may be under way when it returns; the drive's is not. */
static int (*synchronize)(void);
static int (*range_of)(unsigned long long *, size_t *, unsigned long long), (*current_context)(void **);

static void find_driver(void) {
    const char *name = getenv("UCM_CUDA_LIBRARY");
    void *driver = dlopen(name ? name : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (driver) {
        *(void **)&to_device = dlsym(driver, "cuMemcpyHtoD_v2");
        *(void **)&to_host = dlsym(driver, "cuMemcpyDtoH_v2");
        *(void **)&synchronize = dlsym(driver, "cuCtxSynchronize");
        *(void **)&range_of = dlsym(driver, "cuMemGetAddressRange_v2");
        *(void **)&current_context = dlsym(driver, "cuCtxGetCurrent");
    }
}

static void must_have_context(const char *call) {
    void *context = NULL;
    if (!current_context || current_context(&context) || !context) {
        misuse(call, "no context is current on this thread");
    }
}

/* ---- opening ---- */

API CUfileError_t cuFileGetVersion(int *number) {
    *number = version;
    return status(OK);
}

#ifndef UCM_STUB_OLD
API CUfileError_t cuFileSetParameterBool(int parameter, bool value) {
    int code = enter("cuFileSetParameterBool");
    if (code) {
        return status(code);
    }
    if (opened) {
        return status(IS_OPEN);
    }
    if (parameter < 0 || parameter >= (version < VERSION_PARAMETERS ? PARAMETERS_FIRST : PARAMETERS)) {
        misuse("cuFileSetParameterBool", "version %d has no parameter %d", version, parameter);
    }
    staged[parameter] = value;
    return status(OK);
}
#endif

API CUfileError_t cuFileDriverOpen(void) {
    int code = enter("cuFileDriverOpen");
    find_driver();
    if (opened) {
        return status(IS_OPEN);
    }
    memcpy(current, staged, sizeof current);
    stage_defaults();
    opened = !code;
    return status(code);
}

/* It is one for the process, and opens are not counted: whoever closes it takes it from all others. */
API CUfileError_t cuFileDriverClose_v2(void) {
    misuse("cuFileDriverClose_v2", "others of the process use cuFile");
}

API CUfileError_t cuFileDriverClose(void) {
    misuse("cuFileDriverClose", "others of the process use cuFile");
}

API CUfileError_t cuFileDriverGetProperties(CUfileDrvProps_t *properties) {
    int code = enter("cuFileDriverGetProperties");
    if (code) {
        return status(code);
    }
    memset(properties, 0, sizeof *properties);
    properties->nvfs.major_version = 2;
    properties->nvfs.minor_version = 17;
    unsigned flags = 1;
    flags |= current[ALLOW_COMPAT] || current[FORCE_COMPAT] ? 1u << 1 : 0;
    flags |= current[POSIX_IO] ? 1u << 2 : 0;
    flags |= current[FALLBACK_IO] ? 1u << 4 : 0;
    properties->nvfs.dcontrolflags = flags;
    return status(OK);
}

/* ---- registrations ---- */

API CUfileError_t cuFileBufRegister(const void *base, size_t bytes, int flags) {
    must_be_open("cuFileBufRegister");
    must_have_context("cuFileBufRegister");
    int code = enter("cuFileBufRegister");
    if (code) {
        return status(code);
    }
    unsigned long long start = 0;
    size_t length = 0;
    if (range_of(&start, &length, (uintptr_t)base)) {
        return status(CUDA_ERROR);
    }
    if (start != (uintptr_t)base || bytes > length || flags) {
        misuse("cuFileBufRegister", "%zu bytes at %p are no allocation of the device", bytes, base);
    }
    pthread_mutex_lock(&lock);
    for (int i = 0; i < BUFFERS_MAX; i++) {
        if (!buffers[i].base) {
            buffers[i].base = base;
            buffers[i].bytes = bytes;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return status(OK);
}

API CUfileError_t cuFileBufDeregister(const void *base) {
    must_be_open("cuFileBufDeregister");
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < BUFFERS_MAX && buffers[i].base != base) {
        i++;
    }
    if (i == BUFFERS_MAX) {
        misuse("cuFileBufDeregister", "%p is not registered", base);
    }
    if (buffers[i].busy) {
        misuse("cuFileBufDeregister", "%p is deregistered under %d transfers", base, buffers[i].busy);
    }
    buffers[i].base = NULL;
    pthread_mutex_unlock(&lock);
    return status(OK);
}

API CUfileError_t cuFileHandleRegister(void **handle, CUfileDescr_t *description) {
    must_be_open("cuFileHandleRegister");
    must_have_context("cuFileHandleRegister");
    int code = enter("cuFileHandleRegister"), fd = description->handle.fd;
    if (code) {
        return status(code);
    }
    int flags = fcntl(fd, F_GETFL);
    struct stat found;
    if (description->type != 1 || description->fs_ops || flags < 0 || fstat(fd, &found)) {
        misuse("cuFileHandleRegister", "descriptor %d", fd);
    }
    if (!(flags & O_DIRECT)) {
        misuse("cuFileHandleRegister", "descriptor %d goes through the page cache", fd);
    }
    if (unsupported) {
        return status(NOT_SUPPORTED);
    }
    pthread_mutex_lock(&lock);
    struct file *file = files;
    while (file < files + FILES_MAX && file->magic) {
        if (file->fd == fd) {
            misuse("cuFileHandleRegister", "descriptor %d is registered already", fd);
        }
        file++;
    }
    for (file = files; file < files + FILES_MAX && file->magic; file++) {
    }
    *file = (struct file){HANDLE_MAGIC, fd, 0, found.st_ino};
    pthread_mutex_unlock(&lock);
    *handle = file;
    return status(OK);
}

static struct file *file_of(const char *call, void *handle) {
    struct file *file = handle;
    if (file < files || file >= files + FILES_MAX || file->magic != HANDLE_MAGIC) {
        misuse(call, "%p is not a registered file", handle);
    }
    struct stat found;
    if (fstat(file->fd, &found) || found.st_ino != file->inode) {
        misuse(call, "descriptor %d was closed before its file was deregistered", file->fd);
    }
    return file;
}

API void cuFileHandleDeregister(void *handle) {
    must_be_open("cuFileHandleDeregister");
    pthread_mutex_lock(&lock);
    struct file *file = file_of("cuFileHandleDeregister", handle);
    if (file->busy) {
        misuse("cuFileHandleDeregister", "descriptor %d is deregistered under %d transfers", file->fd, file->busy);
    }
    file->magic = 0;
    pthread_mutex_unlock(&lock);
}

/* ---- transfers ---- */

static ssize_t move(bool reads, int fd, char *device, size_t bytes, off_t at) {
    void *stop = NULL;
    if (posix_memalign(&stop, PAGE, bytes)) {
        abort();
    }
    ssize_t moved;
    if (reads) {
        moved = pread(fd, stop, bytes, at);
        bool copies = moved > 0 && !lies;
        if (copies && (to_device((uintptr_t)device, stop, (size_t)moved) || (synchronize && synchronize()))) {
            moved = -CUDA_ERROR;
        }
    } else {
        moved = to_host(stop, (uintptr_t)device, bytes) ? -CUDA_ERROR : pwrite(fd, stop, bytes, at);
    }
    int error = errno;
    free(stop);
    errno = error;
    return moved;
}

static ssize_t transfer(const char *call, bool reads, void *handle, void *base, size_t bytes, off_t at, off_t from) {
    must_be_open(call);
    must_have_context(call);
    int code = enter(call);
    if (code) {
        errno = code;
        return code < 5000 ? -1 : -code;
    }
    if (at % PAGE || from % PAGE || bytes % PAGE || !bytes) {
        misuse(call, "%zu bytes at %ld of the file, %ld of the memory: no whole pages", bytes, (long)at, (long)from);
    }
    pthread_mutex_lock(&lock);
    struct file *file = file_of(call, handle);
    int buffer = 0;
    while (buffer < BUFFERS_MAX && buffers[buffer].base != base) {
        buffer++;
    }
    if (buffer == BUFFERS_MAX || (size_t)from + bytes > buffers[buffer].bytes) {
        misuse(call, "%zu bytes at %ld of %p are not registered", bytes, (long)from, base);
    }
    file->busy++;
    buffers[buffer].busy++;
    while (held) {
        pthread_cond_wait(&changed, &lock);
    }
    pthread_mutex_unlock(&lock);
    if (delay_micros) {
        nanosleep(&(struct timespec){0, (long)delay_micros * 1000}, NULL);
    }
    size_t most = longest && longest < bytes ? longest : bytes;
    ssize_t moved = move(reads, file->fd, (char *)base + from, most, at);
    int error = errno;
    pthread_mutex_lock(&lock);
    file->busy--;
    buffers[buffer].busy--;
    pthread_mutex_unlock(&lock);
    errno = error;
    return moved;
}

API ssize_t cuFileRead(void *handle, void *base, size_t bytes, off_t at, off_t from) {
    return transfer("cuFileRead", true, handle, base, bytes, at, from);
}

API ssize_t cuFileWrite(void *handle, const void *base, size_t bytes, off_t at, off_t from) {
    return transfer("cuFileWrite", false, handle, (void *)(uintptr_t)base, bytes, at, from);
}
