// Kernel body of decode, update and prefill, and their entry points per instruction set.
// Included by for_each_isa.h, once per instruction set.
#include "cpu/recall_kernel.h"
// Each of these uses the ones before it.
#include "cpu/rows_kernel.h"
//
#include "cpu/candidates_kernel.h"
//
#include "cpu/bounds_kernel.h"
//
#include "cpu/update_kernel.h"
//
#include "cpu/incremental_kernel.h"
//
#if LOLA_BF16_DOTS
#include "cpu/decode_dots_kernel.h"
#endif
//
#include "cpu/decode_kernel.h"
//
#if LOLA_BF16_DOTS
#include "cpu/prefill_dots_kernel.h"
#endif
//
#include "cpu/prefill_kernel.h"

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
  for (int64_t turn = turns.take(); turn < turns.count;) {
    const int64_t first = turn * turns.items, left = items - first;
    const int64_t count = left < turns.items ? left : turns.items;
    DecodeItem own[kTurnItems];
    for (int64_t i = 0; i < count; ++i) own[i] = decode_item(a, first + i, seq_lens);
    int64_t next_turn = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!x.ahead.asked && own[i].page > 0) announce(a, own[i], true, x.ahead);
      int64_t next = first + i + 1;
      if (i + 1 == count) {
        next_turn = turns.take();
        next = next_turn * turns.items;
      }
      if (next < items) {
        const DecodeItem coming = decode_item(a, next, seq_lens);
        if (coming.page > 0) announce(a, coming, false, x.ahead);
      }
      if (i == 0) map_queries(a, own, count, x);
      decode_one<T>(a, own[i], phi_of(a, i, x), x);
      x.ahead.asked = x.ahead.asked || own[i].page > 0;
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

template <typename T>
struct StreamScratch {
  PrefillScratch<T> prefill;
  UpdateScratch<T> update;
  Features<T>* features;  // of each sparse set of a KV head
  Bounds<T>* bounds;      // likewise
};

template <typename T>
int64_t carve_stream(const LolaArgs& a, char* base, StreamScratch<T>* x) {
  int64_t used = carve_prefill<T>(a, base, &x->prefill);
  used += carve_update<T>(a, true, base == nullptr ? nullptr : base + used, &x->update);
  x->features = take_as<Features<T>>(base, a.Hg / a.Hkv, &used);
  x->bounds = take_as<Bounds<T>>(base, a.Hg / a.Hkv, &used);
  for (int64_t i = 0; i < a.Hg / a.Hkv; ++i) {
    Bounds<T> b;
    used += carve_bounds<T>(a, base == nullptr ? nullptr : base + used, &b);
    if (base != nullptr) x->bounds[i] = b;
    T* const rows = take_as<T>(base, a.incremental ? 0 : Features<T>::size(a), &used);
    if (base != nullptr) x->features[i] = {rows, 0};
  }
  return used;
}

// A run of one KV head from its first piece to its last, with no other thread to wait for.
template <typename T>
void stream_items(const LolaArgs& a, const Sequence* runs, int64_t begin, int64_t end,
                  char* memory) {
  StreamScratch<T> x;
  carve_stream<T>(a, memory, &x);
  const int64_t sets = a.Hg / a.Hkv;
  const int64_t block = query_block(a);
  for (int64_t item = begin; item < end; ++item) {
    const Sequence& run = runs[item / a.Hkv];
    const int64_t kv = item % a.Hkv;
    for (int64_t i = 0; i < sets; ++i) x.features[i].known = x.bounds[i].known = 0;
    for (int64_t done = 0; done < run.count;) {
      const Sequence piece = next_piece(a, run, done);
      write_pairs(a, piece, kv);
      for (int64_t set = kv * sets; set < (kv + 1) * sets; ++set) {
        for (int64_t first = 0; first < piece.count; first += block) {
          attend_block<T>(a, attend_item(piece, set, first, block), x.prefill);
        }
        const int64_t n = piece.position + piece.count;
        if (a.update_due(n)) {
          const int64_t i = set - kv * sets;
          Bounds<T>* const bounds = bounds_hold<T>(a) ? x.bounds + i : nullptr;
          update_set<T>(a, piece.page, set, n, x.features[i], bounds, x.update);
        }
      }
      done += piece.count;
    }
  }
}

template <typename T>
void attend_items(const LolaArgs& a, const AttendItem* items, int64_t begin, int64_t end,
                  char* memory) {
  PrefillScratch<T> x;
  carve_prefill<T>(a, memory, &x);
  for (int64_t i = begin; i < end; ++i) attend_block<T>(a, items[i], x);
}

template <typename T>
void update_items(const LolaArgs& a, const Sequence* sequences, int64_t begin, int64_t end,
                  char* memory) {
  UpdateScratch<T> x;
  carve_update<T>(a, false, memory, &x);
  for (int64_t item = begin; item < end; ++item) {
    const Sequence& s = sequences[item / a.Hg];
    update_alone<T>(a, s.page, item % a.Hg, s.position + s.count, x);
  }
}

template <typename T>
int64_t scratch_of(const LolaArgs& a, Phase phase) {
  DecodeScratch<T> decode;
  StreamScratch<T> stream;
  PrefillScratch<T> prefill;
  UpdateScratch<T> update;
  switch (phase) {
    case Phase::decode:
      return carve_decode<T>(a, nullptr, &decode);
    case Phase::stream:
      return carve_stream<T>(a, nullptr, &stream);
    case Phase::attend:
      return carve_prefill<T>(a, nullptr, &prefill);
    default:
      return carve_update<T>(a, false, nullptr, &update);
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

void stream_run(const LolaArgs& a, const Sequence* s, int64_t begin, int64_t end, char* memory) {
  if (a.exact_k.dtype == DType::f64) {
    stream_items<double>(a, s, begin, end, memory);
  } else {
    stream_items<float>(a, s, begin, end, memory);
  }
}

void attend_run(const LolaArgs& a, const AttendItem* items, int64_t begin, int64_t end,
                char* memory) {
  if (a.exact_k.dtype == DType::f64) {
    attend_items<double>(a, items, begin, end, memory);
  } else {
    attend_items<float>(a, items, begin, end, memory);
  }
}

void update_run(const LolaArgs& a, const Sequence* s, int64_t begin, int64_t end, char* memory) {
  if (a.exact_k.dtype == DType::f64) {
    update_items<double>(a, s, begin, end, memory);
  } else {
    update_items<float>(a, s, begin, end, memory);
  }
}

}  // namespace LOLA_ISA
}  // namespace lola
