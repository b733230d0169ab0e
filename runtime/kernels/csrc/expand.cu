// y = base + h B (+ bias) for each token's own slot; h are the shrink's sums, added up here.
//
// A warp makes 64 columns. A thread loads 8 neighbouring columns of a row of B; column c of the
// j-th mma is column 8 c + j of the 64, so a thread ends with 16 neighbours of a row of y: two
// stores of 16 bytes. Ranks are permuted alike: a thread's four of 16 are neighbours in h.
#include "launch.h"
#include "mma.cuh"

namespace lora::cuda {
namespace {

constexpr int kWarps = 4, kColumns = 64;

// The operand of 8 mma steps: ranks 4 quad .. + 3 of columns 8 group .. + 7.
struct Columns {
  uint32_t b[8][2];
};

template <typename E, bool kAligned>
__device__ Columns load_columns(const typename E::Value* b, int64_t column, int64_t out,
                                int64_t rank, int64_t width) {
  uint4 rows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    rows[i] = rank + i < width ? load8<E, kAligned>(b + (rank + i) * out, column, out)
                               : uint4{0, 0, 0, 0};
  Columns loaded;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t one[4] = {rows[2 * pair].x, rows[2 * pair].y, rows[2 * pair].z,
                             rows[2 * pair].w};
    const uint32_t other[4] = {rows[2 * pair + 1].x, rows[2 * pair + 1].y, rows[2 * pair + 1].z,
                               rows[2 * pair + 1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      loaded.b[2 * i][pair] = __byte_perm(one[i], other[i], 0x5410);
      loaded.b[2 * i + 1][pair] = __byte_perm(one[i], other[i], 0x7632);
    }
  }
  return loaded;
}

// Four ranks of a token's h: the sums of all splits in their order, rounded as a graph rounds h.
template <typename E>
__device__ uint2 load_h(const ExpandArguments& the, int64_t token, int64_t rank) {
  float4 h = {0, 0, 0, 0};
  if (token < 0 || rank >= the.padded_width) return {0, 0};
  const float* sums = the.sums + token * the.padded_width + rank;
  const int64_t stride = the.tokens * the.padded_width;
#pragma unroll 8
  for (int split = 0; split < the.splits; ++split) {
    const float4 part = *reinterpret_cast<const float4*>(sums + split * stride);
    h.x += part.x, h.y += part.y, h.z += part.z, h.w += part.w;
  }
  return {pack<E>(h.x, h.y), pack<E>(h.z, h.w)};
}

template <typename E, bool kAligned>
__device__ void add_to_row(const Slice& slice, int64_t token, int64_t column,
                           const float (&c)[8][4], int half, const uint4 (&base)[2],
                           const uint4 (&bias)[2]) {
  using Value = typename E::Value;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const uint32_t base_words[4] = {base[side].x, base[side].y, base[side].z, base[side].w};
    const uint32_t bias_words[4] = {bias[side].x, bias[side].y, bias[side].z, bias[side].w};
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 old = unpack<E>(base_words[i]), more = unpack<E>(bias_words[i]);
      words[i] = pack<E>(old.x + (c[2 * i][2 * half + side] + more.x),
                         old.y + (c[2 * i + 1][2 * half + side] + more.y));
    }
    store8<E, kAligned>(static_cast<Value*>(slice.y) + token * slice.out, column + 8 * side,
                        slice.out, {words[0], words[1], words[2], words[3]});
  }
}

template <typename E, bool kAligned>
__device__ void load_row(const void* matrix, int64_t row, int64_t column, int64_t out,
                         uint4 (&loaded)[2]) {
#pragma unroll
  for (int side = 0; side < 2; ++side)
    loaded[side] = matrix == nullptr || row < 0
                       ? uint4{0, 0, 0, 0}
                       : load8<E, kAligned>(static_cast<const typename E::Value*>(matrix) + row * out,
                                            column + 8 * side, out);
}

