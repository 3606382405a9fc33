// The update (LoLA, arXiv 2505.23666, section 3.3): evict, rescore all cached and evicted pairs,
// keep the lam largest, fold the rest into H and s. A block is one row and sparse set; it leaves at
// once unless its row is due, so that the launch is the same at every step.
#include "cuda/launch.cuh"
#include "cuda/recall.cuh"

namespace lola {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBatch = kWarps * kTile;  // candidates of a block at once

struct Shared {
  float *k, *v, *phi;  // [kBatch] rows of whole vectors
  int* counts;         // numbers of folded, of these in the cache, of arrived
  float* scores;       // [lam + interval], as are the next two
  int *positions, *keep;
  int *folded, *arrived;  // [interval], candidates to fold, and evicted ones to keep, in order
  float* importance;      // [interval], of the evicted ones, where pairs are weighted

  LOLA_DEVICE Shared(const Params& p, char* memory) {
    k = reinterpret_cast<float*>(memory);
    v = k + kBatch * whole_vectors(p.head_dim());
    phi = v + kBatch * whole_vectors(p.head_dim());
    counts = reinterpret_cast<int*>(phi + kBatch * whole_vectors(2 * p.feature_dim()));
    int* const lists = p.lists == nullptr ? counts + 4 : p.lists + blockIdx.x * p.list_size();
    const int64_t candidates = p.sparse_cache_size() + p.layout.update_interval;
    scores = reinterpret_cast<float*>(lists);
    positions = lists + candidates;
    keep = positions + candidates;
    folded = keep + candidates;
    arrived = folded + p.layout.update_interval;
    importance = reinterpret_cast<float*>(arrived + p.layout.update_interval);
  }
};

std::size_t shared_bytes(const Params& p) {
  const std::size_t rows =
      kBatch * (2 * whole_vectors(p.head_dim()) + whole_vectors(2 * p.feature_dim()));
  return (rows + 4 + (p.lists == nullptr ? p.list_size() : 0)) * sizeof(float);
}

// The importance of each evicted pair, by a warp at a time.
template <typename T, bool INT8>
LOLA_DEVICE void weigh(const Params& p, const Candidates<T, INT8>& c, const Shared& x) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int i = c.cached + warp; i < c.count; i += kWarps) {
    const float w = pair_importance(p, c.kv, c.k(i, lane), c.v(i, lane), lane);
    if (lane == 0) x.importance[i - c.cached] = w;
  }
}

// Scores of all candidates: SRE, or its norm-relative mean over the state heads of a set, times the
// importance where pairs are weighted. `fresh`: nothing was folded yet, and H and s hold leftovers.
template <typename T, bool INT8>
LOLA_DEVICE void score(const Params& p, const Candidates<T, INT8>& c, bool fresh, const Shared& x) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, states = p.states_per_set();
  const int ld = whole_vectors(p.head_dim()), last = c.count - 1;
  const int64_t first_recent = p.layout.window_start(c.n) - p.layout.recent_size;
  float* const k = x.k + warp * kTile * ld;
  float* const phi = x.phi + warp * kTile * whole_vectors(2 * p.feature_dim());
  for (int first = warp * kTile; first < c.count; first += kBatch) {
    PairRow<T, INT8> v[kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      const int i = first + r < c.count ? first + r : last;  // the rest of a tile repeats the last
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

// Marks the candidates to keep: those of rank below lam, ties to the older position.
LOLA_DEVICE void select(int count, int lam, const Shared& x) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    bool keep = count <= lam;
    if (!keep && lam > 0) {
      const float score = x.scores[i];
      const int position = x.positions[i];
      int rank = 0;
      for (int j = 0; j < count; ++j) {
        const float other = x.scores[j];
        rank += other > score || (other == score && x.positions[j] < position);
      }
      keep = rank < lam;
    }
    x.keep[i] = keep;
  }
}

// Lists what is folded and what enters the cache, by the first warp.
LOLA_DEVICE void list(int count, int cached, const Shared& x) {
  const int lane = static_cast<int>(threadIdx.x);
  const unsigned before = (1u << lane) - 1;
  int folded = 0, from_cache = 0, arrived = 0;
  for (int first = 0; first < count; first += kWarp) {
    const int i = first + lane;
    const bool folds = i < count && !x.keep[i];
    const bool arrives = i < count && x.keep[i] && i >= cached;
    const unsigned folds_of = __ballot_sync(kAllLanes, folds);
    const unsigned leaves_of = __ballot_sync(kAllLanes, folds && i < cached);
    const unsigned arrives_of = __ballot_sync(kAllLanes, arrives);
    if (folds) x.folded[folded + __popc(folds_of & before)] = i;
    if (arrives) x.arrived[arrived + __popc(arrives_of & before)] = i;
    folded += __popc(folds_of);
    from_cache += __popc(leaves_of);
    arrived += __popc(arrives_of);
  }
  if (lane == 0) {
    x.counts[0] = folded;
    x.counts[1] = from_cache;
    x.counts[2] = arrived;
  }
}

