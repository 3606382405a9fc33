#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/sre.h"

namespace lola {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor sre_scores(const Tensor& k, const Tensor& v, const Tensor& feature_map_k, const Tensor& H,
                  const Tensor& s, const Tensor& slots, const Tensor& empty) {
  check_shape(k, "k", "[B, Hg, E, d]", {-1, -1, -1, -1});
  check_shape(feature_map_k, "feature_map_k", "[Hs, d, F]", {-1, k.size(3), -1});
  SreArgs args;
  args.B = k.size(0);
  args.Hg = k.size(1);
  args.E = k.size(2);
  args.d = k.size(3);
  args.Hs = feature_map_k.size(0);
  args.F = feature_map_k.size(2);
  LOLA_CHECK(args.Hg > 0 && args.d > 0, "k: shape ", shape_string(k), ", needs Hg, d >= 1");
  LOLA_CHECK(args.F > 0 && args.Hs > 0 && args.Hs % args.Hg == 0, "feature_map_k: shape ",
             shape_string(feature_map_k), ", needs F >= 1 and state heads in multiples of the ",
             args.Hg, " sparse sets");
  check_shape(v, "v", "[B, Hg, E, d]", {args.B, args.Hg, args.E, args.d});
  check_shape(H, "H", "[N, Hs, 2F, d]", {-1, args.Hs, 2 * args.F, args.d});
  check_shape(s, "s", "[N, Hs, 2F]", {H.size(0), args.Hs, 2 * args.F});
  check_shape(slots, "slots", "[B]", {args.B});
  check_shape(empty, "empty", "[B]", {args.B});

  args.k = check_strided<4>(k, "k");
  args.v = check_strided<4>(v, "v");
  args.feature_map_k = check_strided<3>(feature_map_k, "feature_map_k");
  args.H = check_strided<4>(H, "H");
  args.s = check_strided<3>(s, "s");
  LOLA_CHECK(args.v.dtype == args.k.dtype, "v: dtype must be that of k");
  LOLA_CHECK(args.s.dtype == args.H.dtype, "s: dtype must be that of H");
  LOLA_CHECK(args.H.dtype == (args.k.dtype == DType::f64 ? DType::f64 : DType::f32),
             "H: must be float32, or float64 where k is");
  args.wide_slots = slots.scalar_type() == ScalarType::Long;
  LOLA_CHECK(args.wide_slots || slots.scalar_type() == ScalarType::Int, "slots: dtype ",
             torch::headeronly::toString(slots.scalar_type()), ", expected int32 or int64");
  LOLA_CHECK(empty.scalar_type() == ScalarType::Bool, "empty: dtype ",
             torch::headeronly::toString(empty.scalar_type()), ", expected bool");
  args.slots = static_cast<const char*>(slots.data_ptr());
  args.slots_stride = slots.stride(0);
  args.empty = static_cast<const unsigned char*>(empty.data_ptr());
  args.empty_stride = empty.stride(0);
  for (int64_t row = 0; row < args.B; ++row) {
    LOLA_CHECK(args.slot(row) < H.size(0), "slots: entry ", row, " is ", args.slot(row),
               ", but H has ", H.size(0), " pages");
  }

  const bool wide = args.k.dtype == DType::f64;
  Tensor out = torch::stable::empty({args.B, args.Hg, args.E},
                                    wide ? ScalarType::Double : ScalarType::Float);
  args.out = static_cast<char*>(out.data_ptr());
  if (args.B > 0 && args.E > 0) sre_scores_cpu(args);
  return out;
}

int64_t cpu_isa_level() { return static_cast<int64_t>(cpu_isa()); }

}  // namespace lola

STABLE_TORCH_LIBRARY(lola, m) {
  m.def(
      "sre_scores(Tensor k, Tensor v, Tensor feature_map_k, Tensor H, Tensor s, Tensor slots, "
      "Tensor empty) -> Tensor");
  m.def("cpu_isa_level() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(lola, CPU, m) { m.impl("sre_scores", TORCH_BOX(&lola::sre_scores)); }

STABLE_TORCH_LIBRARY_IMPL(lola, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa_level", TORCH_BOX(&lola::cpu_isa_level));
}
