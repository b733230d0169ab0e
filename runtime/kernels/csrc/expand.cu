// y = base + h B (+ bias) for each token's own slot; h are the shrink's sums, added up here.
//
// A warp makes 64 columns. A thread loads 8 neighbouring columns of a row of B, and column g of the
// j-th mma is column 8 (g / 2) + 32 (g % 2) + j of the 64: so a thread ends with twice 8 neighbours
// of a row of y, and four threads write 64 bytes in a row. Ranks are permuted alike: a thread's
// four of 16 are neighbours in h.
#include <algorithm>

#include "launch.h"
#include "mma.cuh"

namespace lora::cuda {
namespace {

constexpr int kWarps = 4, kColumns = 64;

// The operand of 8 mma steps: ranks 4 quad .. + 3 of the thread's 8 columns.
struct Columns {
  uint4 rows[4];

  // b points at the first of the 8 columns, of which `left` are there.
  template <typename E, bool kAligned>
  __device__ void load(const typename E::Value* b, int left, int stride, int rank, int width) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows[i] = rank + i < width ? load8<E, kAligned>(b + int64_t{rank + i} * stride, 0, left)
                                 : uint4{0, 0, 0, 0};
  }

  // Ranks 4 quad + 2 pair and the next one, of column j.
  __device__ uint32_t operand(int j, int pair) const {
    const uint4 one = rows[2 * pair], other = rows[2 * pair + 1];
    const uint32_t a = j < 2 ? one.x : j < 4 ? one.y : j < 6 ? one.z : one.w;
    const uint32_t b = j < 2 ? other.x : j < 4 ? other.y : j < 6 ? other.z : other.w;
    return __byte_perm(a, b, j % 2 == 0 ? 0x5410 : 0x7632);
  }
};

// Four of every 16 ranks of two tokens' h: the splits' sums, added up in their order; the loads of
// kAhead splits are under way at once.
template <int kRanks16, int kAhead>
struct Sums {
  float4 h[kRanks16][2] = {};

  __device__ void load(const float* const (&from)[2], int rank, int width,
                       const ExpandArguments& the) {
    const int64_t stride = int64_t{the.tokens} * the.padded_width;
#pragma unroll 1
    for (int split = 0; split < the.splits; split += kAhead) {
      float4 parts[kAhead][kRanks16][2];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int k = 0; k < kRanks16; ++k)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const bool there = split + i < the.splits && rank + 16 * k < width;
            const float* at = from[half] + (split + i) * stride + rank + 16 * k;
            parts[i][k][half] =
                there ? *reinterpret_cast<const float4*>(at) : float4{0, 0, 0, 0};
          }
      __syncwarp();  // else the compiler moves each load to its use, and they wait one by one
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int k = 0; k < kRanks16; ++k)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float4 part = parts[i][k][half];
            float4& sum = h[k][half];
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
          }
    }
  }
};

// c, of the two times 8 columns of a thread in two rows, begins with the bias.
template <typename E>
__device__ void begin_sums(float (&c)[8][4], const uint4 (&bias)[2]) {
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const uint32_t words[4] = {bias[side].x, bias[side].y, bias[side].z, bias[side].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 values = unpack<E>(words[i]);
      c[2 * i][side] = c[2 * i][2 + side] = values.x;
      c[2 * i + 1][side] = c[2 * i + 1][2 + side] = values.y;
    }
  }
}

// y = base + c, of one row.
template <typename E, bool kAligned>
__device__ void write_row(const Slice& slice, int token, int column, const float (&c)[8][4],
                          int half, const uint4 (&base)[2]) {
  using Value = typename E::Value;
  Value* y = static_cast<Value*>(slice.y) + int64_t{token} * slice.out;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const uint32_t old_words[4] = {base[side].x, base[side].y, base[side].z, base[side].w};
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 old = unpack<E>(old_words[i]);
      words[i] = pack<E>(old.x + c[2 * i][2 * half + side], old.y + c[2 * i + 1][2 * half + side]);
    }
    store8<E, kAligned>(y, column + 32 * side, static_cast<int>(slice.out),
                        {words[0], words[1], words[2], words[3]});
  }
}

template <typename E, bool kAligned>
__device__ void load_row(const void* matrix, int row, int column, int64_t out,
                         uint4 (&loaded)[2]) {
#pragma unroll
  for (int side = 0; side < 2; ++side)
    loaded[side] = matrix == nullptr
                       ? uint4{0, 0, 0, 0}
                       : load8<E, kAligned>(
                             static_cast<const typename E::Value*>(matrix) + row * out,
                             column + 32 * side, static_cast<int>(out));
}

