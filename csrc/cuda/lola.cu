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
#include "cuda/update_scratch.cuh"
#include "ops.h"

#ifdef LOLA_EMULATE
namespace lola {
namespace emulate {
// Scratch of captured launches, which torch keeps in a graph's own pool.
static std::vector<torch::stable::Tensor> held;
}  // namespace emulate
}  // namespace lola
#endif

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
constexpr int64_t kMaxScoreBlocks = 4096;  // most leave at once, which is not free

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

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Divides rows and sets among blocks: as many as fill the device, each with as many keys and rows
// of H as the others.
void plan_splits(Params& p, const Layouts& layouts) {
  int64_t total = 0, longest = 0;
  for (int64_t i = 0; i < layouts.count; ++i) {
    const int64_t work = layouts.first[i].step_work();
    total += work * p.num_rows * p.num_sparse_heads();
    longest = std::max(longest, work);
  }
  const int64_t wanted = kBlocksPerProcessor * num_processors();
  const int64_t share = p.num_rows * p.layer_sets() < wanted ? ceil_div(total, wanted) : longest;
  const int64_t each = std::max({share, ceil_div(longest, kMaxSplits), kSplitRows});
  p.split_work = static_cast<int>(each);
  p.splits = static_cast<int>(ceil_div(longest, each));
}

// Divides the scores of a row and set among blocks: as many as fill the device when one row in an
// interval is due.
void plan_scores(Params& p, int64_t candidates) {
  const int64_t blocks = p.num_rows * p.layer_sets();
  const int64_t due = std::max<int64_t>(blocks / p.layout.update_interval, p.layer_sets());
  const int64_t most = std::min(ceil_div(candidates, kScoreBatch), kMaxScoreBlocks / blocks);
  const int64_t wanted = ceil_div(kBlocksPerProcessor * num_processors(), due);
  p.score_parts = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1)));
}

template <typename T>
void run(const Params& p, bool vectors, cudaStream_t stream) {
  launch_features(p, stream);
  launch_decode<T>(p, vectors, stream);
  launch_update<T>(p, stream);
}

// The answers and updates of a layer. `q` says where scratch is allocated.
void decode_layer(Params p, const Layouts& layouts, const Tensor& q) {
  const PageLayout& x = p.layout;
  int64_t pairs = 0, candidates = 0;
  p.list_stride = 0;
  for (int64_t i = 0; i < layouts.count; ++i) {
    const PageLayout& group = layouts.first[i];
    pairs = std::max(pairs, group.exact_size() + group.sparse_cache_size);
    candidates = std::max(candidates, group.sparse_cache_size + group.update_interval);
    p.list_stride = std::max(p.list_stride, UpdateScratch::size(group));
  }
  // Blocks, keys and scratch per block are counted in 32 bits; page offsets are not.
  constexpr int64_t kMost = int64_t{1} << 30;
  LOLA_CHECK(pairs < kMost && p.layer_heads() * p.num_rows < kMost && 2 * x.feature_dim < kMost,
             "q: ", p.num_rows, " rows of ", p.layer_heads(), " heads over ", pairs,
             " pairs are too many for one launch");

  // Parts of a page start at multiples of 64 bytes.
  const int64_t pair_bytes = size_of(x.kv_dtype);
  const auto view_aligned = [&](const TokenView& view) {
    return aligned(view.data, {view.row_stride * pair_bytes, view.head_stride * pair_bytes});
  };
  const bool vectors = aligned(p.pages, {p.page_stride}) && x.head_dim * pair_bytes % 16 == 0 &&
                       view_aligned(p.k) && view_aligned(p.v);

  plan_splits(p, layouts);
  plan_scores(p, candidates);
  p.merging = p.splits > 1 ? static_cast<int>(p.num_rows) * p.layer_heads() : 0;
  const int64_t sets = p.layer_sets();
  const Tensor phi = torch::stable::new_empty(q, {p.num_rows, p.layer_heads(), 2 * p.feature_dim()},
                                              ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(
      q, {p.splits > 1 ? p.num_rows * p.layer_heads() : 0, p.splits, p.partial_size()},
      ScalarType::Float);
  const Tensor lists =
      torch::stable::new_empty(q, {p.num_rows * sets * (p.list_stride + 1)}, ScalarType::Int);
  p.phi = static_cast<float*>(phi.data_ptr());
  p.partial = static_cast<float*>(partial.data_ptr());
  p.lists = static_cast<int*>(lists.data_ptr());
  p.arrivals = p.lists + p.num_rows * sets * p.list_stride;
#ifdef LOLA_EMULATE
  if (emulate::capturing) emulate::held.insert(emulate::held.end(), {phi, partial, lists});
#endif
  const cudaStream_t stream = current_stream(q.get_device_index());
  if (x.kv_dtype == DType::bf16) {
    run<Bf16>(p, vectors, stream);
  } else if (x.kv_dtype == DType::f16) {
    run<F16>(p, vectors, stream);
  } else {
    run<float>(p, vectors, stream);
  }
}

// The layout table where kernels read it.
const PageLayout* device_table(const Tensor& t, int64_t count) {
  check_shape(t, "device_layout", "[groups, fields of PageLayout]", {count, kTableFields}, kDevice);
  LOLA_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous(),
             "device_layout: must be int64 and contiguous");
  return static_cast<const PageLayout*>(t.data_ptr());
}

