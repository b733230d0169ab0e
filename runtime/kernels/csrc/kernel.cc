#include "kernel.h"

#include <string>
#include <vector>

#include "routes.h"

namespace lora {
namespace {

// An input's memory and shape.
struct Tensor {
  const void* data;
  std::vector<int64_t> dims;

  Tensor(const ort::Api& api, const ort::KernelContext* context, size_t index) {
    const ort::Value* value = api.input(context, index);
    ort::TypeAndShape* info = api.shape_of(value);
    dims.resize(api.rank(info));
    api.dims(info, dims.data(), dims.size());
    api.release(info);
    data = api.data(value);
  }
  int64_t rows() const {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) rows *= dims[i];
    return rows;
  }
  int64_t last() const { return dims.empty() ? 0 : dims.back(); }
};

}  // namespace

Kernel::Kernel(const Op& op, ort::Table table, const ort::KernelInfo* info)
    : op_(op), api_(table) {
  if (op.kind == Kind::kRoute) return;
  slots_ = api_.attribute(info, "num_slots");
  width_ = api_.attribute(info, "rows_per_slot");
  if (op.kind == Kind::kLinear) bias_rows_ = api_.attribute(info, "bias_rows");
  check(slots_ >= 1 && slots_ <= kMaxSlots, "num_slots must be 1 to 65535");
  check(width_ >= 1, "rows_per_slot must be 1 or more");
  check(bias_rows_ == 0 || bias_rows_ == 8, "bias_rows must be 0 or 8");
}

void Kernel::compute(ort::KernelContext* context) {
  op_.kind == Kind::kRoute ? route(context) : compute_site(context);
}

void Kernel::route(ort::KernelContext* context) {
  const Tensor slots(api_, context, 0);
  const int64_t rows = slots.rows() * slots.last();
  const int64_t dims[] = {rows + 1, kRouteWords};
  void* routes = api_.data(api_.output(context, 0, dims, 2));
  const int64_t* given = static_cast<const int64_t*>(slots.data);
  if (!op_.on_cuda) return cpu::route(given, rows, routes);
#ifdef LORAEXPORT_CUDA
  fail_with(cuda::route(given, rows, routes, api_.stream(context)));
#endif
}

void Kernel::compute_site(ort::KernelContext* context) {
  Site site = describe(context);
  if (site.tokens == 0) return;
  if (!op_.on_cuda) return cpu::compute(site);
#ifdef LORAEXPORT_CUDA
  constexpr int kVersion = 3, kCublas = 10002;
  cuda::Queue queue{api_.stream(context), nullptr};
  if (op_.kind == Kind::kLinear) queue.cublas = api_.resource(context, kVersion, kCublas);
  const cuda::Choice choice = cuda::choose(site);
  const cuda::Scratch::Lease lease =
      scratch_.lease(queue.stream, cuda::scratch_bytes(site, choice));
  if (lease.memory == nullptr) fail_with("no device memory for the sums of the shrink");
  fail_with(cuda::compute(site, queue, choice, lease.memory));
#endif
}

Site Kernel::describe(ort::KernelContext* context) const {
  const Tensor x(api_, context, op_.x()), routes(api_, context, op_.x() + 1);
  const Tensor ranks(api_, context, op_.x() + 2), a(api_, context, op_.x() + 5);
  Site site;
  site.element = op_.element == ort::kFloat     ? Element::kFloat
                 : op_.element == ort::kFloat16 ? Element::kFloat16
                                                : Element::kBFloat16;
  site.tokens = x.rows();
  site.in = x.last();
  site.rows = routes.dims.empty() ? 0 : routes.dims[0] - 1;
  site.slots = slots_;
  site.width = width_;
  site.x = x.data;
  site.a = below(a.data, bias_rows_ * site.in);
  site.routes = routes.data;
  site.ranks = static_cast<const int64_t*>(ranks.data);
  site.num_slices = static_cast<int>(op_.outputs());
  const int64_t stack = bias_rows_ + slots_ * width_;
  check(routes.dims.size() == 2 && routes.dims[1] == kRouteWords, "routes must come from Route");
  check(site.rows > 0 ? site.tokens % site.rows == 0 : site.tokens == 0,
        "the rows of x must be a multiple of the routed rows");
  check(ranks.dims == std::vector<int64_t>{slots_, 1}, "ranks must be [S, 1]");
  check(a.dims == std::vector<int64_t>{stack, site.in}, "A must be [K', in]");
  std::vector<int64_t> dims = x.dims;
  const bool whole = op_.kind == Kind::kLinear;  // b holds the base's rows too, of one y
  int64_t column = 0;
  for (int i = 0; i < site.num_slices; ++i) {
    Slice& slice = site.slices[i];
    const Tensor b(api_, context, op_.x() + 6 + (whole ? i : 0));
    check(b.dims.size() == 2 && b.dims[0] == (whole ? site.in : 0) + stack,
          "WB must be [in + K', out], B [K, out]");
    slice.b_stride = b.last();
    if (whole) {
      slice.out = dims.back() = b.last();
      slice.weight = b.data;
      if (bias_rows_ > 0) slice.bias = below(b.data, site.in * slice.out);
      slice.b = below(b.data, (site.in + bias_rows_) * slice.out);
    } else {
      const Tensor base(api_, context, i);
      slice.out = base.last();
      const bool ends = i + 1 == site.num_slices;
      check(base.rows() == site.tokens && (ends ? column + slice.out == b.last()
                                                : column + slice.out < b.last()),
            "y must be [.., out], and all of them as wide as B");
      slice.base = base.data;
      slice.b = below(b.data, column);
      column += slice.out;
      dims = base.dims;
    }
    slice.y = api_.data(api_.output(context, i, dims.data(), dims.size()));
  }
  return site;
}

const void* Kernel::below(const void* from, int64_t elements) const {
  return static_cast<const char*>(from) + elements * (op_.element == ort::kFloat ? 4 : 2);
}

void Kernel::check(bool fits, const char* what) const {
  if (!fits) throw ort::Error{ort::kInvalidArgument, std::string(op_.op_name) + ": " + what};
}

#ifdef LORAEXPORT_CUDA
void Kernel::fail_with(const char* what) const {
  if (what != nullptr) throw ort::Error{ort::kFail, std::string(op_.op_name) + ": " + what};
}
#endif

}  // namespace lora
