#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "cpu/call.h"
#include "cpu/isa.h"
#include "cpu/ops_cpu.h"

namespace lola {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Indices check_indices(const Tensor& t, const char* name, const char* meaning, int64_t count) {
  check_shape(t, name, meaning, {count});
  Indices view;
  view.wide = t.scalar_type() == ScalarType::Long;
  LOLA_CHECK(view.wide || t.scalar_type() == ScalarType::Int, name, ": dtype ",
             torch::headeronly::toString(t.scalar_type()), ", expected int32 or int64");
  view.data = static_cast<const char*>(t.data_ptr());
  view.stride = t.stride(0);
  return view;
}

// A number for each column of a product, or null.
const float* check_columns(const std::optional<Tensor>& t, const char* name, int64_t N) {
  if (!t) return nullptr;
  check_shape(*t, name, "[N]", {N});
  check_float(*t, name, {DType::f32});
  LOLA_CHECK(t->is_contiguous(), name, ": must be contiguous");
  return static_cast<const float*>(t->data_ptr());
}

// Tokens by heads: [T, heads, d].
TokenRows check_tokens(const Tensor& t, const char* name, std::initializer_list<DType> known) {
  TokenRows rows;
  rows.dtype = check_float(t, name, known);
  rows.data = static_cast<char*>(t.data_ptr());
  rows.token_stride = t.stride(0) * size_of(rows.dtype);
  rows.head_stride = t.stride(1) * size_of(rows.dtype);
  LOLA_CHECK(t.size(2) <= 1 || t.stride(2) == 1, name,
             ": the last dimension must be contiguous, its stride is ", t.stride(2));
  return rows;
}

// The part of a call for page `i`: its heads of tokens and weights. Maps have `map_columns`
// columns, also those of heads without a hidden state.
Call part_of(const Call& all, const PageLayout& layout, int64_t i, int64_t map_columns) {
  const auto heads_of = [&](TokenRows rows, int64_t heads) {
    rows.data += i * heads * rows.head_stride;
    return rows;
  };
  const int64_t size = size_of(layout.state_dtype), map = layout.head_dim * map_columns;
  const auto weights_of = [&](const void* weights, int64_t numbers) -> const void* {
    if (weights == nullptr) return nullptr;  // a layer may have no importance
    return static_cast<const char*>(weights) + i * numbers * size;
  };
  return {layout,
          all.pages,
          all.page_stride,
          all.state_indices,
          heads_of(all.q, layout.num_heads),
          heads_of(all.k, layout.num_kv_heads),
          heads_of(all.v, layout.num_kv_heads),
          heads_of(all.out, layout.num_heads),
          weights_of(all.feature_map_q, layout.num_heads * map),
          weights_of(all.feature_map_k, layout.num_state_heads * map),
          weights_of(all.gates, 2 * layout.num_heads),
          weights_of(all.importance, layout.num_kv_heads * layout.importance_size()),
          all.layer_state_heads};
}

// A call for each page of the layer.
std::vector<Call> check_cpu_call(const LayerTensors& t, const Tensor& state_indices) {
  const Layouts layouts = check_call(t, Device::cpu);
  const PageLayout& layout = *layouts.first;
  const DType kv = layout.kv_dtype, wide = kv == DType::f64 ? DType::f64 : DType::f32;
  LOLA_CHECK(kv != DType::f16 && layout.state_dtype == wide,
             "layout: keys and values must be float32, bfloat16 or float64, and H and s float32, "
             "or float64 where keys and values are");
  const Tensor& pages = t.pages;
  Call call{layout,
            static_cast<char*>(pages.data_ptr()),
            pages.stride(0),
            check_indices(state_indices, "state_indices", "[rows]", state_indices.size(0)),
            check_tokens(t.q, "q", {DType::f32, DType::bf16, DType::f64}),
            check_tokens(t.k, "k", {kv}),
            check_tokens(t.v, "v", {kv}),
            check_tokens(t.out, "out", {DType::f32, DType::bf16, DType::f64}),
            t.feature_map_q.data_ptr(),
            t.feature_map_k.data_ptr(),
            t.gates.data_ptr(),
            t.importance.data_ptr(),
            layouts.count * layout.num_state_heads};
  for (int64_t row = 0; row < state_indices.size(0); ++row) {
    LOLA_CHECK(call.state_indices[row] < pages.size(0), "state_indices: entry ", row, " is ",
               call.state_indices[row], ", but there are ", pages.size(0), " pages");
  }
  std::vector<Call> calls;
  for (int64_t i = 0; i < layouts.count; ++i) {
    calls.push_back(part_of(call, layouts.first[i], i, t.feature_map_q.size(2)));
  }
  return calls;
}

}  // namespace

