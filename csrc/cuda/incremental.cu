// The update of interval 1 (docs/algorithm.md, section 3): one pair is evicted and at most one
// folded. Bounds on recall errors follow each fold, and an error is computed anew only where it may
// be the least; the choice is the one that all scores would give. What bounds a pair, and why, is
// in csrc/cpu/drift_kernel.h.
//
// A block is one row and sparse set. All of it works on one tile of pairs, so that a step with few
// pairs in doubt is short, and the matrices are read once per tile.
#include "bounds.h"
#include "cuda/launch.cuh"
#include "cuda/recall.cuh"

namespace lola {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kNewcomer = -1;  // in the place of a slot: the pair that is evicted
constexpr int kLikely = kTile - 1;
static_assert(kTile <= kWarps, "a warp for each pair of a tile");

struct Shared {
  float *k, *v, *phi, *recalled;  // [kTile] rows of whole vectors
  float* parts;                   // sums of products of a tile, in parts of the matrix
  float *numbers, *newcomer;      // [Hs / Hg, kBounds] of the newcomer, and its score
  float* scores;                  // [lam], bounds at first
  int8_t* directions;             // [Hs / Hg, d] of the newcomer
  int *tile, *listed, *loser;     // [kTile] slots of the first tile; length of the list; a slot
  int* list;                      // [lam] slots of pairs in doubt

  LOLA_DEVICE Shared(const Params& p, char* memory) {
    const int ld = whole_vectors(p.d), share = p.Hs / p.Hg;
    k = reinterpret_cast<float*>(memory);
    v = k + kTile * ld;
    recalled = v + kTile * ld;
    phi = recalled + kTile * ld;
    parts = phi + kTile * whole_vectors(2 * p.F);
    numbers = parts + kTile * parts_of(p);
    newcomer = numbers + share * kBounds;
    tile = reinterpret_cast<int*>(newcomer + 1);
    listed = tile + kTile;
    loser = listed + 1;
    directions = reinterpret_cast<int8_t*>(loser + 1);
    int* const lists = p.lists == nullptr ? loser + 1 + whole_vectors(share * p.d) / 4
                                          : p.lists + blockIdx.x * p.list_size();
    scores = reinterpret_cast<float*>(lists);
    list = lists + p.lam;
  }

