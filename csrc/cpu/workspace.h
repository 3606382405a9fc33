// Working memory of a thread, kept from call to call: a decode step makes one call per layer, and
// fresh memory would cost more page faults than the step computes.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

namespace lola {

class Scratch {
 public:
  // At least `bytes`, aligned to a cache line. Holds whatever the last call left; zero when new, so
  // that padding which no kernel writes is finite.
  static void* of_thread(std::size_t bytes) {
    thread_local Scratch scratch;
    return scratch.at_least(bytes);
  }

  // The same for what the threads of a call share: memory of the thread that makes the call.
  static void* of_call(std::size_t bytes) {
    thread_local Scratch scratch;
    return scratch.at_least(bytes);
  }

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  static constexpr std::align_val_t kAlign{64};

  Scratch() = default;
  ~Scratch() { ::operator delete(data_, kAlign); }

  void* at_least(std::size_t bytes) {
    if (bytes > bytes_) grow(bytes);
    return data_;
  }

  void grow(std::size_t bytes) {
    ::operator delete(data_, kAlign);
    data_ = nullptr;
    bytes_ = 0;
    data_ = ::operator new(bytes, kAlign);
    bytes_ = bytes;
    std::memset(data_, 0, bytes);
  }

  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace lola
