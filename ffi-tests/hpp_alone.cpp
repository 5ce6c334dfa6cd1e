// Goal: ucm.hpp needs no other header and may be included twice, also beside ucm.h.
#include <ucm.hpp>
#include <ucm.hpp>
#include <ucm.h>

int main() {
    return ucm::Store().get() == nullptr && ucm_api_version() == UCM_API_VERSION ? 0 : 1;
}
