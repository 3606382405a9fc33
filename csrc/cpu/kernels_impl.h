// Entry points of the kernels for the instruction set that the source names (cpu/target.h). A
// source of its own for each set, so that a build uses several cores.
#pragma once

#include "cpu/decode.h"
#include "cpu/kernels.h"
#include "cpu/prefill.h"
#include "cpu/target.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

template <typename T>
void decode_one(const LolaArgs& a, const DecodeItem& item, const T* phi, DecodeScratch<T>& x) {
  if (item.page <= 0) return zero_set(a, item.token, item.set);
  if constexpr (sizeof(T) == 8) {
    decode_set<T, DType::f64>(a, item, phi, x);
  } else if (a.exact_k.dtype == DType::bf16) {
    decode_set<T, DType::bf16>(a, item, phi, x);
  } else {
    decode_set<T, DType::f32>(a, item, phi, x);
  }
}

// Item i of a step: rows in order, of each one its sets. What a page holds of these lies side by
// side, so memory is read in long runs.
inline DecodeItem decode_item(const LolaArgs& a, int64_t i, const Indices& seq_lens) {
  const int64_t row = i / a.Hg;
  return {row, a.slots[row], i % a.Hg, seq_lens[row]};
}

// Works until no turn is left. The next turn is taken before the last item of one, so that memory
// can be asked for its pages in time.
template <typename T>
void decode_items(const LolaArgs& a, int64_t rows, const Indices& seq_lens, Turns& turns,
                  char* memory) {
  DecodeScratch<T> x;
  carve_decode<T>(a, memory, &x);
  const int64_t items = rows * a.Hg;
  int64_t reading = 0;  // bytes of the item at hand, once it was announced
  for (int64_t turn = turns.take(); turn < turns.count;) {
    const int64_t first = turn * turns.items, left = items - first;
    const int64_t count = left < turns.items ? left : turns.items;
    DecodeItem own[kTurnItems];
    for (int64_t i = 0; i < count; ++i) own[i] = decode_item(a, first + i, seq_lens);
    int64_t next_turn = 0;
    for (int64_t i = 0; i < count; ++i) {
      int64_t next = first + i + 1;
      if (i + 1 == count) {
        next_turn = turns.take();
        next = next_turn * turns.items;
      }
      if (reading == 0) reading = announce(a, own[i], x.ahead);
      const int64_t coming =
          next < items ? announce(a, decode_item(a, next, seq_lens), x.ahead) : 0;
      x.ahead.keep_lead(reading + coming);
      reading = coming;
      if (i == 0) map_queries(a, own, count, x);
      decode_one<T>(a, own[i], phi_of(a, i, x), x);
    }
    turns.finish();
    turn = next_turn;
  }
}

template <typename T>
void sequence_items(const LolaArgs& a, const Sequence* sequences, int64_t begin, int64_t end,
                    char* memory) {
  DecodeScratch<T> x;
  carve_decode<T>(a, memory, &x);
  const int64_t sets = a.Hg / a.Hkv;
  for (int64_t item = begin; item < end; ++item) {
    const Sequence& s = sequences[item / a.Hkv];
    const int64_t kv = item % a.Hkv;
    for (int64_t t = 0; t < s.count; ++t) {
      for (int64_t set = kv * sets; set < (kv + 1) * sets; ++set) {
        const DecodeItem item = {s.token + t, s.page, set, s.position + t + 1};
        map_queries(a, &item, 1, x);
        decode_one<T>(a, item, phi_of(a, 0, x), x);
      }
    }
  }
}

// What a lane of prefill (cpu/streams.h) keeps of each sparse set of its KV head.
template <typename T>
struct LaneSet {
  UpdateScratch<T> update;
  Features<T> features;
  Bounds<T> bounds;

  Bounds<T>* bounds_or_null(const LolaArgs& a) { return bounds_hold(a) ? &bounds : nullptr; }
};

