// The update of interval 1: one pair is evicted and at most one folded. Each fold lowers bounds on
// the recall errors of cached pairs (Lemma 1, docs/bounds.md), and an error is computed anew
// only where it may be the least (Lemma 3). Where pairs are weighted, bounds and errors are
// multiplied by the importance when they are compared.
//
// A block is one row and sparse set. All of it works on one tile of pairs, so that a step with few
// pairs in doubt is short, and the matrices are read once per tile.
#include "cuda/launch.cuh"
#include "cuda/merge.cuh"
#include "cuda/recall.cuh"

namespace lola {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kIncoming = -1;       // in the place of an entry: the pair that is evicted
constexpr int kLikely = kTile - 1;  // cached pairs in the first tile, beside the incoming pair
constexpr float kMost = kDirectionMax;
static_assert(kTile <= kWarps, "a warp for each pair of a tile");

struct Shared {
  float *k, *v, *phi, *recalled;    // [kTile] rows of whole vectors
  float* parts;                     // sums of products of a tile, in parts of the matrix
  float *incoming_rows, *incoming;  // [states_per_set, kBounds] of the incoming pair; its score
  float* incoming_importance;       // where pairs are weighted
  float* scores;                    // [sparse_cache_size], bounds at first
  int8_t* directions;               // [states_per_set, head_dim] of the incoming pair
  int *tile, *listed, *folded;  // [kTile] entries of the first tile; length of the list; an entry
  int* list;                    // [sparse_cache_size] entries of pairs in doubt

  LOLA_DEVICE Shared(const Group& p, char* memory) {
    const int ld = whole_vectors(p.head_dim()), states = p.states_per_set();
    k = reinterpret_cast<float*>(memory);
    v = k + kTile * ld;
    recalled = v + kTile * ld;
    phi = recalled + kTile * ld;
    parts = phi + kTile * whole_vectors(2 * p.feature_dim());
    incoming_rows = parts + kTile * parts_of(p);
    incoming = incoming_rows + states * kBounds;
    incoming_importance = incoming + 1;
    tile = reinterpret_cast<int*>(incoming_importance + 1);
    listed = tile + kTile;
    folded = listed + 1;
    directions = reinterpret_cast<int8_t*>(folded + 1);
    int* const lists = 2 * p.sparse_cache_size() <= p.shared_list
                           ? folded + 1 + whole_vectors(states * p.head_dim()) / 4
                           : p.lists + blockIdx.x * p.list_stride;
    scores = reinterpret_cast<float*>(lists);
    list = lists + p.sparse_cache_size();
  }

  static __host__ __device__ int parts_of(const Params& p) {
    const int wide = p.feature_dim() > p.head_dim() ? p.feature_dim() : p.head_dim();
    return wide > kThreads ? wide : kThreads;
  }
};

std::size_t shared_bytes(const Params& p) {
  const std::size_t states = p.states_per_set();
  return (kTile * (3 * whole_vectors(p.head_dim()) + whole_vectors(2 * p.feature_dim()) +
                   Shared::parts_of(p)) +
          states * kBounds + 4 + kTile +
          whole_vectors(static_cast<int>(states) * p.head_dim()) / 4 + p.shared_list) *
         sizeof(float);
}

// Where the bounds of a pair and state head are: row i of `bounds` at rows[i * ld], and its
// direction.
struct PairBounds {
  float* rows;
  int64_t ld;
  int8_t* direction;
};

LOLA_DEVICE PairBounds bounds_of(const Group& p, int64_t page, int set, int j, int entry,
                                 const Shared& x) {
  if (entry == kIncoming)
    return {x.incoming_rows + j * kBounds, 1, x.directions + j * p.head_dim()};
  const int state = set * p.states_per_set() + j;
  return {p.bounds(page, state) + entry, p.sparse_cache_size(), p.directions(page, state, entry)};
}

// out[r][n] = sum_i a[r][i] b[i][n] over i < rows, n < width, for the rows of a tile in shared
// memory, `lda` and `ldo` apart. By the whole block, which may read `out` afterwards.
LOLA_DEVICE void product(const float* a, int lda, const float* b, int64_t ldb, int rows, int width,
                         float* parts, float* out, int ldo) {
  const int thread = threadIdx.x, side = columns(width, kThreads), num_parts = kThreads / side;
  const int part = thread / side, span = (rows + num_parts - 1) / num_parts;
  const int begin = part * span, end = begin + span < rows ? begin + span : rows;
  for (int n = thread % side; n < width; n += side) {
    float sum[kTile] = {};
#pragma unroll 8
    for (int i = begin; i < end; ++i) {
      const float y = b[i * ldb + n];
#pragma unroll
      for (int r = 0; r < kTile; ++r) sum[r] += a[r * lda + i] * y;
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r) parts[(part * kTile + r) * width + n] = sum[r];
  }
  __syncthreads();
  for (int i = thread; i < kTile * width; i += kThreads) {
    float sum = parts[i];
    for (int other = 1; other < num_parts; ++other) sum += parts[other * kTile * width + i];
    out[i / width * ldo + i % width] = sum;
  }
  __syncthreads();
}

// Features of the first `count` keys of x.k under the map W of their state head. By the whole
// block.
LOLA_DEVICE void map_tile(const Group& p, const float* W, int count, const Shared& x) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, ld = whole_vectors(2 * p.feature_dim());
  product(x.k, whole_vectors(p.head_dim()), W, p.feature_dim(), p.head_dim(), p.feature_dim(),
          x.parts, x.phi, ld);
  float* const phi = x.phi + warp * ld;
  if (warp < count) feature_map(phi, p.feature_dim(), phi, static_cast<int>(threadIdx.x) % kWarp);
  __syncthreads();
}

