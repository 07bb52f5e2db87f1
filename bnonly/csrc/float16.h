// Products in float16, where the processor multiplies these (AVX512-FP16): twice as many at once. Numbers go in pairs
// of neighbours, so that a pair's products can be summed before they are widened to float32.
#pragma once
#if defined(__AVX512FP16__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"   // of gcc 12's own header, whose vectors begin undefined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define BNONLY_FLOAT16

// A float16 in memory, and vectors of 16 and of 32.
typedef _Float16 half;
typedef half Halves16 __attribute__((vector_size(32)));
typedef half Halves32 __attribute__((vector_size(64)));

// The types of products of bfloat16: what arithmetic.h says of these templates, for float16.
template <> struct Product<bf16> { typedef half number; };
template <> struct Vectors<half> {
    typedef Halves16 narrow;
    typedef Halves32 wide;
    static constexpr int tiles = 2;
};
template <> struct Registers<half> {
    typedef Halves32 vector;
    static constexpr int lanes = 32, per_unit = 1;
};

// v = the float16 at p, and the other way round.
template <class X> inline void load(const half* p, X& v) { v = *(const typename Unaligned<X, half>::type*)p; }
template <class X> inline void store(half* p, X v) { *(typename Unaligned<X, half>::type*)p = v; }

constexpr int BF16_BIAS = 127, HALF_BIAS = 15;   // of the exponents
constexpr int BF16_MANTISSA = 7, HALF_MANTISSA = 10;   // bits
constexpr int BF16_SIZE = 0x7fff;   // all bits but the sign
constexpr int BF16_NOT_FINITE = 255;   // the exponent of infinity and NaN

// The scaling of x [rows][K], its rows C numbers apart, that brings the largest below `limit`.
inline Scaling scaling_of(const bf16* x, long rows, long C, long K, float limit) {
    if (K == C) K *= rows, rows = 1;
    __m512i top = _mm512_setzero_si512();
    for (; rows; rows--, x += C)
        for (long i = 0; i < K; i += 32) {
            __m512i v = _mm512_maskz_loadu_epi16(K - i < 32 ? (1u << (K - i)) - 1 : -1u, x + i);
            top = _mm512_max_epu16(top, _mm512_and_si512(v, _mm512_set1_epi16(BF16_SIZE)));
        }
    uint16_t t[32];
    memcpy(t, &top, 64);
    int exponent = *std::max_element(t, t + 32) >> BF16_MANTISSA;
    int drop = std::max(0, exponent - (HALF_BIAS - 1) - std::ilogb(limit));
    float undo = std::ldexp(1.f, drop - (BF16_BIAS - HALF_BIAS));
    return {drop << BF16_MANTISSA, exponent == BF16_NOT_FINITE ? NAN : undo};   // after NaN or infinity all is NaN
}

// The bits of bfloat16 as those of scaled float16, which loses up to 2^-15 of the largest.
inline __m512i to_half(__m512i x, Scaling scaling) {
    __m512i size =
        _mm512_subs_epu16(_mm512_and_si512(x, _mm512_set1_epi16(BF16_SIZE)), _mm512_set1_epi16(scaling.drop));
    return _mm512_ternarylogic_epi32(_mm512_slli_epi16(size, HALF_MANTISSA - BF16_MANTISSA), x,
                                     _mm512_set1_epi16(0x8000),
                                     0xf8);   // size | x & sign
}

// v = the bfloat16 at p as scaled float16.
inline void load(const bf16* p, Scaling scaling, Halves32& v) { v = (Halves32)to_half(_mm512_loadu_si512(p), scaling); }
inline void load(const bf16* p, Scaling scaling, Halves16& v) {
    __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    v = (Halves16)_mm512_castsi512_si256(to_half(x, scaling));
}

// The sum of each pair of neighbours, of a in the even lanes and of b in the odd ones.
inline Halves32 sum_pairs(Halves32 a, Halves32 b) {
    __m512i x = (__m512i)a, y = (__m512i)b;
    __m512i other = _mm512_ror_epi32(_mm512_mask_blend_epi16(0xaaaaaaaa, y, x), 16);
    return (Halves32)_mm512_mask_blend_epi16(0xaaaaaaaa, x, y) + (Halves32)other;
}

// The indices 0 to 31 of lanes in an order of 32 bytes, the first in the lowest byte of a.
inline __m512i lane_order(long a, long b, long c, long d) {
    return _mm512_cvtepi8_epi16(_mm256_set_epi64x(d, c, b, a));
}

