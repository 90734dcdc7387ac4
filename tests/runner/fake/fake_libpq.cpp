// A plugin library as pq-run meets it. FAKE_PQ_ABI and FAKE_PQ_VARIANTS change its answers.
#include <cstdlib>

#include "pq_kernels.h"

namespace {

int answer(const char* variable, int otherwise) {
    const char* const text = getenv(variable);
    return text ? atoi(text) : otherwise;
}

}  // namespace

extern "C" int pq_abi_version(void) { return answer("FAKE_PQ_ABI", PQ_ABI_VERSION); }
extern "C" int pq_gemm_variants(int, int, int, int, int, int*, int) { return answer("FAKE_PQ_VARIANTS", 3); }