// Sets the bound on a pair's recall error (Lemma 1, docs/bounds.md), by one warp. Returns the
// error, or its ratio to ||v|| where `relative`. `recalled` is phi^T H; `empty`: nothing was folded
// yet, and H and s hold leftovers.
LOLA_DEVICE float set_bound(const Group& p, const float* s, bool empty, bool relative,
                            const float* phi, const float* recalled, const float* v,
                            const PairBounds& to, int lane) {
  float sum = 0, features = 0;
  for (int f = lane; f < 2 * p.feature_dim(); f += kWarp) {
    features += phi[f] * phi[f];
    if (!empty) sum += phi[f] * s[f];
  }
  sum = reduce<Sum>(sum) + kRecallEps<float>;
  const float inverse = 1.0f / sum;
  const auto rest = [&](int i) { return empty ? v[i] : v[i] - recalled[i] * inverse; };
  float value = 0, error = 0, largest = 0;
  for (int i = lane; i < p.head_dim(); i += kWarp) {
    value += v[i] * v[i];
    error += rest(i) * rest(i);
    largest = fmaxf(largest, fabsf(rest(i)));
  }
  value = sqrtf(reduce<Sum>(value));
  // Against an empty state they are equal, and ratios must tie exactly.
  error = empty ? value : sqrtf(reduce<Sum>(error));
  largest = reduce<Max>(largest);
  const float steps = largest > 0 ? kMost / largest : 0.0f;
  float with_rest = 0, with_v = 0, square = 0;
  for (int i = lane; i < p.head_dim(); i += kWarp) {
    const float u = fmaxf(fminf(rintf(rest(i) * steps), kMost), -kMost);  // kMost of a NaN
    to.direction[i] = static_cast<int8_t>(u);
    with_rest += u * rest(i);
    with_v += u * v[i];
    square += u * u;
  }
  square = reduce<Sum>(square);
  const float scale = square > 0 ? 1.0f / sqrtf(square) : 0.0f;
  with_rest = reduce<Sum>(with_rest) * scale;
  with_v = reduce<Sum>(with_v) * scale;
  features = reduce<Sum>(features);
  if (lane == 0) {
    to.rows[kLow * to.ld] = with_rest - (error + value) * kBoundSlack<float>;
    to.rows[kSum * to.ld] = sum;
    to.rows[kValue * to.ld] = value;
    to.rows[kFeatures * to.ld] = sqrtf(features);
    to.rows[kAlong * to.ld] = with_v;
    to.rows[kScale * to.ld] = scale;
  }
  return relative ? error / fmaxf(value, kRecallEps<float>) : error;
}

