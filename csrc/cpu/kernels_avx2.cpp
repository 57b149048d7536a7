#include <immintrin.h>
#include <stdint.h>

namespace pat {
namespace {

// For each of the sets of eight words, the numbers of those in it, from the first on; then zeros.
struct Order {
  constexpr Order() : of() {
    for (int bits = 0; bits < 256; ++bits)
      for (int word = 0, at = 0; word < 8; ++word)
        if (bits >> word & 1) of[bits][at++] = static_cast<uint8_t>(word);
  }
  uint8_t of[256][8];
};
alignas(64) constexpr Order kOrder;

struct Words4 {
  static constexpr int64_t kBytes = 4, kWords = 8;

  static __m256i in_order(__m256i words, unsigned bits) {
    const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kOrder.of[bits]));
    return _mm256_permutevar8x32_epi32(words, _mm256_cvtepu8_epi32(order));
  }

  static int64_t put(char* to, const char* from, unsigned bits) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), in_order(words, bits));
    return kBytes * __builtin_popcount(bits);
  }

  // Bits as lanes whose sign is set.
  static __m256i lanes(unsigned bits) {
    const __m256i to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    return _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), to_sign);
  }

  static int64_t put_few(char* to, const char* from, unsigned bits) {
    const int count = __builtin_popcount(bits);
    const __m256i words = _mm256_maskload_epi32(reinterpret_cast<const int*>(from), lanes(bits));
    _mm256_maskstore_epi32(reinterpret_cast<int*>(to), lanes((1u << count) - 1u), in_order(words, bits));
    return kBytes * count;
  }
};

}  // namespace
}  // namespace pat

#include "compress.inc"
#define PAT_ISA kernels_avx2
#define PAT_VECTOR_BYTES 32
#define PAT_COMPRESS compress, compress_past
#include "kernels.inc"
