/* The pretended machine's lock, its health, and failures on request. */
#define _GNU_SOURCE
#include "inside.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

pthread_mutex_t stub_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t stub_changed = PTHREAD_COND_INITIALIZER;
__thread bool stub_in_host;

static long calls, fail_at, named_at;
static int fail_status, fail_sticky, named_status;
int stub_dead_status;
static char named[64], failed[64];
unsigned stub_delay_micros;
int stub_held;
size_t stub_falsified;

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

void stub_pause(unsigned micros) {
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
    if (stub_in_host) {
        stub_misuse(call, "called from a host function, where no call is allowed");
    }
    pthread_mutex_lock(&stub_lock);
    int status = stub_dead_status;
    calls++;
    count(call);
    if (!status && fail_at && --fail_at == 0) {
        status = fail_status;
        snprintf(failed, sizeof failed, "%s", call);
        if (fail_sticky) {
            stub_dead_status = status;
            pthread_cond_broadcast(&stub_changed);
        }
    } else if (!status && named_at && !strcmp(named, call) && --named_at == 0) {
        status = named_status;
        snprintf(failed, sizeof failed, "%s", call);
    }
    pthread_mutex_unlock(&stub_lock);
    return status;
}

int stub_dead(void) {
    return stub_dead_status;
}

/* A process ends with its driver: what runs on then gets this status, as cuda's DEINITIALIZED. */
__attribute__((destructor)) static void deinitialise(void) {
    pthread_mutex_lock(&stub_lock);
    stub_dead_status = 4;
    pthread_cond_broadcast(&stub_changed);
    pthread_mutex_unlock(&stub_lock);
}

void ucm_stub_fail(long nth, int status, int sticky) {
    pthread_mutex_lock(&stub_lock);
    fail_at = nth;
    fail_status = status;
    fail_sticky = sticky;
    failed[0] = 0;
    pthread_mutex_unlock(&stub_lock);
}

void ucm_stub_fail_call(const char *name, long nth, int status) {
    pthread_mutex_lock(&stub_lock);
    snprintf(named, sizeof named, "%s", name);
    named_at = nth;
    named_status = status;
    failed[0] = 0;
    pthread_mutex_unlock(&stub_lock);
}

const char *ucm_stub_failed(void) {
    return failed[0] ? failed : NULL;
}

long ucm_stub_calls(void) {
    return calls;
}

long ucm_stub_calls_of(const char *name) {
    long total = 0;
    pthread_mutex_lock(&stub_lock);
    for (int i = 0; i < NAMES_MAX && counts[i].name; i++) {
        if (!strcmp(counts[i].name, name)) {
            total = counts[i].count;
        }
    }
    pthread_mutex_unlock(&stub_lock);
    return total;
}

void ucm_stub_delay(unsigned micros) {
    stub_delay_micros = micros;
}

void ucm_stub_falsify(size_t bytes) {
    stub_falsified = bytes;
}

void ucm_stub_hold(int hold) {
    pthread_mutex_lock(&stub_lock);
    stub_held = hold;
    pthread_cond_broadcast(&stub_changed);
    pthread_mutex_unlock(&stub_lock);
}

void ucm_stub_reset(void) {
    pthread_mutex_lock(&stub_lock);
    calls = fail_at = named_at = 0;
    failed[0] = 0;
    stub_delay_micros = 0;
    stub_held = HOLD_NOTHING;
    stub_falsified = 0;
    stub_dead_status = 0;
    memset(counts, 0, sizeof counts);
    stub_forget_fills();
    pthread_cond_broadcast(&stub_changed);
    pthread_mutex_unlock(&stub_lock);
}
