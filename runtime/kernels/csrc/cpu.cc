// The ops on a CPU: plain loops in float32, so that their meaning can be tested on any machine.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "routes.h"
#include "site.h"

namespace lora::cpu {
namespace {

struct Float {
  static constexpr size_t kBytes = 4;
  static float load(const void* from, int64_t at) { return static_cast<const float*>(from)[at]; }
  static void store(void* to, int64_t at, float value) { static_cast<float*>(to)[at] = value; }
};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct BFloat16 {
  static constexpr size_t kBytes = 2;
  static float load(const void* from, int64_t at) {
    return of_bits(uint32_t{static_cast<const uint16_t*>(from)[at]} << 16);
  }
  static void store(void* to, int64_t at, float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t even = 0x7fff + ((bits >> 16) & 1);
    static_cast<uint16_t*>(to)[at] =
        std::isnan(value) ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + even) >> 16);
  }
};

struct Float16 {
  static constexpr size_t kBytes = 2;
  static float load(const void* from, int64_t at) {
    const uint32_t half = static_cast<const uint16_t*>(from)[at];
    const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // The product moves the exponent, subnormal numbers included.
    return of_bits(sign | bits_of(of_bits(magnitude << 13) * 0x1p112f));
  }
  static void store(void* to, int64_t at, float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;  // rounds to 65,536 or is more: inf
    } else if (magnitude >= 0x38800000) {
      half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else {
      // The sum's last bit is worth 2^-24, that of a subnormal: it rounds to even.
      half = bits_of(of_bits(magnitude) + 0.5f) - bits_of(0.5f);
    }
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(sign | half);
  }
};

template <typename T>
std::vector<float> row_of(const void* matrix, int64_t row, int64_t width) {
  std::vector<float> values(width);
  for (int64_t i = 0; i < width; ++i) values[i] = T::load(matrix, row * width + i);
  return values;
}

// y += value * the row of `matrix` that begins at an element.
template <typename T>
void add_row(std::vector<float>& y, float value, const void* matrix, int64_t begin) {
  const int64_t width = static_cast<int64_t>(y.size());
  for (int64_t i = 0; i < width; ++i) y[i] += value * T::load(matrix, begin + i);
}

// h = x A^T of the token's own slot, rounded to the element type as a graph's operators do.
template <typename T>
std::vector<float> shrink(const Site& site, const std::vector<float>& x, int64_t slot) {
  const int64_t rank = rank_of(site.ranks, slot, site.width);
  std::vector<float> h(rank);
  for (int64_t w = 0; w < rank; ++w) {
    const int64_t row = (slot - 1) * site.width + w;
    float sum = 0;
    for (int64_t k = 0; k < site.in; ++k) sum += x[k] * T::load(site.a, row * site.in + k);
    char rounded[4];
    T::store(rounded, 0, sum);
    h[w] = T::load(rounded, 0);
  }
  return h;
}

template <typename T>
void compute_as(const Site& site) {
  const int64_t per_row = site.rows > 0 ? site.tokens / site.rows : 0;
  const Routes routes = Routes::in(const_cast<void*>(site.routes), site.rows);
  for (int64_t token = 0; token < site.tokens; ++token) {
    const int64_t slot = routes.slots[token / per_row];
    const bool adapted = slot >= 1 && slot <= site.slots;
    const std::vector<float> x = row_of<T>(site.x, token, site.in);
    const std::vector<float> h = adapted ? shrink<T>(site, x, slot) : std::vector<float>();
    for (int i = 0; i < site.num_slices; ++i) {
      const Slice& slice = site.slices[i];
      std::vector<float> y(slice.out);
      if (slice.weight == nullptr) y = row_of<T>(slice.base, token, slice.out);
      for (int64_t k = 0; slice.weight != nullptr && k < site.in; ++k)
        add_row<T>(y, x[k], slice.weight, k * slice.out);
      if (slice.bias != nullptr) add_row<T>(y, 1, slice.bias, 0);
      for (size_t w = 0; w < h.size(); ++w)
        add_row<T>(y, h[w], slice.b,
                   ((slot - 1) * site.width + static_cast<int64_t>(w)) * slice.b_stride);
      for (int64_t n = 0; n < slice.out; ++n) T::store(slice.y, token * slice.out + n, y[n]);
    }
  }
}

void write_runs(Run* runs, int size, const Run& all, int64_t& count) {
  for (int done = 0; done < all.count; done += size)
    runs[count++] = {all.slot, all.begin + done, std::min(size, all.count - done), 0};
}

}  // namespace

void route(const int64_t* slots, int64_t rows, void* memory) {
  std::memset(memory, 0xff, (rows + 1) * kRouteWords * 8);  // -1 everywhere
  const Routes routes = Routes::in(memory, rows);
  std::vector<int> sorted(rows);
  for (int64_t row = 0; row < rows; ++row) {
    const bool adapted = slots[row] >= 1 && slots[row] <= kMaxSlots;
    routes.slots[row] = adapted ? slots[row] : 0;
    sorted[row] = static_cast<int>(row);
  }
  const auto key = [&](int row) {
    return routes.slots[row] > 0 ? routes.slots[row] : kMaxSlots + 1;
  };
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](int one, int other) { return key(one) < key(other); });
  int64_t tiles16 = 0, tiles32 = 0, tiles64 = 0;
  for (int64_t begin = 0, end; begin < rows; begin = end) {
    const int slot = static_cast<int>(routes.slots[sorted[begin]]);
    const int first = static_cast<int>(16 * tiles16);
    for (end = begin; end < rows && routes.slots[sorted[end]] == slot; ++end) {
      if ((end - begin) % 16 == 0) routes.slots16[tiles16++] = slot;
      routes.rows[first + end - begin] = sorted[end];
    }
    const Run all{slot, first, static_cast<int>(end - begin), 0};
    write_runs(routes.runs32, 32, all, tiles32);
    write_runs(routes.runs64, 64, all, tiles64);
  }
  const int64_t tiles[] = {tiles16, tiles32, tiles64, 0};
  std::copy(tiles, tiles + 4, routes.tiles);
}

void compute(const Site& site) {
  switch (site.element) {
    case Element::kFloat: return compute_as<Float>(site);
    case Element::kFloat16: return compute_as<Float16>(site);
    case Element::kBFloat16: return compute_as<BFloat16>(site);
  }
}

}  // namespace lora::cpu
