// Decode: one query per head over one page, in one pass over the state.
//
// A block is one row, one sparse set with the query heads it serves, and one split of the keys and
// of the rows of H. Lanes that share a key keep a softmax of their own (largest logit, sum,
// weighted values), so the loop over keys has no barrier; the sums are joined once at the end. The
// new pair comes from the inputs, so no block waits for another one's write.
#pragma once

#include <type_traits>

#include "cuda/answer.cuh"
#include "cuda/launch.cuh"

namespace lola {
namespace cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / kWarp;

// Blocks a processor holds at once: bounds the registers, so that nothing is spilled.
template <int D, int HEADS, bool INT8>
constexpr int kDecodeBlocks = HEADS > 4 || (INT8 && (D == 0 || (HEADS > 1 && D > 64))) ? 2
                              : D == 0 || HEADS > 1                                    ? 3
                                                                                       : 4;

// The pairs a query sees, in one numbering: sparse cache, sinks, window, the new one.
template <typename T>
struct Pairs {
  int cached, sinks, in_ring, count;
  int first_row, ring, sink;
  const T *sparse_k, *sparse_v, *exact_k, *exact_v, *new_k, *new_v;
  const int8_t *numbers_k, *numbers_v;  // where cached pairs are int8, with these scales
  const float* scale_k;
  int scale_v;  // from there on

  LOLA_DEVICE Pairs(const Group& p, int64_t row, int64_t page, int set, int64_t position) {
    const int kv = set / p.sets_per_kv_head();
    const int64_t start = p.layout.window_start(position);
    cached = static_cast<int>(p.layout.num_sparse(position));
    sinks = static_cast<int>(position < p.layout.sink_size ? position : p.layout.sink_size);
    in_ring = static_cast<int>(position > start ? position - start : 0);
    count = cached + sinks + in_ring + 1;
    ring = static_cast<int>(p.layout.ring_size());
    sink = static_cast<int>(p.layout.sink_size);
    first_row = static_cast<int>(start % ring);
    sparse_k = p.sparse_k<const T>(page, set);
    sparse_v = p.sparse_v<const T>(page, set);
    numbers_k = p.sparse_k<const int8_t>(page, set);
    numbers_v = p.sparse_v<const int8_t>(page, set);
    scale_k = p.sparse_k_scale(page, set);
    scale_v = static_cast<int>(p.sparse_v_scale(page, set) - scale_k);
    exact_k = p.exact_k<const T>(page, kv);
    exact_v = p.exact_v<const T>(page, kv);
    new_k = p.k.at<const T>(row, kv);
    new_v = p.v.at<const T>(row, kv);
  }

  // Key and value of pair i, of d elements each.
  LOLA_DEVICE void find(int i, int64_t d, const T** k, const T** v) const {
    if (i < cached) {
      *k = sparse_k + i * d;
      *v = sparse_v + i * d;
    } else if (i < count - 1) {
      int at = i - cached;
      if (at >= sinks) {
        at = first_row + (at - sinks);
        at = sink + (at < ring ? at : at - ring);
      }
      *k = exact_k + int64_t{at} * d;
      *v = exact_v + int64_t{at} * d;
    } else {
      *k = new_k;
      *v = new_v;
    }
  }
};

// The heads of a block that are worked on together: first .. first + count of the set.
struct HeadRange {
  int first, count;
};

// Softmax over the pairs of a split. Each warp leaves, per head, its largest logit (of base 2) and
// sum in stats[warp][h][0 .. 2) and its weighted values in soft[warp][h][0 .. d).
template <typename T, int D, int HEADS, bool INT8>
LOLA_DEVICE void attend(const Group& p, int64_t row, int set, HeadRange heads,
                        const Pairs<T>& pairs, int begin, int end, float* soft, float* stats) {
  using R = Row<T, D>;
  constexpr int kGroups = kDecodeThreads / R::kLanes;
  constexpr int kUnroll = HEADS > 4 ? (R::kUnroll + 1) / 2 : R::kUnroll;
  const int lane = static_cast<int>(threadIdx.x) % R::kLanes;
  const int group = static_cast<int>(threadIdx.x) / R::kLanes, d = D > 0 ? D : p.head_dim();
  float q[HEADS][R::kElements], sum[HEADS][R::kElements], largest[HEADS], total[HEADS];
  const float scale = kLog2e / sqrtf(static_cast<float>(d));  // logits of base 2
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const int64_t head = static_cast<int64_t>(set) * p.heads_per_set() + heads.first + h;
    const int64_t offset = p.q.offset(row, head);
    largest[h] = kMinusInf;
    total[h] = 0;
#pragma unroll
    for (int i = 0; i < R::kElements; ++i) {
      const int at = R::index(lane, i);
      const bool ok = h < heads.count && at < d;
      q[h][i] = ok ? load_any(p.q.data, p.q_type, offset + at) * scale : 0.0f;
      sum[h][i] = 0;
    }
  }

