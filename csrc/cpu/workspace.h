// How kernels divide one block of memory into the arrays that they need.
#pragma once

#include <cstdint>

#if defined(LOLA_SANITIZE)
#include <sanitizer/asan_interface.h>
#endif

namespace lola {

// Takes arrays from a block of memory, each from a cache line on. Without memory (null) every array
// is null, and only `bytes()` counts. The memory is not cleared. In a build with sanitizers a fence
// follows every array, which nothing may touch.
class Workspace {
 public:
  explicit Workspace(char* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    char* const array = memory_ == nullptr ? nullptr : memory_ + bytes_;
    const int64_t size = count * static_cast<int64_t>(sizeof(T));
    bytes_ += (size + 63) / 64 * 64;
#if defined(LOLA_SANITIZE)
    bytes_ += 64;
    if (array != nullptr) {
      ASAN_POISON_MEMORY_REGION(array + size,
                                static_cast<std::size_t>(memory_ + bytes_ - (array + size)));
    }
#endif
    return reinterpret_cast<T*>(array);
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace lola
