// lola::decode on CUDA: checks, scratch and launches. The contract is csrc/ops.h, with float16
// besides bfloat16 and float32, and without float64.
//
// Every launch depends on shapes alone, nothing waits for the device, and scratch comes from
// torch's allocator, so that a CUDA graph may capture the op.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>

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

TokenView tokens(const Tensor& t, const char* name) {
  LOLA_CHECK(t.size(2) <= 1 || t.stride(2) == 1, name,
             ": the last dimension must be contiguous, its stride is ", t.stride(2));
  return {static_cast<char*>(t.data_ptr()), t.stride(0), t.stride(1)};
}

Indices indices(const Tensor& t, const char* name, int64_t count) {
  check_shape(t, name, "[rows]", {count}, kDevice);
  const bool wide = t.scalar_type() == ScalarType::Long;
  LOLA_CHECK(wide || t.scalar_type() == ScalarType::Int, name, ": dtype ",
             torch::headeronly::toString(t.scalar_type()), ", expected int32 or int64");
  return {static_cast<const char*>(t.data_ptr()), t.stride(0), wide};
}

// Whether an address and strides are multiples of 16 bytes.
bool aligned(const void* data, std::initializer_list<int64_t> strides) {
  bool ok = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) ok = ok && stride % 16 == 0;
  return ok;
}

// Blocks that one row and set is divided among: as many as fill the device.
int num_splits(const Params& p) {
  const int64_t blocks = p.num_rows * p.num_sparse_heads(),
                wanted = kBlocksPerProcessor * num_processors();
  if (blocks >= wanted) return 1;
  const int64_t work = p.layout.sink_size + p.layout.window_size + p.layout.update_interval +
                       p.sparse_cache_size() + 2 * p.feature_dim();
  const int64_t most = std::clamp<int64_t>(work / kSplitRows, 1, kMaxSplits);
  return static_cast<int>(std::min((wanted + blocks - 1) / blocks, most));
}

template <typename T>
void run(const Params& p, bool vectors, cudaStream_t stream) {
  launch_features(p, stream);
  launch_decode<T>(p, vectors, stream);
  if (p.splits > 1) launch_merge(p, stream);
  if (p.layout.keeps_bounds()) {
    launch_update_per_token<T>(p, stream);
  } else {
    launch_update<T>(p, stream);
  }
}

// The part of a call for group `i` of its layer: its heads of tokens and weights.
Params part_of(Params p, const PageLayout& layout, int64_t i) {
  const auto skip = [&](TokenView& view, DType type, int64_t heads) {
    view.data += i * heads * view.head_stride * size_of(type);
  };
  skip(p.q, p.q_type, layout.num_heads);
  skip(p.k, layout.kv_dtype, layout.num_kv_heads);
  skip(p.v, layout.kv_dtype, layout.num_kv_heads);
  skip(p.out, p.out_type, layout.num_heads);
  const int64_t map = layout.head_dim * layout.feature_dim;
  p.layout = layout;
  p.feature_map_q += i * layout.num_heads * map;
  p.feature_map_k += i * layout.num_state_heads * map;
  p.log_gate += i * layout.num_heads;
  if (layout.has_score_weights) {
    p.importance_weights += i * layout.num_kv_heads * layout.importance_size();
  }
  return p;
}

