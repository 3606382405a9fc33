// The update (LoLA, arXiv 2505.23666, section 3.3): evict, rescore all cached and evicted pairs
// (score.cuh), keep the lam largest, fold the rest into H and s. Blocks share the scores of a row
// and sparse set, and the last of them chooses and folds. They leave at once unless their row is
// due, so that the launch is the same at every step. Where rows are split, this launch joins their
// answers too: it waits for the same one, and a launch costs more than the work.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/merge.cuh"
#include "cuda/recall.cuh"
#include "cuda/score.cuh"
#include "cuda/select.cuh"
#include "cuda/update_scratch.cuh"

namespace lola {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBatch = kWarps * kTile;  // candidates of a block at once
static_assert(kBatch == kScoreBatch);

struct Shared {
  float *k, *v, *phi;  // [kBatch] rows of whole vectors
  int* counts;         // numbers of folded, of these in the cache, of arrived
  int* warp_counts;    // [kWarps, 3], the same of each warp's candidates
  SelectMemory select;

  LOLA_DEVICE Shared(const Group& p, char* memory)
      : k(reinterpret_cast<float*>(memory)),
        v(k + kBatch * whole_vectors(p.head_dim())),
        phi(v + kBatch * whole_vectors(p.head_dim())),
        counts(reinterpret_cast<int*>(phi + kBatch * whole_vectors(2 * p.feature_dim()))),
        warp_counts(counts + 4),
        select(warp_counts + 3 * kWarps) {}

  static std::size_t bytes(const Params& p) {
    const std::size_t rows =
        kBatch * (2 * whole_vectors(p.head_dim()) + whole_vectors(2 * p.feature_dim()));
    return (rows + 4 + 3 * kWarps + SelectMemory::kSize) * sizeof(float);
  }
};

// What an update keeps: all, none, or the candidates from a key on.
struct Choice {
  bool all, none;
  uint64_t threshold;
};

template <typename T, bool INT8>
LOLA_DEVICE Choice choose(const Group& p, const Candidates<T, INT8>& c, const Shared& x,
                          const UpdateScratch& scratch) {
  const int lam = p.sparse_cache_size();
  if (c.count <= lam || lam == 0) return {lam > 0, lam == 0, 0};
  const auto score = [&](int i) { return scratch.scores[i]; };
  const auto position = [&](int i) { return c.position(i); };
  return {false, false, select_threshold(c.count, lam, kThreads, score, position, x.select)};
}

// Lists what is folded and what enters the cache, in the order of candidates. Each warp has a part
// of them, which it goes through twice: to count, and to list.
template <typename T, bool INT8>
LOLA_DEVICE void list(const Candidates<T, INT8>& c, const Choice& choice, const Shared& x,
                      const UpdateScratch& scratch) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned before = (1u << lane) - 1;
  const int span = (c.count + kThreads - 1) / kThreads * kWarp, begin = warp * span;
  const int end = begin + span < c.count ? begin + span : c.count;
  int folded = 0, from_cache = 0, arrived = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int first = begin; first < end; first += kWarp) {
      const int i = first + lane;
      bool keep = choice.all;
      if (i < end && !choice.all && !choice.none) {
        keep = rank_key(scratch.scores[i], c.position(i)) >= choice.threshold;
      }
      const bool folds = i < end && !keep, arrives = i < end && keep && i >= c.cached;
      const unsigned folds_of = __ballot_sync(kAllLanes, folds);
      const unsigned leaves_of = __ballot_sync(kAllLanes, folds && i < c.cached);
      const unsigned arrives_of = __ballot_sync(kAllLanes, arrives);
      if (pass == 1 && folds) scratch.folded[folded + __popc(folds_of & before)] = i;
      if (pass == 1 && arrives) scratch.arrived[arrived + __popc(arrives_of & before)] = i;
      folded += __popc(folds_of);
      from_cache += __popc(leaves_of);
      arrived += __popc(arrives_of);
    }
    if (pass == 1) break;
    if (lane == 0) {
      x.warp_counts[3 * warp] = folded;
      x.warp_counts[3 * warp + 1] = from_cache;
      x.warp_counts[3 * warp + 2] = arrived;
    }
    __syncthreads();
    folded = from_cache = arrived = 0;
    for (int other = 0; other < warp; ++other) {
      folded += x.warp_counts[3 * other];
      from_cache += x.warp_counts[3 * other + 1];
      arrived += x.warp_counts[3 * other + 2];
    }
  }
  if (warp == kWarps - 1 && lane == 0) {
    x.counts[0] = folded;
    x.counts[1] = from_cache;
    x.counts[2] = arrived;
  }
}

