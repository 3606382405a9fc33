// Feature maps of the queries, before decode: a block maps a few rows with one head's matrix, so
// that the matrices are not read once per row. It also clears what the update counts in.
#include "cuda/launch.cuh"

namespace lola {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = kThreads / kWarp;  // a warp per row takes the softmaxes

std::size_t shared_bytes(const Params& p) {
  const std::size_t parts = kThreads / columns(p.feature_dim(), kThreads);
  return kRows * (p.head_dim() + parts * p.feature_dim()) * sizeof(float);
}

// Grid: heads of the layer x tiles of rows.
__global__ void __launch_bounds__(kThreads) features_kernel(const Params params) {
  LOLA_SHARED(memory);
  const int thread = threadIdx.x, of_layer = static_cast<int>(blockIdx.x % params.layer_heads());
  const Group p(params, of_layer / params.num_heads());
  const int head = of_layer % p.num_heads();
  const int64_t first = static_cast<int64_t>(blockIdx.x / p.layer_heads()) * kRows;
  if (head % p.heads_per_set() == 0 && thread < kRows && first + thread < p.num_rows) {
    p.arrivals[(first + thread) * p.layer_sets() + p.first_set + head / p.heads_per_set()] = 0;
  }
  bool active[kRows], any = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    active[r] = row < p.num_rows && p.live(row) && p.any_folded(p.seq_lens[row] - 1);
    any = any || active[r];
  }
  if (!any) return;

  float* const q = reinterpret_cast<float*>(memory);  // [kRows, d]
  float* const y = q + kRows * p.head_dim();          // [parts, kRows, F]
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t offset = p.q.offset(first + r, head);
    for (int i = thread; i < p.head_dim(); i += kThreads) {
      q[r * p.head_dim() + i] = active[r] ? load_any(p.q.data, p.q_type, offset + i) : 0.0f;
    }
  }
  __syncthreads();

  const int width = columns(p.feature_dim(), kThreads), parts = kThreads / width,
            part = thread / width;
  const int span = (p.head_dim() + parts - 1) / parts, begin = part * span;
  const int end = begin + span < p.head_dim() ? begin + span : p.head_dim();
  const float* const W = p.query_map(head);
  for (int f = thread % width; f < p.feature_dim(); f += width) {
    float sum[kRows] = {};
#pragma unroll 8
    for (int i = begin; i < end; ++i) {
      const float w = W[static_cast<int64_t>(i) * p.feature_dim() + f];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] += q[r * p.head_dim() + i] * w;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) y[(part * kRows + r) * p.feature_dim() + f] = sum[r];
  }
  __syncthreads();

  const int warp = thread / kWarp, lane = thread % kWarp;
  const int64_t row = first + warp;
  if (row >= p.num_rows || !p.live(row) || !p.any_folded(p.seq_lens[row] - 1)) return;
  float* const mine = y + warp * p.feature_dim();
  for (int f = lane; f < p.feature_dim(); f += kWarp) {
    float sum = mine[f];
    for (int other = 1; other < parts; ++other) sum += mine[other * kRows * p.feature_dim() + f];
    mine[f] = sum;
  }
  __syncwarp();
  feature_map(mine, p.feature_dim(), p.phi_of(row, head), lane);
}

}  // namespace

void launch_features(const Params& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.num_rows + kRows - 1) / kRows * p.layer_heads());
  launch("decode: feature maps", features_kernel, dim3(blocks), kThreads, shared_bytes(p), stream,
         p);
}

}  // namespace cuda
}  // namespace lola