  for (int base = begin; base < end; base += kGroups * kUnroll) {
    typename R::Raw k[kUnroll], v[kUnroll];
    float z[kUnroll][HEADS], v_scale[kUnroll];  // scales: only of int8 pairs
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kGroups + group;
      const bool ok = i < end;
      if constexpr (INT8) {
        const bool cached = ok && i < pairs.cached;
        v_scale[u] = cached ? pairs.scale_k[pairs.scale_v + i] : 1.0f;
        if (cached) {
          k[u] = R::load_numbers(pairs.numbers_k + static_cast<int64_t>(i) * d, lane, d, true);
          v[u] = R::load_numbers(pairs.numbers_v + static_cast<int64_t>(i) * d, lane, d, true);
          continue;
        }
      }
      const T *k_row, *v_row;
      pairs.find(ok ? i : begin, d, &k_row, &v_row);
      k[u] = R::load(k_row, lane, d, ok);
      v[u] = R::load(v_row, lane, d, ok);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = base + u * kGroups + group;
      const bool ok = at < end;
      float k_scale = 1;
      if constexpr (INT8) k_scale = ok && at < pairs.cached ? pairs.scale_k[at] : 1.0f;
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        float dot = 0;
#pragma unroll
        for (int i = 0; i < R::kElements; ++i) dot += q[h][i] * R::get(k[u], i);
        dot = reduce<Sum, 1, R::kLanes>(dot);
        if constexpr (INT8) dot *= k_scale;
        z[u][h] = ok ? dot : kMinusInf;
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float high = largest[h];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) high = fmaxf(high, z[u][h]);
      const float shift = high == kMinusInf ? 0.0f : high, rescale = exp2f(largest[h] - shift);
      largest[h] = high;
      total[h] *= rescale;
#pragma unroll
      for (int i = 0; i < R::kElements; ++i) sum[h][i] *= rescale;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float weight = exp2f(z[u][h] - shift);
        total[h] += weight;
        if constexpr (INT8) weight *= v_scale[u];
#pragma unroll
        for (int i = 0; i < R::kElements; ++i) sum[h][i] += weight * R::get(v[u], i);
      }
    }
  }

  // Join the groups of a warp.
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const float high = reduce<Max, R::kLanes>(largest[h]);
    const float weight = weight_of(largest[h], high);
    total[h] = reduce<Sum, R::kLanes>(total[h] * weight);
#pragma unroll
    for (int i = 0; i < R::kElements; ++i) {
      const float x = reduce<Sum, R::kLanes>(sum[h][i] * weight);
      const int at = R::index(lane, i);
      if (threadIdx.x % kWarp < R::kLanes && at < d) soft[(warp * HEADS + h) * d + at] = x;
    }
    if (threadIdx.x % kWarp == 0) {
      stats[(warp * HEADS + h) * 4] = high;
      stats[(warp * HEADS + h) * 4 + 1] = total[h];
    }
  }
}