void decode(const Tensor& pages, const Tensor& layout, const Tensor&, const Tensor& feature_map_q,
            const Tensor& feature_map_k, const Tensor& gates, const Tensor& importance,
            const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state_indices,
            const Tensor& seq_lens, const Tensor& out) {
  const std::vector<Call> calls =
      check_cpu_call({pages, layout, feature_map_q, feature_map_k, gates, importance, q, k, v, out},
                     state_indices);
  const int64_t rows = state_indices.size(0);
  LOLA_CHECK(rows == q.size(0), "state_indices: ", rows, " rows, but q has ", q.size(0), " tokens");
  const Indices lengths = check_indices(seq_lens, "seq_lens", "[rows]", rows);
  for (int64_t row = 0; row < rows; ++row) {
    LOLA_CHECK(calls[0].state_indices[row] <= 0 || lengths[row] >= 1, "seq_lens: entry ", row,
               " is ", lengths[row], ", it counts the new token");
  }
  if (rows > 0) decode_cpu(calls, rows, lengths);
}

void prefill(const Tensor& pages, const Tensor& layout, const Tensor&, const Tensor& feature_map_q,
             const Tensor& feature_map_k, const Tensor& gates, const Tensor& importance,
             const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state_indices,
             const Tensor& query_start_loc, const Tensor& context_lens, const Tensor& out) {
  const std::vector<Call> calls =
      check_cpu_call({pages, layout, feature_map_q, feature_map_k, gates, importance, q, k, v, out},
                     state_indices);
  const int64_t rows = state_indices.size(0);
  const Indices starts = check_indices(query_start_loc, "query_start_loc", "[rows + 1]", rows + 1);
  const Indices context = check_indices(context_lens, "context_lens", "[rows]", rows);
  for (int64_t row = 0; row < rows; ++row) {
    LOLA_CHECK(starts[row] >= 0 && starts[row] <= starts[row + 1] && starts[row + 1] <= q.size(0),
               "query_start_loc: entries ", row, " and ", row + 1, " are ", starts[row], " and ",
               starts[row + 1], ", but q has ", q.size(0), " tokens");
    LOLA_CHECK(context[row] >= 0, "context_lens: entry ", row, " is ", context[row]);
  }
  if (rows > 0) prefill_cpu(calls, rows, starts, context);
}

Tensor linear(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& scale) {
  const int64_t dim = x.dim();
  LOLA_CHECK(dim > 0, "x: shape ", shape_string(x), ", expected [.., K]");
  const int64_t K = x.size(dim - 1);
  check_shape(panels, "panels", "[N / 32, K, 32]", {-1, K, kPanel});
  DType dtype = DType::f32;
  if (scale) {
    LOLA_CHECK(panels.scalar_type() == ScalarType::Char, "panels: dtype ",
               torch::headeronly::toString(panels.scalar_type()), ", with scales expected int8");
    dtype = check_float(x, "x", {DType::f32, DType::bf16});
  } else {
    check_float(x, "x", {DType::f32});
    check_float(panels, "panels", {DType::bf16});
  }
  LOLA_CHECK(x.is_cpu() && panels.is_contiguous(),
             "x and panels: must be CPU tensors, and panels "
             "contiguous");
  const int64_t N = panels.size(0) * kPanel;
  const float* const biases = check_columns(bias, "bias", N);
  const float* const scales = check_columns(scale, "scale", N);
  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) {
    sizes.push_back(x.size(i));
    rows *= x.size(i);
  }
  sizes.push_back(N);
  Tensor from = torch::stable::contiguous(x);
  if (dtype == DType::bf16 && (K % 2 != 0 || cpu_isa() != Isa::avx512_bf16)) {
    from = torch::stable::to(from, ScalarType::Float);
  }
  Tensor y = torch::stable::new_empty(from, sizes);
  const DType computed = from.scalar_type() == ScalarType::Float ? DType::f32 : DType::bf16;
  linear_cpu(
      {computed, from.data_ptr(), panels.data_ptr(), scales, biases, y.data_ptr(), rows, K, N});
  return computed == dtype ? y : torch::stable::to(y, ScalarType::BFloat16);
}

int64_t cpu_isa_level() { return static_cast<int64_t>(cpu_isa()); }

}  // namespace lola

STABLE_TORCH_LIBRARY(lola, m) {
  m.def(LOLA_DECODE_SCHEMA);
  m.def(LOLA_PREFILL_SCHEMA);
  m.def(LOLA_LINEAR_SCHEMA);
  m.def("cpu_isa_level() -> int");  // as in cpu/isa.h
}

STABLE_TORCH_LIBRARY_IMPL(lola, CPU, m) {
  m.impl("decode", TORCH_BOX(&lola::decode));
  m.impl("prefill", TORCH_BOX(&lola::prefill));
  m.impl("linear", TORCH_BOX(&lola::linear));
}

STABLE_TORCH_LIBRARY_IMPL(lola, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa_level", TORCH_BOX(&lola::cpu_isa_level));
}
