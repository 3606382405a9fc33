// CUDA without a GPU: the kernels as plain C++, for tests of their arithmetic and their barriers.
//
// A block runs on one OS thread; its CUDA threads are fibers that switch only at barriers and warp
// exchanges. Warps and lanes take turns in random order and a warp runs as far as it can, so that a
// missing barrier shows as a wrong result. Blocks run in random order. Shared memory starts as NaN
// and ends in a guard that is checked. Launches are counted, and can be captured as in a CUDA
// graph: then nothing runs until a replay, which shows what the host has read of the device's data.
// What this cannot show: hardware limits, races of blocks.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "checks.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LOLA_SHARED(name) char* const name = lola::emulate::shared_memory

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace lola {
namespace emulate {

constexpr std::size_t kStack = 128 * 1024, kGuard = 64;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t values[2][32];  // two exchanges: one may still be read when the next is written
};

struct Fiber {
  ucontext_t entry;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool started, done;
  unsigned parity;
};

inline char* shared_memory = nullptr;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline jmp_buf scheduler;
inline Fiber* current = nullptr;
inline uint64_t progress = 0;  // barrier arrivals and exits: a pass without any changed nothing
inline void (*run_body)(void*) = nullptr;
inline void* body = nullptr;
inline std::mt19937 random{20240601};
inline int64_t launches = 0;  // so far
inline bool capturing = false;
inline std::vector<std::function<void()>> graph;  // what a replay does

__attribute__((noinline)) inline void yield() {
  if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned expected) {
  ++progress;
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (*const_cast<volatile unsigned*>(&barrier.generation) == generation) yield();
}

inline void fiber_main() {
  run_body(body);
  current->done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(unsigned thread) {
  threadIdx = dim3(thread);
  current = &fibers[thread];
  if (_setjmp(scheduler) == 0) {
    if (current->started) _longjmp(current->state, 1);
    current->started = true;
    setcontext(&current->entry);
  }
}

// Runs every lane of a warp once, from a random one on, up or down; whether any of them moved on.
inline bool run_warp(unsigned warp, unsigned threads) {
  const uint64_t before = progress;
  const unsigned first = warp * 32, lanes = std::min(32u, threads - first);
  const auto choice = static_cast<unsigned>(random());
  for (unsigned i = 0; i < lanes; ++i) {
    const unsigned step = choice % 2 ? i : lanes - 1 - i;
    const unsigned thread = first + (choice / 2 + step) % lanes;
    if (!fibers[thread].done) resume(thread);
  }
  return progress != before;
}

// A warp runs until it waits for others, so that the warps are as far apart as barriers allow.
inline void run_block(unsigned threads) {
  block_barrier = {};
  warps.assign((threads + 31) / 32, Warp{});
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, fiber_main, 0);
    fiber.started = fiber.done = false;
    fiber.parity = 0;
  }
  std::vector<unsigned> order(warps.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (bool moved = true; moved;) {
    moved = false;
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned warp : order) {
      while (run_warp(warp, threads)) moved = true;
    }
  }
  for (unsigned i = 0; i < threads; ++i) {
    LOLA_CHECK(fibers[i].done, "emulation: thread ", i, " waits at a barrier that others do not ",
               "reach");
  }
}

inline uint32_t exchange(uint32_t mine, unsigned from) {
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned parity = current->parity++ % 2;
  warp.values[parity][threadIdx.x % 32] = mine;
  wait(warp.barrier, 32);
  return warp.values[parity][from];
}

template <typename To, typename From>
To bits_of(From x) {
  To y;
  static_assert(sizeof y == sizeof x);
  std::memcpy(&y, &x, sizeof y);
  return y;
}

}  // namespace emulate
}  // namespace lola

// --- intrinsics ---

inline void __syncthreads() { lola::emulate::wait(lola::emulate::block_barrier, blockDim.x); }
inline void __syncwarp() {
  lola::emulate::wait(lola::emulate::warps[threadIdx.x / 32].barrier, 32);
}
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  using namespace lola::emulate;
  return bits_of<float>(exchange(bits_of<uint32_t>(x), threadIdx.x % 32 ^ mask));
}
inline int __shfl_up_sync(unsigned, int x, unsigned by) {
  using namespace lola::emulate;
  const unsigned lane = threadIdx.x % 32;
  return bits_of<int>(exchange(bits_of<uint32_t>(x), lane < by ? lane : lane - by));
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  lola::emulate::Warp& warp = lola::emulate::warps[threadIdx.x / 32];
  const unsigned parity = lola::emulate::current->parity % 2;
  lola::emulate::exchange(predicate, 0);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= warp.values[parity][i] << i;
  return votes;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}                                 // blocks run one after another
inline int atomicAdd(int* p, int x) { return (*p += x) - x; }  // fibers switch at barriers alone
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(unsigned x) { return lola::emulate::bits_of<float>(x); }
inline unsigned __float_as_uint(float x) { return lola::emulate::bits_of<unsigned>(x); }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = lola::emulate::bits_of<uint32_t>(x);
  const uint32_t rounded = x == x ? u + 0x7fff + (u >> 16 & 1) : u | 0x400000;
  return {static_cast<uint16_t>(rounded >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t x) { return {x}; }
inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(1024.0f + mantissa, exponent - 25);
  return h.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (!(magnitude < 65520.0f)) return {static_cast<uint16_t>(sign | (x == x ? 0x7c00 : 0x7e00))};
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const auto units = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A mantissa that rounds up to 2048 carries into the exponent by itself.
  return {static_cast<uint16_t>(sign | (units + (exponent + 14) * 1024))};
}

namespace lola {
namespace cuda {

// How many processors the launch geometry sees: small, so that tests reach splits and none.
inline int num_processors() {
  const char* text = std::getenv("LOLA_EMULATED_PROCESSORS");
  return text == nullptr ? 1 : std::atoi(text);
}

template <typename... Args>
void run(const char* name, void (*kernel)(Args...), dim3 grid, int threads, std::size_t shared,
         Args... args) {
  namespace em = lola::emulate;
  auto call = [&] { kernel(args...); };
  em::body = &call;
  em::run_body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  std::vector<uint4> memory((shared + em::kGuard) / sizeof(uint4) + 1);
  em::shared_memory = reinterpret_cast<char*>(memory.data());
  std::vector<unsigned> blocks(static_cast<std::size_t>(grid.x) * grid.y);
  for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<unsigned>(i);
  std::shuffle(blocks.begin(), blocks.end(), em::random);
  for (const unsigned block : blocks) {
    blockIdx = dim3(block % grid.x, block / grid.x);
    std::memset(em::shared_memory, 0xff, shared + em::kGuard);
    em::run_block(static_cast<unsigned>(threads));
    for (std::size_t i = shared; i < shared + em::kGuard; ++i) {
      LOLA_CHECK(em::shared_memory[i] == static_cast<char>(0xff), name,
                 ": wrote beyond its shared memory");
    }
  }
}

template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), dim3 grid, int threads, std::size_t shared,
            cudaStream_t, Args... args) {
  ++lola::emulate::launches;
  if (lola::emulate::capturing) {
    lola::emulate::graph.push_back([=] { run(name, kernel, grid, threads, shared, args...); });
  } else {
    run(name, kernel, grid, threads, shared, args...);
  }
}

}  // namespace cuda
}  // namespace lola
