#include "ops.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/call.h"

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

// Tokens by heads: [T, heads, d].
Strided<3> check_tokens(const Tensor& t, const char* name, std::initializer_list<DType> known) {
  Strided<3> view;
  view.dtype = check_float(t, name, known);
  view.data = static_cast<char*>(t.data_ptr());
  for (int i = 0; i < 3; ++i) view.stride[i] = t.stride(i);
  LOLA_CHECK(t.size(2) <= 1 || view.stride[2] == 1, name,
             ": the last dimension must be contiguous, its stride is ", view.stride[2]);
  return view;
}

// A part of every page, [N, heads, rows, columns].
Strided<4> part(const Tensor& pages, int64_t offset, DType dtype, int64_t rows, int64_t columns) {
  return {static_cast<char*>(pages.data_ptr()) + offset,
          dtype,
          {pages.stride(0) / size_of(dtype), rows * columns, columns, 1}};
}

LolaArgs check_args(const LayerTensors& t, const Tensor& slots) {
  const PageLayout& x = check_call(t, Device::cpu);
  const DType pair = x.kv_dtype, wide = pair == DType::f64 ? DType::f64 : DType::f32;
  LOLA_CHECK(pair != DType::f16 && x.state_dtype == wide,
             "layout: keys and values must be float32, bfloat16 or float64, and H and s float32, "
             "or float64 where keys and values are");
  LolaArgs a;
  a.Hq = x.num_heads;
  a.d = x.head_dim;
  a.Hkv = x.num_kv_heads;
  a.Hg = x.num_sparse_heads;
  a.lam = x.sparse_cache_size;
  a.Hs = x.num_state_heads;
  a.F = x.feature_dim;
  a.window = x.window_size;
  a.interval = x.update_interval;
  a.sink = x.sink_size;
  a.subtract_max = x.subtract_max != 0;

  a.q = check_tokens(t.q, "q", {DType::f32, DType::bf16, DType::f64});
  a.out = check_tokens(t.out, "out", {DType::f32, DType::bf16, DType::f64});
  a.k = check_tokens(t.k, "k", {pair});
  a.v = check_tokens(t.v, "v", {pair});
  a.feature_map_q = {static_cast<char*>(t.feature_map_q.data_ptr()), wide, {a.d * a.F, a.F, 1}};
  a.log_gate = {static_cast<char*>(t.log_gate.data_ptr()), wide, {1}};
  const Tensor& pages = t.pages;
  a.sparse_k = part(pages, x.sparse_k, pair, a.lam, a.d);
  a.sparse_v = part(pages, x.sparse_v, pair, a.lam, a.d);
  a.exact_k = part(pages, x.exact_k, pair, a.sink + x.ring_size(), a.d);
  a.exact_v = part(pages, x.exact_v, pair, a.sink + x.ring_size(), a.d);
  a.recall = RecallArgs{};
  a.recall.feature_map_k = {
      static_cast<char*>(t.feature_map_k.data_ptr()), wide, {a.d * a.F, a.F, 1}};
  a.recall.H = part(pages, x.H, wide, 2 * a.F, a.d);
  const Strided<4> s = part(pages, x.s, wide, 1, 2 * a.F);
  a.recall.s = {s.data, wide, {s.stride[0], s.stride[1], 1}};
  a.recall.d = a.d;
  a.recall.F = a.F;
  a.incremental = x.bounded();
  a.bounds = part(pages, x.bounds, wide, kBounds, a.lam);
  a.directions = static_cast<int8_t*>(pages.data_ptr()) + x.directions;
  a.directions_stride[0] = pages.stride(0);
  a.directions_stride[1] = a.lam * a.d;
  a.positions = reinterpret_cast<int32_t*>(static_cast<char*>(pages.data_ptr()) + x.positions);
  a.positions_stride[0] = pages.stride(0) / 4;
  a.positions_stride[1] = a.lam;
  a.slots = check_indices(slots, "slots", "[rows]", slots.size(0));
  for (int64_t row = 0; row < slots.size(0); ++row) {
    LOLA_CHECK(a.slots[row] < pages.size(0), "slots: entry ", row, " is ", a.slots[row],
               ", but there are ", pages.size(0), " pages");
  }
  return a;
}

}  // namespace

void decode(const Tensor& pages, const Tensor& layout, const Tensor& feature_map_q,
            const Tensor& feature_map_k, const Tensor& log_gate, const Tensor& q, const Tensor& k,
            const Tensor& v, const Tensor& slots, const Tensor& seq_lens, const Tensor& out) {
  const LolaArgs args =
      check_args({pages, layout, feature_map_q, feature_map_k, log_gate, q, k, v, out}, slots);
  const int64_t rows = slots.size(0);
  LOLA_CHECK(rows == q.size(0), "slots: ", rows, " rows, but q has ", q.size(0), " tokens");
  const Indices lengths = check_indices(seq_lens, "seq_lens", "[rows]", rows);
  for (int64_t row = 0; row < rows; ++row) {
    LOLA_CHECK(args.slots[row] <= 0 || lengths[row] >= 1, "seq_lens: entry ", row, " is ",
               lengths[row], ", it counts the new token");
  }
  if (rows > 0) decode_cpu(args, rows, lengths);
}

void prefill(const Tensor& pages, const Tensor& layout, const Tensor& feature_map_q,
             const Tensor& feature_map_k, const Tensor& log_gate, const Tensor& q, const Tensor& k,
             const Tensor& v, const Tensor& slots, const Tensor& query_start_loc,
             const Tensor& context_lens, const Tensor& out) {
  const LolaArgs args =
      check_args({pages, layout, feature_map_q, feature_map_k, log_gate, q, k, v, out}, slots);
  const int64_t rows = slots.size(0);
  const Indices starts = check_indices(query_start_loc, "query_start_loc", "[rows + 1]", rows + 1);
  const Indices context = check_indices(context_lens, "context_lens", "[rows]", rows);
  for (int64_t row = 0; row < rows; ++row) {
    LOLA_CHECK(starts[row] >= 0 && starts[row] <= starts[row + 1] && starts[row + 1] <= q.size(0),
               "query_start_loc: entries ", row, " and ", row + 1, " are ", starts[row], " and ",
               starts[row + 1], ", but q has ", q.size(0), " tokens");
    LOLA_CHECK(context[row] >= 0, "context_lens: entry ", row, " is ", context[row]);
  }
  if (rows > 0) prefill_cpu(args, rows, starts, context);
}

int64_t cpu_isa_level() { return static_cast<int64_t>(cpu_isa()); }

}  // namespace lola

STABLE_TORCH_LIBRARY(lola, m) {
  m.def(LOLA_DECODE_SCHEMA);
  m.def(LOLA_PREFILL_SCHEMA);
  m.def("cpu_isa_level() -> int");  // as in cpu/isa.h
}

STABLE_TORCH_LIBRARY_IMPL(lola, CPU, m) {
  m.impl("decode", TORCH_BOX(&lola::decode));
  m.impl("prefill", TORCH_BOX(&lola::prefill));
}

STABLE_TORCH_LIBRARY_IMPL(lola, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa_level", TORCH_BOX(&lola::cpu_isa_level));
}