// kRanks16: how many times 16 ranks of B a warp keeps; wider slots are taken in turns.
template <typename E, int kTokens16, int kRanks16, bool kAligned>
__device__ void expand_tile(const ExpandArguments& the, const Slice& slice, int64_t column,
                            const Tile<16 * kTokens16>& tile) {
  using Value = typename E::Value;
  const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const bool adapted = tile.slot >= 1 && tile.slot <= the.slots;
  if (tile.slot < 0 || !(adapted || the.all)) return wait_for_previous();
  const Value* b = static_cast<const Value*>(slice.b) +
                   int64_t{adapted ? tile.slot - 1 : 0} * the.width * slice.out;
  const int64_t width = adapted ? the.width : 0, first = column + 16 * quad;
  Columns kept[kRanks16];
  const auto keep = [&](int64_t rank) {
#pragma unroll
    for (int k = 0; k < kRanks16; ++k)
      kept[k] = load_columns<E, kAligned>(b, column + 8 * group, slice.out,
                                          rank + 16 * k + 4 * quad, width);
  };
  keep(0);
  uint4 bias[2];
  load_row<E, kAligned>(slice.bias, 0, first, slice.out, bias);

#pragma unroll 1
  for (int i = 0; i < kTokens16 && 16 * i < tile.count; ++i) {
    const int64_t low = tile.token(16 * i + group), high = tile.token(16 * i + 8 + group);
    uint4 base[2][2];
    load_row<E, kAligned>(slice.base, low, first, slice.out, base[0]);
    load_row<E, kAligned>(slice.base, high, first, slice.out, base[1]);
    if (i == 0) wait_for_previous();
    float c[8][4] = {};
#pragma unroll 1
    for (int64_t rank = 0; rank < width; rank += 16 * kRanks16) {
      if (width > 16 * kRanks16) keep(rank);
#pragma unroll
      for (int k = 0; k < kRanks16; ++k) {
        const uint2 h_low = load_h<E>(the, low, rank + 16 * k + 4 * quad);
        const uint2 h_high = load_h<E>(the, high, rank + 16 * k + 4 * quad);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          multiply<E>(c[j], h_low.x, h_high.x, h_low.y, h_high.y, kept[k].b[j][0],
                      kept[k].b[j][1]);
      }
    }
    if (low >= 0) add_to_row<E, kAligned>(slice, low, first, c, 0, base[0], bias);
    if (high >= 0) add_to_row<E, kAligned>(slice, high, first, c, 1, base[1], bias);
  }
}

template <typename E, int kTokens16, int kRanks16, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) expand_kernel(const ExpandArguments the) {
  using Tile = Tile<16 * kTokens16>;
  const int64_t at = blockIdx.x / the.blocks, block = blockIdx.x - at * the.blocks;
  int index = 0;
#pragma unroll
  for (int i = 1; i < kMaxSlices; ++i)
    if (i < the.num_slices && block >= the.first_block[i]) index = i;
  const Slice& slice = the.slices[index];
  const int64_t warp = (block - the.first_block[index]) * kWarps + threadIdx.x / 32;
  const int64_t column = warp * kColumns;
  if (column >= slice.out) return wait_for_previous();

  // Routes and base are older than the kernel before this one, which has waited for its own.
  const Routes routes = Routes::in(const_cast<void*>(the.routes), the.rows);
  expand_tile<E, kTokens16, kRanks16, kAligned>(the, slice, column,
                                                Tile(routes, at, the.per_row, the.chunks));
  // The grid has room for the tiles of S slots and the base. Numbers that name no slot may make
  // more of them: the last blocks do what is left.
  if (the.all && the.per_row == 1 && at == the.tiles - 1)
    for (int64_t more = at + 1; more < Tile::number(routes); ++more)
      expand_tile<E, kTokens16, kRanks16, kAligned>(the, slice, column,
                                                    Tile(routes, more, the.per_row, the.chunks));
}

template <typename E, int kTokens16>
cudaError_t launch_for(const ExpandArguments& the, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(launch.tiles * the.blocks));
  const auto with = [&](auto kernel) {
    return launch_kernel(kernel, grid, 32 * kWarps, 0, launch, the);
  };
  if (!launch.aligned) return with(expand_kernel<E, kTokens16, 1, false>);
  return the.width <= 16   ? with(expand_kernel<E, kTokens16, 1, true>)
         : the.width <= 32 ? with(expand_kernel<E, kTokens16, 2, true>)
                           : with(expand_kernel<E, kTokens16, 4, true>);
}

template <typename E>
cudaError_t launch_for(const ExpandArguments& the, const Launch& launch) {
  return launch.tile == 64   ? launch_for<E, 4>(the, launch)
         : launch.tile == 32 ? launch_for<E, 2>(the, launch)
                             : launch_for<E, 1>(the, launch);
}

}  // namespace

cudaError_t launch_expand(Element element, const ExpandArguments& the, const Launch& launch) {
  return element == Element::kFloat16 ? launch_for<Half>(the, launch)
                                      : launch_for<BHalf>(the, launch);
}

}  // namespace lora::cuda
