// A site on CUDA: which kernels in which order, tile sizes and splits.
#include <algorithm>

#include "gemm.h"
#include "launch.h"

namespace lora::cuda {
namespace {

int up(int64_t value, int64_t multiple) {
  return static_cast<int>((value + multiple - 1) / multiple);
}

// The kernels count in 32 bits, but for addresses.
bool fits(const Site& site) {
  int64_t most = std::max({site.tokens, site.in, site.slots * site.width});
  for (int i = 0; i < site.num_slices; ++i)
    most = std::max({most, site.slices[i].out, site.slices[i].b_stride});
  return most < (int64_t{1} << 30);
}

bool multiple_of_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Programmatic dependent launch came with Hopper.
bool can_be_early() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

// The shrink of 64 tokens keeps more sums than the consumer cards' multiprocessors hold.
bool holds_large_tiles() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= 160 << 10;
}

// Tiles of one slot each that T tokens make at most; `groups` counts the slots, and the base.
int64_t most_tiles(const Site& site, int tile, int64_t groups) {
  const int64_t per_row = site.tokens / site.rows;
  if (per_row > 1) return site.rows * up(per_row, tile);
  return std::min(site.rows, site.rows / tile + groups);
}

// Whether every row begins at a multiple of 16 bytes.
bool aligned_in(const Site& site) {
  return site.in % 8 == 0 && multiple_of_16(site.x) && multiple_of_16(site.a);
}

bool aligned_out(const Site& site) {
  return std::all_of(site.slices, site.slices + site.num_slices, [](const Slice& slice) {
    return slice.out % 8 == 0 && slice.b_stride % 8 == 0 && multiple_of_16(slice.b) &&
           multiple_of_16(slice.y) && multiple_of_16(slice.base) && multiple_of_16(slice.bias);
  });
}

bool has_bias(const Site& site) {
  return std::any_of(site.slices, site.slices + site.num_slices,
                     [](const Slice& slice) { return slice.bias != nullptr; });
}

// What both kernels are told of a site, cut into tiles of so many tokens.
template <typename Arguments>
Arguments arguments_of(const Site& site, int tile) {
  Arguments the{};
  the.routes = site.routes;
  the.ranks = site.ranks;
  the.rows = static_cast<int>(site.rows);
  the.per_row = static_cast<int>(site.tokens / site.rows);
  the.chunks = up(the.per_row, tile);
  the.tokens = static_cast<int>(site.tokens);
  the.slots = static_cast<int>(site.slots);
  the.width = static_cast<int>(site.width);
  the.padded_width = 16 * up(site.width, 16);
  return the;
}

cudaError_t shrink(const Site& site, const Choice& choice, float* sums, cudaStream_t stream,
                   bool early) {
  auto the = arguments_of<ShrinkArguments>(site, choice.shrink_tile);
  the.x = site.x;
  the.a = site.a;
  the.sums = sums;
  the.in = static_cast<int>(site.in);
  the.parts = up(up(site.in, 32), choice.splits);
  const int64_t tiles = most_tiles(site, choice.shrink_tile, site.slots);
  return launch_shrink(site.element, the,
                       {stream, choice.shrink_tile, tiles, choice.splits, aligned_in(site), early});
}

cudaError_t expand(const Site& site, const Choice& choice, const float* sums, cudaStream_t stream,
                   bool early) {
  auto the = arguments_of<ExpandArguments>(site, choice.expand_tile);
  the.sums = sums;
  the.splits = choice.splits;
  the.num_slices = site.num_slices;
  the.all = choice.order == kBaseLast || has_bias(site);
  constexpr int64_t kBlock = 256;  // columns of a block
  for (int i = 0; i < site.num_slices; ++i) {
    Slice& slice = the.slices[i] = site.slices[i];
    if (slice.weight == nullptr) {
      the.all = true;  // y is not where the base is: base rows are copied
    } else {
      slice.base = choice.order == kBaseLast ? nullptr : slice.y;
    }
    the.first_block[i] = the.blocks;
    the.blocks += up(slice.out, kBlock);
  }
  const int64_t groups = site.slots + (the.all ? 1 : 0);
  the.tiles = static_cast<int>(most_tiles(site, choice.expand_tile, groups));
  return launch_expand(site.element, the,
                       {stream, choice.expand_tile, the.tiles, 1, aligned_out(site), early});
}

const char* bases(const Site& site, const Queue& queue, float beta) {
  for (int i = 0; i < site.num_slices; ++i) {
    const Slice& slice = site.slices[i];
    if (slice.weight == nullptr) continue;
    const char* failed = gemm(queue.cublas, site.element, site.tokens, site.in, slice.out, site.x,
                              slice.weight, slice.y, beta);
    if (failed != nullptr) return failed;
  }
  return nullptr;
}

}  // namespace

Choice choose(const Site& site, Choice fixed) {
  const int64_t tokens = site.tokens, per_row = site.rows > 0 ? tokens / site.rows : 1;
  const bool many = tokens > 1024;
  Choice choice = fixed;
  if (choice.shrink_tile == 0)
    choice.shrink_tile = !many || (per_row > 1 && per_row <= 16) ? 16 : site.width > 32 ? 64 : 32;
  if (choice.expand_tile == 0)
    choice.expand_tile = !many || (per_row > 1 && per_row <= 32) ? 16 : 64;
  // There are no other kernels.
  if (choice.expand_tile == 32 || !aligned_out(site)) choice.expand_tile = 16;
  if (choice.shrink_tile == 64 && !holds_large_tiles()) choice.shrink_tile = 32;
  if (!aligned_in(site)) choice.shrink_tile = 16;
  if (choice.splits == 0) {
    const int64_t wanted = tokens <= 16 ? 16 : tokens <= 1024 ? 8 : tokens <= 2048 ? 2 : 1;
    choice.splits = static_cast<int>(std::clamp<int64_t>(site.in / 256, 1, wanted));
  }
  // The other orders were no faster on an H100, from 8 to 8,192 tokens. A base that is given is
  // there already.
  if (choice.order == kChosen || site.slices[0].weight == nullptr) choice.order = kBaseFirst;
  return choice;
}

size_t scratch_bytes(const Site& site, const Choice& choice) {
  return sizeof(float) * choice.splits * site.tokens * 16 * up(site.width, 16);
}

const char* compute(const Site& site, const Queue& queue, const Choice& choice, float* scratch) {
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  const bool early = can_be_early();
  const bool whole = site.slices[0].weight != nullptr;
  if (!fits(site)) return "a dimension is beyond 2^30";
  const char* failed = nullptr;
  cudaError_t error = cudaSuccess;
  // What runs before a site may be no kernel at all: only behind the base's may a kernel be early.
  if (choice.order == kBaseFirst) {
    if (whole) failed = bases(site, queue, 0);
    if (failed == nullptr) error = shrink(site, choice, scratch, stream, early && whole);
    if (failed == nullptr && error == cudaSuccess)
      error = expand(site, choice, scratch, stream, early);
  } else {
    error = shrink(site, choice, scratch, stream, false);
    if (choice.order == kShrinkFirst && error == cudaSuccess) failed = bases(site, queue, 0);
    if (failed == nullptr && error == cudaSuccess)
      error = expand(site, choice, scratch, stream, early && choice.order == kBaseLast);
    if (choice.order == kBaseLast && error == cudaSuccess) failed = bases(site, queue, 1);
  }
  if (failed != nullptr) return failed;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lora::cuda
