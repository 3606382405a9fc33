// Rows of numbers: conversion, copies, and padding to whole vectors.
#pragma once

#include "cpu/simd.h"
#include "layout.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// dst[0 .. padded) = src[0 .. n) converted, then zeros.
template <typename T>
LOLA_INLINE void load_row(T* dst, const char* src, DType dtype, int64_t n, int64_t padded) {
  int64_t i = 0;
  if (dtype == DType::bf16) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(src);
    if constexpr (sizeof(T) == 4) {
      for (; i + kLanes<T> <= n; i += kLanes<T>) store<T>(dst + i, load_bf16(p + i));
    }
    for (; i < n; ++i) dst[i] = static_cast<T>(bf16_to_float(p[i]));
  } else if (dtype == DType::f32) {
    const float* p = reinterpret_cast<const float*>(src);
    for (; i < n; ++i) dst[i] = static_cast<T>(p[i]);
  } else if (dtype == DType::i8) {
    const int8_t* p = reinterpret_cast<const int8_t*>(src);
    for (; i + kLanes<T> <= n; i += kLanes<T>) store<T>(dst + i, load_bytes<T>(p + i));
    for (; i < n; ++i) dst[i] = static_cast<T>(p[i]);
  } else {
    const double* p = reinterpret_cast<const double*>(src);
    for (; i < n; ++i) dst[i] = static_cast<T>(p[i]);
  }
  for (; i < padded; ++i) dst[i] = 0;
}

// dst[0 .. n) = src[0 .. n) rounded to dtype.
template <typename T>
LOLA_INLINE void store_row(char* dst, const T* src, DType dtype, int64_t n) {
  int64_t i = 0;
  if (dtype == DType::bf16) {
    uint16_t* p = reinterpret_cast<uint16_t*>(dst);
    if constexpr (sizeof(T) == 4) {
      for (; i + kLanes<T> <= n; i += kLanes<T>) store_bf16(p + i, load<T>(src + i));
    }
    for (; i < n; ++i) p[i] = float_to_bf16(static_cast<float>(src[i]));
  } else if (dtype == DType::f32) {
    float* p = reinterpret_cast<float*>(dst);
    for (; i < n; ++i) p[i] = static_cast<float>(src[i]);
  } else {
    double* p = reinterpret_cast<double*>(dst);
    for (; i < n; ++i) p[i] = static_cast<double>(src[i]);
  }
}

// dst[0 .. padded) = src[0 .. n), then zeros.
template <typename T>
LOLA_INLINE void load_padded(T* dst, const T* src, int64_t n, int64_t padded) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
  for (int64_t i = n; i < padded; ++i) dst[i] = 0;
}

inline void copy_bytes(void* dst, const void* src, int64_t bytes) {
  __builtin_memcpy(dst, src, static_cast<unsigned long>(bytes));
}

template <typename T>
LOLA_INLINE void copy_row(T* dst, const T* src, int64_t n) {
  copy_bytes(dst, src, n * static_cast<int64_t>(sizeof(T)));
}

// The length of a padded row.
template <typename T>
LOLA_INLINE T norm(const T* x, int64_t padded) {
  Vec<T> sum{};
  for (int64_t i = 0; i < padded; i += kLanes<T>) {
    const Vec<T> a = load(x + i);
    sum = fma(a, a, sum);
  }
  return __builtin_sqrt(reduce<Sum>(sum));
}

// A matrix [rows, columns] with rows of round_up(columns) numbers: the source itself where its rows
// are that already, else a copy in `copy`, which must have room for it.
template <typename T>
const T* padded_matrix(const T* src, int64_t rows, int64_t columns, T* copy) {
  const int64_t padded = round_up<T>(columns);
  if (columns == padded) return src;
  for (int64_t i = 0; i < rows; ++i) {
    load_padded(copy + i * padded, src + i * columns, columns, padded);
  }
  return copy;
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
