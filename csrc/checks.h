// Checks of op arguments; every message names the argument, what it is and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "layout.h"

// Like STD_TORCH_CHECK, but the message is only what the user needs: no function, file and line.
#define LOLA_CHECK(condition, ...)               \
  do {                                           \
    if (!(condition)) ::lola::fail(__VA_ARGS__); \
  } while (false)

namespace lola {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_string(const torch::stable::Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

enum class Device { cpu, cuda };

constexpr torch::headeronly::ScalarType scalar_type_of(DType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == DType::f64    ? ScalarType::Double
         : dtype == DType::bf16 ? ScalarType::BFloat16
         : dtype == DType::f16  ? ScalarType::Half
                                : ScalarType::Float;
}

// `expected` gives a size per dimension, -1 for any; `meaning` is the shape in symbols.
inline void check_shape(const torch::stable::Tensor& t, const char* name, const char* meaning,
                        std::initializer_list<int64_t> expected, Device device = Device::cpu) {
  LOLA_CHECK(device == Device::cpu ? t.is_cpu() : t.is_cuda(), name, ": must be a ",
             device == Device::cpu ? "CPU" : "CUDA", " tensor");
  bool ok = t.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (const int64_t size : expected) {
    ok = ok && (size < 0 || t.size(i) == size);
    ++i;
  }
  if (ok) return;  // the words are for those who need them: a decode step makes 20 checks
  std::string wanted = "[";
  i = 0;
  for (const int64_t size : expected) {
    wanted += (i++ ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
  }
  fail(name, ": shape ", shape_string(t), ", expected ", meaning, " = ", wanted, "]");
}

// What both ops take besides the rows of the batch; csrc/ops.h says what they are.
struct LayerTensors {
  const torch::stable::Tensor &pages, &layout, &feature_map_q, &feature_map_k, &gates, &importance,
      &q, &k, &v, &out;
};

// The layouts of a call's pages, one for each group of KV heads that share a page.
struct Layouts {
  const PageLayout* first;
  int64_t count;
};

// The layout table of a call, after a look at the tensors that change from call to call. Layout,
// pages and weights were checked against each other by `LayerState.bind` (lola_vllm/core/ops/
// contract.py). Throws, naming the argument.
inline Layouts check_call(const LayerTensors& t, Device device) {
  using torch::headeronly::ScalarType;
  check_shape(t.layout, "layout", "[groups, fields of PageLayout]", {-1, kTableFields});
  const int64_t count = t.layout.size(0);
  LOLA_CHECK(count > 0 && t.layout.scalar_type() == ScalarType::Long && t.layout.is_contiguous(),
             "layout: must be int64 and contiguous");
  const PageLayout& a = *static_cast<const PageLayout*>(t.layout.data_ptr());
  check_shape(t.pages, "pages", "[N, page bytes]", {-1, -1}, device);
  const int64_t bytes = (&a)[count - 1].page_bytes;  // of the last one: up to its end
  LOLA_CHECK(t.pages.size(1) >= bytes && t.pages.stride(1) == 1, "pages: rows of ", t.pages.size(1),
             " bytes, need ", bytes, " in a row");
  const int64_t tokens = t.q.dim() == 3 ? t.q.size(0) : -1;
  const int64_t heads = count * a.num_heads, kv_heads = count * a.num_kv_heads;
  check_shape(t.q, "q", "[T, Hq, d]", {-1, heads, a.head_dim}, device);
  check_shape(t.k, "k", "[T, Hkv, d]", {tokens, kv_heads, a.head_dim}, device);
  check_shape(t.v, "v", "[T, Hkv, d]", {tokens, kv_heads, a.head_dim}, device);
  check_shape(t.out, "out", "[T, Hq, d]", {tokens, heads, a.head_dim}, device);
  return {&a, count};
}

// The dtype of a floating-point tensor, which must be one of `known`.
inline DType check_float(const torch::stable::Tensor& t, const char* name,
                         std::initializer_list<DType> known) {
  using torch::headeronly::ScalarType;
  const ScalarType type = t.scalar_type();
  for (const DType dtype : known) {
    if (type == scalar_type_of(dtype)) return dtype;
  }
  std::string expected;
  for (const DType dtype : known) {
    expected += (expected.empty() ? "" : ", ") +
                std::string(torch::headeronly::toString(scalar_type_of(dtype)));
  }
  fail(name, ": dtype ", torch::headeronly::toString(type), ", expected one of ", expected);
}

}  // namespace lola
