/* Goal: numbers, sizes and offsets are those that programs were compiled with: a change breaks the build. */
#include "check.h"

#ifdef __cplusplus
#define ASSERT(condition) static_assert(condition, #condition)
#else
#define ASSERT(condition) _Static_assert(condition, #condition)
#endif
#define AT(type, field, place) ASSERT(offsetof(type, field) == (place))

ASSERT(UCM_STATUS_OK == 0);
ASSERT(UCM_STATUS_PENDING == 1);
ASSERT(UCM_STATUS_INVALID_ARGUMENT == 2);
ASSERT(UCM_STATUS_INVALID_CONFIG == 3);
ASSERT(UCM_STATUS_NOT_FOUND == 4);
ASSERT(UCM_STATUS_CORRUPT == 5);
ASSERT(UCM_STATUS_IO == 6);
ASSERT(UCM_STATUS_NO_SPACE == 7);
ASSERT(UCM_STATUS_OUT_OF_MEMORY == 8);
ASSERT(UCM_STATUS_TIMEOUT == 9);
ASSERT(UCM_STATUS_BUSY == 10);
ASSERT(UCM_STATUS_CANCELLED == 11);
ASSERT(UCM_STATUS_UNSUPPORTED == 12);
ASSERT(UCM_STATUS_DEVICE == 13);
ASSERT(UCM_STATUS_PERMISSION == 14);
ASSERT(UCM_STATUS_CLOSED == 15);
ASSERT(UCM_STATUS_INTERNAL == 16);
ASSERT(UCM_STAGE_COPIED == 1);
ASSERT(UCM_STAGE_PERSISTED == 2);
ASSERT(UCM_STAGE_LOADED == 3);
ASSERT(UCM_STAGE_RELEASED == 4);
ASSERT(UCM_STAGE_ENQUEUED == 5);
ASSERT(UCM_BATCH_NOTIFY == 1);
ASSERT(UCM_BATCH_NOTIFY_COPIED == 2);
ASSERT(UCM_LOG_OFF == 0);
ASSERT(UCM_LOG_ERROR == 1);
ASSERT(UCM_LOG_WARNING == 2);
ASSERT(UCM_LOG_INFO == 3);
ASSERT(UCM_LOG_DEBUG == 4);
ASSERT(sizeof(ucm_status_t) == 4);
ASSERT(UCM_API_VERSION == ((UCM_API_VERSION_MAJOR << 16) | UCM_API_VERSION_MINOR));

ASSERT(sizeof(ucm_block_id_t) == 16);
ASSERT(sizeof(struct ucm_block_id) == 16);
ASSERT(sizeof(ucm_batch_t) == 72);
ASSERT(sizeof(struct ucm_batch) == 72);
AT(ucm_batch_t, struct_size, 0);
AT(ucm_batch_t, blocks, 8);
AT(ucm_batch_t, shards, 16);
AT(ucm_batch_t, addresses, 24);
AT(ucm_batch_t, count, 32);
AT(ucm_batch_t, wait_event, 40);
AT(ucm_batch_t, flags, 48);
AT(ucm_batch_t, user_data, 56);
AT(ucm_batch_t, timeout_ms, 64);
ASSERT(sizeof(ucm_completion_t) == 24);
AT(ucm_completion_t, task, 0);
AT(ucm_completion_t, user_data, 8);
AT(ucm_completion_t, stage, 16);
AT(ucm_completion_t, status, 20);
ASSERT(sizeof(ucm_stats_t) == 256);
AT(ucm_stats_t, struct_size, 0);
AT(ucm_stats_t, lookups, 8);
AT(ucm_stats_t, backends_degraded, 184);
AT(ucm_stats_t, refreshes, 248);

int main(void) {
    static const char *const names[] = {
        "UCM_STATUS_OK", "UCM_STATUS_PENDING", "UCM_STATUS_INVALID_ARGUMENT", "UCM_STATUS_INVALID_CONFIG",
        "UCM_STATUS_NOT_FOUND", "UCM_STATUS_CORRUPT", "UCM_STATUS_IO", "UCM_STATUS_NO_SPACE",
        "UCM_STATUS_OUT_OF_MEMORY", "UCM_STATUS_TIMEOUT", "UCM_STATUS_BUSY", "UCM_STATUS_CANCELLED",
        "UCM_STATUS_UNSUPPORTED", "UCM_STATUS_DEVICE", "UCM_STATUS_PERMISSION", "UCM_STATUS_CLOSED",
        "UCM_STATUS_INTERNAL",
    };
    for (int status = 0; status <= UCM_STATUS_INTERNAL; ++status) {
        CHECK(strcmp(ucm_status_name(status), names[status]) == 0);
    }
    CHECK(strcmp(ucm_status_name(-1), "UCM_STATUS_UNKNOWN") == 0);
    CHECK(strcmp(ucm_status_name(17), "UCM_STATUS_UNKNOWN") == 0);
    CHECK(ucm_api_version() == UCM_API_VERSION);
    CHECK(strchr(ucm_version(), '(') != NULL);
    return passed();
}
