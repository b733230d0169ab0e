// What csrc/*.cu uses of CUDA, on a CPU: blocks run one after another, the threads of a block as
// fibers that change over where threads of a warp or a block meet. It shows what the kernels
// compute; it has no memory model, so it shows no race.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) float2 { float x, y; };

// Of the fiber that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct Operands {
  uint32_t a0, a1, a2, a3, b0, b1;
};
using Multiply = std::function<void(const Operands*, float (*)[4])>;

float* dynamic_shared();
void meet_block();
void meet_warp(unsigned mask);
// What each lane of the mask gave, once all have given theirs.
std::array<int, 32> exchange(unsigned mask, int value);
// The last lane that comes works for the whole warp: operands and sums of its 32 lanes.
void work_as_warp(const Operands& operands, float (&c)[4], const Multiply& work);
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);

template <typename E>
float value_of(uint32_t word, int half) {
  typename E::Value values[2];
  std::memcpy(values, &word, 4);
  return E::to_float(values[half]);
}

// mma.m16n8k16: where PTX says that the lanes hold their parts.
template <typename E>
void multiply(float (&c)[4], const Operands& operands) {
  work_as_warp(operands, c, [](const Operands* of, float (*sums)[4]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half) {
        const int group = lane / 4, k = 2 * (lane % 4) + half;
        a[group][k] = value_of<E>(of[lane].a0, half);
        a[group + 8][k] = value_of<E>(of[lane].a1, half);
        a[group][k + 8] = value_of<E>(of[lane].a2, half);
        a[group + 8][k + 8] = value_of<E>(of[lane].a3, half);
        b[k][group] = value_of<E>(of[lane].b0, half);
        b[k + 8][group] = value_of<E>(of[lane].b1, half);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k)
          sums[lane][i] += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
  });
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulated::meet_warp(mask); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __shfl_up_sync(unsigned mask, int value, int by) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return emulated::exchange(mask, value)[lane >= by ? lane - by : lane];
}
inline int __reduce_max_sync(unsigned mask, int value) {
  const auto all = emulated::exchange(mask, value);
  return *std::max_element(all.begin(), all.end());
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  const auto all = emulated::exchange(mask, value);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= (all[lane] == value ? 1u : 0u) << lane;
  return same;
}
inline int atomicMax(int* at, int value) {
  const int old = *at;
  *at = std::max(old, value);
  return old;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i)
    made |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return made;
}

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
// Of a Hopper device, each with its value.
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 9,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 227 << 10,
};
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
constexpr int cudaLaunchAttributeProgrammaticStreamSerialization = 0;
struct cudaLaunchAttribute {
  int id;
  struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "failed"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }

template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& the) {
  emulated::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                [&] { kernel(the); });
  return cudaSuccess;
}
