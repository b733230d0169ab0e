// h = x A^T for each token's own slot: float32 sums over a part of `in` for each of the splits.
//
// A block has 8 warps, which take turns along `in`; their sums are added in a fixed order at the
// end. A thread loads 16 bytes of a row: 8 values of k that make its share of two mma steps. Both
// operands are permuted the same way along k, so nothing has to be moved. A block takes as many
// ranks at once as the widest slot may have, or a quarter or half of them where its own adapter
// has no more. Where a tile has fewer tokens, or an adapter fewer ranks still, a neighbour's row is
// loaded instead, and what comes of it is dropped: loads without conditions are under way together.
#include "launch.h"
#include "mma.cuh"

namespace lora::cuda {
namespace {

constexpr int kWarps = 8;

template <int kTokens16, int kRanks8>
struct Shape {
  static constexpr int kTokens = 16 * kTokens16, kRanks = 8 * kRanks8;
  static constexpr int kPitch = kRanks + 8;  // the 8 keep a warp's stores off each other's banks
  // Parts of 32 along k whose loads are under way at once: as many as registers hold.
  static constexpr int kLoads = 2 * kTokens16 + kRanks8;
  static constexpr int kAhead = kLoads <= 6 ? 4 : kLoads <= 12 ? 2 : 1;
};

// What a thread holds of one part: 8 neighbours along k of its rows of x and A.
template <typename E, int kTokens16, int kRanks8>
struct Part {
  using Value = typename E::Value;
  uint4 x[kTokens16][2], a[kRanks8];

  // `load` gives 8 values of a row.
  template <typename Load>
  __device__ void load(const Value* const (&x_rows)[kTokens16][2],
                       const Value* const (&a_rows)[kRanks8], const Load& load) {
#pragma unroll
    for (int j = 0; j < kRanks8; ++j) a[j] = load(a_rows[j]);
#pragma unroll
    for (int i = 0; i < kTokens16; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) x[i][half] = load(x_rows[i][half]);
  }

