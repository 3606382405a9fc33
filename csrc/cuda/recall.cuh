// What an update does with candidates, a warp at a time: map keys, their self-recall errors
//   SRE = || v - phi(k)^T H / (phi(k)^T s + 1e-6) ||    (LoLA, arXiv 2505.23666, section 3.2),
// and the importance that weighs these (docs/algorithm.md, section 6).
#pragma once

#include "cuda/page.cuh"

namespace lola {
namespace cuda {

constexpr int kTile = 4;  // candidates a warp works on: each element of W or H it reads serves four

__host__ __device__ constexpr int whole_vectors(int n) { return (n + 3) / 4 * 4; }

// A key or value of a candidate as it is outside the window.
template <typename T, bool INT8>
struct PairRow {
  const T* x = nullptr;

  LOLA_DEVICE float operator[](int i) const { return to_float(x[i]); }
};

// A cached one of int8 numbers and a scale, or an evicted one with the scale that it is rounded
// at. All in float32, operation by operation as in lola_vllm/core/ops/int8.py.
template <typename T>
struct PairRow<T, true> {
  const int8_t* numbers = nullptr;
  const T* x = nullptr;  // where there are no numbers yet
  float scale = 0;

  LOLA_DEVICE float number(int i) const {
    if (numbers != nullptr) return numbers[i];
    if (!(scale > 0)) return 0;
    const float steps = rintf(to_float(x[i]) / scale);  // to nearest, ties to even
    return fmaxf(fminf(steps, kPairMax), -kPairMax);
  }
  LOLA_DEVICE float operator[](int i) const { return number(i) * scale; }
};

// The scale at which a row is rounded, by one warp; NaN where an entry is not finite.
template <typename T>
LOLA_DEVICE float int8_scale(const T* x, int d, int lane) {
  float largest = 0, odd = 0;  // `odd` adds x - x, which is 0 or NaN
  for (int i = lane; i < d; i += kWarp) {
    const float y = to_float(x[i]);
    largest = fmaxf(largest, fabsf(y));
    odd += y - y;
  }
  constexpr float kStep = static_cast<float>(1.0 / kPairMax);
  return reduce<Max>(largest) * kStep + reduce<Sum>(odd);
}

// Candidates of an update: cached pairs by entry, then evicted ones by position.
template <typename T, bool INT8>
struct Candidates {
  const Group& p;
  int64_t page, n;
  int start, set, kv, cached, count;  // start: position of the first evicted pair

  LOLA_DEVICE Candidates(const Group& group, int64_t page_, int set_, int64_t n_)
      : p(group), page(page_), n(n_), set(set_), kv(set_ / group.sets_per_kv_head()) {
    start = static_cast<int>(p.layout.window_start(n - p.layout.update_interval));
    cached = static_cast<int>(p.layout.num_sparse(n - p.layout.update_interval));
    count = cached + static_cast<int>(p.layout.window_start(n) - start);
  }
  LOLA_DEVICE int position(int i) const {
    return i < cached ? p.positions(page, set)[i] : start + i - cached;
  }
  // Key and value of candidate i, for a whole warp.
  LOLA_DEVICE PairRow<T, INT8> k(int i, int lane) const {
    if constexpr (INT8) {
      if (i < cached) {
        return {p.sparse_k<const int8_t>(page, set, i), nullptr, p.sparse_k_scale(page, set)[i]};
      }
      return {nullptr, evicted_k(i), int8_scale(evicted_k(i), p.head_dim(), lane)};
    } else {
      return {i < cached ? p.sparse_k<const T>(page, set, i) : evicted_k(i)};
    }
  }
  LOLA_DEVICE PairRow<T, INT8> v(int i, int lane) const {
    if constexpr (INT8) {
      if (i < cached) {
        return {p.sparse_v<const int8_t>(page, set, i), nullptr, p.sparse_v_scale(page, set)[i]};
      }
      return {nullptr, evicted_v(i), int8_scale(evicted_v(i), p.head_dim(), lane)};
    } else {
      return {i < cached ? p.sparse_v<const T>(page, set, i) : evicted_v(i)};
    }
  }
  // Puts an evicted pair i into an entry, by `count` threads of whole warps, of which this is
  // number `thread`.
  LOLA_DEVICE void put(int i, int entry, int thread, int count) const {
    const PairRow<T, INT8> from_k = k(i, thread % kWarp), from_v = v(i, thread % kWarp);
    if constexpr (INT8) {
      int8_t* const to_k = p.sparse_k<int8_t>(page, set, entry);
      int8_t* const to_v = p.sparse_v<int8_t>(page, set, entry);
      for (int j = thread; j < p.head_dim(); j += count) {
        to_k[j] = static_cast<int8_t>(from_k.number(j));
        to_v[j] = static_cast<int8_t>(from_v.number(j));
      }
      if (thread == 0) {
        p.sparse_k_scale(page, set)[entry] = from_k.scale;
        p.sparse_v_scale(page, set)[entry] = from_v.scale;
      }
    } else {
      T* const to_k = p.sparse_k<T>(page, set, entry);
      T* const to_v = p.sparse_v<T>(page, set, entry);
      for (int j = thread; j < p.head_dim(); j += count) {
        to_k[j] = from_k.x[j];
        to_v[j] = from_v.x[j];
      }
    }
    if (thread == 0) p.positions(page, set)[entry] = position(i);
  }

