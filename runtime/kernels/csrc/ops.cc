// The ops as onnxruntime sees them: names, types, shapes, and what a call works on.
//
//   Route(slots) -> routes
//   LoraLinear(x, routes, owners, rest, A, WB_1) -> y_1; LoraLinear2 and 3 with a WB for each y
//   LoraAdd(y, x, routes, owners, rest, A, B) -> y + h_own B
//
// `owners` and `rest` are there for the stock operators of the function's body; nothing here reads
// them. Every op is registered for each provider and element type: onnxruntime infers the type of
// an output only if the types of all inputs are fixed.
#include <string>
#include <vector>

#include "ort_api.h"
#include "routes.h"
#include "site.h"
#ifdef LORAEXPORT_CUDA
#include "scratch.h"
#endif

namespace lora {
namespace {

constexpr char kCpu[] = "CPUExecutionProvider";
constexpr char kCuda[] = "CUDAExecutionProvider";

enum class Kind { kRoute, kLinear, kAdd };

struct Op : ort::CustomOp {
  const char* op_name = nullptr;
  Kind kind = Kind::kRoute;
  int slices = 0;  // WBs of a LoraLinear
  int element = ort::kInt64;
  bool on_cuda = false;

  size_t inputs() const { return kind == Kind::kRoute ? 1 : kind == Kind::kAdd ? 7 : 5 + slices; }
  size_t outputs() const { return kind == Kind::kLinear ? slices : 1; }
  size_t x() const { return kind == Kind::kAdd ? 1 : 0; }
};

const Op& as_op(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

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

void require(bool fits, const char* op, const std::string& what) {
  if (!fits) throw ort::Error{ort::kInvalidArgument, std::string(op) + ": " + what};
}

class Kernel {
 public:
  Kernel(const Op& op, ort::Table table, const ort::KernelInfo* info) : op_(op), api_(table) {
    if (op.kind == Kind::kRoute) return;
    slots_ = api_.attribute(info, "num_slots");
    width_ = api_.attribute(info, "rows_per_slot");
    if (op.kind == Kind::kLinear) bias_rows_ = api_.attribute(info, "bias_rows");
    require(slots_ >= 1 && slots_ <= kMaxSlots, op.op_name, "num_slots must be 1 to 65535");
    require(width_ >= 1, op.op_name, "rows_per_slot must be 1 or more");
    require(bias_rows_ == 0 || bias_rows_ == 8, op.op_name, "bias_rows must be 0 or 8");
  }

  const ort::Api& api() const { return api_; }

  void compute(ort::KernelContext* context) {
    op_.kind == Kind::kRoute ? route(context) : compute_site(context);
  }

 private:
  void route(ort::KernelContext* context) {
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

  void compute_site(ort::KernelContext* context) {
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

  // Reads the inputs, checks that their shapes fit, and makes the outputs.
  Site describe(ort::KernelContext* context) const {
    const Tensor x(api_, context, op_.x()), routes(api_, context, op_.x() + 1);
    const Tensor a(api_, context, op_.x() + 4);
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
    site.num_slices = static_cast<int>(op_.outputs());
    const int64_t stack = bias_rows_ + slots_ * width_;
    check(routes.dims.size() == 2 && routes.dims[1] == kRouteWords, "routes must come from Route");
    check(site.rows > 0 ? site.tokens % site.rows == 0 : site.tokens == 0,
          "the rows of x must be a multiple of the routed rows");
    check(a.dims == std::vector<int64_t>{stack, site.in}, "A must be [K', in]");
    std::vector<int64_t> dims = x.dims;
    for (int i = 0; i < site.num_slices; ++i) {
      Slice& slice = site.slices[i];
      const Tensor b(api_, context, op_.x() + 5 + i);
      const bool whole = op_.kind == Kind::kLinear;  // b holds the base's rows too
      check(b.dims.size() == 2 && b.dims[0] == (whole ? site.in : 0) + stack,
            "WB must be [in + K', out], B [K, out]");
      slice.out = dims.back() = b.last();
      if (whole) {
        slice.weight = b.data;
        if (bias_rows_ > 0) slice.bias = below(b.data, site.in * slice.out);
        slice.b = below(b.data, (site.in + bias_rows_) * slice.out);
      } else {
        const Tensor base(api_, context, 0);
        check(base.rows() == site.tokens && base.last() == slice.out, "y must be [.., out]");
        slice.base = base.data;
        slice.b = b.data;
        dims = base.dims;
      }
      slice.y = api_.data(api_.output(context, i, dims.data(), dims.size()));
    }
    return site;
  }

  const void* below(const void* from, int64_t elements) const {
    return static_cast<const char*>(from) + elements * (op_.element == ort::kFloat ? 4 : 2);
  }
  void check(bool fits, const char* what) const { require(fits, op_.op_name, what); }
  void fail_with(const char* what) const {
    if (what != nullptr) throw ort::Error{ort::kFail, std::string(op_.op_name) + ": " + what};
  }

  const Op& op_;
  const ort::Api api_;
  int64_t slots_ = 0, width_ = 0, bias_rows_ = 0;
#ifdef LORAEXPORT_CUDA
  cuda::Scratch scratch_;
#endif
};

// Runs `work`; what it throws must not cross the C interface.
template <typename Work>
ort::Status* guarded(const ort::Api& api, Work work) {
  try {
    work();
    return nullptr;
  } catch (const ort::Error& error) {
    return api.status(error.code, error.text.c_str());
  } catch (const std::exception& error) {
    return api.status(ort::kFail, error.what());
  }
}

ort::Status* create(const ort::CustomOp* op, ort::Table table, const ort::KernelInfo* info,
                    void** kernel) {
  return guarded(ort::Api(table), [&] { *kernel = new Kernel(as_op(op), table, info); });
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
  Kernel& self = *static_cast<Kernel*>(kernel);
  return guarded(self.api(), [&] { self.compute(context); });
}

int input_type(const ort::CustomOp* op, size_t index) {
  const Op& self = as_op(op);
  const bool whole = self.kind == Kind::kRoute || index == self.x() + 1 || index == self.x() + 2;
  return whole ? ort::kInt64 : self.element;
}

// Memory of the session's API table: InferOutputShapeFn is handed none.
ort::Table table_of_session = nullptr;

// Shapes of the outputs where that of the inputs is known. The API says rank 0 for a shape that
// is not known, so nothing is said then. onnxruntime asks the first op of a name for all of its
// element types: the type comes from the input, not from `op`.
ort::Status* infer_shape(const ort::CustomOp* op, ort::ShapeContext* context) {
  const ort::Api api(table_of_session);
  const Op& self = as_op(op);
  return guarded(api, [&] {
    int element = 0;
    const auto dims_of = [&](size_t index, std::vector<int64_t>& dims,
                             std::vector<const char*>& names) {
      const ort::TypeAndShape* info = api.inferred(context, index);
      dims.resize(info == nullptr ? 0 : api.rank(info));
      names.resize(dims.size());
      if (dims.empty()) return false;
      api.dims(info, dims.data(), dims.size());
      api.names(info, names.data(), names.size());
      element = api.element(info);
      return true;
    };
    std::vector<int64_t> dims, width;
    std::vector<const char*> names, width_names;
    if (!dims_of(0, dims, names)) return;
    for (size_t i = 0; i < self.outputs(); ++i) {
      if (self.kind == Kind::kLinear) {
        if (!dims_of(5 + i, width, width_names)) return;
        dims.back() = width.back();
        names.back() = width_names.back();
      }
      ort::TypeAndShape* info = api.make_shape();
      api.set_element(info, element);
      api.set_dims(info, dims.data(), dims.size());
      api.set_names(info, names.data(), names.size());
      api.set_inferred(context, i, info);
      api.release(info);
    }
  });
}

Op make_op(const char* name, Kind kind, int slices, int element, bool on_cuda) {
  Op op;
  op.op_name = name;
  op.kind = kind;
  op.slices = slices;
  op.element = element;
  op.on_cuda = on_cuda;
  op.name = [](const ort::CustomOp* self) { return as_op(self).op_name; };
  op.provider = [](const ort::CustomOp* self) { return as_op(self).on_cuda ? kCuda : kCpu; };
  op.input_type = input_type;
  op.input_count = [](const ort::CustomOp* self) { return as_op(self).inputs(); };
  op.output_type = [](const ort::CustomOp* self, size_t) { return as_op(self).element; };
  op.output_count = [](const ort::CustomOp* self) { return as_op(self).outputs(); };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = op.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.variadic_input_arity = op.variadic_input_homogeneity = [](const ort::CustomOp*) { return 1; };
  op.variadic_output_arity = op.variadic_output_homogeneity = op.variadic_input_arity;
  op.create_v2 = create;
  op.compute_v2 = compute;
  if (kind != Kind::kRoute) op.infer_shape = infer_shape;
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return 1; };
  return op;
}

const std::vector<Op>& all_ops() {
  static const std::vector<Op> ops = [] {
    std::vector<Op> made;
#ifdef LORAEXPORT_CUDA
    const std::vector<bool> providers = {false, true};
#else
    const std::vector<bool> providers = {false};
#endif
    for (const bool on_cuda : providers) {
      made.push_back(make_op("Route", Kind::kRoute, 0, ort::kInt64, on_cuda));
      for (const int element : {ort::kFloat, ort::kFloat16, ort::kBFloat16}) {
        if (on_cuda && element == ort::kFloat) continue;
        made.push_back(make_op("LoraLinear", Kind::kLinear, 1, element, on_cuda));
        made.push_back(make_op("LoraLinear2", Kind::kLinear, 2, element, on_cuda));
        made.push_back(make_op("LoraLinear3", Kind::kLinear, 3, element, on_cuda));
        made.push_back(make_op("LoraAdd", Kind::kAdd, 0, element, on_cuda));
      }
    }
    return made;
  }();
  return ops;
}

}  // namespace
}  // namespace lora

// Called by onnxruntime with the options of one session; the domain lives as long as the process.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Table table = base->get_api(ort::kApiVersion);
  lora::table_of_session = table;
  const ort::Api api(table);
  return lora::guarded(api, [&] {
    static ort::Domain* const domain = [&] {
      ort::Domain* made = api.make_domain("loraexport");
      for (const lora::Op& op : lora::all_ops()) api.add_op(made, &op);
      return made;
    }();
    api.add_domain(options, domain);
  });
}
