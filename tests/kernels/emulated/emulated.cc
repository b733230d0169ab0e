// The fibers of the emulation, and a plain product in place of cuBLAS.
#include <ucontext.h>

#include <map>
#include <memory>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "gemm.h"

namespace emulated {
namespace {

constexpr size_t kStack = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool ended = false;
};

// Threads that meet: counted until all are there, then the next round begins.
struct Meeting {
  unsigned there = 0, round = 0;
};

struct Warp {
  std::map<unsigned, Meeting> meetings;  // by mask
  int values[32];
  Operands operands[32];
  float (*sums[32])[4];
  unsigned there = 0, round = 0;
};

struct {
  std::vector<float> shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting meeting;
  unsigned current = 0, running = 0;
  ucontext_t scheduler;
  const std::function<void()>* kernel;
} state;

void pause() { swapcontext(&state.fibers[state.current].context, &state.scheduler); }

Warp& warp() { return state.warps[state.current / 32]; }

void enter() {
  (*state.kernel)();
  state.fibers[state.current].ended = true;
  --state.running;
  pause();
}

void run_block() {
  const unsigned threads = blockDim.x;
  state.fibers.resize(threads);
  state.warps.assign((threads + 31) / 32, Warp());
  state.meeting = Meeting();
  state.running = threads;
  std::fill(state.shared.begin(), state.shared.end(), __builtin_nanf(""));
  for (Fiber& fiber : state.fibers) {
    fiber.stack.resize(kStack);
    fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  while (state.running > 0)
    for (state.current = 0; state.current < threads; ++state.current)
      if (!state.fibers[state.current].ended) {
        threadIdx = dim3(state.current, 0, 0);
        swapcontext(&state.scheduler, &state.fibers[state.current].context);
      }
}

}  // namespace

float* dynamic_shared() { return state.shared.data(); }

void meet_block() {
  const unsigned round = state.meeting.round;
  ++state.meeting.there;
  // Threads that have ended are not waited for, as on the device.
  while (state.meeting.round == round) {
    if (state.meeting.there == state.running) {
      state.meeting.there = 0;
      ++state.meeting.round;
    } else {
      pause();
    }
  }
}

void meet_warp(unsigned mask) {
  Meeting& meeting = warp().meetings[mask];
  const unsigned round = meeting.round;
  if (++meeting.there == static_cast<unsigned>(__builtin_popcount(mask))) {
    meeting.there = 0;
    ++meeting.round;
  }
  while (meeting.round == round) pause();
}

std::array<int, 32> exchange(unsigned mask, int value) {
  Warp& mine = warp();
  mine.values[state.current % 32] = value;
  meet_warp(mask);
  std::array<int, 32> all;
  std::copy(mine.values, mine.values + 32, all.begin());
  meet_warp(mask);
  return all;
}

void work_as_warp(const Operands& operands, float (&c)[4], const Multiply& work) {
  Warp& mine = warp();
  const unsigned lane = state.current % 32, round = mine.round;
  mine.operands[lane] = operands;
  mine.sums[lane] = &c;
  if (++mine.there == 32) {
    float sums[32][4];
    for (int i = 0; i < 32; ++i) std::copy(*mine.sums[i], *mine.sums[i] + 4, sums[i]);
    work(mine.operands, sums);
    for (int i = 0; i < 32; ++i) std::copy(sums[i], sums[i] + 4, *mine.sums[i]);
    mine.there = 0;
    ++mine.round;
  }
  while (mine.round == round) pause();
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = block;
  state.kernel = &kernel;
  state.shared.resize(shared / sizeof(float));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block();
      }
}

}  // namespace emulated

namespace lora::cuda {
namespace {

template <typename Value>
void product(int64_t tokens, int64_t in, int64_t out, const void* x, const void* weight, void* y,
             float beta, float (*widen)(Value), Value (*narrow)(float)) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < out; ++n) {
      Value& at = static_cast<Value*>(y)[t * out + n];
      float sum = beta == 0 ? 0 : beta * widen(at);
      for (int64_t k = 0; k < in; ++k)
        sum += widen(static_cast<const Value*>(x)[t * in + k]) *
               widen(static_cast<const Value*>(weight)[k * out + n]);
      at = narrow(sum);
    }
}

}  // namespace

const char* gemm(void*, Element element, int64_t tokens, int64_t in, int64_t out, const void* x,
                 const void* weight, void* y, float beta) {
  if (element == Element::kFloat16) {
    product<__half>(tokens, in, out, x, weight, y, beta, __half2float, __float2half_rn);
  } else {
    product<__nv_bfloat16>(tokens, in, out, x, weight, y, beta, __bfloat162float,
                           __float2bfloat16_rn);
  }
  return nullptr;
}

}  // namespace lora::cuda
