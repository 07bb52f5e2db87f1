// The library of kernels, one translation unit: the exported functions for float32 and for bfloat16.
#include "batchnorm.h"
#include "blocks.h"
#include "direct.h"
#include "entries.h"
#include "winograd.h"

#define T float
#define NAME(function) function##_float32
#include "exports.h"
#undef T
#undef NAME

#define T bf16
#define NAME(function) function##_bfloat16
#include "exports.h"
#undef T
#undef NAME

// The instruction set that these kernels were built for.
extern "C" const char* instruction_set() {
#if defined(BNONLY_FLOAT16)
    return "avx512_fp16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#else
    return "baseline";
#endif
}