// Computes the scores of up to a tile of pairs, whose entries are in shared memory. By the whole
// block.
template <typename T, bool INT8>
LOLA_DEVICE void score_tile(const Group& p, const Candidates<T, INT8>& c, const int* entries,
                            int count, bool empty, const Shared& x) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, states = p.states_per_set();
  const int ld = whole_vectors(p.head_dim()), phi_ld = whole_vectors(2 * p.feature_dim());
  const int entry = entries[warp < count ? warp : 0];
  if (warp < kTile) {  // the rest of a tile repeats its first pair
    const int i = entry == kIncoming ? c.cached : entry;
    load_row(x.k + warp * ld, c.k(i, lane), p.head_dim(), true, lane);
    load_row(x.v + warp * ld, c.v(i, lane), p.head_dim(), true, lane);
  }
  __syncthreads();
  float total = 0;
  for (int j = 0; j < states; ++j) {
    const int state = c.set * states + j;
    map_tile(p, p.key_map(state, c.n), kTile, x);
    if (!empty) {
      product(x.phi, phi_ld, p.H(c.page, state), p.head_dim(), 2 * p.feature_dim(), p.head_dim(),
              x.parts, x.recalled, ld);
    }
    if (warp < count) {
      total += set_bound(p, p.s(c.page, state), empty, states > 1, x.phi + warp * phi_ld,
                         x.recalled + warp * ld, x.v + warp * ld,
                         bounds_of(p, c.page, c.set, j, entry, x), lane);
    }
    __syncthreads();  // before phi is taken for the next head
  }
  if (warp < count && lane == 0) {
    float* const score = entry == kIncoming ? x.incoming : x.scores + entry;
    if (p.weighted()) {
      total *= entry == kIncoming ? *x.incoming_importance : p.score_weights(c.page, c.set)[entry];
    }
    *score = total == total ? total : -kMinusInf;  // NaN counts as the largest
  }
  __syncthreads();
}

// Lower bounds on the scores of the cached pairs. Nothing is known of one whose bound is NaN.
LOLA_DEVICE void bound_scores(const Group& p, int64_t page, int set, const Shared& x) {
  const int states = p.states_per_set();
  for (int i = threadIdx.x; i < p.sparse_cache_size(); i += kThreads) {
    float total = 0;
    for (int j = 0; j < states; ++j) {
      const PairBounds at = bounds_of(p, page, set, j, i, x);
      const float low = at.rows[kLow * at.ld], value = at.rows[kValue * at.ld];
      total += states > 1 ? low / fmaxf(value, kRecallEps<float>) : low;
    }
    if (p.weighted()) total *= p.score_weights(page, set)[i];
    x.scores[i] = total == total ? total : kMinusInf;
  }
}

// Fills the first tile, by one warp: the incoming pair, and those that are likely the least of
// their part of the entries.
LOLA_DEVICE void first_tile(const Group& p, int likely, int lane, const Shared& x) {
  if (lane == 0) x.tile[0] = kIncoming;
  for (int part = 0; part < likely; ++part) {
    float low = -kMinusInf;
    int at = part;
    for (int i = part + likely * lane; i < p.sparse_cache_size(); i += likely * kWarp) {
      if (x.scores[i] < low) {
        low = x.scores[i];
        at = i;
      }
    }
    const float least = reduce<Min>(low);
    const int entry = reduce_max(low == least ? at : 0);
    if (lane == 0) x.tile[1 + part] = entry;
  }
}

// Lists the entries outside the first tile whose score may be `limit` or less, by one warp.
LOLA_DEVICE void list_doubtful(const Group& p, float limit, int tile, int lane, const Shared& x) {
  int listed = 0;
  for (int first = 0; first < p.sparse_cache_size(); first += kWarp) {
    const int i = first + lane;
    bool doubtful =
        i < p.sparse_cache_size() && x.scores[i < p.sparse_cache_size() ? i : 0] <= limit;
    for (int r = 1; r < tile; ++r) doubtful = doubtful && i != x.tile[r];
    const unsigned lanes = __ballot_sync(kAllLanes, doubtful);
    if (doubtful) x.list[listed + __popc(lanes & ((1u << lane) - 1))] = i;
    listed += __popc(lanes);
  }
  if (lane == 0) *x.listed = listed;
}

