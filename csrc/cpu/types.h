// Plain descriptions of tensors, free of torch, so that kernel bodies can be compiled once per
// instruction set without pulling library code into those builds.
#pragma once

#include <cstdint>

#include "layout.h"

namespace lola {

// A strided tensor of R dimensions whose last one is contiguous. Strides are in elements; offsets
// are 64-bit because a pool of pages exceeds 2^31 bytes soon.
template <int R>
struct Strided {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[R] = {};

  template <typename... I>
  char* at(I... index) const {
    static_assert(sizeof...(I) <= R);
    int64_t offset = 0;
    int i = 0;
    ((offset += static_cast<int64_t>(index) * stride[i++]), ...);
    return data + offset * size_of(dtype);
  }
};

}  // namespace lola
