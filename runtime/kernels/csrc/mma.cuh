// Tensor-core products and the loads that fit them, for float16 and bfloat16 with float32 sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.h"
#include "routes.h"

namespace lora::cuda {

struct Half {
  using Value = __half;
  static __device__ float to_float(Value value) { return __half2float(value); }
  static __device__ Value of_float(float value) { return __float2half_rn(value); }
};

struct BHalf {
  using Value = __nv_bfloat16;
  static __device__ float to_float(Value value) { return __bfloat162float(value); }
  static __device__ Value of_float(float value) { return __float2bfloat16_rn(value); }
};

template <typename E>
__device__ uint32_t pack(float low, float high) {
  const typename E::Value values[2] = {E::of_float(low), E::of_float(high)};
  uint32_t packed;
  memcpy(&packed, values, 4);
  return packed;
}

template <typename E>
__device__ float2 unpack(uint32_t packed) {
  typename E::Value values[2];
  memcpy(values, &packed, 4);
  return {E::to_float(values[0]), E::to_float(values[1])};
}

#ifdef LORAEXPORT_EMULATED
// tests/kernels/emulated runs these sources on a CPU, a fiber for each thread.
template <typename E>
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
  emulated::multiply<E>(c, {a0, a1, a2, a3, b0, b1});
}

inline float* dynamic_shared() { return emulated::dynamic_shared(); }
#else
// The block's shared memory of a size that the launch says.
__device__ inline float* dynamic_shared() {
  extern __shared__ float memory[];
  return memory;
}

// c [16, 8] += a [16, 16] b [16, 8]. A row of c depends on that row of a and on b alone.
template <typename E>
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply<Half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                      uint32_t a3, uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply<BHalf>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#endif

// Elements [at, at + 8) of a row of `size`, 0 past its end. 8 divides the size of aligned rows.
template <typename E, bool kAligned>
__device__ uint4 load8(const typename E::Value* row, int at, int size) {
  uint4 loaded = {0, 0, 0, 0};
  if constexpr (kAligned) {
    if (at < size) loaded = *reinterpret_cast<const uint4*>(row + at);
  } else {
    typename E::Value values[8] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (at + i < size) values[i] = row[at + i];
    memcpy(&loaded, values, 16);
  }
  return loaded;
}

template <typename E, bool kAligned>
__device__ void store8(typename E::Value* row, int at, int size, uint4 value) {
  if constexpr (kAligned) {
    if (at < size) *reinterpret_cast<uint4*>(row + at) = value;
  } else {
    typename E::Value values[8];
    memcpy(values, &value, 16);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (at + i < size) row[at + i] = values[i];
  }
}

// Programmatic dependent launch: what stands before wait() runs while the kernel before this one
// ends; what that kernel wrote may be read only behind it. Older cards launch in plain order.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A tile of kSize tokens that use one slot. Where a row has several tokens, a tile lies within one
// row, and `chunks` of them make the row; else it is one that Route has made.
template <int kSize>
struct Tile {
  int slot;  // -1: no such tile; 0: the base
  int first;
  int count;
  const int* rows;

  __device__ Tile(const Routes& routes, int tile, int per_row, int chunks) {
    if (per_row > 1) {
      const int row = tile / chunks, begin = (tile - row * chunks) * kSize;
      slot = static_cast<int>(routes.slots[row]);
      first = row * per_row + begin;
      count = min(per_row - begin, kSize);
      rows = nullptr;
    } else if constexpr (kSize == 16) {
      slot = routes.slots16[tile];
      rows = routes.rows + tile * 16;
      count = 16;  // or fewer: -1 fills the gap
    } else {
      const Run run = (kSize == 32 ? routes.runs32 : routes.runs64)[tile];
      slot = run.slot;
      rows = routes.rows + run.begin;
      count = run.count;
    }
  }

  static __device__ int number(const Routes& routes) {
    return routes.tiles[kSize == 16 ? 0 : kSize == 32 ? 1 : 2];
  }

  // The rank of its slot's adapter; 0 of the base.
  __device__ int rank(const SiteArguments& the) const {
    const bool adapted = slot >= 1 && slot <= the.slots;
    return adapted ? static_cast<int>(rank_of(the.ranks, slot, the.width)) : 0;
  }

  // The token at a place of the tile, -1 for none.
  __device__ int token(int place) const {
    if (place >= count) return -1;
    return rows == nullptr ? first + place : rows[place];
  }
};

}  // namespace lora::cuda
