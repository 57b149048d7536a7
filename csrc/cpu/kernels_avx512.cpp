#include <immintrin.h>
#include <stdint.h>

namespace pat {
namespace {

struct Words4 {
  static constexpr int64_t kBytes = 4, kWords = 16;

  static int64_t put(char* to, const char* from, unsigned bits) {
    const auto mask = static_cast<__mmask16>(bits);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(from)));
    return kBytes * __builtin_popcount(bits);
  }

  static int64_t put_few(char* to, const char* from, unsigned bits) {
    const auto mask = static_cast<__mmask16>(bits);
    const int count = __builtin_popcount(bits);
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << count) - 1u),
                             _mm512_maskz_compress_epi32(mask, _mm512_maskz_loadu_epi32(mask, from)));
    return kBytes * count;
  }
};

}  // namespace
}  // namespace pat

#include "compress.inc"
#define PAT_ISA kernels_avx512
#define PAT_VECTOR_BYTES 64
#define PAT_COMPRESS compress, compress_past
#include "kernels.inc"
