/* Goal: proves that the sanitizer builds can fail: asks the library to write a status behind the end of an array. */
#include "check.h"

int main(void) {
    char *buffer = (char *)malloc(8);
    CHECK(buffer != NULL);
    EXPECT(UCM_STATUS_INVALID_ARGUMENT, ucm_options_new(NULL));
    ucm_last_error(buffer, 64); /* 64 is a lie: the message is longer than 8 bytes */
    free(buffer);
    return passed();
}