  __device__ void add_to(float (&c)[kTokens16][kRanks8][4]) const {
#pragma unroll
    for (int i = 0; i < kTokens16; ++i)
#pragma unroll
      for (int j = 0; j < kRanks8; ++j) {
        const uint4 low = x[i][0], high = x[i][1], b = a[j];
        multiply<E>(c[i][j], low.x, high.x, low.y, high.y, b.x, b.y);
        multiply<E>(c[i][j], low.z, high.z, low.w, high.w, b.z, b.w);
      }
  }
};

// A warp's parts, kSteps at a time, as long as there are so many before `end`.
template <int kSteps, typename Part, typename XRows, typename ARows, typename Load, typename Sums>
__device__ void add_parts(int& part, int end, const XRows& x_rows, const ARows& a_rows,
                          const Load& load, Sums& c) {
#pragma unroll 1
  for (; part + kWarps * (kSteps - 1) < end; part += kWarps * kSteps) {
    Part loaded[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      loaded[step].load(x_rows, a_rows,
                        [&](const auto* row) { return load(row, part + kWarps * step); });
    __syncwarp();  // else the compiler moves each load to its use, and they wait one by one
#pragma unroll
    for (int step = 0; step < kSteps; ++step) loaded[step].add_to(c);
  }
}

// The ranks [rank0, rank0 + 8 kRanks8) of a tile's tokens, as far as the adapter has them.
template <typename E, int kTokens16, int kRanks8, bool kAligned>
__device__ void shrink_tile(const ShrinkArguments& the, const Tile<16 * kTokens16>& tile, int rank0,
                            int width) {
  using S = Shape<kTokens16, kRanks8>;
  using Value = typename E::Value;
  using Loaded = Part<E, kTokens16, kRanks8>;
  float* const sums = dynamic_shared();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const Value* a_rows[kRanks8];
#pragma unroll
  for (int j = 0; j < kRanks8; ++j) {
    const int rank = min(rank0 + 8 * j + group, width - 1);
    a_rows[j] = static_cast<const Value*>(the.a) +
                (int64_t{tile.slot - 1} * the.width + rank) * the.in;
  }
  const int first_token = tile.token(0);
  const Value* x_rows[kTokens16][2];
#pragma unroll
  for (int i = 0; i < kTokens16; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = tile.token(16 * i + 8 * half + group);
      x_rows[i][half] =
          static_cast<const Value*>(the.x) + int64_t{token < 0 ? first_token : token} * the.in;
    }

  float c[kTokens16][kRanks8][4] = {};
  const int first = blockIdx.y * the.parts;
  const int last = min(first + the.parts, (the.in + 31) / 32);
  const int whole = kAligned ? min(last, the.in / 32) : first;  // up to here no end of a row is met
  int part = first + warp;
  const auto load = [&](const Value* row, int at) {
    return *reinterpret_cast<const uint4*>(row + 32 * at + 8 * quad);
  };
  add_parts<S::kAhead, Loaded>(part, whole, x_rows, a_rows, load, c);
  if constexpr (S::kAhead > 2) add_parts<2, Loaded>(part, whole, x_rows, a_rows, load, c);
  if constexpr (S::kAhead > 1) add_parts<1, Loaded>(part, whole, x_rows, a_rows, load, c);
#pragma unroll 1
  for (; part < last; part += kWarps) {
    Loaded loaded;
    loaded.load(x_rows, a_rows, [&](const Value* row) {
      return load8<E, kAligned>(row, 32 * part + 8 * quad, the.in);
    });
    loaded.add_to(c);
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
    const int place = at / kFours, four = 4 * (at % kFours), rank = rank0 + four;
    const int token = tile.token(place);
    if (token < 0 || rank >= (width + 15) / 16 * 16) continue;  // the expand reads 16 at once
    float sum[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += sums[(w * S::kTokens + place) * S::kPitch + four + i];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (rank + i >= width) sum[i] = 0;
    *reinterpret_cast<float4*>(
        the.sums + (int64_t{blockIdx.y} * the.tokens + token) * the.padded_width + rank) = {
        sum[0], sum[1], sum[2], sum[3]};
  }
}

// kRanks8: how many times 8 ranks a block takes at most.
template <typename E, int kTokens16, int kRanks8, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) shrink_kernel(const ShrinkArguments the) {
  wait_for_previous();
  let_next_start();
  const Routes routes = Routes::in(const_cast<void*>(the.routes), the.rows);
  const Tile<16 * kTokens16> tile(routes, blockIdx.x, the.per_row, the.chunks);
  const int width = tile.rank(the), rank0 = blockIdx.z * 8 * kRanks8, left = width - rank0;
  if (left <= 0) return;
  if constexpr (kRanks8 > 4)
    if (left > 32) return shrink_tile<E, kTokens16, 8, kAligned>(the, tile, rank0, width);
  if constexpr (kRanks8 > 2)
    if (left > 16) return shrink_tile<E, kTokens16, 4, kAligned>(the, tile, rank0, width);
  shrink_tile<E, kTokens16, 2, kAligned>(the, tile, rank0, width);
}

template <typename E, int kTokens16, int kRanks8, bool kAligned>
cudaError_t launch_as(const ShrinkArguments& the, const Launch& launch) {
  using S = Shape<kTokens16, kRanks8>;
  constexpr int kBytes = kWarps * S::kTokens * S::kPitch * 4;
  const auto kernel = shrink_kernel<E, kTokens16, kRanks8, kAligned>;
  // On every call: the limit belongs to the device that is current, and setting it costs little.
  if (kBytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(launch.tiles), static_cast<unsigned>(launch.splits),
                  static_cast<unsigned>((the.padded_width + S::kRanks - 1) / S::kRanks));
  return launch_kernel(kernel, grid, 32 * kWarps, kBytes, launch, the);
}

template <typename E>
cudaError_t launch_for(const ShrinkArguments& the, const Launch& launch) {
  if (!launch.aligned) return launch_as<E, 1, 4, false>(the, launch);
  if (launch.tile == 64) return launch_as<E, 4, 8, true>(the, launch);
  if (launch.tile == 32)
    return the.width <= 16 ? launch_as<E, 2, 2, true>(the, launch)
                           : launch_as<E, 2, 4, true>(the, launch);
  return the.width <= 16   ? launch_as<E, 1, 2, true>(the, launch)
         : the.width <= 32 ? launch_as<E, 1, 4, true>(the, launch)
                           : launch_as<E, 1, 8, true>(the, launch);
}

}  // namespace

cudaError_t launch_shrink(Element element, const ShrinkArguments& the, const Launch& launch) {
  return element == Element::kFloat16 ? launch_for<Half>(the, launch)
                                      : launch_for<BHalf>(the, launch);
}

}  // namespace lora::cuda
