// What is called of onnxruntime's C API, by its position in the table of functions: the table only
// ever grows, so a position is as stable as a header. Positions were read from API version 24.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ort {

// Opaque to us: only pointers to them are handed on.
struct Status;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct Value;
struct TypeAndShape;
struct SessionOptions;
struct Domain;
using Table = void* const*;

struct ApiBase {
  Table (*get_api)(uint32_t version);
  const char* (*version)();
};

constexpr uint32_t kApiVersion = 17;  // the first with everything that is used here
enum Element { kFloat = 1, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

// The words of a custom op in their order. `version` says how many are read: 17 ends with the op's
// versions; the words of 18 (in place, alias) would be called without a check for null.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*create)(const CustomOp*, Table, const KernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  int (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*input_count)(const CustomOp*) = nullptr;
  int (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute)(void*, KernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  int (*input_characteristic)(const CustomOp*, size_t) = nullptr;
  int (*output_characteristic)(const CustomOp*, size_t) = nullptr;
  int (*input_memory)(const CustomOp*, size_t) = nullptr;
  int (*variadic_input_arity)(const CustomOp*) = nullptr;
  int (*variadic_input_homogeneity)(const CustomOp*) = nullptr;
  int (*variadic_output_arity)(const CustomOp*) = nullptr;
  int (*variadic_output_homogeneity)(const CustomOp*) = nullptr;
  Status* (*create_v2)(const CustomOp*, Table, const KernelInfo*, void**) = nullptr;
  Status* (*compute_v2)(void*, KernelContext*) = nullptr;
  Status* (*infer_shape)(const CustomOp*, ShapeContext*) = nullptr;
  int (*start_version)(const CustomOp*) = nullptr;
  int (*end_version)(const CustomOp*) = nullptr;
  void* unread[4] = {};
};

// A call's failure; the library's outer functions turn it into a Status.
struct Error {
  ErrorCode code;
  std::string text;
};

class Api {
 public:
  explicit Api(Table table) : table_(table) {}

  Status* status(ErrorCode code, const char* text) const {
    return call<0, Status*>(static_cast<int>(code), text);
  }
  Domain* make_domain(const char* name) const {
    Domain* domain = nullptr;
    check<26>(name, &domain);
    return domain;
  }
  void add_op(Domain* domain, const CustomOp* op) const { check<27>(domain, op); }
  void add_domain(SessionOptions* options, Domain* domain) const { check<28>(options, domain); }

  int64_t attribute(const KernelInfo* info, const char* name) const {
    int64_t value = 0;
    check<86>(info, name, &value);
    return value;
  }

  const Value* input(const KernelContext* context, size_t index) const {
    const Value* value = nullptr;
    check<90>(context, index, &value);
    return value;
  }
  Value* output(KernelContext* context, size_t index, const int64_t* dims, size_t rank) const {
    Value* value = nullptr;
    check<91>(context, index, dims, rank, &value);
    return value;
  }
  void* data(const Value* value) const {
    void* data = nullptr;
    check<51>(const_cast<Value*>(value), &data);
    return data;
  }
  void* stream(const KernelContext* context) const {
    void* stream = nullptr;
    check<193>(context, &stream);
    return stream;
  }
  void* resource(const KernelContext* context, int version, int id) const {
    void* resource = nullptr;
    check<265>(context, version, id, &resource);
    return resource;
  }

  TypeAndShape* shape_of(const Value* value) const {
    TypeAndShape* info = nullptr;
    check<65>(value, &info);
    return info;
  }
  TypeAndShape* make_shape() const {
    TypeAndShape* info = nullptr;
    check<57>(&info);
    return info;
  }
  void release(TypeAndShape* info) const { call<99, void>(info); }
  size_t rank(const TypeAndShape* info) const {
    size_t rank = 0;
    check<61>(info, &rank);
    return rank;
  }
  void dims(const TypeAndShape* info, int64_t* dims, size_t rank) const {
    check<62>(info, dims, rank);
  }
  void names(const TypeAndShape* info, const char** names, size_t rank) const {
    check<63>(info, names, rank);
  }
  int element(const TypeAndShape* info) const {
    int element = 0;
    check<60>(info, &element);
    return element;
  }
  void set_element(TypeAndShape* info, int element) const { check<58>(info, element); }
  void set_dims(TypeAndShape* info, const int64_t* dims, size_t rank) const {
    check<59>(info, dims, rank);
  }
  void set_names(TypeAndShape* info, const char** names, size_t rank) const {
    check<271>(info, names, rank);
  }

  // The context owns what it gives.
  TypeAndShape* inferred(const ShapeContext* context, size_t index) const {
    TypeAndShape* info = nullptr;
    check<268>(context, index, &info);
    return info;
  }
  void set_inferred(const ShapeContext* context, size_t index, const TypeAndShape* info) const {
    check<270>(context, index, info);
  }

 private:
  template <int kAt, typename Result, typename... Arguments>
  Result call(Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(table_[kAt])(arguments...);
  }
  template <int kAt, typename... Arguments>
  void check(Arguments... arguments) const {
    Status* status = call<kAt, Status*>(arguments...);
    if (status == nullptr) return;
    std::string text = call<2, const char*>(status);
    call<93, void>(status);
    throw Error{kFail, text};
  }

  Table table_;
};

}  // namespace ort
