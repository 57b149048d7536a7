// What the engine and the ISA-specific kernels say to each other. Plain C types only: this header is
// compiled with several instruction sets, and no inline function may be shared between them.
#pragma once

#include <stdint.h>

namespace pat {

enum DType { kF32, kF64, kBF16, kF16, kDTypes };
enum Func { kAbs, kSquare, kPower, kMul, kAbsMul, kSqMul, kFuncs };

// A block of rows of a tile. A row is `outer` runs of `inner` elements. Strides are in elements.
struct Rows {
  int64_t n, stride;
  int64_t outer, outer_stride;
  int64_t inner, inner_stride;
};

// Sums, coefficients and scales are double for kF64 and float for the other dtypes. A vector over the
// elements of a row is [outer * inner]; a vector over rows is [n]. Both may be null.
struct Kernels {
  // row_sums[r] += sum over the row; acc[j] += sum over the rows.
  void (*reduce[kDTypes][kFuncs])(const void* x, const void* y, const Rows* rows, double p, void* row_sums, void* acc);
  // y += (row_coef[r] + col_coef[j]) * x; null counts as 0.
  void (*axpy[kDTypes])(void* y, const void* x, const Rows* rows, const void* row_coef, const void* col_coef);
  // x *= row_scale[r] * col_scale[j]; null counts as 1; a product of 0 writes 0.
  void (*scale[kDTypes])(void* x, const Rows* rows, const void* row_scale, const void* col_scale);
  // Copies those of `length` words of 4 bytes whose bit is set in masks [ceil(length / 16)] to `to`, which has room for
  // as many and maybe more, and is changed behind them; returns how many they are. What lies at `ahead`, as long, is
  // fetched meanwhile. Null where the instruction set has nothing for it.
  int64_t (*compress)(uint32_t* to, int64_t room, const uint32_t* from, int64_t length, const uint16_t* masks,
                      const uint32_t* ahead);
  // Copies whole lines of 64 bytes to where a line begins, past the caches; others see them after `fence`, called by
  // the same thread. Null where the instruction set has nothing for it.
  void (*stream)(void* to, const void* from, int64_t bytes);
  void (*fence)();
};

const Kernels* kernels_base();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#endif

}  // namespace pat