// H += sum phi(k) v^T and s += sum phi(k) over the folded candidates of update number `update`, for
// one state head. `fresh`: H and s hold leftovers and are written instead.
template <typename T, bool INT8>
LOLA_DEVICE void fold(const Params& p, const Candidates<T, INT8>& c, int state, int64_t update,
                      int count, bool fresh, const Shared& x) {
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int d = p.head_dim(), ld = whole_vectors(d), F2 = 2 * p.feature_dim(),
            phi_ld = whole_vectors(F2);
  const int blocks = phi_ld / 4, columns = ld / 4;  // a thread owns 4 x 4 elements of H
  float* const s = p.s(c.page, state);
  for (int first = 0; first < count; first += kBatch) {
    const int size = count - first < kBatch ? count - first : kBatch;
    for (int r = 0; r < kTile; ++r) {
      const int i = warp * kTile + r;
      const int candidate = x.folded[i < size ? first + i : first];
      load_row(x.k + i * ld, c.k(candidate, lane), d, i < size, lane);
      load_row(x.v + i * ld, c.v(candidate, lane), d, i < size, lane);
    }
    __syncwarp();
    if (warp * kTile < size) {
      map_keys(p, p.key_map(state, c.n), x.k + warp * kTile * ld, x.phi + warp * kTile * phi_ld,
               lane);
    }
    __syncthreads();
    const bool write = fresh && first == 0;
    const int part = first / kBatch * F2;
    for (int item = thread; item < blocks * columns; item += kThreads) {
      const int f = item / columns * 4, column = item % columns;
      float sum[4][4] = {};
      for (int i = 0; i < size; ++i) {
        const float4 phi = *reinterpret_cast<const float4*>(x.phi + i * phi_ld + f);
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const float v = x.v[i * ld + column + b * columns];
#pragma unroll
          for (int a = 0; a < 4; ++a) sum[a][b] += element(phi, a) * v;
        }
      }
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        float* const row = p.H(c.page, state, f + a < F2 ? f + a : 0);
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const int at = column + b * columns;
          if (f + a < F2 && at < d) {
            row[at] = write ? sum[a][b] : add_dithered(row[at], sum[a][b], update, part + f + a);
          }
        }
      }
    }
    for (int f = thread; f < F2; f += kThreads) {
      float sum = 0;
      for (int i = 0; i < size; ++i) sum += x.phi[i * phi_ld + f];
      s[f] = write ? sum : add_dithered(s[f], sum, update, part + f);
    }
    __syncthreads();  // before the next batch takes the memory
  }
}

// The i-th pair that arrives takes the i-th entry that is empty or whose pair was folded.
template <typename T, bool INT8>
LOLA_DEVICE void replace(const Params& p, const Candidates<T, INT8>& c, const Shared& x) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int i = warp; i < x.counts[2]; i += kWarps) {
    const int source = x.arrived[i];
    const int entry = i < x.counts[1] ? x.folded[i] : c.cached + (i - x.counts[1]);
    c.put(source, entry, lane, kWarp);
    if (lane == 0 && p.weighted()) {
      p.score_weights(c.page, c.set)[entry] = x.importance[source - c.cached];
    }
  }
}

// Grid: rows x sets.
template <typename T, bool INT8>
__global__ void __launch_bounds__(kThreads, INT8 ? 1 : 2) update_kernel(const Params p) {
  LOLA_SHARED(memory);
  const int64_t row = blockIdx.x / p.num_sparse_heads();
  if (!p.live(row) || !p.layout.update_due(p.seq_lens[row])) return;
  const int64_t n = p.seq_lens[row];
  const Candidates<T, INT8> c(p, p.state_indices[row],
                              static_cast<int>(blockIdx.x % p.num_sparse_heads()), n);
  const Shared x(p, memory);
  for (int i = threadIdx.x; i < c.count; i += kThreads) x.positions[i] = c.position(i);
  const bool fresh = !p.any_folded(n - p.layout.update_interval);
  if (p.weighted()) {
    weigh(p, c, x);
    __syncthreads();
  }
  if (c.count > p.sparse_cache_size() && p.sparse_cache_size() > 0)
    score(p, c, fresh, x);  // else nothing is to be chosen
  __syncthreads();
  select(c.count, p.sparse_cache_size(), x);
  __syncthreads();
  if (threadIdx.x < kWarp) list(c.count, c.cached, x);
  __syncthreads();
  for (int j = 0; j < p.states_per_set(); ++j) {
    fold(p, c, c.set * p.states_per_set() + j, n / p.layout.update_interval, x.counts[0], fresh, x);
  }
  replace(p, c, x);  // only now: what was folded is overwritten
}

}  // namespace

template <typename T>
void launch_update(const Params& p, cudaStream_t stream) {
  launch("decode: update", p.layout.int8_pairs() ? update_kernel<T, true> : update_kernel<T, false>,
         dim3(static_cast<unsigned>(p.num_rows * p.num_sparse_heads())), kThreads, shared_bytes(p),
         stream, p);
}

template void launch_update<Bf16>(const Params&, cudaStream_t);
template void launch_update<F16>(const Params&, cudaStream_t);
template void launch_update<float>(const Params&, cudaStream_t);

}  // namespace cuda
}  // namespace lola
