// Element types and their arithmetic, for the device and for the host alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../cpu/kernels.h"

#ifdef __CUDACC__
#define PAT_BOTH __host__ __device__ __forceinline__
#else
#define PAT_BOTH inline
#endif

namespace pat::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename accumulator<T>::type;

#ifndef __CUDA_ARCH__
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 0 ? std::ldexp(float(mantissa), -24) : std::ldexp(float(1024 + mantissa), exponent - 25);
  if (exponent == 31) value = mantissa != 0 ? NAN : INFINITY;
  return bits & 0x8000 ? -value : value;
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  if (size < 0x1p-14f) exponent = -13;  // denormals share the least exponent
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 13) << 10) + mantissa));
}
#endif

PAT_BOTH float load(float x) { return x; }
PAT_BOTH double load(double x) { return x; }
PAT_BOTH float load(bf16 x) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
#else
  return float_of(static_cast<uint32_t>(x.bits) << 16);
#endif
}
PAT_BOTH float load(f16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  return half_to_float(x.bits);
#endif
}

PAT_BOTH void store(float& to, float x) { to = x; }
PAT_BOTH void store(double& to, double x) { to = x; }
PAT_BOTH void store(bf16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t u = bits_of(x);
  to.bits = static_cast<uint16_t>(std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
}
PAT_BOTH void store(f16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = float_to_half(x);
#endif
}

// What is summed: one kernel for each kind. Telling products apart is cheap beside reading two tensors; the usual sums
// of one would be bound by it, and `pow` is long.
enum Kind { kSizes, kSquares, kPowers, kProducts };

constexpr Kind kind_of(Func f) {
  return f == kAbs ? kSizes : f == kSquare ? kSquares : f == kPower ? kPowers : kProducts;
}

template <Kind kKind, class A>
PAT_BOTH A value(Func f, A x, A y, A p) {
  if constexpr (kKind == kSizes) {
    return std::fabs(x);
  } else if constexpr (kKind == kSquares) {
    return x * x;
  } else if constexpr (kKind == kPowers) {
    return std::pow(std::fabs(x), p);
  } else {
    const A xy = x * y;
    return f == kSqMul ? x * xy : f == kAbsMul ? std::fabs(xy) : xy;
  }
}

// Calls body with the constant that a kind is.
template <class Body>
void with_kind(Kind kind, const Body& body) {
  if (kind == kSizes) body(std::integral_constant<Kind, kSizes>{});
  else if (kind == kSquares) body(std::integral_constant<Kind, kSquares>{});
  else if (kind == kPowers) body(std::integral_constant<Kind, kPowers>{});
  else body(std::integral_constant<Kind, kProducts>{});
}

// Calls body(T{}) with the element type that a code stands for.
template <class Body>
void with_dtype(DType dtype, const Body& body) {
  if (dtype == kF32) body(float{});
  else if (dtype == kF64) body(double{});
  else if (dtype == kBF16) body(bf16{});
  else body(f16{});
}

}  // namespace pat::cuda
