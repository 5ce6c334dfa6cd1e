/* Goal: the log callback gets messages of its level with its context, may not be changed from within, and is not
 * called once it is replaced. */
#include "check.h"

typedef struct {
    int magic, calls;
    uint32_t worst;
    ucm_status_t nested;
    char all[8192];
} ears_t;

static void listen(void *context, uint32_t level, const char *message) {
    ears_t *ears = (ears_t *)context;
    CHECK(ears->magic == 4711 && message != NULL);
    CHECK(level >= UCM_LOG_ERROR && level <= UCM_LOG_DEBUG);
    ears->calls += 1;
    if (level > ears->worst) ears->worst = level;
    ears->nested = ucm_log_callback(NULL, NULL, UCM_LOG_ERROR);
    strncat(ears->all, message, sizeof ears->all - strlen(ears->all) - 1);
}

int main(void) {
    static ears_t ears;
    ucm_options_t *options;
    ucm_store_t *store = NULL;
    int before;
    ears.magic = 4711;
    OK(ucm_log_callback(listen, &ears, UCM_LOG_WARNING));
    options = test_options(BLOCK_BYTES);
    OK(ucm_options_set(options, "posix_io_engine", "aio")); /* of upstream UCM: accepted with a warning */
    OK(ucm_store_open(options, &store));
    CHECK(ears.calls > 0 && ears.worst <= UCM_LOG_WARNING);
    CHECK(strstr(ears.all, "aio") != NULL);
    CHECK(ears.nested == UCM_STATUS_BUSY);
    ucm_store_close(store);

    OK(ucm_log_callback(NULL, NULL, UCM_LOG_OFF));
    before = ears.calls;
    OK(ucm_store_open(options, &store));
    ucm_store_close(store);
    CHECK(ears.calls == before);
    ucm_options_free(options);
    return passed();
}
