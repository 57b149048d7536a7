#include <immintrin.h>

#include "kernels.h"

namespace pat {
namespace {

// Whole registers are stored while they end before the last word: what is too much is written over by what follows.
void compress_words(uint32_t* to, int64_t kept, const uint32_t* from, int64_t length, const uint16_t* masks) {
  uint32_t* const end = to + kept;
  for (int64_t i = 0; i < length; i += 16, ++masks) {
    const __mmask16 mask = *masks;
    // Bits behind the last word are not set, and what no bit asks for is not read.
    const __m512i words = length - i >= 16
                              ? _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(from + i))
                              : _mm512_maskz_compress_epi32(mask, _mm512_maskz_loadu_epi32(mask, from + i));
    const int count = __builtin_popcount(mask);
    if (end - to >= 16) _mm512_storeu_si512(to, words);
    else _mm512_mask_storeu_epi32(to, (__mmask16)((1u << count) - 1u), words);
    to += count;
  }
}

}  // namespace
}  // namespace pat

#define PAT_ISA kernels_avx512
#define PAT_VECTOR_BYTES 64
#define PAT_COMPRESS compress_words
#include "kernels.inc"
