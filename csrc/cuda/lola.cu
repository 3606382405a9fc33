// lola::decode on CUDA: checks, scratch and launches. The contract is csrc/ops.h, with float16
// besides bfloat16 and float32, and without float64.
//
// Every launch depends on shapes alone, nothing waits for the device, and scratch comes from
// torch's allocator, so that a CUDA graph may capture the op.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "checks.h"
#include "cuda/launch.cuh"
#include "ops.h"

namespace lola {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef LOLA_EMULATE
constexpr Device kDevice = Device::cpu;
cudaStream_t current_stream(int) { return nullptr; }
#else
constexpr Device kDevice = Device::cuda;
cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

constexpr int64_t kBlocksPerProcessor = 2;  // fewer leave processors idle: split the state
constexpr int64_t kSplitRows = 64;          // keys and rows of H that are worth a block
constexpr int64_t kMaxSplits = 32;
constexpr int64_t kSharedList = 8192;  // longer lists of an update lie in memory

Type check_type(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  LOLA_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
             name, ": dtype ", torch::headeronly::toString(type),
             ", expected float32, bfloat16 or float16");
  return type == ScalarType::Float      ? Type::f32
         : type == ScalarType::BFloat16 ? Type::bf16
                                        : Type::f16;
}

// The strides of all dimensions but the last, which is contiguous.
template <int R>
View<R> view(const Tensor& t, const char* name) {
  View<R> x;
  x.data = static_cast<char*>(t.data_ptr());
  for (int i = 0; i < R; ++i) x.stride[i] = t.stride(i);
  LOLA_CHECK(t.size(R) <= 1 || t.stride(R) == 1, name,
             ": the last dimension must be contiguous, its stride is ", t.stride(R));
  return x;
}

const float* weights(const Tensor& t, const char* name) {
  LOLA_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), name,
             ": must be float32 and contiguous");
  return static_cast<const float*>(t.data_ptr());
}

Indices indices(const Tensor& t, const char* name, int64_t count) {
  check_shape(t, name, "[rows]", {count}, kDevice);
  const bool wide = t.scalar_type() == ScalarType::Long;
  LOLA_CHECK(wide || t.scalar_type() == ScalarType::Int, name, ": dtype ",
             torch::headeronly::toString(t.scalar_type()), ", expected int32 or int64");
  return {static_cast<const char*>(t.data_ptr()), t.stride(0), wide};
}

// Whether every row of the view starts at a multiple of 16 bytes.
template <int R>
bool aligned(const View<R>& x, int64_t element) {
  bool ok = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (const int64_t stride : x.stride) ok = ok && stride * element % 16 == 0;
  return ok;
}

// Blocks that share one row and set: as many as fill the device.
int num_splits(const Params& p) {
  const int64_t blocks = p.rows * p.Hg, wanted = kBlocksPerProcessor * num_processors();
  if (blocks >= wanted) return 1;
  const int64_t work = p.sink + p.window + p.interval + p.lam + 2 * p.F;
  const int64_t most = std::clamp<int64_t>(work / kSplitRows, 1, kMaxSplits);
  return static_cast<int>(std::min((wanted + blocks - 1) / blocks, most));
}

template <typename T>
void run(const Params& p, bool vectors, cudaStream_t stream) {
  launch_features(p, stream);
  launch_decode<T>(p, vectors, stream);
  if (p.splits > 1) launch_merge(p, stream);
  if (p.incremental) {
    launch_incremental<T>(p, stream);
  } else {
    launch_update<T>(p, stream);
  }
}

void decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& feature_map_q,
            const Tensor& feature_map_k, const Tensor& log_gate, const Tensor& H, const Tensor& s,
            const Tensor& positions, const Tensor& sparse_k, const Tensor& sparse_v,
            const Tensor& exact_k, const Tensor& exact_v, const Tensor& bounds,
            const Tensor& directions, const Tensor& slots, const Tensor& seq_lens,
            const Tensor& out, bool subtract_max, int64_t window, int64_t interval, int64_t sink) {
  const LolaSizes sizes = check_sizes({q, k, v, feature_map_q, feature_map_k, log_gate, H, s,
                                       positions, sparse_k, sparse_v, exact_k, exact_v, slots, out},
                                      window, interval, sink, kDevice);
  LOLA_CHECK(sizes.d <= kMaxHeadDim, "q: head size ", sizes.d, ", at most ", kMaxHeadDim);
  Params p;
  p.q = view<2>(q, "q");
  p.k = view<2>(k, "k");
  p.v = view<2>(v, "v");
  p.out = view<2>(out, "out");
  p.q_type = check_type(q, "q");
  p.out_type = check_type(out, "out");
  p.feature_map_q = weights(feature_map_q, "feature_map_q");
  p.feature_map_k = weights(feature_map_k, "feature_map_k");
  p.log_gate = weights(log_gate, "log_gate");
  p.H = view<3>(H, "H");
  p.s = view<2>(s, "s");
  for (const auto& [tensor, name] : {std::pair(&H, "H"), std::pair(&s, "s")}) {
    LOLA_CHECK(tensor->scalar_type() == ScalarType::Float, name, ": dtype ",
               torch::headeronly::toString(tensor->scalar_type()), ", expected float32");
  }
  LOLA_CHECK(positions.scalar_type() == ScalarType::Int, "positions: must be int32");
  p.positions = view<2>(positions, "positions");
  p.sparse_k = view<3>(sparse_k, "sparse_k");
  p.sparse_v = view<3>(sparse_v, "sparse_v");
  p.exact_k = view<3>(exact_k, "exact_k");
  p.exact_v = view<3>(exact_v, "exact_v");
  p.incremental = check_remembered(bounds, directions, sizes, interval, kDevice) > 0;
  p.bounds = view<3>(bounds, "bounds");
  LOLA_CHECK(bounds.scalar_type() == ScalarType::Float, "bounds: must be float32");
  p.directions = view<3>(directions, "directions");
  const Type type = check_type(k, "k");
  for (const Tensor* t : {&v, &sparse_k, &sparse_v, &exact_k, &exact_v}) {
    LOLA_CHECK(t->scalar_type() == k.scalar_type(),
               "k: keys and values, and the pages that hold them, must be of one dtype");
  }
  p.slots = indices(slots, "slots", sizes.T);
  p.seq_lens = indices(seq_lens, "seq_lens", sizes.T);
  p.pages = sizes.N;
  p.rows = sizes.T;
  p.window = window;
  p.interval = interval;
  p.sink = sink;
  p.subtract_max = subtract_max;
  // Blocks, keys and scratch per block are counted in 32 bits; page offsets are not.
  constexpr int64_t kMost = int64_t{1} << 30;
  LOLA_CHECK(sink + window + interval + sizes.lam < kMost && sizes.Hq * sizes.T < kMost &&
                 sizes.F < kMost / 2,
             "q: ", sizes.T, " rows of ", sizes.Hq, " heads over ",
             sink + window + interval + sizes.lam, " pairs are too many for one launch");
  p.Hq = static_cast<int>(sizes.Hq);
  p.Hkv = static_cast<int>(sizes.Hkv);
  p.Hs = static_cast<int>(sizes.Hs);
  p.Hg = static_cast<int>(sizes.Hg);
  p.d = static_cast<int>(sizes.d);
  p.F = static_cast<int>(sizes.F);
  p.lam = static_cast<int>(sizes.lam);
  if (p.rows == 0) return;

  const int64_t pair_bytes = type == Type::f32 ? 4 : 2;
  bool vectors =
      aligned(p.H, sizeof(float)) && aligned(p.k, pair_bytes) && aligned(p.v, pair_bytes);
  for (const auto* x : {&p.sparse_k, &p.sparse_v, &p.exact_k, &p.exact_v}) {
    vectors = vectors && aligned(*x, pair_bytes);
  }

  p.direction_words = aligned(p.directions, 1);

  const int device = q.get_device_index();
#ifndef LOLA_EMULATE
  const torch::stable::accelerator::DeviceGuard guard(device);
#endif
  p.splits = num_splits(p);
  const Tensor phi = torch::stable::new_empty(q, {p.rows, p.Hq, 2 * p.F}, ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(
      q, {p.splits > 1 ? p.rows * p.Hq : 0, p.splits, p.partial_size()}, ScalarType::Float);
  p.phi = static_cast<float*>(phi.data_ptr());
  p.partial = static_cast<float*>(partial.data_ptr());
  const int64_t list = p.list_size() <= kSharedList ? 0 : p.list_size();
  const Tensor lists = torch::stable::new_empty(q, {p.rows, p.Hg, list}, ScalarType::Int);
  p.lists = list == 0 ? nullptr : static_cast<int*>(lists.data_ptr());
  const cudaStream_t stream = current_stream(device);
  if (type == Type::bf16) {
    run<Bf16>(p, vectors, stream);
  } else if (type == Type::f16) {
    run<F16>(p, vectors, stream);
  } else {
    run<float>(p, vectors, stream);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lola

#ifdef LOLA_EMULATE
// lola::decode under a name of its own.
STABLE_TORCH_LIBRARY(lola_emulated, m) { m.def(LOLA_DECODE_SCHEMA); }
STABLE_TORCH_LIBRARY_IMPL(lola_emulated, CPU, m) {
  m.impl("decode", TORCH_BOX(&lola::cuda::decode));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lola, CUDA, m) { m.impl("decode", TORCH_BOX(&lola::cuda::decode)); }
#endif
