// The ops as onnxruntime sees them: names, types, shapes, and what a call works on.
//
//   Route(slots) -> routes
//   LoraLinear(x, routes, ranks, owners, rest, A, WB_1) -> y_1; LoraLinear2, 3: a WB for each y
//   LoraAdd(y, x, routes, ranks, owners, rest, A, B) -> y + h_own B; LoraAdd2 and 3 of so many y,
//   with `widths` behind B, which has the columns of all of them
//
// `owners`, `rest` and `widths` are there for the stock operators of the function's body; nothing
// here reads them. Every op is registered for each provider and element type: onnxruntime infers
// the type of an output only if the types of all inputs are fixed.
#include <exception>
#include <vector>

#include "kernel.h"

namespace lora {
namespace {

constexpr char kCpu[] = "CPUExecutionProvider";
constexpr char kCuda[] = "CUDAExecutionProvider";

const Op& as_op(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

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
  const size_t x = self.x();
  const bool whole = self.kind == Kind::kRoute || (index > x && index <= x + 3) ||
                     (self.kind == Kind::kAdd && index == x + 7);
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
    for (size_t i = 0; i < self.outputs(); ++i) {
      if (!dims_of(self.kind == Kind::kAdd ? i : 0, dims, names)) return;
      if (self.kind == Kind::kLinear) {
        if (!dims_of(6 + i, width, width_names)) return;
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
  op.input_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.output_characteristic = op.input_characteristic;
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
        made.push_back(make_op("LoraAdd", Kind::kAdd, 1, element, on_cuda));
        made.push_back(make_op("LoraAdd2", Kind::kAdd, 2, element, on_cuda));
        made.push_back(make_op("LoraAdd3", Kind::kAdd, 3, element, on_cuda));
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
