// What the CUDA kernels are written in: element types, 128-bit row fragments, warp reductions and
// the launch. With LOLA_EMULATE the same sources are plain C++ (see emulate.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "checks.h"
#include "constants.h"

#ifdef LOLA_EMULATE
#include "cuda/emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// Dynamic shared memory; kernels have no other, so that the emulation can poison it.
#define LOLA_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

#define LOLA_DEVICE __device__ __forceinline__

namespace lola {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMinusInf = -__builtin_huge_valf();

// --- element types ---

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

LOLA_DEVICE float to_float(float x) { return x; }
LOLA_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
LOLA_DEVICE float to_float(F16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <typename T>
struct Rounded;
template <>
struct Rounded<float> {
  static LOLA_DEVICE float of(float x) { return x; }
};
template <>
struct Rounded<Bf16> {
  static LOLA_DEVICE Bf16 of(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
};
template <>
struct Rounded<F16> {
  static LOLA_DEVICE F16 of(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
};

// Inputs and outputs of a few elements per thread: their type is looked up at run time.
LOLA_DEVICE float load_any(const char* p, DType type, int64_t i) {
  return type == DType::f32    ? reinterpret_cast<const float*>(p)[i]
         : type == DType::bf16 ? to_float(reinterpret_cast<const Bf16*>(p)[i])
                               : to_float(reinterpret_cast<const F16*>(p)[i]);
}

LOLA_DEVICE void store_any(char* p, DType type, int64_t i, float x) {
  if (type == DType::f32) {
    reinterpret_cast<float*>(p)[i] = x;
  } else if (type == DType::bf16) {
    reinterpret_cast<Bf16*>(p)[i] = Rounded<Bf16>::of(x);
  } else {
    reinterpret_cast<F16*>(p)[i] = Rounded<F16>::of(x);
  }
}

// --- row fragments ---

constexpr int power_of_two_above(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// A row of D elements held by kLanes neighbouring lanes, 16 bytes each. A load that is not valid
// touches nothing and gives zeros: what the count does not vouch for may be NaN.
template <typename T, int D>
struct Row {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kLanes = power_of_two_above(D / kElements);
  static constexpr int kUnroll = 4;
  static_assert(D % kElements == 0 && kLanes <= kWarp, "a row is whole vectors of one warp");

  struct Raw {
    uint4 words;
  };
  static LOLA_DEVICE int index(int lane, int i) { return lane * kElements + i; }
  static LOLA_DEVICE Raw load(const T* row, int lane, int, bool valid) {
    if (!valid || lane * kElements >= D) return {make_uint4(0, 0, 0, 0)};
    return {*reinterpret_cast<const uint4*>(row + lane * kElements)};
  }
  // The same of a row of int8 numbers, which every T holds exactly.
  static LOLA_DEVICE Raw load_numbers(const int8_t* row, int lane, int, bool valid) {
    if (!valid || lane * kElements >= D) return {make_uint4(0, 0, 0, 0)};
    unsigned words[4];
    if constexpr (sizeof(T) == 4) {
      const unsigned four = *reinterpret_cast<const unsigned*>(row + lane * kElements);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = __float_as_uint(static_cast<float>(static_cast<int8_t>(four >> (8 * i))));
      }
    } else {
      const uint64_t eight = *reinterpret_cast<const uint64_t*>(row + lane * kElements);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = static_cast<int8_t>(eight >> (16 * i));
        const float high = static_cast<int8_t>(eight >> (16 * i + 8));
        words[i] = Rounded<T>::of(low).bits | static_cast<unsigned>(Rounded<T>::of(high).bits)
                                                  << 16;
      }
    }
    return {make_uint4(words[0], words[1], words[2], words[3])};
  }
  static LOLA_DEVICE float get(const Raw& raw, int i) {
    const unsigned words[4] = {raw.words.x, raw.words.y, raw.words.z, raw.words.w};
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      return to_float(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
    }
  }
};

constexpr int kGenericElements = 16;
constexpr int kMaxHeadDim = kGenericElements * kWarp;

// The fallback: any d up to kMaxHeadDim and any alignment, element by element, a warp per row.
template <typename T>
struct Row<T, 0> {
  static constexpr int kElements = kGenericElements;
  static constexpr int kLanes = kWarp;
  static constexpr int kUnroll = 1;

  struct Raw {
    T x[kElements];
  };
  static LOLA_DEVICE int index(int lane, int i) { return i * kWarp + lane; }
  static LOLA_DEVICE Raw load(const T* row, int lane, int d, bool valid) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      raw.x[i] = valid && index(lane, i) < d ? row[index(lane, i)] : T{};
    }
    return raw;
  }
  static LOLA_DEVICE Raw load_numbers(const int8_t* row, int lane, int d, bool valid) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const bool ok = valid && index(lane, i) < d;
      raw.x[i] = Rounded<T>::of(ok ? static_cast<float>(row[index(lane, i)]) : 0.0f);
    }
    return raw;
  }
  static LOLA_DEVICE float get(const Raw& raw, int i) { return to_float(raw.x[i]); }
};

