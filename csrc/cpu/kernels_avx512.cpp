#include <immintrin.h>

#include "kernels.h"
#include "stream.h"

namespace pat {
namespace {

void stream_lines(void* to, const void* from, int64_t bytes);
void fence();

struct Lines {
  static void stream(char* to, const char* from, int64_t bytes) { stream_lines(to, from, bytes); }
  static void fence() { pat::fence(); }
};

// Where the r-th of the rows that stay lies, and rows behind it.
class Places {
 public:
  explicit Places(const Words& x) : x_(x), near_(kNearBytes / x.bytes + 1), far_(kFarBytes / x.bytes + 1) {}

  const char* row(int64_t r) const {
    if (r >= x_.n) r = x_.n - 1;
    return x_.from + (x_.rows != nullptr ? x_.rows[r] : r) * x_.stride;
  }
  const char* near(int64_t r) const { return row(r + near_); }
  const char* far(int64_t r) const { return row(r + far_); }

 private:
  const Words& x_;
  const int64_t near_, far_;
};

inline __m512i kept(__mmask16 mask, const char* from) {
  return _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(from));
}

// Bits behind the last word are not set, and what no bit asks for is not read.
inline __m512i kept_of_last(__mmask16 mask, const char* from) {
  return _mm512_maskz_compress_epi32(mask, _mm512_maskz_loadu_epi32(mask, from));
}

// Whole registers are stored while they end before the last word: what is too much is written over by what follows.
void compress(const Words* x, int64_t r0, int64_t r1, char* to, int64_t stride) {
  const Places places(*x);
  for (int64_t r = r0; r < r1; ++r, to += stride) {
    expect_row(places.far(r));
    const char *from = places.row(r), *later = places.near(r);
    char *y = to, *const end = to + 4 * x->kept;
    int64_t i = 0;
    for (; x->length - i >= 16 && end - y >= 64; i += 16) {
      const __mmask16 mask = x->masks[i / 16];
      _mm_prefetch(later + 4 * i, _MM_HINT_T0);
      _mm512_storeu_si512(y, kept(mask, from + 4 * i));
      y += 4 * __builtin_popcount(mask);
    }
    for (; i < x->length; i += 16) {
      const __mmask16 mask = x->masks[i / 16];
      const int count = __builtin_popcount(mask);
      _mm512_mask_storeu_epi32(y, (__mmask16)((1u << count) - 1u), kept_of_last(mask, from + 4 * i));
      y += 4 * count;
    }
  }
}

void compress_past(const Words* x, int64_t r0, int64_t r1, char* to) {
  constexpr int64_t kWords = Stream<Lines>::kPiece / 4;
  const Places places(*x);
  Stream<Lines> out(to);
  for (int64_t r = r0; r < r1; ++r) {
    expect_row(places.far(r));
    const char *from = places.row(r), *later = places.near(r);
    for (int64_t w = 0; w < x->length; w += kWords) {
      const int64_t end = x->length - w < kWords ? x->length : w + kWords;
      char *const start = out.room(), *y = start;
      const uint16_t* const masks = x->masks;
      int64_t i = w;
      for (; end - i >= 16; i += 16) {
        const __mmask16 mask = masks[i / 16];
        _mm_prefetch(later + 4 * i, _MM_HINT_T0);
        _mm512_storeu_si512(y, kept(mask, from + 4 * i));
        y += 4 * __builtin_popcount(mask);
      }
      if (i < end) {
        const __mmask16 mask = x->masks[i / 16];
        _mm512_storeu_si512(y, kept_of_last(mask, from + 4 * i));
        y += 4 * __builtin_popcount(mask);
      }
      out.wrote(y - start);
    }
  }
}

}  // namespace
}  // namespace pat

#define PAT_ISA kernels_avx512
#define PAT_VECTOR_BYTES 64
#define PAT_COMPRESS compress, compress_past
#include "kernels.inc"