// Finds the entry of the pair that is folded, by one warp: kIncoming, also at a tie, as it is the
// youngest, or of the least ones the youngest.
LOLA_DEVICE void find_folded(const Group& p, const int32_t* positions, int lane, const Shared& x) {
  float least = -kMinusInf;
  for (int i = lane; i < p.sparse_cache_size(); i += kWarp) least = fminf(least, x.scores[i]);
  least = reduce<Min>(least);
  int youngest = -1, entry = kIncoming;
  for (int i = lane; least < *x.incoming && i < p.sparse_cache_size(); i += kWarp) {
    if (x.scores[i] == least && positions[i] > youngest) {
      youngest = positions[i];
      entry = i;
    }
  }
  const int last = reduce_max(youngest);
  if (youngest == last && (last >= 0 || lane == 0)) *x.folded = entry;
}

// Puts the incoming pair into an entry.
template <typename T, bool INT8>
LOLA_DEVICE void enter(const Group& p, const Candidates<T, INT8>& c, int entry, const Shared& x) {
  c.put(c.cached, entry, threadIdx.x, kThreads);
  for (int i = threadIdx.x; i < p.states_per_set() * p.head_dim(); i += kThreads) {
    bounds_of(p, c.page, c.set, i / p.head_dim(), entry, x).direction[i % p.head_dim()] =
        x.directions[i];
  }
  for (int i = threadIdx.x; i < p.states_per_set() * kBounds; i += kThreads) {
    const PairBounds to = bounds_of(p, c.page, c.set, i / kBounds, entry, x);
    to.rows[i % kBounds * to.ld] = x.incoming_rows[i];
  }
  if (threadIdx.x == 0 && p.weighted())
    p.score_weights(c.page, c.set)[entry] = *x.incoming_importance;
}

// H += phi v^T and s += phi for the first pair of the tile, in update number `update`.
LOLA_DEVICE void fold_one(const Group& p, int64_t page, int state, int64_t update, bool empty,
                          const Shared& x) {
  const int thread = threadIdx.x;
  for (int f = thread / kWarp; f < 2 * p.feature_dim(); f += kWarps) {
    float* const row = p.H(page, state, f);
    for (int i = thread % kWarp; i < p.head_dim(); i += kWarp) {
      row[i] = add_dithered(empty ? 0.0f : row[i], x.phi[f] * x.v[i], update, f);
    }
  }
  float* const s = p.s(page, state);
  for (int f = thread; f < 2 * p.feature_dim(); f += kThreads) {
    s[f] = add_dithered(empty ? 0.0f : s[f], x.phi[f], update, f);
  }
}

// u . v of a stored direction, by the kAcross lanes that share it.
constexpr int kAcross = 8;
LOLA_DEVICE float along(const int8_t* u, const float* v, int d, bool words, int lane) {
  float sum = 0;
  if (words) {
    for (int i = 4 * lane; i < d; i += 4 * kAcross) {
      const uint32_t four = *reinterpret_cast<const uint32_t*>(u + i);
#pragma unroll
      for (int b = 0; b < 4; ++b) sum += static_cast<int8_t>(four >> (8 * b)) * v[i + b];
    }
  } else {
    for (int i = lane; i < d; i += kAcross) sum += u[i] * v[i];
  }
  return reduce<Sum, 1, kAcross>(sum);
}

// Lowers the bounds of a head's pairs by what the fold of the first pair of the tile can have
// moved.
LOLA_DEVICE void lower_bounds(const Group& p, int64_t page, int state, const Shared& x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int group = static_cast<int>(threadIdx.x) / kAcross, member = lane % kAcross;
  float square = 0;
  for (int f = lane; f < 2 * p.feature_dim(); f += kWarp) square += x.phi[f] * x.phi[f];
  const float length = sqrtf(reduce<Sum>(square));
  float* const rows = p.bounds(page, state);
  const int64_t ld = p.sparse_cache_size();
  for (int first = 0; first < p.sparse_cache_size(); first += kThreads / kAcross) {
    const int i = first + group;
    const int8_t* const u = p.directions(page, state, i < p.sparse_cache_size() ? i : first);
    const float product = along(u, x.v, p.head_dim(), p.direction_words, member);
    if (member > 0 || i >= p.sparse_cache_size()) continue;
    const float low = rows[kLow * ld + i], c = rows[kFeatures * ld + i] * length;
    const float there = product * rows[kScale * ld + i];
    const float ahead = there - (rows[kAlong * ld + i] - low);
    if (ahead > 0)
      rows[kLow * ld + i] = low - c / (rows[kSum * ld + i] + c) * kBoundFactor<float> * ahead;
  }
}

