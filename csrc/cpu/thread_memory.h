// Memory of a thread for workspaces, kept from call to call: a decode step makes one call per
// layer, and fresh memory would cost more page faults than the step computes.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(LOLA_SANITIZE)
#include <sanitizer/asan_interface.h>
#endif

namespace lola {

class ThreadMemory {
 public:
  // At least `bytes` for this thread alone, aligned to a cache line. Holds whatever the last call
  // left; zero when new, so that padding which no kernel writes is finite.
  static char* own(int64_t bytes) {
    thread_local ThreadMemory memory;
    return memory.at_least(bytes);
  }

  // The same for what the threads of a call share: memory of the thread that makes the call.
  static char* shared(int64_t bytes) {
    thread_local ThreadMemory memory;
    return memory.at_least(bytes);
  }

  ThreadMemory(const ThreadMemory&) = delete;
  ThreadMemory& operator=(const ThreadMemory&) = delete;

 private:
  static constexpr std::align_val_t kAlignment{64};

  ThreadMemory() = default;
  ~ThreadMemory() { release(); }

  char* at_least(int64_t bytes) {
    if (bytes > bytes_) grow(bytes);
#if defined(LOLA_SANITIZE)
    // NaN in every dtype: what a kernel has not written itself shows in its results.
    ASAN_UNPOISON_MEMORY_REGION(data_, static_cast<std::size_t>(bytes_));
    std::memset(data_, 0xff, static_cast<std::size_t>(bytes_));
#endif
    return static_cast<char*>(data_);
  }

  void release() {
#if defined(LOLA_SANITIZE)
    ASAN_UNPOISON_MEMORY_REGION(data_, static_cast<std::size_t>(bytes_));
#endif
    ::operator delete(data_, kAlignment);
    data_ = nullptr;
    bytes_ = 0;
  }

  void grow(int64_t bytes) {
    release();
    const auto size = static_cast<std::size_t>(bytes);
    data_ = ::operator new(size, kAlignment);
    bytes_ = bytes;
    std::memset(data_, 0, size);
  }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace lola
