#include "gemm.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace lora::cuda {
namespace {

// cublasGemmEx and the values of its enumerations, as its ABI has them.
using Gemm = int (*)(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
                     const void* a, int atype, int lda, const void* b, int btype, int ldb,
                     const void* beta, void* c, int ctype, int ldc, int compute, int algorithm);
constexpr int kAsIs = 0, kTypeFloat16 = 2, kTypeBFloat16 = 14, kInFloat32 = 68, kDefault = -1;

// The path under which onnxruntime's CUDA provider is loaded, or "": it has no soname to ask for.
std::string provider() {
  std::string path;
  const auto look = [](dl_phdr_info* info, size_t, void* found) {
    const bool here = std::strstr(info->dlpi_name, "libonnxruntime_providers_cuda.so") != nullptr;
    if (here) *static_cast<std::string*>(found) = info->dlpi_name;
    return here ? 1 : 0;
  };
  dl_iterate_phdr(look, &path);
  return path;
}

// A handle belongs to the library that made it: the provider's own cuBLAS, looked for through the
// provider; else the one that a process without onnxruntime has loaded.
Gemm find() {
  const std::string names[] = {provider(), "libcublas.so.13", "libcublas.so.12"};
  for (const std::string& name : names) {
    void* library = name.empty() ? nullptr : dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
    void* found = library == nullptr ? nullptr : dlsym(library, "cublasGemmEx");
    if (found != nullptr) return reinterpret_cast<Gemm>(found);
  }
  return nullptr;
}

}  // namespace

const char* gemm(void* cublas, Element element, int64_t tokens, int64_t in, int64_t out,
                 const void* x, const void* weight, void* y, float beta) {
  static const Gemm multiply = find();
  if (multiply == nullptr || cublas == nullptr) return "cuBLAS is not loaded in this process";
  const int type = element == Element::kFloat16 ? kTypeFloat16 : kTypeBFloat16;
  const float alpha = 1;
  // cuBLAS counts by columns, so it sees every matrix transposed: y^T = weight^T x^T.
  const int status = multiply(cublas, kAsIs, kAsIs, static_cast<int>(out), static_cast<int>(tokens),
                              static_cast<int>(in), &alpha, weight, type, static_cast<int>(out), x,
                              type, static_cast<int>(in), &beta, y, type, static_cast<int>(out),
                              kInFloat32, kDefault);
  return status == 0 ? nullptr : "cuBLAS failed in the base's product";
}

}  // namespace lora::cuda
