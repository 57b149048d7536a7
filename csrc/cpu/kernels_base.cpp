#define PAT_ISA kernels_base
#define PAT_VECTOR_BYTES 16
#include "kernels.inc"
