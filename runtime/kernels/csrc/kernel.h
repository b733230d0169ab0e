// A node of a graph: which op it is, and what it does when it is called.
#pragma once

#include "ort_api.h"
#include "site.h"
#ifdef LORAEXPORT_CUDA
#include "scratch.h"
#endif

namespace lora {

enum class Kind { kRoute, kLinear, kAdd };

struct Op : ort::CustomOp {
  const char* op_name = nullptr;
  Kind kind = Kind::kRoute;
  int slices = 0;  // y of a LoraLinear or LoraAdd
  int element = ort::kInt64;
  bool on_cuda = false;

  size_t inputs() const {
    if (kind == Kind::kRoute) return 1;
    return kind == Kind::kLinear ? 6 + slices : 7 + slices + (slices > 1);
  }
  size_t outputs() const { return kind == Kind::kRoute ? 1 : slices; }
  size_t x() const { return kind == Kind::kAdd ? slices : 0; }
};

class Kernel {
 public:
  // Reads and checks the node's attributes.
  Kernel(const Op& op, ort::Table table, const ort::KernelInfo* info);

  const ort::Api& api() const { return api_; }
  void compute(ort::KernelContext* context);

 private:
  void route(ort::KernelContext* context);
  void compute_site(ort::KernelContext* context);
  // Reads the inputs, checks that their shapes fit, and makes the outputs.
  Site describe(ort::KernelContext* context) const;
  const void* below(const void* from, int64_t elements) const;
  void check(bool fits, const char* what) const;

  const Op& op_;
  const ort::Api api_;
  int64_t slots_ = 0, width_ = 0, bias_rows_ = 0;
#ifdef LORAEXPORT_CUDA
  void fail_with(const char* what) const;
  cuda::Scratch scratch_;
#endif
};

}  // namespace lora