// Grid: rows x query heads of the layer where this launch joins answers, then rows x sets of the
// layer.
template <typename T, bool INT8>
__global__ void __launch_bounds__(kThreads, 2) update_per_token_kernel(const Params params) {
  LOLA_SHARED(memory);
  if (merged(params)) return;
  const int block = static_cast<int>(blockIdx.x) - params.merging;
  const int64_t row = block / params.layer_sets();
  const int of_layer = block % params.layer_sets();
  const Group p(params, of_layer / params.num_sparse_heads());
  if (!updates_per_token(p.layout)) return;
  if (!p.live(row) || !p.layout.update_due(p.seq_lens[row])) return;
  const int64_t n = p.seq_lens[row];
  const Candidates<T, INT8> c(p, p.state_indices[row], of_layer % p.num_sparse_heads(), n);
  const Shared x(p, memory);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool empty = !p.any_folded(n - 1), folds = c.cached == p.sparse_cache_size();

  if (warp == kWarps - 1 && p.weighted()) {
    const float w = pair_importance(p, c.kv, c.k(c.cached, lane), c.v(c.cached, lane), lane);
    if (lane == 0) *x.incoming_importance = w;
  }
  if (folds) bound_scores(p, c.page, c.set, x);
  __syncthreads();
  const int likely =
      folds ? (p.sparse_cache_size() < kLikely ? p.sparse_cache_size() : kLikely) : 0;
  if (warp == 0) first_tile(p, likely, lane, x);
  __syncthreads();
  score_tile(p, c, x.tile, 1 + likely, empty, x);

  int entry = c.cached;  // where the incoming pair goes
  if (folds) {
    float limit = *x.incoming;
    for (int r = 1; r <= likely; ++r) limit = fminf(limit, x.scores[x.tile[r]]);
    if (warp == 0) list_doubtful(p, limit, 1 + likely, lane, x);
    __syncthreads();
    for (int first = 0; first < *x.listed; first += kTile) {
      const int left = *x.listed - first;
      score_tile(p, c, x.list + first, left < kTile ? left : kTile, empty, x);
    }
    if (warp == 0) find_folded(p, p.positions(c.page, c.set), lane, x);
    __syncthreads();
    entry = *x.folded;
    if (warp == 0) {  // what will be folded, before the incoming pair takes its place
      const int i = entry == kIncoming ? c.cached : entry;
      load_row(x.k, c.k(i, lane), p.head_dim(), true, lane);
      load_row(x.v, c.v(i, lane), p.head_dim(), true, lane);
    }
    __syncthreads();
  }
  if (entry != kIncoming) enter(p, c, entry, x);
  __syncthreads();
  for (int j = 0; folds && j < p.states_per_set(); ++j) {
    const int state = c.set * p.states_per_set() + j;
    map_tile(p, p.key_map(state, n), 1, x);
    fold_one(p, c.page, state, n, empty, x);
    lower_bounds(p, c.page, state, x);
    __syncthreads();
  }
}

}  // namespace

template <typename T>
void launch_update_per_token(const Params& p, cudaStream_t stream) {
  launch(
      "decode: update",
      p.layout.int8_pairs() ? update_per_token_kernel<T, true> : update_per_token_kernel<T, false>,
      dim3(static_cast<unsigned>(p.merging + p.num_rows * p.layer_sets())), kThreads,
      shared_bytes(p), stream, p);
}

template void launch_update_per_token<Bf16>(const Params&, cudaStream_t);
template void launch_update_per_token<F16>(const Params&, cudaStream_t);
template void launch_update_per_token<float>(const Params&, cudaStream_t);

}  // namespace cuda
}  // namespace lola