  static __host__ __device__ int parts_of(const Params& p) {
    const int wide = p.F > p.d ? p.F : p.d;
    return wide > kThreads ? wide : kThreads;
  }
};

std::size_t shared_bytes(const Params& p) {
  const std::size_t share = p.Hs / p.Hg, lists = p.lists == nullptr ? 2 * p.lam : 0;
  return (kTile * (3 * whole_vectors(p.d) + whole_vectors(2 * p.F) + Shared::parts_of(p)) +
          share * kBounds + 3 + kTile + whole_vectors(static_cast<int>(share) * p.d) / 4 + lists) *
         sizeof(float);
}

// Where what is known of a pair and head goes: number i to numbers[i * ld].
struct Place {
  float* numbers;
  int64_t ld;
  int8_t* direction;
};

LOLA_DEVICE Place place_of(const Params& p, int64_t page, int set, int j, int slot,
                           const Shared& x) {
  if (slot == kNewcomer) return {x.numbers + j * kBounds, 1, x.directions + j * p.d};
  const int state = set * (p.Hs / p.Hg) + j;
  return {p.bounds.at<float>(page, state) + slot, p.bounds.stride[2],
          p.directions.at<int8_t>(page, state, slot)};
}

// out[r][n] = sum_i a[r][i] b[i][n] over i < rows, n < width, for the rows of a tile in shared
// memory, `lda` and `ldo` apart. By the whole block, which may read `out` afterwards.
LOLA_DEVICE void product(const float* a, int lda, const float* b, int64_t ldb, int rows, int width,
                         float* parts, float* out, int ldo) {
  const int thread = threadIdx.x, side = columns(width, kThreads), num_parts = kThreads / side;
  const int part = thread / side, share = (rows + num_parts - 1) / num_parts;
  const int begin = part * share, end = begin + share < rows ? begin + share : rows;
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

// Features of the first `count` keys of x.k. By the whole block.
LOLA_DEVICE void map_tile(const Params& p, int state, int count, const Shared& x) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, ld = whole_vectors(2 * p.F);
  product(x.k, whole_vectors(p.d), p.feature_map_k + static_cast<int64_t>(state) * p.d * p.F, p.F,
          p.d, p.F, x.parts, x.phi, ld);
  float* const phi = x.phi + warp * ld;
  if (warp < count) feature_map(phi, p.F, phi, static_cast<int>(threadIdx.x) % kWarp);
  __syncthreads();
}

// Takes note of a pair's recall error, by one warp: returns it, or its ratio to ||v|| where
// `relative`. `recalled` is phi^T H; `empty`: nothing was folded yet, and H and s hold leftovers.
LOLA_DEVICE float note(const Params& p, const float* s, bool empty, bool relative, const float* phi,
                       const float* recalled, const float* v, const Place& to, int lane) {
  float sum = 0, features = 0;
  for (int f = lane; f < 2 * p.F; f += kWarp) {
    features += phi[f] * phi[f];
    if (!empty) sum += phi[f] * s[f];
  }
  sum = reduce<Sum>(sum) + kRecallEps;
  const float inverse = 1.0f / sum;
  const auto rest = [&](int i) { return empty ? v[i] : v[i] - recalled[i] * inverse; };
  float value = 0, error = 0, largest = 0;
  for (int i = lane; i < p.d; i += kWarp) {
    value += v[i] * v[i];
    error += rest(i) * rest(i);
    largest = fmaxf(largest, fabsf(rest(i)));
  }
  value = sqrtf(reduce<Sum>(value));
  // Against an empty state they are equal, and ratios must tie exactly.
  error = empty ? value : sqrtf(reduce<Sum>(error));
  largest = reduce<Max>(largest);
  const float steps = largest > 0 ? 127.0f / largest : 0.0f;
  float with_rest = 0, with_v = 0, square = 0;
  for (int i = lane; i < p.d; i += kWarp) {
    const float u = fmaxf(fminf(rintf(rest(i) * steps), 127.0f), -127.0f);  // 127 of a NaN
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
    to.numbers[kLow * to.ld] = with_rest - (error + value) * 2e-5f;  // far beyond rounding errors
    to.numbers[kSum * to.ld] = sum;
    to.numbers[kValue * to.ld] = value;
    to.numbers[kFeatures * to.ld] = sqrtf(features);
    to.numbers[kAlong * to.ld] = with_v;
    to.numbers[kScale * to.ld] = scale;
  }
  return relative ? error / fmaxf(value, kRecallEps) : error;
}

// Computes the scores of up to a tile of pairs, whose slots are in shared memory. By the whole
// block.
template <typename T>
LOLA_DEVICE void score_tile(const Params& p, const Candidates<T>& c, const int* slots, int count,
                            bool empty, const Shared& x) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, share = p.Hs / p.Hg;
  const int ld = whole_vectors(p.d), phi_ld = whole_vectors(2 * p.F);
  const int slot = slots[warp < count ? warp : 0];
  if (warp < kTile) {  // the rest of a tile repeats its first pair
    const int i = slot == kNewcomer ? c.cached : slot;
    load_row(x.k + warp * ld, c.k(i), p.d, true, lane);
    load_row(x.v + warp * ld, c.v(i), p.d, true, lane);
  }
  __syncthreads();
  float total = 0;
  for (int j = 0; j < share; ++j) {
    const int state = c.set * share + j;
    map_tile(p, state, kTile, x);
    if (!empty) {
      product(x.phi, phi_ld, p.H.at<const float>(c.page, state), p.H.stride[2], 2 * p.F, p.d,
              x.parts, x.recalled, ld);
    }
    if (warp < count) {
      total += note(p, p.s.at<const float>(c.page, state), empty, share > 1, x.phi + warp * phi_ld,
                    x.recalled + warp * ld, x.v + warp * ld, place_of(p, c.page, c.set, j, slot, x),
                    lane);
    }
    __syncthreads();  // before phi is taken for the next head
  }
  if (warp < count && lane == 0) {
    float* const score = slot == kNewcomer ? x.newcomer : x.scores + slot;
    *score = total == total ? total : -kMinusInf;  // NaN counts as the largest
  }
  __syncthreads();
}

