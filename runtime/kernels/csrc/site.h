// What one call of an op works on, and the functions that do the work on a CPU and on CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define LORA_BOTH __host__ __device__
#else
#define LORA_BOTH
#endif

namespace lora {

enum class Element { kFloat, kFloat16, kBFloat16 };

// One product of a site: y = base + h_own B. All matrices lie row by row.
struct Slice {
  int64_t out = 0;
  const void* weight = nullptr;  // [in, out]: the base is x weight; null: it is `base`
  const void* bias = nullptr;    // [out] or null
  const void* base = nullptr;    // [T, out]
  const void* b = nullptr;       // [S * W, out]; of a wider matrix so many columns
  int64_t b_stride = 0;          // columns of that matrix
  void* y = nullptr;             // [T, out]
};

constexpr int kMaxSlices = 3;
constexpr int64_t kMaxSlots = 65535;

// The rows of its slot that an adapter has, from the first on; all of them, if it says more.
LORA_BOTH inline int64_t rank_of(const int64_t* ranks, int64_t slot, int64_t width) {
  const int64_t rank = ranks[slot - 1];
  return rank < 0 ? 0 : rank < width ? rank : width;
}

struct Site {
  Element element = Element::kFloat;
  int64_t tokens = 0;  // T = rows * tokens of a row
  int64_t rows = 0;    // R
  int64_t in = 0;
  int64_t slots = 0;  // S, counted from 1
  int64_t width = 0;  // W, stack rows of a slot, of which its rank are in use
  const void* x = nullptr;       // [T, in]
  const void* a = nullptr;       // [S * W, in]
  const void* routes = nullptr;  // what `route` made of the R slots
  const int64_t* ranks = nullptr;  // [S]
  int num_slices = 0;
  Slice slices[kMaxSlices];
};

namespace cpu {
void route(const int64_t* slots, int64_t rows, void* routes);
void compute(const Site& site);
}  // namespace cpu

#ifdef LORAEXPORT_CUDA
namespace cuda {

// Where the work is queued. cublas may be null where no slice has a weight.
struct Queue {
  void* stream = nullptr;
  void* cublas = nullptr;
};

// 0: as `choose` finds best for the shapes. Fixed by hand where variants are compared.
struct Choice {
  int shrink_tile = 0;  // tokens of a tile: 16, 32 or 64
  int expand_tile = 0;
  int splits = 0;  // parts of `in` whose sums the expand adds up
  int order = 0;   // see Order
};
enum Order { kChosen, kBaseFirst, kShrinkFirst, kBaseLast };

// Everything that decides the order of a sum follows from shapes alone, never from slots: so a
// row's result does not depend, bit for bit, on what the other rows of the batch use.
Choice choose(const Site& site, Choice fixed = {});
size_t scratch_bytes(const Site& site, const Choice& choice);

// They give null, or what failed.
const char* route(const int64_t* slots, int64_t rows, void* routes, void* stream);
const char* compute(const Site& site, const Queue& queue, const Choice& choice, float* scratch);
}  // namespace cuda
#endif

}  // namespace lora
