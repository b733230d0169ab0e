// Route on CUDA: rows sorted by slot (stable) and cut into tiles, by one block, once a run.
//
// A counting sort in windows of slots: each warp counts its own stretch of rows, so that no two
// warps touch one counter and the order is the same every time.
#include "launch.h"
#include "routes.h"

namespace lora::cuda {
namespace {

struct Arguments {
  const int64_t* slots;
  int rows;
  void* routes;
};

constexpr int kFew = 128, kThreads = 1024, kWarps = kThreads / 32;
constexpr int kWindow = 256;  // slots that are sorted at once
constexpr int64_t kMaxRows = 1 << 24;

// What a slot has, or what all slots before it have.
struct Begins {
  int tiles16, tiles32, tiles64;
};

__device__ Begins operator+(const Begins& a, const Begins& b) {
  return {a.tiles16 + b.tiles16, a.tiles32 + b.tiles32, a.tiles64 + b.tiles64};
}

__device__ Begins shuffle_up(const Begins& from, int by) {
  return {__shfl_up_sync(~0u, from.tiles16, by), __shfl_up_sync(~0u, from.tiles32, by),
          __shfl_up_sync(~0u, from.tiles64, by)};
}

struct Shared {
  int counts[kWarps][kWindow];       // rows of a slot in a warp's stretch, then before it
  Begins begins[kWindow];            // of a slot's rows and tiles
  int totals[kWindow];
  Begins warps[kWindow / 32];
  int most;
};
static_assert(sizeof(Shared) <= 48 << 10);

// Row number `place` of the `total` of a slot, which begins at `begin`.
__device__ void write_row(const Routes& routes, const Begins& begin, int slot, int row, int place,
                          int total) {
  const int first = 16 * begin.tiles16, at = first + place;
  routes.rows[at] = row;
  if (place % 16 == 0) routes.slots16[at / 16] = slot;
  if (place % 32 == 0)
    routes.runs32[begin.tiles32 + place / 32] = {slot, at, min(32, total - place), 0};
  if (place % 64 == 0)
    routes.runs64[begin.tiles64 + place / 64] = {slot, at, min(64, total - place), 0};
  if (place == total - 1)
    for (int gap = at + 1; gap % 16 != 0; ++gap) routes.rows[gap] = -1;
}

// Behind the last tile no slot.
__device__ void finish(const Routes& routes, const Begins& end, int rows) {
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    if (i >= end.tiles16) routes.slots16[i] = -1;
    if (i >= end.tiles32) routes.runs32[i] = {-1, -1, -1, -1};
    if (i >= end.tiles64) routes.runs64[i] = {-1, -1, -1, -1};
  }
  if (threadIdx.x == 0)
    *reinterpret_cast<int4*>(routes.tiles) = {end.tiles16, end.tiles32, end.tiles64, 0};
}

__device__ int valid(int64_t slot) { return slot >= 1 && slot <= kMaxSlots ? int(slot) : 0; }

// Few rows: each thread compares its own with all others.
__global__ void __launch_bounds__(kFew) route_few(const Arguments the) {
  __shared__ int keys[kFew], places[kFew];
  const int64_t* const slots = the.slots;
  const int rows = the.rows;
  const Routes routes = Routes::in(the.routes, rows);
  const int i = threadIdx.x;
  const int slot = i < rows ? valid(slots[i]) : 0;
  const int key = slot > 0 ? slot : kMaxSlots + 1;
  keys[i] = key;
  __syncthreads();
  int place = 0, total = 0;
  for (int j = 0; j < rows; ++j) {
    place += keys[j] == key && j < i;
    total += keys[j] == key;
  }
  places[i] = place;
  __syncthreads();
  Begins begin = {0, 0, 0}, end = {0, 0, 0};
  for (int j = 0; j < rows; ++j) {
    const Begins one = {places[j] % 16 == 0, places[j] % 32 == 0, places[j] % 64 == 0};
    end = end + one;
    if (keys[j] < key) begin = begin + one;
  }
  finish(routes, end, rows);
  if (i >= rows) return;
  routes.slots[i] = slot;
  write_row(routes, begin, slot, i, place, total);
}

// Where each slot of a window begins, behind `before`; gives where the window ends.
__device__ Begins place_window(Shared& shared, Begins before) {
  const int i = threadIdx.x, lane = i % 32;
  Begins mine = {0, 0, 0}, sum = mine;
  if (i < kWindow) {
    int total = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      const int count = shared.counts[warp][i];
      shared.counts[warp][i] = total;
      total += count;
    }
    shared.totals[i] = total;
    mine = {(total + 15) / 16, (total + 31) / 32, (total + 63) / 64};
    sum = mine;
    for (int by = 1; by < 32; by *= 2) {
      const Begins other = shuffle_up(sum, by);
      if (lane >= by) sum = sum + other;
    }
    if (lane == 31) shared.warps[i / 32] = sum;
  }
  __syncthreads();
  Begins end = before;
  for (int warp = 0; warp < kWindow / 32; ++warp) {
    if (warp == i / 32) before = end;
    end = end + shared.warps[warp];
  }
  if (i < kWindow)
    shared.begins[i] = before + Begins{sum.tiles16 - mine.tiles16, sum.tiles32 - mine.tiles32,
                                       sum.tiles64 - mine.tiles64};
  __syncthreads();
  return end;
}

