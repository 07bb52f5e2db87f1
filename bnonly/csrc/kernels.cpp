// The functions that Python calls, for float32 and bfloat16. All tensors are channels last; strides are in numbers.
#include "batchnorm.h"
#include "blocks.h"
#include "direct.h"
#include "entries.h"
#include "winograd.h"

#define EXPORT(T, NAME)                                                                                                \
    extern "C" int multiplies_float16_##NAME() { return sizeof(Product<T>::number) == 2; }                             \
    extern "C" void forward_##NAME(const T* x, const T* residual, T* y, uint8_t* mask, const Norm* bn, long pixels,    \
                                   long C, int training, int relus, int threads) {                                     \
        bn_forward(x, residual, y, mask, *bn, pixels, C, training, relus, threads);                                    \
    }                                                                                                                  \
    extern "C" void backward_##NAME(const T* dy, const T* x, const uint8_t* mask, T* dx, T* dresidual, const Norm* bn, \
                                    long pixels, long C, int training, int relus, int threads) {                       \
        bn_backward(dy, x, mask, dx, dresidual, *bn, pixels, C, training, relus, threads);                             \
    }                                                                                                                  \
    extern "C" void entries_##NAME(const T* x, const T* dy, const int64_t* index, float* out, long n, long B, long H,  \
                                   long W, long C, long OH, long OW, long O, long K, long stride, long pad,            \
                                   int threads) {                                                                      \
        sparse_weight_gradient<T>(x, dy, index, out, n, B, H, W, C, OH, OW, O, K, stride, pad, threads);               \
    }                                                                                                                  \
    extern "C" float pack_winograd_##NAME(const T* w, long n, const T* from, const Entry* at, void* u, long O, long C, \
                                          int threads) {                                                               \
        return pack_winograd(w, n, from, *at, u, O, C, threads);                                                       \
    }                                                                                                                  \
    extern "C" void winograd_##NAME(const T* x, const void* u, const T* bias, T* y, double scale, long B, long H,      \
                                    long W, long C, long O, int threads) {                                             \
        winograd<T>(x, nullptr, nullptr, u, bias, y, scale, B, H, W, C, O, threads);                                   \
    }                                                                                                                  \
    extern "C" void winograd_gradient_##NAME(const T* x, const T* dy, float* dw, const Entry* at, long B, long H,      \
                                             long W, long C, long O, int threads) {                                    \
        winograd_weight_gradient<T>(x, dy, dw, *at, B, H, W, C, O, threads);                                           \
    }                                                                                                                  \
    extern "C" float pack_direct_##NAME(const T* w, long n, const T* from, const Entry* at, void* u, long O, long C,   \
                                        long A, long E, int threads) {                                                 \
        return pack_direct(w, n, from, *at, u, O, C, A, E, threads);                                                   \
    }                                                                                                                  \
    extern "C" void direct_##NAME(const T* x, const void* u, const T* bias, T* y, double scale, const Direct* d,       \
                                  int threads) {                                                                       \
        direct<T>(x, u, bias, y, scale, *d, threads);                                                                  \
    }                                                                                                                  \
    extern "C" void direct_gradient_##NAME(const T* x, const T* dy, float* dw, const Entry* at, long B, long H,        \
                                           long W, long C, long h, long w, long O, long K, long stride, long pad,      \
                                           int threads) {                                                              \
        direct_weight_gradient<T>(x, dy, dw, *at, B, H, W, C, h, w, O, K, stride, pad, threads);                       \
    }                                                                                                                  \
    extern "C" void blocks_forward_##NAME(const T* x, T* y, T* workspace, const Layer* layers, long n, long B, long H, \
                                          long W, long C, int threads) {                                               \
        blocks_forward(x, y, workspace, layers, n, B, H, W, C, threads);                                               \
    }                                                                                                                  \
    extern "C" void blocks_backward_##NAME(const T* dy, T* dx, T* workspace, const Layer* layers, long n, long B,      \
                                           long H, long W, long C, int threads) {                                      \
        blocks_backward(dy, dx, workspace, layers, n, B, H, W, C, threads);                                            \
    }
EXPORT(float, float32)
EXPORT(bf16, bfloat16)

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