// Threads of a block that stand side by side on the columns of a matrix; the others take more rows
// of it.
__host__ __device__ constexpr int columns(int width, int threads) {
  int side = kWarp;
  while (side < width && side < threads) side *= 2;
  return side;
}

// --- warp reductions: every lane gets the result, in a fixed order ---

struct Sum {
  static LOLA_DEVICE float of(float a, float b) { return a + b; }
};
struct Max {
  static LOLA_DEVICE float of(float a, float b) { return fmaxf(a, b); }
};
struct Min {
  static LOLA_DEVICE float of(float a, float b) { return fminf(a, b); }
};

// Over lanes whose number differs in the bits First, 2 First, .. below End.
template <typename Op, int First = 1, int End = kWarp>
LOLA_DEVICE float reduce(float x) {
#pragma unroll
  for (int offset = First; offset < End; offset *= 2) {
    x = Op::of(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

// phi[0 .. 2F) = max(concat(softmax(y), softmax(-y)), kFeatureFloor) by one warp; phi may start at
// y.
LOLA_DEVICE void feature_map(const float* y, int F, float* phi, int lane) {
  float high = kMinusInf, low = -kMinusInf, up = 0, down = 0;
  for (int f = lane; f < F; f += kWarp) {
    high = fmaxf(high, y[f]);
    low = fminf(low, y[f]);
  }
  high = reduce<Max>(high);
  low = reduce<Min>(low);
  for (int f = lane; f < F; f += kWarp) {
    up += expf(y[f] - high);
    down += expf(low - y[f]);
  }
  up = 1.0f / reduce<Sum>(up);
  down = 1.0f / reduce<Sum>(down);
  for (int f = lane; f < F; f += kWarp) {
    const float x = y[f];
    phi[F + f] = fmaxf(expf(low - x) * down, kFeatureFloor<float>);
    phi[f] = fmaxf(expf(x - high) * up, kFeatureFloor<float>);
  }
}

// The same number, which the compiler does not know to be the same: what follows from it is
// computed anew where it is used, and takes no registers until then.
LOLA_DEVICE int anew(int x) {
#ifndef LOLA_EMULATE
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// --- launch ---

#ifndef LOLA_EMULATE

// Shared memory a block may have without asking.
constexpr std::size_t kDefaultShared = 48 * 1024;

inline void check(cudaError_t error, const char* what) {
  LOLA_CHECK(error == cudaSuccess, what, ": CUDA says \"", cudaGetErrorString(error), "\"");
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "lola: current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "lola: device attribute");
  return value;
}

inline int num_processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Runs a kernel on a stream; its launch, not its run, is checked here.
template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), dim3 grid, int threads, std::size_t shared,
            cudaStream_t stream, Args... args) {
  if (shared > kDefaultShared) {
    const auto limit =
        static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    LOLA_CHECK(shared <= limit, name, ": needs ", shared, " bytes of shared memory, a block of ",
               "this device has ", limit, "; it grows with the head size and feature_dim");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          name);
  }
  kernel<<<grid, threads, shared, stream>>>(args...);
  check(cudaGetLastError(), name);
}

#endif

}  // namespace cuda
}  // namespace lola
