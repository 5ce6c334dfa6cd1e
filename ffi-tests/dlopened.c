/* Goal: the library works through dlopen and dlsym, and dlclose, with a store open or not, unmaps nothing that its
 * threads run. Is not linked with it: UCM_TEST_LIBRARY names it. */
#include <ucm.h>

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                          \
    do {                                                                          \
        if (!(condition)) {                                                       \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);       \
            exit(1);                                                              \
        }                                                                         \
    } while (0)

typedef struct {
    void *library;
    uint32_t (*api_version)(void);
    ucm_status_t (*from_yaml)(const char *, size_t, ucm_options_t **);
    ucm_status_t (*open)(const ucm_options_t *, ucm_store_t **);
    ucm_status_t (*refresh)(ucm_store_t *, int64_t);
    ucm_status_t (*lookup_prefix)(ucm_store_t *, const ucm_block_id_t *, size_t, size_t *);
    void (*close)(ucm_store_t *);
    size_t (*last_error)(char *, size_t);
} functions_t;

/* ISO C has no cast from void * to a function pointer: copied. */
static void find(void *library, const char *name, void *function) {
    void *symbol = dlsym(library, name);
    CHECK(symbol != NULL);
    memcpy(function, &symbol, sizeof symbol);
}

static functions_t load_library(void) {
    functions_t ucm;
    ucm.library = dlopen(getenv("UCM_TEST_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
    CHECK(ucm.library != NULL);
    find(ucm.library, "ucm_api_version", (void *)&ucm.api_version);
    find(ucm.library, "ucm_options_from_yaml", (void *)&ucm.from_yaml);
    find(ucm.library, "ucm_store_open", (void *)&ucm.open);
    find(ucm.library, "ucm_store_refresh", (void *)&ucm.refresh);
    find(ucm.library, "ucm_lookup_prefix", (void *)&ucm.lookup_prefix);
    find(ucm.library, "ucm_store_close", (void *)&ucm.close);
    find(ucm.library, "ucm_last_error", (void *)&ucm.last_error);
    CHECK(ucm.api_version() == UCM_API_VERSION);
    return ucm;
}

static ucm_store_t *open_store(const functions_t *ucm) {
    char yaml[4096], message[512];
    ucm_options_t *options = NULL;
    ucm_store_t *store = NULL;
    snprintf(yaml, sizeof yaml,
             "store_pipeline: Cache|Posix\nstorage_backends: [\"%s\"]\ncache_buffer_capacity_gb: 0.0625\n"
             "segment_size_mb: 64\ndevice: host\ndevice_id: 0\n"
             "block_size: 1048576\nshard_size: 1048576\ntensor_size_list: [1048576]\n",
             getenv("UCM_TEST_DIRECTORY"));
    if (ucm->from_yaml(yaml, strlen(yaml), &options) != UCM_STATUS_OK ||
        ucm->open(options, &store) != UCM_STATUS_OK) {
        ucm->last_error(message, sizeof message);
        fprintf(stderr, "open: %s\n", message);
        exit(1);
    }
    return store;
}

int main(void) {
    const ucm_block_id_t block = {{1}};
    size_t hits = 9;
    functions_t first = load_library();
    ucm_store_t *store = open_store(&first);
    CHECK(dlclose(first.library) == 0);

    /* The handle still works through a second dlopen, and so does the first's code. */
    functions_t second = load_library();
    CHECK(second.api_version == first.api_version);
    CHECK(second.refresh(store, 0) == UCM_STATUS_OK);
    CHECK(first.lookup_prefix(store, &block, 1, &hits) == UCM_STATUS_OK && hits == 0);
    second.close(store);
    CHECK(dlclose(second.library) == 0);
    CHECK(second.refresh(store, 0) == UCM_STATUS_CLOSED);
    puts("ok");
    return 0;
}
