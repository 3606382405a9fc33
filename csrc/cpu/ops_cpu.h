// Decode and prefill on the CPU: how the work of a call is divided among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/call.h"
#include "cpu/kernels.h"

namespace lola {

// The calls are of the pages of a layer: of one, or of one for each KV head. They differ in heads
// and sizes of sparse sets alone.

// One token per row, `seq_lens` [rows] counts it.
void decode_cpu(const std::vector<Call>& calls, int64_t rows, const Indices& seq_lens);

// Row r holds the tokens query_start_loc[r] .. query_start_loc[r + 1], after context_lens[r].
void prefill_cpu(const std::vector<Call>& calls, int64_t rows, const Indices& query_start_loc,
                 const Indices& context_lens);

void linear_cpu(const Linear& call);

}  // namespace lola