// phi^T H and phi^T s over the rows of H of a split, whose features stand in phi[f - begin][h].
// Each warp leaves its sums in linear[warp][h][0 .. d) and stats[warp][h][2].
template <int D, int HEADS>
LOLA_DEVICE void read_out(const Group& p, int64_t page, int set, HeadRange heads, int begin,
                          int end, const float* phi, float* linear, float* stats) {
  using R = Row<float, D>;
  constexpr int kGroups = kDecodeThreads / R::kLanes;
  const int lane = static_cast<int>(threadIdx.x) % R::kLanes;
  const int group = static_cast<int>(threadIdx.x) / R::kLanes, d = D > 0 ? D : p.head_dim();
  float sum[HEADS][R::kElements], total[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    total[h] = 0;
#pragma unroll
    for (int i = 0; i < R::kElements; ++i) sum[h][i] = 0;
  }
  const int per_state = p.heads_per_state(), head0 = set * p.heads_per_set() + heads.first;
  for (int state = head0 / per_state; state * per_state < head0 + heads.count; ++state) {
    const int low = state * per_state - head0, high = low + per_state;  // heads of this state
    const float* const H = p.H(page, state);
    const float* const s = p.s(page, state);
    for (int base = begin; base < end; base += kGroups * R::kUnroll) {
      typename R::Raw rows[R::kUnroll];
      float normal[R::kUnroll];
#pragma unroll
      for (int u = 0; u < R::kUnroll; ++u) {
        const int f = base + u * kGroups + group;
        rows[u] = R::load(H + static_cast<int64_t>(f < end ? f : begin) * d, lane, d, f < end);
        normal[u] = f < end ? s[f] : 0.0f;
      }
#pragma unroll
      for (int u = 0; u < R::kUnroll; ++u) {
        const int f = base + u * kGroups + group;
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
          const bool ok = f < end && h >= low && h < high;
          const float weight = ok ? phi[(f - begin) * HEADS + h] : 0.0f;
          total[h] += weight * normal[u];
#pragma unroll
          for (int i = 0; i < R::kElements; ++i) sum[h][i] += weight * R::get(rows[u], i);
        }
      }
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    total[h] = reduce<Sum, R::kLanes>(total[h]);
#pragma unroll
    for (int i = 0; i < R::kElements; ++i) {
      const float x = reduce<Sum, R::kLanes>(sum[h][i]);
      const int at = R::index(lane, i);
      if (threadIdx.x % kWarp < R::kLanes && at < d) linear[(warp * HEADS + h) * d + at] = x;
    }
    if (threadIdx.x % kWarp == 0) stats[(warp * HEADS + h) * 4 + 2] = total[h];
  }
}

inline std::size_t decode_shared(const Params& p, int heads) {
  // All features: a small group is not divided where another is.
  return heads * (kDecodeWarps * (2 * p.head_dim() + 4) + 2 * p.feature_dim()) * sizeof(float);
}