void decode(const Tensor& pages, const Tensor& layout, const Tensor& device_layout,
            const Tensor& feature_map_q, const Tensor& feature_map_k, const Tensor& gates,
            const Tensor& importance, const Tensor& q, const Tensor& k, const Tensor& v,
            const Tensor& state_indices, const Tensor& seq_lens, const Tensor& out) {
  const Layouts layouts = check_call(
      {pages, layout, feature_map_q, feature_map_k, gates, importance, q, k, v, out}, kDevice);
  const PageLayout& x = *layouts.first;
  LOLA_CHECK(x.head_dim <= kMaxHeadDim, "q: head size ", x.head_dim, ", at most ", kMaxHeadDim);
  LOLA_CHECK(x.kv_dtype != DType::f64 && x.state_dtype == DType::f32,
             "layout: keys and values must be float32, bfloat16 or float16, and H and s float32");
  Params p;
  p.layout = x;
  p.layout.feature_dim = feature_map_q.size(2);  // the first group may have no hidden state
  p.table = device_table(device_layout, layouts.count);
  p.num_groups = static_cast<int>(layouts.count);
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
  p.gates = static_cast<const float*>(gates.data_ptr());
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
  decode_layer(p, layouts, q);
}

}  // namespace
}  // namespace cuda
}  // namespace lola

#ifdef LOLA_EMULATE
namespace lola {
namespace emulate {
namespace {

int64_t launches_so_far() { return launches; }

// Launches are captured from now on, or no more; what was captured before is forgotten.
void capture(bool on) {
  capturing = on;
  if (!on) return;
  graph.clear();
  held.clear();
}

void replay() {
  for (const auto& run : graph) run();
}

}  // namespace
}  // namespace emulate
}  // namespace lola

// lola::decode under a name of its own.
STABLE_TORCH_LIBRARY(lola_emulated, m) {
  m.def(LOLA_DECODE_SCHEMA);
  m.def("launches() -> int");
  m.def("capture(bool on) -> ()");
  m.def("replay() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(lola_emulated, CPU, m) {
  m.impl("decode", TORCH_BOX(&lola::cuda::decode));
}
STABLE_TORCH_LIBRARY_IMPL(lola_emulated, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&lola::emulate::launches_so_far));
  m.impl("capture", TORCH_BOX(&lola::emulate::capture));
  m.impl("replay", TORCH_BOX(&lola::emulate::replay));
}
#else
STABLE_TORCH_LIBRARY_IMPL(lola, CUDA, m) { m.impl("decode", TORCH_BOX(&lola::cuda::decode)); }
#endif
