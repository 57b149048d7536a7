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

// Rows of words of `size` bytes, 2 or 4, `stride` bytes apart, in tensors whose rows have so many bytes. Of the rows
// those in rows [n] stay (null: the first n), of each of their `length` words the `kept` ones whose bit is set in masks
// [ceil(length / 16)].
struct Words {
  const char* from;
  int64_t stride, bytes, size;
  const int32_t* rows;
  int64_t n, length, kept;
  const uint16_t* masks;
};

// So many bytes before a row is copied, in whole rows, all of its lines are asked for, and still earlier the first
// ones: the processor cannot know which rows stay, but goes on by itself where it has seen one begin.
constexpr int64_t kNearBytes = 4096, kFarBytes = 8192;

// Asks for the first lines of a row. GCC leaves calls of it out, as of a function without effect, unless it is inlined.
static inline __attribute__((always_inline)) void expect_row(const char* row) {
  __builtin_prefetch(row);
  __builtin_prefetch(row + 64);
}

// The processor does not go on by itself from one page to the next.
constexpr int64_t kPage = 4096;

// Asks for what comes behind a line of memory that is read from end to end: a line some way ahead; and where a page
// begins, its first two lines still earlier.
static inline __attribute__((always_inline)) void expect_line(const char* line) {
  __builtin_prefetch(line + 6144);
  if (((uintptr_t)line & (kPage - 1)) < 128) __builtin_prefetch(line + 24576);
}

// The same for memory that is read and written, which gains by pages alone: the first lines of the third behind this
// one.
constexpr int64_t kSoon = 3 * kPage;
static inline __attribute__((always_inline)) void expect_page(const void* at) {
  expect_row((const char*)((uintptr_t)at & ~(uintptr_t)(kPage - 1)) + kSoon);
}

// Sums, coefficients and scales are double for kF64 and float for the other dtypes. A vector over the
// elements of a row is [outer * inner]; a vector over rows is [n]. Both may be null.
struct Kernels {
  // row_sums[r] += sum over the row; acc[j] += sum over the rows.
  void (*reduce[kDTypes][kFuncs])(const void* x, const void* y, const Rows* rows, double p, void* row_sums, void* acc);
  // y += (row_coef[r] + col_coef[j]) * x; null counts as 0.
  void (*axpy[kDTypes])(void* y, const void* x, const Rows* rows, const void* row_coef, const void* col_coef);
  // x *= row_scale[r] * col_scale[j]; null counts as 1; a product of 0 writes 0.
  void (*scale[kDTypes])(void* x, const Rows* rows, const void* row_scale, const void* col_scale);
  // Copies what stays of the rows [r0, r1) of those that stay, to rows `stride` bytes apart. Null where the instruction
  // set has nothing for it.
  void (*compress)(const Words* x, int64_t r0, int64_t r1, char* to, int64_t stride);
  // The same to rows that lie one behind the other, past the caches; others see them at the end.
  void (*compress_past)(const Words* x, int64_t r0, int64_t r1, char* to);
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