// Grid: (rows x sets of the layer, splits).
template <typename T, int D, int HEADS, bool INT8>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks<D, HEADS, INT8>)
    decode_kernel(const Params params) {
  LOLA_SHARED(memory);
  const int of_layer = static_cast<int>(blockIdx.x % params.layer_sets());
  const int row = static_cast<int>(blockIdx.x / params.layer_sets());
  const int thread = threadIdx.x, split = blockIdx.y;
  const Group whole(params, of_layer / params.num_sparse_heads());
  if (split >= whole.own_splits()) return;
  const int set = of_layer % params.num_sparse_heads(), num_heads = params.heads_per_set();
  const int d = D > 0 ? D : params.head_dim(), head0 = set * num_heads;
  if (!params.live(row)) {
    if (params.splits > 1) return;  // the merge answers
    for (int i = thread; i < num_heads * d; i += kDecodeThreads) {
      answer(whole, row, head0 + i / d, i % d, params.answer_of_padding(row));
    }
    return;
  }
  const int64_t position = params.seq_lens[row] - 1;
  const Pairs<T> pairs(whole, row, params.state_indices[row], set, position);
  const bool folded = whole.any_folded(position);
  const int keys = (pairs.count + whole.own_splits() - 1) / whole.own_splits();
  const int key0 = keys * split;
  const int key1 = key0 + keys < pairs.count ? key0 + keys : pairs.count;

  float* const soft = reinterpret_cast<float*>(memory);    // [warps, HEADS, d]
  float* const linear = soft + kDecodeWarps * HEADS * d;   // [warps, HEADS, d]
  float* const stats = linear + kDecodeWarps * HEADS * d;  // [warps, HEADS, 4]
  float* const phi = stats + kDecodeWarps * HEADS * 4;     // [f1 - f0, HEADS]
  for (int first = 0; first < num_heads; first += HEADS) {
    const int left = num_heads - first;
    const HeadRange heads = {first, left < HEADS ? left : HEADS};
    attend<T, D, HEADS, INT8>(whole, row, set, heads, pairs, key0, key1, soft, stats);
    // Not before the softmax, which needs the registers.
    const Group p(params, anew(of_layer) / params.num_sparse_heads());
    const int splits = p.own_splits();
    const int features = (2 * p.feature_dim() + splits - 1) / splits, f0 = features * split;
    const int f1 = f0 + features < 2 * p.feature_dim() ? f0 + features : 2 * p.feature_dim();
    for (int i = thread; folded && i < (f1 - f0) * heads.count; i += kDecodeThreads) {
      const int h = i / (f1 - f0), f = i % (f1 - f0);
      phi[f * HEADS + h] = p.phi_of(row, head0 + first + h)[f0 + f];
    }
    __syncthreads();
    if (folded) {
      read_out<D, HEADS>(p, p.state_indices[row], set, heads, f0, f1, phi, linear, stats);
      __syncthreads();
    }
    for (int i = thread; i < heads.count * d; i += kDecodeThreads) {
      const int h = i / d, at = i % d;
      Answer sum;
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        const int part = warp * HEADS + h;
        sum.add(stats + part * 4, soft[part * d + at], folded,
                folded ? linear[part * d + at] : 0.0f);
      }
      const int head = head0 + first + h;
      if (p.splits == 1) {
        answer(p, row, head, at, sum.value(p, head, folded));
      } else {
        float* const out = p.partial_of(row, head, split);
        out[4 + at] = sum.soft;
        if (folded) out[4 + d + at] = sum.linear;
        if (at == 0) sum.store_stats(out, folded);
      }
    }
    __syncthreads();  // before the next heads take the memory
  }

  const int sets = params.sets_per_kv_head(), kv = set / sets;
  if (split == 0 && set % sets == 0) {
    const Group p(params, anew(of_layer) / params.num_sparse_heads());
    const int64_t page = p.state_indices[row], at = p.layout.exact_row(p.seq_lens[row] - 1);
    T *const k = p.exact_k<T>(page, kv, at), *const v = p.exact_v<T>(page, kv, at);
    const T *const new_k = p.k.at<const T>(row, kv), *const new_v = p.v.at<const T>(row, kv);
    for (int i = thread; i < d; i += kDecodeThreads) {
      k[i] = new_k[i];
      v[i] = new_v[i];
    }
  }
}

template <typename T, bool INT8>
void launch_decode_as(const Params& p, bool vectors, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.num_rows * p.layer_sets()),
                  static_cast<unsigned>(p.splits));
  const auto run = [&](auto kernel, int heads) {
    launch("decode", kernel, grid, kDecodeThreads, decode_shared(p, heads), stream, p);
  };
  const auto run_size = [&](auto size) {
    constexpr int D = decltype(size)::value;
    if (p.heads_per_set() == 1) {
      run(decode_kernel<T, D, 1, INT8>, 1);
    } else if (p.heads_per_set() <= 4) {
      run(decode_kernel<T, D, 4, INT8>, 4);
    } else {
      run(decode_kernel<T, D, 8, INT8>, 8);
    }
  };
  if (vectors && p.head_dim() == 64) return run_size(std::integral_constant<int, 64>());
  if (vectors && p.head_dim() == 96) return run_size(std::integral_constant<int, 96>());
  if (vectors && p.head_dim() == 128) return run_size(std::integral_constant<int, 128>());
  run(decode_kernel<T, 0, 1, INT8>, 1);
}

template <typename T>
void launch_decode(const Params& p, bool vectors, cudaStream_t stream) {
  if (p.layout.int8_pairs()) return launch_decode_as<T, true>(p, vectors, stream);
  launch_decode_as<T, false>(p, vectors, stream);
}

}  // namespace cuda
}  // namespace lola
