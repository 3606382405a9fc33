#include "ops.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/page.h"

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

LolaArgs check_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& feature_map_q,
                    const Tensor& feature_map_k, const Tensor& log_gate, const Tensor& H,
                    const Tensor& s, const Tensor& positions, const Tensor& sparse_k,
                    const Tensor& sparse_v, const Tensor& exact_k, const Tensor& exact_v,
                    const Tensor& bounds, const Tensor& directions, const Tensor& slots,
                    const Tensor& out, bool subtract_max, int64_t window, int64_t interval,
                    int64_t sink) {
  const LolaSizes sizes = check_sizes({q, k, v, feature_map_q, feature_map_k, log_gate, H, s,
                                       positions, sparse_k, sparse_v, exact_k, exact_v, slots, out},
                                      window, interval, sink, Device::cpu);
  LolaArgs a;
  a.Hq = sizes.Hq;
  a.d = sizes.d;
  a.Hkv = sizes.Hkv;
  a.Hg = sizes.Hg;
  a.lam = sizes.lam;
  a.Hs = sizes.Hs;
  a.F = sizes.F;
  a.window = window;
  a.interval = interval;
  a.sink = sink;
  a.subtract_max = subtract_max;

  a.q = check_strided<3>(q, "q");
  a.k = check_strided<3>(k, "k");
  a.v = check_strided<3>(v, "v");
  a.out = check_strided<3>(out, "out");
  a.feature_map_q = check_strided<3>(feature_map_q, "feature_map_q");
  a.log_gate.dtype = check_float(log_gate, "log_gate");
  a.log_gate.data = static_cast<char*>(log_gate.data_ptr());
  a.log_gate.stride[0] = log_gate.stride(0);
  a.sparse_k = check_strided<4>(sparse_k, "sparse_k");
  a.sparse_v = check_strided<4>(sparse_v, "sparse_v");
  a.exact_k = check_strided<4>(exact_k, "exact_k");
  a.exact_v = check_strided<4>(exact_v, "exact_v");
  a.recall = RecallArgs{};
  a.recall.feature_map_k = check_strided<3>(feature_map_k, "feature_map_k");
  a.recall.H = check_strided<4>(H, "H");
  a.recall.s = check_strided<3>(s, "s");
  a.recall.d = a.d;
  a.recall.F = a.F;
  a.incremental = check_remembered(bounds, directions, sizes, interval, Device::cpu) > 0;
  a.bounds = check_strided<4>(bounds, "bounds");
  a.directions = static_cast<int8_t*>(directions.data_ptr());
  a.directions_stride[0] = directions.stride(0);
  a.directions_stride[1] = directions.stride(1);
  const DType pair = a.exact_k.dtype;
  const DType wide = pair == DType::f64 ? DType::f64 : DType::f32;
  LOLA_CHECK(a.recall.H.dtype == wide && a.recall.s.dtype == wide,
             "H: H and s must be float32, or float64 where keys and values are");
  LOLA_CHECK(a.bounds.dtype == wide,
             "bounds: must be float32, or float64 where keys and values are");
  LOLA_CHECK(a.k.dtype == pair && a.v.dtype == pair && a.exact_v.dtype == pair &&
                 a.sparse_k.dtype == pair && a.sparse_v.dtype == pair,
             "k: keys and values, and the pages that hold them, must be of one dtype");
  // Rows of keys and values are read as contiguous runs.
  for (const auto* view : {&a.sparse_k, &a.sparse_v, &a.exact_k, &a.exact_v}) {
    LOLA_CHECK(view->stride[2] == a.d, "exact_k, sparse_k: rows of a page must be contiguous");
  }
  LOLA_CHECK(positions.scalar_type() == ScalarType::Int, "positions: must be int32");
  LOLA_CHECK(a.lam <= 1 || positions.stride(2) == 1,
             "positions: the last dimension must be contiguous");
  a.positions = static_cast<int32_t*>(positions.data_ptr());
  a.positions_stride[0] = positions.stride(0);
  a.positions_stride[1] = positions.stride(1);
  a.slots = check_indices(slots, "slots", "[rows]", slots.size(0));
  for (int64_t row = 0; row < slots.size(0); ++row) {
    LOLA_CHECK(a.slots[row] < sizes.N, "slots: entry ", row, " is ", a.slots[row],
               ", but there are ", sizes.N, " pages");
  }
  return a;
}

}  // namespace

void decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& feature_map_q,
            const Tensor& feature_map_k, const Tensor& log_gate, const Tensor& H, const Tensor& s,
            const Tensor& positions, const Tensor& sparse_k, const Tensor& sparse_v,
            const Tensor& exact_k, const Tensor& exact_v, const Tensor& bounds,
            const Tensor& directions, const Tensor& slots, const Tensor& seq_lens,
            const Tensor& out, bool subtract_max, int64_t window, int64_t interval, int64_t sink) {
  const LolaArgs args = check_args(q, k, v, feature_map_q, feature_map_k, log_gate, H, s, positions,
                                   sparse_k, sparse_v, exact_k, exact_v, bounds, directions, slots,
                                   out, subtract_max, window, interval, sink);
  const int64_t rows = slots.size(0);
  LOLA_CHECK(rows == q.size(0), "slots: ", rows, " rows, but q has ", q.size(0), " tokens");
  const Indices lengths = check_indices(seq_lens, "seq_lens", "[rows]", rows);
  for (int64_t row = 0; row < rows; ++row) {
    LOLA_CHECK(args.slots[row] <= 0 || lengths[row] >= 1, "seq_lens: entry ", row, " is ",
               lengths[row], ", it counts the new token");
  }
  if (rows > 0) decode_cpu(args, rows, lengths);
}

void prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& feature_map_q,
             const Tensor& feature_map_k, const Tensor& log_gate, const Tensor& H, const Tensor& s,
             const Tensor& positions, const Tensor& sparse_k, const Tensor& sparse_v,
             const Tensor& exact_k, const Tensor& exact_v, const Tensor& bounds,
             const Tensor& directions, const Tensor& slots, const Tensor& query_start,
             const Tensor& context_lens, const Tensor& out, bool subtract_max, int64_t window,
             int64_t interval, int64_t sink) {
  const LolaArgs args = check_args(q, k, v, feature_map_q, feature_map_k, log_gate, H, s, positions,
                                   sparse_k, sparse_v, exact_k, exact_v, bounds, directions, slots,
                                   out, subtract_max, window, interval, sink);
  const int64_t rows = slots.size(0);
  const Indices starts = check_indices(query_start, "query_start", "[rows + 1]", rows + 1);
  const Indices context = check_indices(context_lens, "context_lens", "[rows]", rows);
  for (int64_t row = 0; row < rows; ++row) {
    LOLA_CHECK(starts[row] >= 0 && starts[row] <= starts[row + 1] && starts[row + 1] <= q.size(0),
               "query_start: entries ", row, " and ", row + 1, " are ", starts[row], " and ",
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