// A warp's columns of one tile. kRanks16: how many times 16 ranks of B it keeps; wider slots are
// taken in turns.
template <typename E, int kTokens16, int kRanks16, bool kAligned>
__device__ void expand_tile(const ExpandArguments& the, const Slice& slice, int column,
                            const Tile<16 * kTokens16>& tile) {
  using Value = typename E::Value;
  const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  // An adapter that has nothing here is as good as none.
  const int width = tile.rank(the);
  if (tile.slot < 0 || (width == 0 && !the.all)) return wait_for_previous();
  const int out = static_cast<int>(slice.out), stride = static_cast<int>(slice.b_stride);
  const int mine = column + 8 * (group / 2) + 32 * (group % 2), first = column + 8 * quad;
  const Value* b = static_cast<const Value*>(slice.b) +
                   int64_t{width > 0 ? tile.slot - 1 : 0} * the.width * stride + mine;
  Columns kept[kRanks16];
  const auto keep = [&](int rank) {
#pragma unroll
    for (int k = 0; k < kRanks16; ++k)
      kept[k].template load<E, kAligned>(b, out - mine, stride, rank + 16 * k + 4 * quad, width);
  };
  keep(0);
  const int any = tile.token(0);
  int next[2] = {tile.token(group), tile.token(8 + group)};

#pragma unroll 1
  for (int i = 0; i < kTokens16 && 16 * i < tile.count; ++i) {
    const int tokens[2] = {next[0], next[1]};
    const float* sums[2];
    uint4 base[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      next[half] = i + 1 < kTokens16 ? tile.token(16 * i + 16 + 8 * half + group) : -1;
      // Where there is no token, what is made of another's is dropped.
      const int there = tokens[half] < 0 ? any : tokens[half];
      sums[half] = the.sums + int64_t{there} * the.padded_width + 4 * quad;
      load_row<E, kAligned>(slice.base, there, first, out, base[half]);
    }
    uint4 bias[2];
    load_row<E, kAligned>(slice.bias, 0, first, out, bias);
    float c[8][4];
    begin_sums<E>(c, bias);
    if (i == 0) wait_for_previous();
#pragma unroll 1
    for (int rank = 0; rank < width; rank += 16 * kRanks16) {
      if (width > 16 * kRanks16) keep(rank);
      // Many tokens have one split, and warps enough to wait for each other.
      Sums<kRanks16, kTokens16 == 1 ? 8 / kRanks16 : 1> loaded;
      loaded.load(sums, rank, width, the);
      uint2 h[kRanks16][2];
#pragma unroll
      for (int k = 0; k < kRanks16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 sum = loaded.h[k][half];
          h[k][half] = {pack<E>(sum.x, sum.y), pack<E>(sum.z, sum.w)};
        }
#pragma unroll
      for (int k = 0; k < kRanks16; ++k)
        if (rank + 16 * k < width)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            multiply<E>(c[j], h[k][0].x, h[k][1].x, h[k][0].y, h[k][1].y, kept[k].operand(j, 0),
                        kept[k].operand(j, 1));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (tokens[half] >= 0)
        write_row<E, kAligned>(slice, tokens[half], first, c, half, base[half]);
  }
}

template <typename E, int kTokens16, int kRanks16, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps, kRanks16 > 2 ? 2 : kTokens16 * kRanks16 == 4 ? 4 : 3)
    expand_kernel(const ExpandArguments the) {
  using Tile = Tile<16 * kTokens16>;
  const int block = blockIdx.x;
  int at = blockIdx.z * gridDim.y + blockIdx.y;
  int index = 0;
#pragma unroll
  for (int i = 1; i < kMaxSlices; ++i)
    if (i < the.num_slices && block >= the.first_block[i]) index = i;
  const Slice& slice = the.slices[index];
  const int warp = (block - the.first_block[index]) * kWarps + threadIdx.x / 32;
  const int column = warp * kColumns;
  if (column >= slice.out || at >= the.tiles) return wait_for_previous();

  // Routes and base are older than the kernel before this one, which has waited for its own.
  const Routes routes = Routes::in(const_cast<void*>(the.routes), the.rows);
  // The grid has room for the tiles of S slots and the base. Numbers that name no slot may make
  // more of them: the last blocks do what is left.
  const bool rest = the.all && the.per_row == 1 && at == the.tiles - 1;
  const int end = rest ? Tile::number(routes) : at + 1;
#pragma unroll 1
  do {
    expand_tile<E, kTokens16, kRanks16, kAligned>(the, slice, column,
                                                  Tile(routes, at, the.per_row, the.chunks));
  } while (++at < end);
}

template <typename E>
cudaError_t launch_for(const ExpandArguments& the, const Launch& launch) {
  constexpr unsigned kMost = 65535;  // blocks along y
  const auto tiles = static_cast<unsigned>(launch.tiles);
  const dim3 grid(static_cast<unsigned>(the.blocks), std::min(tiles, kMost),
                  (tiles + kMost - 1) / kMost);
  const auto with = [&](auto kernel) {
    return launch_kernel(kernel, grid, 32 * kWarps, 0, launch, the);
  };
  if (!launch.aligned) return with(expand_kernel<E, 1, 1, false>);
  if (launch.tile == 64)
    return the.width <= 16 ? with(expand_kernel<E, 4, 1, true>)
                           : with(expand_kernel<E, 4, 2, true>);
  return the.width <= 16   ? with(expand_kernel<E, 1, 1, true>)
         : the.width <= 32 ? with(expand_kernel<E, 1, 2, true>)
                           : with(expand_kernel<E, 1, 4, true>);
}

}  // namespace

cudaError_t launch_expand(Element element, const ExpandArguments& the, const Launch& launch) {
  return element == Element::kFloat16 ? launch_for<Half>(the, launch)
                                      : launch_for<BHalf>(the, launch);
}

}  // namespace lora::cuda