// The answers and updates of one group. `q` says where scratch is allocated.
void decode_group(Params p, const Tensor& q) {
  const PageLayout& x = p.layout;
  // Blocks, keys and scratch per block are counted in 32 bits; page offsets are not.
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t pairs = x.sink_size + x.ring_size() + x.sparse_cache_size;
  LOLA_CHECK(pairs < kMost && x.num_heads * p.num_rows < kMost && 2 * x.feature_dim < kMost,
             "q: ", p.num_rows, " rows of ", x.num_heads, " heads over ", pairs,
             " pairs are too many for one launch");

  // Parts of a page start at multiples of 64 bytes.
  const int64_t pair_bytes = size_of(x.kv_dtype);
  const bool pages_aligned = aligned(p.pages, {p.page_stride});
  const auto view_aligned = [&](const TokenView& view) {
    return aligned(view.data, {view.row_stride * pair_bytes, view.head_stride * pair_bytes});
  };
  const bool vectors =
      pages_aligned && x.head_dim * pair_bytes % 16 == 0 && view_aligned(p.k) && view_aligned(p.v);
  p.direction_words = pages_aligned && x.head_dim % 16 == 0;

  p.splits = num_splits(p);
  const Tensor phi = torch::stable::new_empty(q, {p.num_rows, p.num_heads(), 2 * p.feature_dim()},
                                              ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(
      q, {p.splits > 1 ? p.num_rows * p.num_heads() : 0, p.splits, p.partial_size()},
      ScalarType::Float);
  p.phi = static_cast<float*>(phi.data_ptr());
  p.partial = static_cast<float*>(partial.data_ptr());
  const int64_t list = p.list_size() <= kSharedList ? 0 : p.list_size();
  const Tensor lists =
      torch::stable::new_empty(q, {p.num_rows, p.num_sparse_heads(), list}, ScalarType::Int);
  p.lists = list == 0 ? nullptr : static_cast<int*>(lists.data_ptr());
  const cudaStream_t stream = current_stream(q.get_device_index());
  if (x.kv_dtype == DType::bf16) {
    run<Bf16>(p, vectors, stream);
  } else if (x.kv_dtype == DType::f16) {
    run<F16>(p, vectors, stream);
  } else {
    run<float>(p, vectors, stream);
  }
}

void decode(const Tensor& pages, const Tensor& layout, const Tensor& feature_map_q,
            const Tensor& feature_map_k, const Tensor& log_gate, const Tensor& importance,
            const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state_indices,
            const Tensor& seq_lens, const Tensor& out) {
  const Layouts layouts = check_call(
      {pages, layout, feature_map_q, feature_map_k, log_gate, importance, q, k, v, out}, kDevice);
  const PageLayout& x = *layouts.first;
  LOLA_CHECK(x.head_dim <= kMaxHeadDim, "q: head size ", x.head_dim, ", at most ", kMaxHeadDim);
  LOLA_CHECK(x.kv_dtype != DType::f64 && x.state_dtype == DType::f32,
             "layout: keys and values must be float32, bfloat16 or float16, and H and s float32");
  Params p;
  p.q = tokens(q, "q");
  p.k = tokens(k, "k");
  p.v = tokens(v, "v");
  p.out = tokens(out, "out");
  p.q_type = check_float(q, "q", {DType::f32, DType::bf16, DType::f16});
  p.out_type = check_float(out, "out", {DType::f32, DType::bf16, DType::f16});
  check_float(k, "k", {x.kv_dtype});
  check_float(v, "v", {x.kv_dtype});
  p.feature_map_q = static_cast<const float*>(feature_map_q.data_ptr());
  p.feature_map_k = static_cast<const float*>(feature_map_k.data_ptr());
  p.layer_state_heads = layouts.count * x.num_state_heads;
  p.log_gate = static_cast<const float*>(log_gate.data_ptr());
  p.importance_weights = static_cast<const float*>(importance.data_ptr());
  p.pages = static_cast<char*>(pages.data_ptr());
  p.page_stride = pages.stride(0);
  p.num_pages = pages.size(0);
  p.num_rows = q.size(0);
  p.state_indices = indices(state_indices, "state_indices", p.num_rows);
  p.seq_lens = indices(seq_lens, "seq_lens", p.num_rows);
  if (p.num_rows == 0) return;
#ifndef LOLA_EMULATE
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
#endif
  for (int64_t i = 0; i < layouts.count; ++i) {
    decode_group(part_of(p, layouts.first[i], i), q);
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
