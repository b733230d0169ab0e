// The arguments of the kernels, and how a kernel is launched.
#pragma once

#include <cuda_runtime.h>

#include "site.h"

namespace lora::cuda {

struct SiteArguments {
  const void* routes;
  const int64_t* ranks;
  int rows, per_row, chunks;
  int tokens, slots, width;
  int padded_width;  // W up to a multiple of 16
};

struct ShrinkArguments : SiteArguments {
  const void* x;
  const void* a;
  float* sums;  // [splits, T, padded_width]
  int in;
  int parts;  // of 32 along `in` that a split has
};

struct ExpandArguments : SiteArguments {
  const float* sums;
  int splits;
  bool all;   // base rows are written too
  int tiles;  // of the grid
  int num_slices;
  int first_block[kMaxSlices];  // of the blocks along the columns of all slices
  int blocks;
  Slice slices[kMaxSlices];  // base null: y begins at 0
};

struct Launch {
  cudaStream_t stream;
  int tile;       // tokens
  int64_t tiles;  // at most so many
  int splits;
  bool aligned;  // every row begins at a multiple of 16 bytes
  bool early;    // programmatic dependent launch
};

cudaError_t launch_shrink(Element element, const ShrinkArguments& the, const Launch& launch);
cudaError_t launch_expand(Element element, const ExpandArguments& the, const Launch& launch);

template <typename Arguments>
cudaError_t launch_kernel(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared,
                          const Launch& launch, const Arguments& the) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = launch.early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, the);
}

}  // namespace lora::cuda
