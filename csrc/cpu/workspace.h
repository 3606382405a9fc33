// How kernels divide one block of memory into the arrays that they need.
#pragma once

#include <cstdint>

namespace lola {

// Takes arrays from a block of memory, each from a cache line on. Without memory (null) every array
// is null, and only `bytes()` counts. The memory is not cleared.
class Workspace {
 public:
  explicit Workspace(char* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    char* const array = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(array);
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace lola