// y = the even lanes of v as float32, and the odd ones: the products of two tiles.
inline void split(Halves32 v, Floats* y) {
    __m512i order = lane_order(0x0e0c0a0806040200, 0x1e1c1a1816141210, 0x0f0d0b0907050301, 0x1f1d1b1917151311);
    __m512i both = _mm512_permutexvar_epi16(order, (__m512i)v);
    y[0] = (Floats)_mm512_cvtxph_ps((__m256h)_mm512_castsi512_si256(both));
    y[1] = (Floats)_mm512_cvtxph_ps((__m256h)_mm512_extracti64x4_epi64(both, 1));
}

// The 16 numbers at p in the even lanes, those at q in the odd ones.
inline Halves32 interleave(const half* p, const half* q) {
    __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    both = _mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i*)q), 1);
    __m512i order = lane_order(0x1303120211011000, 0x1707160615051404, 0x1b0b1a0a19091808, 0x1f0f1e0e1d0d1c0c);
    return (Halves32)_mm512_permutexvar_epi16(order, both);
}

// The two numbers at p in every pair of lanes.
inline Halves32 broadcast(const half* p) {
    int pair;
    memcpy(&pair, p, 4);
    return (Halves32)_mm512_set1_epi32(pair);
}

// m [R][16 N] = the sums of pairs, two rows side by side, plus what m already holds if `more`.
template <int R, int N> inline void accumulate(half* m, const Halves32 (&sum)[R][N], bool more) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 2)
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            Halves32 was = {};
            if (more) load(m + (r * N + 2 * n) * 16, was);
            store(m + (r * N + 2 * n) * 16, was + sum_pairs(sum[r][n], sum[r + 1][n]));
        }
}

// out [R][16 N], its rows `row` numbers apart, += the sums of pairs times `undo`.
template <int R, int N> inline void add_rows(float* out, long row, const Halves32 (&sum)[R][N], float undo) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 2)
#pragma GCC unroll 16
        for (int k = 0; k < N; k++) {
            Floats s[2], a;
            split(sum_pairs(sum[r][k], sum[r + 1][k]), s);
            for (int z = 0; z < 2; z++) {
                float* at = out + (r + z) * row + k * 16;
                load(at, a);
                store(at, a + s[z] * undo);
            }
        }
}

// u = two weights of each of 16 output channels as pairs in packed order, divided by their scale.
inline void store_packed(half* u, const Floats* v, float scale) {
    half both[32];
    for (int s = 0; s < 2; s++) store(both + 16 * s, __builtin_convertvector(v[s] / scale, Halves16));
    store(u, interleave(both, both + 16));
}

// As the float32 version in arithmetic.h, in pairs of tiles: planes of [w / 2][C][2].
template <class F, int N>
void transform_rows_for_sums(const half* line, long length, long w, long C, half* v, long stride) {
    for (long j = 0; j < w; j += 2, line += 8 * C)
        for (long c = 0; c < C; c += 16, v += 32)
            for (int k = 0; k < 6; k++) {
                Halves32 d[N], s[6];
                for (int l = 0; l < N; l++) {
                    const half* at = line + k * length + c;
                    d[l] = interleave(at + l * C, at + (l + 4) * C);
                }
                F::transform(d, s);
                for (int l = 0; l < 6; l++) store(v + (k * 6 + l) * stride, s[l]);
            }
}

// As the float32 version, in pairs of pixels: v [w / 2][size][2].
inline void gather_pixels(const half* line, long run, long step, long w, long size, half* v) {
    for (long j = 0; j < w; j += 2)
        for (long e = 0; e < run; e += 16)
            store(v + j * size + 2 * e, interleave(line + j * step + e, line + (j + 1) * step + e));
}

// As the float32 version, in pairs of pixels: m [w / 2][M][2]; an odd last one has a partner of zeros.
inline void read_pixels(const bf16* p, long w, long O, long M, Scaling scaling, half* m) {
    half both[32] = {};
    for (long j = 0; j < w; j += 2)
        for (long k = 0; k < M; k += 16) {
            for (int z = 0; z < 2; z++) {
                Halves16 n = {};
                if (j + z < w) load(p + (j + z) * O + k, scaling, n);
                store(both + 16 * z, n);
            }
            store(m + j * M + 2 * k, interleave(both, both + 16));
        }
}
#endif
