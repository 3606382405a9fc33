// Checks of op arguments; every message names the argument, what it is and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "bounds.h"
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

enum class Device { cpu, cuda };

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

// The tensors of a call as the ops take them, and the numbers their shapes agree on.
struct LolaTensors {
  const torch::stable::Tensor &q, &k, &v, &feature_map_q, &feature_map_k, &log_gate, &H, &s,
      &positions, &sparse_k, &sparse_v, &exact_k, &exact_v, &slots, &out;
};

struct LolaSizes {
  int64_t T, N, Hq, Hkv, Hs, Hg, lam, d, F;
};

// Checks every shape and on which device it is; throws, naming the argument. Shared by the CPU
// and the CUDA ops.
inline LolaSizes check_sizes(const LolaTensors& t, int64_t window, int64_t interval, int64_t sink,
                             Device device) {
  const auto check = [&](const torch::stable::Tensor& x, const char* name, const char* meaning,
                         std::initializer_list<int64_t> expected) {
    check_shape(x, name, meaning, expected, device);
  };
  LolaSizes a;
  check(t.q, "q", "[T, Hq, d]", {-1, -1, -1});
  a.T = t.q.size(0);
  a.Hq = t.q.size(1);
  a.d = t.q.size(2);
  check(t.exact_k, "exact_k", "[N, Hkv, sink + window + interval, d]", {-1, -1, -1, a.d});
  a.N = t.exact_k.size(0);
  a.Hkv = t.exact_k.size(1);
  check(t.sparse_k, "sparse_k", "[N, Hg, lam, d]", {a.N, -1, -1, a.d});
  a.Hg = t.sparse_k.size(1);
  a.lam = t.sparse_k.size(2);
  check(t.feature_map_k, "feature_map_k", "[Hs, d, F]", {-1, a.d, -1});
  a.Hs = t.feature_map_k.size(0);
  a.F = t.feature_map_k.size(2);
  LOLA_CHECK(a.d > 0 && a.F > 0 && a.Hkv > 0 && a.Hg > 0 && a.Hs > 0, "q: shape ",
             shape_string(t.q), ", needs a head size, feature size and heads of at least 1");
  LOLA_CHECK(window >= 1 && interval >= 1 && sink >= 0, "window = ", window,
             ", interval = ", interval, ", sink = ", sink,
             ": need window, interval >= 1 and sink >= 0");
  LOLA_CHECK(a.Hq % a.Hs == 0 && a.Hs % a.Hg == 0 && a.Hg % a.Hkv == 0, "feature_map_k: ", a.Hs,
             " state heads do not lie between the ", a.Hq, " query heads, the ", a.Hg,
             " sparse sets and the ", a.Hkv, " KV heads");
  const int64_t rows = sink + window + interval;
  check(t.exact_k, "exact_k", "[N, Hkv, sink + window + interval, d]", {a.N, a.Hkv, rows, a.d});
  check(t.exact_v, "exact_v", "[N, Hkv, sink + window + interval, d]", {a.N, a.Hkv, rows, a.d});
  check(t.sparse_v, "sparse_v", "[N, Hg, lam, d]", {a.N, a.Hg, a.lam, a.d});
  check(t.positions, "positions", "[N, Hg, lam]", {a.N, a.Hg, a.lam});
  check(t.H, "H", "[N, Hs, 2F, d]", {a.N, a.Hs, 2 * a.F, a.d});
  check(t.s, "s", "[N, Hs, 2F]", {a.N, a.Hs, 2 * a.F});
  check(t.feature_map_q, "feature_map_q", "[Hq, d, F]", {a.Hq, a.d, a.F});
  check(t.log_gate, "log_gate", "[Hq]", {a.Hq});
  check(t.k, "k", "[T, Hkv, d]", {a.T, a.Hkv, a.d});
  check(t.v, "v", "[T, Hkv, d]", {a.T, a.Hkv, a.d});
  check(t.out, "out", "[T, Hq, d]", {a.T, a.Hq, a.d});
  return a;
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

// Checks what pages of interval 1 keep of sparse pairs, and that others keep nothing of it. Returns
// the number of pairs.
inline int64_t check_remembered(const torch::stable::Tensor& bounds,
                                const torch::stable::Tensor& directions, const LolaSizes& a,
                                int64_t interval, Device device) {
  const int64_t pairs = interval == 1 ? a.lam : 0;
  check_shape(bounds, "bounds", "[N, Hs, 6, lam if interval = 1]", {a.N, a.Hs, kBounds, pairs},
              device);
  check_shape(directions, "directions", "[N, Hs, lam if interval = 1, d]", {a.N, a.Hs, pairs, a.d},
              device);
  LOLA_CHECK(directions.scalar_type() == torch::headeronly::ScalarType::Char,
             "directions: must be int8");
  LOLA_CHECK(pairs * a.d <= 1 || (directions.stride(2) == a.d && directions.stride(3) == 1),
             "directions: rows of a page must be contiguous");
  return pairs;
}

}  // namespace lola
