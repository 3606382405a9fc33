// Blocks of queries that prefill answers at once.
#pragma once

#include <cstdint>

#include "cpu/call.h"

namespace lola {

// Queries `first` .. `first + count` of a chunk, and the sparse set whose heads ask. A chunk lies
// within one update interval.
struct QueryBlock {
  Page page;
  int64_t set;
  int64_t token;     // row of the block's first query in q and out
  int64_t position;  // where the chunk starts
  int64_t first, count;

  // Pairs of the cache that the queries see, and the first position of their window.
  int64_t cached() const { return page.layout->num_sparse(position); }
  int64_t window_start() const { return page.layout->window_start(position); }
  // Positions up to here the last query sees.
  int64_t end() const { return position + first + count; }
  int64_t sinks() const {
    const int64_t sink = page.layout->sink_size;
    return end() < sink ? end() : sink;
  }
};

}  // namespace lola
