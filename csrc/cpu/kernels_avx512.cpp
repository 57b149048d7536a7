#define PAT_ISA kernels_avx512
#define PAT_VECTOR_BYTES 64
#include "kernels.inc"
