/* Goal: ucm.h needs no other header, may be included twice, and is strict C and C++. */
#include <ucm.h>
#include <ucm.h>

int main(void) {
    ucm_batch_t batch = {0};
    return batch.struct_size == 0 && ucm_api_version() == UCM_API_VERSION ? 0 : 1;
}
