// Vectors of float32 as long as a register, loads and stores of float32 and bfloat16, ReLU and its bit mask.
//
// In all files T is the type of a tensor's numbers (float or bf16), X that of a vector or a single number in registers,
// and sizes have the letters of the field: B images, H rows, W columns, C input channels, O output channels.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#elif !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"   // vectors longer than a register; nothing of them is exported
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;   // float32 numbers in a register, of which there are 32
#else
constexpr int LANES = 8;   // there are 16 registers; without AVX the compiler takes two of four numbers each
#endif
constexpr bool WIDE = LANES == 16;
constexpr int CACHE_LINE = 64;   // bytes

// A register of float32, their bits, and the bits of as many bfloat16.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t Bits16 __attribute__((vector_size(2 * LANES)));

// A bfloat16 in memory: the upper half of a float32.
struct bf16 {
    uint16_t bits;
};

// How many numbers of type E a vector X holds: numbers<Floats, float> is LANES, numbers<float, float> is 1.
template <class X, class E> constexpr int numbers = sizeof(X) / sizeof(E);

// Loads and stores at any address run on vectors (Floats) and, for the last few pixels, on single numbers (float). A
// memcpy would be split into shorter moves where the compiler tunes for no processor in particular.
template <class X, class E> struct Unaligned { typedef X type __attribute__((aligned(alignof(E)), may_alias)); };

// v = the numbers at p, and the other way round.
template <class X> inline void load(const float* p, X& v) { v = *(const typename Unaligned<X, float>::type*)p; }
template <class X> inline void store(float* p, X v) { *(typename Unaligned<X, float>::type*)p = v; }

// v = the bfloat16 at p as float32, for a vector and for a single number.
inline void load(const bf16* p, Floats& v) {
    Bits16 h = *(const Unaligned<Bits16, uint16_t>::type*)p;
#if defined(__AVX512F__)
    v = (Floats)((Bits32)_mm512_maskz_cvtepu16_epi32(-1, (__m256i)h)
                 << 16);   // a vector of two steps; gcc's own conversion takes five
#elif defined(__AVX2__)
    v = (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    v = (Floats)(__builtin_convertvector(h, Bits32) << 16);
#endif
}
inline void load(const bf16* p, float& v) {
    uint32_t u = (uint32_t)p->bits << 16;
    memcpy(&v, &u, 4);
}

const uint16_t BF16_NAN = 0x7fc0;

// The bits of v as bfloat16, rounded to nearest even; NaN stays NaN.
inline uint16_t round_to_bf16(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return v == v ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : BF16_NAN;
}

// p = v as bfloat16, rounded in the same way, for a vector and for a single number.
inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    __m256i u = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    __m256 ordered = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_ORD_Q);
    r = _mm256_blendv_epi8(_mm256_set1_epi32(BF16_NAN), r, (__m256i)ordered);
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
#else
    Bits32 u = (Bits32)v, r = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = Bits32{} + BF16_NAN;
    Bits16 h = __builtin_convertvector(v == v ? r : nan, Bits16);
#endif
    *(Unaligned<Bits16, uint16_t>::type*)p = (Bits16)h;
}
inline void store(bf16* p, float v) { p->bits = round_to_bf16(v); }

// max(v, 0); NaN stays NaN.
inline Floats relu(Floats v) { return v < 0 ? Floats{} : v; }
inline float relu(float v) { return v < 0 ? 0 : v; }

// The gradient of ReLU: g where v > 0, else 0; NaN in v lets g through, as PyTorch's ReLU does.
inline Floats where_positive(Floats v, Floats g) { return v <= 0 ? Floats{} : g; }
inline float where_positive(float v, float g) { return v <= 0 ? 0 : g; }

// The bit mask of a ReLU: number e has bit e % 8 of byte e / 8, which is 1 where the ReLU is open.

// The bit of each lane.
#if defined(__AVX512F__)
const Bits32 BIT = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
#else
const Bits32 BIT = {1, 2, 4, 8, 16, 32, 64, 128};
#endif

// The bits of LANES numbers from e on.
inline uint32_t lane_bits(const uint8_t* mask, long e) {
    typename std::conditional<WIDE, uint16_t, uint8_t>::type bits;
    memcpy(&bits, mask + e / 8, sizeof bits);
    return bits;
}

// Set the bits of the numbers v from e on. A single number's is added to a mask that was zero there.
inline void put_mask(uint8_t* mask, long e, Floats v) {
#if defined(__AVX512F__)
    uint16_t bits = _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NLE_UQ);
#elif defined(__AVX__)
    uint8_t bits = _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NLE_UQ));
#else
    auto shut = v <= 0;
    uint8_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (shut[i] ? 0 : 1) << i;
#endif
    memcpy(mask + e / 8, &bits, sizeof bits);
}
inline void put_mask(uint8_t* mask, long e, float v) { mask[e / 8] |= (v <= 0 ? 0 : 1) << e % 8; }

// The numbers g from e on where the mask is 1, else 0.
inline Floats where_mask(const uint8_t* mask, long e, Floats g) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_mov_ps(lane_bits(mask, e), (__m512)g);
#else
    return (BIT & lane_bits(mask, e)) != 0 ? g : Floats{};
#endif
}
inline float where_mask(const uint8_t* mask, long e, float g) { return mask[e / 8] >> e % 8 & 1 ? g : 0; }

// Lanes of the vectors a and b in the order of these indices; those of b follow those of a.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

// b = LANES vectors of which two hold the lanes of vectors i and i + LANES / 2 of a in turns.
template <class X> inline void interleave_rows(const X* a, X* b) {
    for (int i = 0; i < LANES / 2; i++) {
#if defined(__AVX512F__)
        b[2 * i] = SHUFFLE(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        b[2 * i + 1] = SHUFFLE(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
        b[2 * i] = SHUFFLE(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = SHUFFLE(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
#endif
    }
}

// Transpose LANES vectors of LANES numbers each in place: interleaved log2(LANES) times, they are.
template <class X> inline void transpose(X* a) {
    X b[LANES];
    for (int n = LANES; n > 1; n /= 4) {
        interleave_rows(a, b);
        if (n == 2) std::copy(b, b + LANES, a);
        else interleave_rows(b, a);
    }
}

// n numbers, zeros at first, that begin where a line of the cache does.
template <class E> struct Buffer {
    struct alignas(CACHE_LINE) Line {
        char bytes[CACHE_LINE];
    };
    std::vector<Line> lines;
    explicit Buffer(long n) : lines((n * sizeof(E) + CACHE_LINE - 1) / CACHE_LINE, Line{}) {}
    operator E*() { return (E*)lines.data(); }
};
