// The entry points of the kernels for the instruction set that a source names (cpu/target.h): each
// set is compiled in a source of its own, so that a build uses several cores.
#pragma once

#include "cpu/decode.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/prefill.h"
#include "cpu/target.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

template <DType D>
int64_t decode_bytes(const Call& call) {
  Workspace counted(nullptr);
  const DecodeWorkspace<Compute<D>> x(call.layout, counted);
  return counted.bytes();
}

template <DType D>
int64_t attend_bytes(const Call& call) {
  Workspace counted(nullptr);
  const PrefillWorkspace<Compute<D>> x(call, counted);
  return counted.bytes();
}

template <DType D>
int64_t update_bytes(const Call& call) {
  return open_updates<Compute<D>>(call, nullptr);
}

template <DType D>
void open(const Call& call, char* workspace) {
  open_updates<Compute<D>>(call, workspace);
}

template <DType D>
constexpr Kernels kKernels = {
    decode_bytes<D>,          decode_items<D>,          decode_tokens<D>, max_block,
    attend_bytes<D>,          attend_block<Compute<D>>, update_bytes<D>,  open<D>,
    decide_chunk<Compute<D>>, commit_chunk<Compute<D>>, multiply};

}  // namespace

// The one place where kernels are chosen by dtype.
const Kernels& kernels(DType kv_dtype) {
  switch (kv_dtype) {
    case DType::f64:
      return kKernels<DType::f64>;
    case DType::bf16:
      return kKernels<DType::bf16>;
    default:
      return kKernels<DType::f32>;
  }
}

}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