// Lower bounds on the scores of the cached pairs. Nothing is known of one whose bound is NaN.
LOLA_DEVICE void bound_scores(const Params& p, int64_t page, int set, const Shared& x) {
  const int share = p.Hs / p.Hg;
  for (int i = threadIdx.x; i < p.lam; i += kThreads) {
    float total = 0;
    for (int j = 0; j < share; ++j) {
      const Place at = place_of(p, page, set, j, i, x);
      const float low = at.numbers[kLow * at.ld], value = at.numbers[kValue * at.ld];
      total += share > 1 ? low / fmaxf(value, kRecallEps) : low;
    }
    x.scores[i] = total == total ? total : kMinusInf;
  }
}

// Fills the first tile, by one warp: the newcomer, and those that are likely the least of their
// share of the slots.
LOLA_DEVICE void first_tile(const Params& p, int likely, int lane, const Shared& x) {
  if (lane == 0) x.tile[0] = kNewcomer;
  for (int part = 0; part < likely; ++part) {
    float low = -kMinusInf;
    int at = part;
    for (int i = part + likely * lane; i < p.lam; i += likely * kWarp) {
      if (x.scores[i] < low) {
        low = x.scores[i];
        at = i;
      }
    }
    const float least = reduce<Min>(low);
    const int slot = reduce_max(low == least ? at : 0);
    if (lane == 0) x.tile[1 + part] = slot;
  }
}

// Lists the slots outside the first tile whose score may be `limit` or less, by one warp.
LOLA_DEVICE void list_doubtful(const Params& p, float limit, int tile, int lane, const Shared& x) {
  int listed = 0;
  for (int first = 0; first < p.lam; first += kWarp) {
    const int i = first + lane;
    bool doubtful = i < p.lam && x.scores[i < p.lam ? i : 0] <= limit;
    for (int r = 1; r < tile; ++r) doubtful = doubtful && i != x.tile[r];
    const unsigned lanes = __ballot_sync(kAllLanes, doubtful);
    if (doubtful) x.list[listed + __popc(lanes & ((1u << lane) - 1))] = i;
    listed += __popc(lanes);
  }
  if (lane == 0) *x.listed = listed;
}

// Finds the slot of the pair that loses, by one warp: kNewcomer, which as the youngest also loses a
// tie, or of the least ones the youngest.
LOLA_DEVICE void find_loser(const Params& p, const int32_t* positions, int lane, const Shared& x) {
  float least = -kMinusInf;
  for (int i = lane; i < p.lam; i += kWarp) least = fminf(least, x.scores[i]);
  least = reduce<Min>(least);
  int youngest = -1, slot = kNewcomer;
  for (int i = lane; least < *x.newcomer && i < p.lam; i += kWarp) {
    if (x.scores[i] == least && positions[i] > youngest) {
      youngest = positions[i];
      slot = i;
    }
  }
  const int last = reduce_max(youngest);
  if (youngest == last && (last >= 0 || lane == 0)) *x.loser = slot;
}

// Puts the newcomer into a slot.
template <typename T>
LOLA_DEVICE void enter(const Params& p, const Candidates<T>& c, int slot, const Shared& x) {
  c.put(c.cached, slot, threadIdx.x, kThreads);
  for (int i = threadIdx.x; i < p.Hs / p.Hg * p.d; i += kThreads) {
    place_of(p, c.page, c.set, i / p.d, slot, x).direction[i % p.d] = x.directions[i];
  }
  for (int i = threadIdx.x; i < p.Hs / p.Hg * kBounds; i += kThreads) {
    const Place to = place_of(p, c.page, c.set, i / kBounds, slot, x);
    to.numbers[i % kBounds * to.ld] = x.numbers[i];
  }
}

