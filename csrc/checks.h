// Checks of op arguments; every message names the argument, what it is and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/types.h"

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

// `expected` gives a size per dimension, -1 for any; `meaning` is the shape in symbols.
inline void check_shape(const torch::stable::Tensor& t, const char* name, const char* meaning,
                        std::initializer_list<int64_t> expected) {
  LOLA_CHECK(t.is_cpu(), name, ": must be a CPU tensor");
  bool ok = t.dim() == static_cast<int64_t>(expected.size());
  std::string wanted = "[";
  int64_t i = 0;
  for (const int64_t size : expected) {
    ok = ok && (size < 0 || t.size(i) == size);
    wanted += (i++ ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
  }
  LOLA_CHECK(ok, name, ": shape ", shape_string(t), ", expected ", meaning, " = ", wanted, "]");
}

inline DType check_float(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = t.scalar_type();
  LOLA_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double, name,
      ": dtype ", torch::headeronly::toString(type), ", expected float32, bfloat16 or float64");
  return type == ScalarType::Float      ? DType::f32
         : type == ScalarType::BFloat16 ? DType::bf16
                                        : DType::f64;
}

template <int R>
Strided<R> check_strided(const torch::stable::Tensor& t, const char* name) {
  Strided<R> view;
  view.dtype = check_float(t, name);
  view.data = static_cast<char*>(t.data_ptr());
  for (int i = 0; i < R; ++i) view.stride[i] = t.stride(i);
  LOLA_CHECK(t.size(R - 1) <= 1 || view.stride[R - 1] == 1, name,
             ": the last dimension must be contiguous, its stride is ", view.stride[R - 1]);
  return view;
}

}  // namespace lola
