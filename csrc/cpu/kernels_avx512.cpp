#include <immintrin.h>

#include "kernels.h"

namespace pat {
namespace {

// Whole registers are stored while they end before the last word: what is too much is written over by what follows.
int64_t compress_words(uint32_t* to, int64_t room, const uint32_t* from, int64_t length, const uint16_t* masks,
                       const uint32_t* ahead) {
  uint32_t *const start = to, *const end = to + room;
  int64_t i = 0;
  for (; length - i >= 16 && end - to >= 16; i += 16, ++masks) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(*masks, _mm512_loadu_si512(from + i)));
    to += __builtin_popcount(*masks);
  }
  for (; i < length; i += 16, ++masks) {
    // Bits behind the last word are not set, and what no bit asks for is not read.
    const __mmask16 mask = *masks;
    const __m512i words = _mm512_maskz_compress_epi32(mask, _mm512_maskz_loadu_epi32(mask, from + i));
    const int count = __builtin_popcount(mask);
    _mm512_mask_storeu_epi32(to, (__mmask16)((1u << count) - 1u), words);
    to += count;
  }
  return to - start;
}

}  // namespace
}  // namespace pat

#define PAT_ISA kernels_avx512
#define PAT_VECTOR_BYTES 64
#define PAT_COMPRESS compress_words
#include "kernels.inc"
