// The scores of an update: the candidates of a row and set are spread over `score_parts` blocks, of
// which the last to finish goes on with the choice (update.cu).
#pragma once

#include "cuda/launch.cuh"
#include "cuda/recall.cuh"
#include "cuda/update_scratch.cuh"

namespace lola {
namespace cuda {

// Bytes of shared memory of a block of `kScoreBatch / kTile` warps.
inline std::size_t score_bytes(const Params& p) {
  return kScoreBatch * (whole_vectors(p.head_dim()) + whole_vectors(2 * p.feature_dim())) *
         sizeof(float);
}

// The importance of those that are evicted, of the tiles that start at `begin`, `begin + step`...
template <typename T, bool INT8>
LOLA_DEVICE void weigh(const Group& p, const Candidates<T, INT8>& c, int row, int begin, int step,
                       int lane) {
  const UpdateScratch x(p, row, c.set);
#pragma unroll 1
  for (int first = begin; first < c.count; first += step) {
    const int stop = first + kTile < c.count ? first + kTile : c.count;
#pragma unroll 1
    for (int i = first < c.cached ? c.cached : first; i < stop; ++i) {
      const float w = pair_importance(p, c.kv, c.k(i, lane), c.v(i, lane), lane);
      if (lane == 0) x.importance[i - c.cached] = w;
    }
  }
}

// The scores of the same tiles. The rest of the last one repeats the last candidate.
template <typename T, bool INT8>
LOLA_DEVICE void score_tiles(const Group& p, const Candidates<T, INT8>& c, int row, int begin,
                             int step, int warp, int lane, char* memory) {
  const int states = p.states_per_set(), ld = whole_vectors(p.head_dim()), last = c.count - 1;
  const bool fresh = !p.any_folded(c.n - p.layout.update_interval);  // H and s hold leftovers
  const int first_recent = static_cast<int>(p.layout.window_start(c.n) - p.layout.recent_size);
  float* const k = reinterpret_cast<float*>(memory) + warp * kTile * ld;
  float* const phi = reinterpret_cast<float*>(memory) + kScoreBatch * ld +
                     warp * kTile * whole_vectors(2 * p.feature_dim());
#pragma unroll 1
  for (int first = begin; first < c.count; first += step) {
    PairRow<T, INT8> v[kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      const int i = first + r < c.count ? first + r : last;
      v[r] = c.v(i, lane);
      if (!fresh) load_row(k + r * ld, c.k(i, lane), p.head_dim(), true, lane);
    }
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

// Scores of the candidates of a part: SRE, or its norm-relative mean over the state heads of a set,
// times the importance where pairs are weighted; and the importance of those that are evicted, also
// where all are kept and none is scored. A warp takes `kTile` of them, of a tile all or none.
template <typename T, bool INT8>
LOLA_DEVICE void score(const Group& p, const Candidates<T, INT8>& c, int row, int part,
                       char* memory) {
  if (p.sparse_cache_size() == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int begin = part * kScoreBatch + warp * kTile, step = p.score_parts * kScoreBatch;
  if (p.weighted()) weigh(p, c, row, begin, step, lane);
  if (c.count > p.sparse_cache_size()) score_tiles(p, c, row, begin, step, warp, lane, memory);
}

}  // namespace cuda
}  // namespace lola
