// The base's product by the cuBLAS that is loaded already: nothing is linked, so that the library
// loads where there is no CUDA.
#pragma once

#include <cstdint>

#include "site.h"

namespace lora::cuda {

// y [T, out] = x [T, in] weight [in, out] + beta * y, summed in float32; null or what failed.
const char* gemm(void* cublas, Element element, int64_t tokens, int64_t in, int64_t out,
                 const void* x, const void* weight, void* y, float beta);

}  // namespace lora::cuda