__global__ void __launch_bounds__(kThreads) route_many(const Arguments the) {
  __shared__ Shared shared;
  const int64_t* const slots = the.slots;
  const int rows = the.rows;
  const Routes routes = Routes::in(the.routes, rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int stretch = (rows + kWarps - 1) / kWarps;
  const int first = warp * stretch, last = min(rows, first + stretch);
  if (threadIdx.x == 0) shared.most = 0;
  __syncthreads();
  int most = 0;
  for (int row = first + lane; row < last; row += 32) {
    const int slot = valid(slots[row]);
    routes.slots[row] = slot;
    most = max(most, slot);
  }
  atomicMax(&shared.most, __reduce_max_sync(~0u, most));  // the same whatever comes first
  __syncthreads();
  most = shared.most;

  // Slot s has key s - 1; the base comes behind the last slot in use.
  Begins begin = {0, 0, 0};
  for (int window = 0; window <= most; window += kWindow) {
    for (int i = threadIdx.x; i < kWarps * kWindow; i += kThreads) (&shared.counts[0][0])[i] = 0;
    __syncthreads();
    for (int pass = 0; pass < 2; ++pass) {
      for (int chunk = first; chunk < last; chunk += 32) {
        const int row = chunk + lane;
        const int slot = row < last ? valid(slots[row]) : -1;
        const int key = (slot > 0 ? slot - 1 : most) - window;
        const bool inside = slot >= 0 && key >= 0 && key < kWindow;
        const unsigned same = __match_any_sync(~0u, inside ? key : -1);
        if (inside) {
          const int before = shared.counts[warp][key];
          const int ahead = __popc(same & ((1u << lane) - 1));
          __syncwarp(same);
          if (ahead == 0) shared.counts[warp][key] = before + __popc(same);
          if (pass == 1)
            write_row(routes, shared.begins[key], slot, row, before + ahead, shared.totals[key]);
        }
        __syncwarp();
      }
      __syncthreads();
      if (pass == 0) begin = place_window(shared, begin);
    }
  }
  finish(routes, begin, rows);
}

}  // namespace

const char* route(const int64_t* slots, int64_t rows, void* routes, void* stream) {
  if (rows > kMaxRows) return "more rows than a run may have";
  const Arguments the{slots, static_cast<int>(rows), routes};
  Launch launch{};
  launch.stream = static_cast<cudaStream_t>(stream);
  const bool few = rows <= kFew;
  const cudaError_t error = launch_kernel(few ? route_few : route_many, dim3(1),
                                          few ? kFew : kThreads, 0, launch, the);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lora::cuda
