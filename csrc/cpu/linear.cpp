#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"
#include "cpu/ops_cpu.h"

namespace lola {

void linear_cpu(const Linear& call) {
  const int64_t blocks = (call.rows + kRowBlock - 1) / kRowBlock;
  const Kernels& ops = kernels(DType::f32);
  torch::stable::parallel_for(0, blocks * (call.N / kPanel), 1,
                              [&](int64_t begin, int64_t end) { ops.multiply(call, begin, end); });
}

}  // namespace lola