// H += phi v^T and s += phi for the first pair of the tile, in update number `update`.
LOLA_DEVICE void fold_one(const Params& p, int64_t page, int state, int64_t update, bool empty,
                          const Shared& x) {
  const int thread = threadIdx.x;
  for (int f = thread / kWarp; f < 2 * p.F; f += kWarps) {
    float* const row = p.H.at<float>(page, state, f);
    for (int i = thread % kWarp; i < p.d; i += kWarp) {
      row[i] = add_dithered(empty ? 0.0f : row[i], x.phi[f] * x.v[i], update, f);
    }
  }
  float* const s = p.s.at<float>(page, state);
  for (int f = thread; f < 2 * p.F; f += kThreads) {
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
LOLA_DEVICE void drift_apart(const Params& p, int64_t page, int state, const Shared& x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int group = static_cast<int>(threadIdx.x) / kAcross, member = lane % kAcross;
  float square = 0;
  for (int f = lane; f < 2 * p.F; f += kWarp) square += x.phi[f] * x.phi[f];
  const float length = sqrtf(reduce<Sum>(square));
  float* const numbers = p.bounds.at<float>(page, state);
  const int64_t ld = p.bounds.stride[2];
  for (int first = 0; first < p.lam; first += kThreads / kAcross) {
    const int i = first + group;
    const int8_t* const u = p.directions.at<const int8_t>(page, state, i < p.lam ? i : first);
    const float product = along(u, x.v, p.d, p.direction_words, member);
    if (member > 0 || i >= p.lam) continue;
    const float low = numbers[kLow * ld + i], c = numbers[kFeatures * ld + i] * length;
    const float there = product * numbers[kScale * ld + i];
    const float ahead = there - (numbers[kAlong * ld + i] - low);
    if (ahead > 0)
      numbers[kLow * ld + i] = low - c / (numbers[kSum * ld + i] + c) * 1.0001f * ahead;
  }
}

// Grid: rows x sets.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) incremental_kernel(const Params p) {
  LOLA_SHARED(memory);
  const int64_t row = blockIdx.x / p.Hg;
  if (!p.live(row) || !p.update_due(p.seq_lens[row])) return;
  const int64_t n = p.seq_lens[row];
  const Candidates<T> c(p, p.slots[row], static_cast<int>(blockIdx.x % p.Hg), n);
  const Shared x(p, memory);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool empty = !p.any_folded(n - 1), folds = c.cached == p.lam;

  if (folds) bound_scores(p, c.page, c.set, x);
  __syncthreads();
  const int likely = folds ? (p.lam < kLikely ? p.lam : kLikely) : 0;
  if (warp == 0) first_tile(p, likely, lane, x);
  __syncthreads();
  score_tile(p, c, x.tile, 1 + likely, empty, x);

  int slot = c.cached;  // where the newcomer goes
  if (folds) {
    float limit = *x.newcomer;
    for (int r = 1; r <= likely; ++r) limit = fminf(limit, x.scores[x.tile[r]]);
    if (warp == 0) list_doubtful(p, limit, 1 + likely, lane, x);
    __syncthreads();
    for (int first = 0; first < *x.listed; first += kTile) {
      const int left = *x.listed - first;
      score_tile(p, c, x.list + first, left < kTile ? left : kTile, empty, x);
    }
    if (warp == 0) find_loser(p, p.positions.at<const int32_t>(c.page, c.set), lane, x);
    __syncthreads();
    slot = *x.loser;
    if (warp == 0) {  // what will be folded, before the newcomer takes its place
      const int i = slot == kNewcomer ? c.cached : slot;
      load_row(x.k, c.k(i), p.d, true, lane);
      load_row(x.v, c.v(i), p.d, true, lane);
    }
    __syncthreads();
  }
  if (slot != kNewcomer) enter(p, c, slot, x);
  __syncthreads();
  for (int j = 0; folds && j < p.Hs / p.Hg; ++j) {
    const int state = c.set * (p.Hs / p.Hg) + j;
    map_tile(p, state, 1, x);
    fold_one(p, c.page, state, n, empty, x);
    drift_apart(p, c.page, state, x);
    __syncthreads();
  }
}

}  // namespace

template <typename T>
void launch_incremental(const Params& p, cudaStream_t stream) {
  launch("decode: update", incremental_kernel<T>, dim3(static_cast<unsigned>(p.rows * p.Hg)),
         kThreads, shared_bytes(p), stream, p);
}

template void launch_incremental<Bf16>(const Params&, cudaStream_t);
template void launch_incremental<F16>(const Params&, cudaStream_t);
template void launch_incremental<float>(const Params&, cudaStream_t);

}  // namespace cuda
}  // namespace lola
