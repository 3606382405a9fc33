// Working memory of one thread for the length of one parallel region.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

namespace lola {

// Zeroed, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : data_(::operator new(bytes, kAlign)) {
    std::memset(data_, 0, bytes);
  }
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  void* data_;
};

}  // namespace lola
