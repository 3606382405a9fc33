// Memory of an update between its launches: what the blocks that score leave for the block that
// chooses and folds.
#pragma once

#include "cuda/page.cuh"

namespace lola {
namespace cuda {

// Of one row and set.
struct UpdateScratch {
  float* scores;          // [lam + interval], by candidate
  float* importance;      // [interval], of the evicted ones, where pairs are weighted
  int *folded, *arrived;  // [interval], candidates to fold, and evicted ones to keep, in order

  LOLA_DEVICE UpdateScratch(const Group& p, int64_t row, int set) {
    const int64_t interval = p.layout.update_interval;
    int* const lists = p.lists + (row * p.layer_sets() + p.first_set + set) * p.list_stride;
    scores = reinterpret_cast<float*>(lists);
    importance = scores + p.sparse_cache_size() + interval;
    folded = reinterpret_cast<int*>(importance + interval);
    arrived = folded + interval;
  }

  static constexpr int64_t size(const PageLayout& x) {
    return x.sparse_cache_size + 4 * x.update_interval;
  }
};

}  // namespace cuda
}  // namespace lola
