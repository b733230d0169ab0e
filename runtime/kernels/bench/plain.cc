// Plain C entries to the CUDA kernels, so that they can be checked and timed without onnxruntime.
#include "../csrc/routes.h"
#include "../csrc/site.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* plain_route(const int64_t* slots, int64_t rows, void* routes, void* stream) {
  return lora::cuda::route(slots, rows, routes, stream);
}

EXPORT void plain_route_cpu(const int64_t* slots, int64_t rows, void* routes) {
  lora::cpu::route(slots, rows, routes);
}

// Completes the choice and gives the bytes that the sums take.
EXPORT int64_t plain_choose(const lora::Site* site, lora::cuda::Choice* choice) {
  *choice = lora::cuda::choose(*site, *choice);
  return static_cast<int64_t>(lora::cuda::scratch_bytes(*site, *choice));
}

EXPORT const char* plain_compute(const lora::Site* site, const lora::cuda::Choice* choice,
                                 void* stream, void* cublas, void* scratch) {
  return lora::cuda::compute(*site, {stream, cublas}, *choice, static_cast<float*>(scratch));
}