 private:
  LOLA_DEVICE const T* evicted_k(int i) const {
    return p.exact_k<const T>(page, kv, p.layout.exact_row(start + i - cached));
  }
  LOLA_DEVICE const T* evicted_v(int i) const {
    return p.exact_v<const T>(page, kv, p.layout.exact_row(start + i - cached));
  }
};

// A row of d elements as floats with zeros up to whole vectors; zeros alone where it is not valid.
template <typename T, bool INT8>
LOLA_DEVICE void load_row(float* to, const PairRow<T, INT8>& from, int d, bool valid, int lane) {
#pragma unroll 1  // registers of `update_kernel`
  for (int i = lane; i < whole_vectors(d); i += kWarp) to[i] = valid && i < d ? from[i] : 0.0f;
}

// w = exp(clamp(a . rho(k) + b . v + c)) of a pair of a KV head. A NaN stays one.
template <typename T, bool INT8>
LOLA_DEVICE float pair_importance(const Group& p, int kv_head, const PairRow<T, INT8>& k,
                                  const PairRow<T, INT8>& v, int lane) {
  const int d = p.head_dim(), half = d / 2;
  const float* const a = p.importance_weights + kv_head * p.layout.importance_size();
  const float* const b = a + half;
  float sum = 0;
  for (int i = lane; i < d; i += kWarp) sum += b[i] * v[i];
  for (int i = lane; i < half; i += kWarp) {
    const float x = k[i], y = k[i + half];
    sum += a[i] * sqrtf(x * x + y * y);
  }
  sum = reduce<Sum>(sum) + b[d];
  constexpr float kMost = kMaxLogImportance<float>;
  return expf(sum > kMost ? kMost : sum < -kMost ? -kMost : sum);
}

LOLA_DEVICE float element(const float4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// acc[r][c] += sum_i a[r][i] b[i][column + 32 c] over i < rows, columns < width; a in shared memory
// with rows of `lda`, zero from `rows` up to whole vectors.
template <int C>
LOLA_DEVICE void multiply(const float* a, int lda, const float* b, int64_t ldb, int rows,
                          int column, int width, float (&acc)[kTile][C]) {
  b += column;
#pragma unroll 1
  for (int i0 = 0; i0 < rows; i0 += 4) {
    float4 x[kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r) x[r] = *reinterpret_cast<const float4*>(a + r * lda + i0);
#pragma unroll
    for (int i = 0; i < 4; ++i, b += ldb) {
      float y[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const bool ok = i0 + i < rows && column + kWarp * c < width;
        y[c] = ok ? b[kWarp * c] : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
#pragma unroll
        for (int c = 0; c < C; ++c) acc[r][c] += element(x[r], i) * y[c];
      }
    }
  }
}

// phi [kTile][whole_vectors(2F)] of the kTile keys in k [kTile][whole_vectors(d)], zero-padded,
// under the map W of their state head.
LOLA_DEVICE void map_keys(const Group& p, const float* W, const float* k, float* phi, int lane) {
  const int ld = whole_vectors(2 * p.feature_dim());
  for (int f0 = 0; f0 < p.feature_dim(); f0 += 2 * kWarp) {
    float y[kTile][2] = {};
    multiply(k, whole_vectors(p.head_dim()), W, p.feature_dim(), p.head_dim(), f0 + lane,
             p.feature_dim(), y);
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int f = f0 + lane + kWarp * c;
        if (f < p.feature_dim()) phi[r * ld + f] = y[r][c];
      }
    }
  }
  __syncwarp();
  for (int r = 0; r < kTile; ++r) {
    feature_map(phi + r * ld, p.feature_dim(), phi + r * ld, lane);
    if (lane < ld - 2 * p.feature_dim()) phi[r * ld + 2 * p.feature_dim() + lane] = 0;
  }
  __syncwarp();
}

// Norms of kTile values.
template <typename T, bool INT8>
LOLA_DEVICE void norms(const PairRow<T, INT8> (&v)[kTile], int d, int lane, float (&out)[kTile]) {
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
    float sum = 0;
    for (int i = lane; i < d; i += kWarp) sum += v[r][i] * v[r][i];
    out[r] = sqrtf(reduce<Sum>(sum));
  }
}

// Errors of kTile candidates against one state head.
template <typename T, bool INT8>
LOLA_DEVICE void recall_errors(const Group& p, int64_t page, int state, const float* phi,
                               const PairRow<T, INT8> (&v)[kTile], int lane,
                               float (&errors)[kTile]) {
  constexpr int kColumns = 2;  // more take registers that `update_kernel` does not have
  const int F2 = 2 * p.feature_dim(), ld = whole_vectors(F2);
  const float* const H = p.H(page, state);
  const float* const s = p.s(page, state);
  float scale[kTile] = {}, sum[kTile] = {};
#pragma unroll 1  // registers, too
  for (int f = lane; f < F2; f += kWarp) {
    const float x = s[f];
#pragma unroll
    for (int r = 0; r < kTile; ++r) scale[r] += phi[r * ld + f] * x;
  }
#pragma unroll
  for (int r = 0; r < kTile; ++r) scale[r] = 1.0f / (reduce<Sum>(scale[r]) + kRecallEps<float>);
  for (int first = 0; first < p.head_dim(); first += kColumns * kWarp) {
    float recalled[kTile][kColumns] = {};
    multiply(phi, ld, H, p.head_dim(), F2, first + lane, p.head_dim(), recalled);
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int at = first + lane + kWarp * c;
        const float diff = at < p.head_dim() ? v[r][at] - recalled[r][c] * scale[r] : 0.0f;
        sum[r] += diff * diff;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kTile; ++r) errors[r] = sqrtf(reduce<Sum>(sum[r]));
}

}  // namespace cuda
}  // namespace lola