// Divides a lane's memory, which begins with a LaneSet for each set; returns the bytes needed (with
// null: only that).
template <typename T>
int64_t open_lane(const LolaArgs& a, char* base) {
  int64_t used = 0;
  LaneSet<T>* const sets = take_as<LaneSet<T>>(base, a.Hg / a.Hkv, &used);
  for (int64_t i = 0; i < a.Hg / a.Hkv; ++i) {
    LaneSet<T> x;
    used += carve_update<T>(a, true, base == nullptr ? nullptr : base + used, &x.update);
    used += carve_bounds<T>(a, base == nullptr ? nullptr : base + used, &x.bounds);
    x.features = {take_as<T>(base, Features<T>::size(a), &used), 0};
    if (base != nullptr) sets[i] = x;
  }
  return used;
}

template <typename T>
void decide_piece(const LolaArgs& a, const Sequence& piece, int64_t set, char* lane) {
  LaneSet<T>& x = reinterpret_cast<LaneSet<T>*>(lane)[set % (a.Hg / a.Hkv)];
  decide_update<T>(a, piece.page, set, piece.position + piece.count, x.features,
                   x.bounds_or_null(a), x.update);
}

template <typename T>
void commit_piece(const LolaArgs& a, const Sequence& piece, int64_t kv, char* lane) {
  const int64_t sets = a.Hg / a.Hkv;
  for (int64_t i = 0; i < sets; ++i) {
    LaneSet<T>& x = reinterpret_cast<LaneSet<T>*>(lane)[i];
    commit_update<T>(a, piece.page, kv * sets + i, piece.position + piece.count, x.features,
                     x.bounds_or_null(a), x.update);
  }
}

template <typename T>
void attend_item_in(const LolaArgs& a, const AttendItem& item, char* memory) {
  PrefillScratch<T> x;
  carve_prefill<T>(a, memory, &x);
  attend_block<T>(a, item, x);
}

template <typename T>
int64_t scratch_of(const LolaArgs& a, Phase phase) {
  DecodeScratch<T> decode;
  PrefillScratch<T> prefill;
  switch (phase) {
    case Phase::decode:
      return carve_decode<T>(a, nullptr, &decode);
    case Phase::attend:
      return carve_prefill<T>(a, nullptr, &prefill);
    default:
      return open_lane<T>(a, nullptr);
  }
}

}  // namespace

int64_t lola_scratch(const LolaArgs& a, Phase phase) {
  return a.exact_k.dtype == DType::f64 ? scratch_of<double>(a, phase) : scratch_of<float>(a, phase);
}

void decode_run(const LolaArgs& a, int64_t rows, const Indices& seq_lens, Turns& turns,
                char* memory) {
  if (a.exact_k.dtype == DType::f64) {
    decode_items<double>(a, rows, seq_lens, turns, memory);
  } else {
    decode_items<float>(a, rows, seq_lens, turns, memory);
  }
}

void sequence_run(const LolaArgs& a, const Sequence* s, int64_t begin, int64_t end, char* memory) {
  if (a.exact_k.dtype == DType::f64) {
    sequence_items<double>(a, s, begin, end, memory);
  } else {
    sequence_items<float>(a, s, begin, end, memory);
  }
}

void open_run(const LolaArgs& a, char* lane) {
  if (a.exact_k.dtype == DType::f64) {
    open_lane<double>(a, lane);
  } else {
    open_lane<float>(a, lane);
  }
}

void attend_run(const LolaArgs& a, const AttendItem& item, char* memory) {
  if (a.exact_k.dtype == DType::f64) {
    attend_item_in<double>(a, item, memory);
  } else {
    attend_item_in<float>(a, item, memory);
  }
}

void decide_run(const LolaArgs& a, const Sequence& piece, int64_t set, char* lane) {
  if (a.exact_k.dtype == DType::f64) {
    decide_piece<double>(a, piece, set, lane);
  } else {
    decide_piece<float>(a, piece, set, lane);
  }
}

void commit_run(const LolaArgs& a, const Sequence& piece, int64_t kv, char* lane) {
  if (a.exact_k.dtype == DType::f64) {
    commit_piece<double>(a, piece, kv, lane);
  } else {
    commit_piece<float>(a, piece, kv, lane);
  }
}

Kernels lola_kernels() {
  return {lola_scratch, decode_run, sequence_run, {open_run, attend_run, decide_run, commit_run}};
}

}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
