// h = x A^T for each token's own slot: float32 sums over a part of `in` for each of the splits.
//
// A block has 8 warps, which take turns along `in`; their sums are added in a fixed order at the
// end. A thread loads 16 bytes of a row: 8 values of k that make its share of two mma steps. Both
// operands are permuted the same way along k, so nothing has to be moved.
#include "launch.h"
#include "mma.cuh"

namespace lora::cuda {
namespace {

constexpr int kWarps = 8;

template <typename E, int kTokens16, int kRanks8>
struct Shape {
  static constexpr int kTokens = 16 * kTokens16, kRanks = 8 * kRanks8;
  static constexpr int kPitch = kRanks + 8;  // the 8 keep a warp's stores off each other's banks
  static constexpr int kBytes = kWarps * kTokens * kPitch * 4;
  // Parts of 32 along k whose loads are under way at once: as many as registers hold.
  static constexpr int kAhead = 2 * kTokens16 + kRanks8 <= 6 ? 4 : 2;
};

template <typename E, int kTokens16, int kRanks8, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) shrink_kernel(const ShrinkArguments the) {
  using S = Shape<E, kTokens16, kRanks8>;
  using Value = typename E::Value;
  extern __shared__ float sums[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;

  wait_for_previous();
  let_next_start();
  const Routes routes = Routes::in(const_cast<void*>(the.routes), the.rows);
  const Tile<S::kTokens> tile(routes, blockIdx.x, the.per_row, the.chunks);
  if (tile.slot < 1 || tile.slot > the.slots) return;

  const Value* x_rows[kTokens16][2];
#pragma unroll
  for (int i = 0; i < kTokens16; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = tile.token(16 * i + 8 * half + group);
      x_rows[i][half] = token < 0 ? nullptr : static_cast<const Value*>(the.x) + token * the.in;
    }
  const int rank0 = blockIdx.z * S::kRanks + group;
  const Value* a_rows = static_cast<const Value*>(the.a) +
                        (int64_t{tile.slot - 1} * the.width + rank0) * the.in;

  float c[kTokens16][kRanks8][4] = {};
  const int64_t parts = (the.in + 31) / 32;
  const int64_t last = parts * (blockIdx.y + 1) / gridDim.y;
  for (int64_t part = parts * blockIdx.y / gridDim.y + warp; part < last;
       part += kWarps * S::kAhead) {
    uint4 x[S::kAhead][kTokens16][2], a[S::kAhead][kRanks8];
#pragma unroll
    for (int step = 0; step < S::kAhead; ++step) {
      const int64_t mine = part + kWarps * step;
      const int64_t k = 32 * mine + 8 * quad;
#pragma unroll
      for (int j = 0; j < kRanks8; ++j)
        a[step][j] = mine < last && rank0 + 8 * j < the.width
                         ? load8<E, kAligned>(a_rows + 8 * j * the.in, k, the.in)
                         : uint4{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kTokens16; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          x[step][i][half] = mine < last && x_rows[i][half] != nullptr
                                 ? load8<E, kAligned>(x_rows[i][half], k, the.in)
                                 : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int step = 0; step < S::kAhead; ++step)
#pragma unroll
      for (int i = 0; i < kTokens16; ++i)
#pragma unroll
        for (int j = 0; j < kRanks8; ++j) {
          const uint4 low = x[step][i][0], high = x[step][i][1], b = a[step][j];
          multiply<E>(c[i][j], low.x, high.x, low.y, high.y, b.x, b.y);
          multiply<E>(c[i][j], low.z, high.z, low.w, high.w, b.z, b.w);
        }
  }

  float* mine = sums + warp * S::kTokens * S::kPitch;
#pragma unroll
  for (int i = 0; i < kTokens16; ++i)
#pragma unroll
    for (int j = 0; j < kRanks8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(mine + (16 * i + 8 * half + group) * S::kPitch + 8 * j +
                                   2 * quad) = {c[i][j][2 * half], c[i][j][2 * half + 1]};
  __syncthreads();
  constexpr int kFours = S::kRanks / 4;
  for (int at = threadIdx.x; at < S::kTokens * kFours; at += 32 * kWarps) {
    const int place = at / kFours, four = 4 * (at % kFours);
    const int64_t token = tile.token(place);
    const int64_t rank = int64_t{blockIdx.z} * S::kRanks + four;
    if (token < 0 || rank >= the.padded_width) continue;
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = *reinterpret_cast<const float4*>(
          sums + (w * S::kTokens + place) * S::kPitch + four);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    *reinterpret_cast<float4*>(the.sums + (blockIdx.y * the.tokens + token) * the.padded_width +
                               rank) = sum;
  }
}

template <typename E, int kTokens16, int kRanks8, bool kAligned>
cudaError_t launch_as(const ShrinkArguments& the, const Launch& launch) {
  using S = Shape<E, kTokens16, kRanks8>;
  const auto kernel = shrink_kernel<E, kTokens16, kRanks8, kAligned>;
  // On every call: the limit belongs to the device that is current, and setting it costs little.
  if (S::kBytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(launch.tiles), static_cast<unsigned>(launch.splits),
                  static_cast<unsigned>((the.padded_width + S::kRanks - 1) / S::kRanks));
  return launch_kernel(kernel, grid, 32 * kWarps, S::kBytes, launch, the);
}

template <typename E>
cudaError_t launch_for(const ShrinkArguments& the, const Launch& launch) {
  if (!launch.aligned) return launch_as<E, 1, 4, false>(the, launch);
  const bool narrow = the.width <= 16;
  if (launch.tile == 64) {
    return narrow ? launch_as<E, 4, 2, true>(the, launch) : launch_as<E, 4, 4, true>(the, launch);
  }
  if (launch.tile == 32) {
    return narrow             ? launch_as<E, 2, 2, true>(the, launch)
           : the.width <= 32 ? launch_as<E, 2, 4, true>(the, launch)
                              : launch_as<E, 2, 8, true>(the, launch);
  }
  return narrow             ? launch_as<E, 1, 2, true>(the, launch)
         : the.width <= 32 ? launch_as<E, 1, 4, true>(the, launch)
                            : launch_as<E, 1, 8, true>(the, launch);
}

}  // namespace

cudaError_t launch_shrink(Element element, const ShrinkArguments& the, const Launch& launch) {
  return element == Element::kFloat16 ? launch_for<Half>(the, launch)
                                      : launch_for<BHalf>(the, launch);
}

}  // namespace lora::cuda
