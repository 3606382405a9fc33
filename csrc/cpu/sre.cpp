#include "cpu/sre.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/scratch.h"

#define LOLA_KERNEL_BODY "cpu/sre_kernel.h"
#include "cpu/for_each_isa.h"

namespace lola {
namespace {

// Candidates per work item: a multiple of every tile height, small enough that a block's features
// stay in L2 and that a few rows already fill the threads.
constexpr int64_t kBlock = 48;

// Multiply-adds below which a second thread costs more to wake than it saves.
constexpr int64_t kThreadWork = 2'000'000;

}  // namespace

void sre_scores_cpu(const SreArgs& args) {
  const Isa isa = cpu_isa();
  const auto scratch = isa >= Isa::avx512 ? avx512::sre_scratch
                       : isa == Isa::avx2 ? avx2::sre_scratch
                                          : baseline::sre_scratch;
  const auto run = isa >= Isa::avx512 ? avx512::sre_run
                   : isa == Isa::avx2 ? avx2::sre_run
                                      : baseline::sre_run;

  const int64_t block = std::min(kBlock, args.E);
  const int64_t items = args.B * args.Hg * ((args.E + block - 1) / block);
  const int64_t item_work = block * (args.Hs / args.Hg) * args.d * args.F * 3;
  const int64_t element = args.k.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  const int64_t bytes = scratch(args, block) * element;
  torch::stable::parallel_for(
      0, items, std::max<int64_t>(1, kThreadWork / item_work), [&](int64_t begin, int64_t end) {
        run(args, block, begin, end, Scratch::of_thread(static_cast<std::size_t>(bytes)));
      });
}

}  // namespace lola
