#define PAT_ISA kernels_avx2
#define PAT_VECTOR_BYTES 32
#include "kernels.inc"
