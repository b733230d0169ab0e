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
using GetMode = int (*)(void* handle, int* mode);
using SetMode = int (*)(void* handle, int mode);
constexpr int kAsIs = 0, kTypeFloat16 = 2, kTypeBFloat16 = 14, kInFloat32 = 68, kDefault = -1;
constexpr int kNoRoundedSums = 16;  // CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION

struct CuBlas {
  Gemm multiply = nullptr;
  GetMode get_mode = nullptr;
  SetMode set_mode = nullptr;
};

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
CuBlas find() {
  const std::string names[] = {provider(), "libcublas.so.13", "libcublas.so.12"};
  for (const std::string& name : names) {
    void* library = name.empty() ? nullptr : dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) continue;
    const CuBlas found = {reinterpret_cast<Gemm>(dlsym(library, "cublasGemmEx")),
                          reinterpret_cast<GetMode>(dlsym(library, "cublasGetMathMode")),
                          reinterpret_cast<SetMode>(dlsym(library, "cublasSetMathMode"))};
    if (found.multiply && found.get_mode && found.set_mode) return found;
  }
  return {};
}

}  // namespace

const char* gemm(void* cublas, Element element, int64_t tokens, int64_t in, int64_t out,
                 const void* x, const void* weight, void* y, float beta) {
  static const CuBlas found = find();
  if (found.multiply == nullptr || cublas == nullptr) {
    return "cuBLAS is not loaded in this process";
  }
  // Else parts of a split sum may be rounded to the element type before they are added.
  int mode = 0;
  if (found.get_mode(cublas, &mode) != 0 || found.set_mode(cublas, mode | kNoRoundedSums) != 0) {
    return "cuBLAS does not take a mode";
  }
  const int type = element == Element::kFloat16 ? kTypeFloat16 : kTypeBFloat16;
  const float alpha = 1;
  // cuBLAS counts by columns, so it sees every matrix transposed: y^T = weight^T x^T.
  const int status = found.multiply(
      cublas, kAsIs, kAsIs, static_cast<int>(out), static_cast<int>(tokens), static_cast<int>(in),
      &alpha, weight, type, static_cast<int>(out), x, type, static_cast<int>(in), &beta, y, type,
      static_cast<int>(out), kInFloat32, kDefault);
  found.set_mode(cublas, mode);
  return status == 0 ? nullptr : "cuBLAS failed in the base's product";
}

}  // namespace lora::cuda