// H += sum phi(k) v^T and s += sum phi(k) over the folded candidates of update number `update`, for
// one state head. `fresh`: H and s hold leftovers and are written instead.
template <typename T, bool INT8>
LOLA_DEVICE void fold(const Group& p, const Candidates<T, INT8>& c, int state, int64_t update,
                      int count, bool fresh, const Shared& x, const int* folded) {
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int d = p.head_dim(), ld = whole_vectors(d), F2 = 2 * p.feature_dim(),
            phi_ld = whole_vectors(F2);
  const int blocks = phi_ld / 4, columns = ld / 4;  // a thread owns 4 x 4 elements of H
  float* const s = p.s(c.page, state);
  for (int first = 0; first < count; first += kBatch) {
    const int size = count - first < kBatch ? count - first : kBatch;
    for (int r = 0; r < kTile; ++r) {
      const int i = warp * kTile + r;
      const int candidate = folded[i < size ? first + i : first];
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
LOLA_DEVICE void replace(const Group& p, const Candidates<T, INT8>& c, const int* counts,
                         const UpdateScratch& x) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int i = warp; i < counts[2]; i += kWarps) {
    const int source = x.arrived[i];
    const int entry = i < counts[1] ? x.folded[i] : c.cached + (i - counts[1]);
    c.put(source, entry, lane, kWarp);
    if (lane == 0 && p.weighted()) {
      p.score_weights(c.page, c.set)[entry] = x.importance[source - c.cached];
    }
  }
}

// Whether this block is the last of `parts` to come here, which then sees what the others wrote.
// `flag`: an int of shared memory that is free on both sides.
LOLA_DEVICE bool comes_last(int* arrived, int parts, int* flag) {
  __syncthreads();
  if (parts == 1) return true;
  if (threadIdx.x == 0) {
    __threadfence();
    *flag = atomicAdd(arrived, 1) == parts - 1;
    __threadfence();
  }
  __syncthreads();
  const bool last = *flag;
  __syncthreads();
  return last;
}

// Of which row and set, counted in the layer, a block scores which part.
struct Share {
  int row, layer_set, of_layer, part;

  LOLA_DEVICE explicit Share(const Params& p) {
    const int block = anew(static_cast<int>(blockIdx.x)) - p.merging;
    of_layer = block / p.score_parts;
    part = block % p.score_parts;
    row = of_layer / p.layer_sets();
    layer_set = of_layer % p.layer_sets();
  }
};

// Whether the row of this block is due, and its part scored.
template <typename T, bool INT8>
LOLA_DEVICE bool scored(const Params& params, char* memory) {
  const Share x(params);
  const Group p(params, x.layer_set / params.num_sparse_heads());
  if (!p.live(x.row) || !p.layout.update_due(p.seq_lens[x.row])) return false;
  const int set = x.layer_set % p.num_sparse_heads();
  const Candidates<T, INT8> c(p, p.state_indices[x.row], set, p.seq_lens[x.row]);
  score(p, c, x.row, x.part, memory);
  return true;
}

// What follows when all parts are scored.
template <typename T, bool INT8>
LOLA_DEVICE void choose_and_fold(const Params& params, char* memory) {
  const Share of(params);
  const Group p(params, of.layer_set / params.num_sparse_heads());
  const int set = of.layer_set % p.num_sparse_heads();
  const int64_t n = p.seq_lens[of.row];
  const Candidates<T, INT8> c(p, p.state_indices[of.row], set, n);
  const UpdateScratch scratch(p, of.row, set);
  const Shared x(p, memory);
  const bool fresh = !p.any_folded(n - p.layout.update_interval);
  list(c, choose(p, c, x, scratch), x, scratch);
  __syncthreads();
  const int states = p.any_folded(n) ? p.states_per_set() : 0;
  for (int j = 0; j < states; ++j) {
    fold(p, c, set * p.states_per_set() + j, n / p.layout.update_interval, x.counts[0], fresh, x,
         scratch.folded);
  }
  replace(p, c, x.counts, scratch);  // only now: what was folded is overwritten
}

// Grid: rows x query heads of the layer where rows are split, then rows x sets of the layer x
// parts.
template <typename T, bool INT8>
__global__ void __launch_bounds__(kThreads, INT8 ? 1 : 2) update_kernel(const Params params) {
  LOLA_SHARED(memory);
  if (merged(params) || !scored<T, INT8>(params, memory)) return;
  int* const arrived = params.arrivals + Share(params).of_layer;
  if (!comes_last(arrived, params.score_parts, reinterpret_cast<int*>(memory))) return;
  choose_and_fold<T, INT8>(params, memory);
}

}  // namespace

template <typename T>
void launch_update(const Params& p, cudaStream_t stream) {
  const int64_t blocks = p.merging + p.num_rows * p.layer_sets() * p.score_parts;
  launch("decode: update", p.layout.int8_pairs() ? update_kernel<T, true> : update_kernel<T, false>,
         dim3(static_cast<unsigned>(blocks)), kThreads, std::max(score_bytes(p), Shared::bytes(p)),
         stream, p);
}

template void launch_update<Bf16>(const Params&, cudaStream_t);
template void launch_update<F16>(const Params&, cudaStream_t);
template void launch_update<float>(const Params&, cudaStream_t);

}  // namespace cuda
}  // namespace lola
