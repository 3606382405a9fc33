// The scores of an update, before the launch that chooses: the candidates of a row and set are
// spread over `score_parts` blocks. All leave at once unless their row is due, so that the launch
// is the same at every step. Where rows are split, this launch joins their answers too: it waits
// for the same one, and a launch costs more than the work.
#include "cuda/launch.cuh"
#include "cuda/merge.cuh"
#include "cuda/recall.cuh"
#include "cuda/update_scratch.cuh"

namespace lola {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
static_assert(kScoreBatch == kWarps * kTile);

std::size_t shared_bytes(const Params& p) {
  return kScoreBatch * (whole_vectors(p.head_dim()) + whole_vectors(2 * p.feature_dim())) *
         sizeof(float);
}

__host__ __device__ int merging_blocks(const Params& p) {
  return p.splits > 1 ? static_cast<int>(p.num_rows) * p.layer_heads() : 0;
}

// Scores of the candidates of a part: SRE, or its norm-relative mean over the state heads of a set,
// times the importance where pairs are weighted; and the importance of those that are evicted, also
// where all are kept and none is scored.
template <typename T, bool INT8>
LOLA_DEVICE void score(const Group& p, const Candidates<T, INT8>& c, int row, int part,
                       char* memory) {
  const bool scored = c.count > p.sparse_cache_size();
  if (p.sparse_cache_size() == 0 || (!scored && !p.weighted())) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, states = p.states_per_set();
  const int ld = whole_vectors(p.head_dim()), last = c.count - 1;
  const bool fresh = !p.any_folded(c.n - p.layout.update_interval);  // H and s hold leftovers
  const int first_recent = static_cast<int>(p.layout.window_start(c.n) - p.layout.recent_size);
  float* const k = reinterpret_cast<float*>(memory) + warp * kTile * ld;
  float* const phi = reinterpret_cast<float*>(memory) + kScoreBatch * ld +
                     warp * kTile * whole_vectors(2 * p.feature_dim());
  for (int first = (scored ? 0 : c.cached) + (part * kWarps + warp) * kTile; first < c.count;
       first += p.score_parts * kScoreBatch) {
    PairRow<T, INT8> v[kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      const int i = first + r < c.count ? first + r : last;  // the rest of a tile repeats the last
      const PairRow<T, INT8> key = c.k(i, lane);
      v[r] = c.v(i, lane);
      if (scored && !fresh) load_row(k + r * ld, key, p.head_dim(), true, lane);
      if (p.weighted() && i >= c.cached) {
        const float w = pair_importance(p, c.kv, key, v[r], lane);
        if (lane == 0) UpdateScratch(p, row, c.set).importance[i - c.cached] = w;
      }
    }
    if (!scored) continue;
    __syncwarp();
    float lengths[kTile], total[kTile] = {};
    if (fresh || states > 1) norms(v, p.head_dim(), lane, lengths);
    for (int j = 0; j < states; ++j) {
      float errors[kTile];
      if (fresh) {
        for (int r = 0; r < kTile; ++r) errors[r] = lengths[r];
      } else {
        const int state = c.set * states + j;
        map_keys(p, p.key_map(state, c.n), k, phi, lane);
        recall_errors(p, c.page, state, phi, v, lane, errors);
      }
      // Divided before they are summed: against an empty state each ratio is exactly 1, a tie.
      for (int r = 0; r < kTile; ++r) {
        total[r] += states == 1 ? errors[r] : errors[r] / fmaxf(lengths[r], kRecallEps<float>);
      }
    }
    const UpdateScratch x(p, anew(row), c.set);
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      // NaN counts as the largest: ranks need a total order.
      const int i = first + r;
      if (lane == 0 && i < c.count) {
        float mean = total[r] / static_cast<float>(states);
        if (p.weighted()) {
          mean *= i < c.cached ? p.score_weights(c.page, c.set)[i] : x.importance[i - c.cached];
        }
        const bool recent = c.position(i) >= first_recent;
        x.scores[i] = mean == mean && !recent ? mean : -kMinusInf;
      }
    }
    __syncwarp();  // before the next tile takes k and phi
  }
}

// Grid: rows x query heads of the layer where rows are split, then rows x sets of the layer x
// parts.
template <typename T, bool INT8>
__global__ void __launch_bounds__(kThreads, INT8 ? 1 : 2) score_kernel(const Params params) {
  LOLA_SHARED(memory);
  int block = static_cast<int>(blockIdx.x);
  const int merging = merging_blocks(params);
  if (block < merging) {
    merge(params, block / params.layer_heads(), block % params.layer_heads());
    return;
  }
  block -= merging;
  const int part = block % params.score_parts, of_layer = block / params.score_parts;
  const int row = of_layer / params.layer_sets();
  const int layer_set = of_layer % params.layer_sets();
  const Group p(params, layer_set / params.num_sparse_heads());
  if (updates_per_token(p.layout)) return;
  if (!p.live(row) || !p.layout.update_due(p.seq_lens[row])) return;
  const int set = layer_set % p.num_sparse_heads();
  const Candidates<T, INT8> c(p, p.state_indices[row], set, p.seq_lens[row]);
  score(p, c, row, part, memory);
}

}  // namespace

template <typename T>
void launch_score(const Params& p, cudaStream_t stream) {
  const int64_t blocks = merging_blocks(p) + p.num_rows * p.layer_sets() * p.score_parts;
  launch("decode: scores", p.layout.int8_pairs() ? score_kernel<T, true> : score_kernel<T, false>,
         dim3(static_cast<unsigned>(blocks)), kThreads, shared_bytes(p), stream, p);
}

template void launch_score<Bf16>(const Params&, cudaStream_t);
template void launch_score<F16>(const Params&, cudaStream_t);
template void launch_score<float>(const Params&, cudaStream_t);

}  // namespace cuda
}  // namespace lola
