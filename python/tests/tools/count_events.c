// Stands between the engine and the CUDA driver (UCM_CUDA_LIBRARY) and counts the events that live.
// Build: gcc -shared -fPIC -O1 -o count_events.so count_events.c -ldl
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

typedef int (*get_proc)(const char *, void **, int, uint64_t, int *);
typedef int (*create)(void **, unsigned);
typedef int (*destroy)(void *);

// Read by tests.
atomic_long ucm_test_events_made, ucm_test_events_alive;

static create real_create;
static destroy real_destroy;

static void *driver(const char *name) {
  static void *library;
  if (!library) library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  return library ? dlsym(library, name) : 0;
}

static int counted_create(void **event, unsigned flags) {
  int status = real_create(event, flags);
  if (!status) {
    ucm_test_events_made++;
    ucm_test_events_alive++;
  }
  return status;
}

static int counted_destroy(void *event) {
  int status = real_destroy(event);
  if (!status) ucm_test_events_alive--;
  return status;
}

int cuDriverGetVersion(int *version) { return ((int (*)(int *))driver("cuDriverGetVersion"))(version); }

int cuGetProcAddress_v2(const char *name, void **address, int version, uint64_t flags, int *found) {
  int status = ((get_proc)driver("cuGetProcAddress_v2"))(name, address, version, flags, found);
  if (status || !*address) return status;
  if (!strcmp(name, "cuEventCreate")) real_create = *(create *)address, *address = (void *)counted_create;
  if (!strcmp(name, "cuEventDestroy")) real_destroy = *(destroy *)address, *address = (void *)counted_destroy;
  return status;
}
