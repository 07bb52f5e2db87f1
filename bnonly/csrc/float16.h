// Products in float16, where the processor multiplies these (AVX512-FP16): twice as many at once. Numbers go in pairs
// of neighbours, so that a pair's products can be summed before they are widened to float32.
#pragma once
#if defined(__AVX512FP16__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"   // of gcc 12's own header, whose vectors begin undefined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define BNONLY_FLOAT16
typedef _Float16 half;
typedef half Q __attribute__((vector_size(32)));
typedef half QQ __attribute__((vector_size(64)));
template <> struct Product<bf16> { typedef half number; };
template <> struct Vectors<half> {
    typedef Q narrow;
    typedef QQ wide;
    static constexpr int tiles = 2;
};
template <> struct Registers<half> {
    typedef QQ one;
    static constexpr int lanes = 32, each = 1;
};
template <class X> inline void load(const half* p, X& v) { v = *(const typename Unaligned<X, half>::type*)p; }
template <class X> inline void store(half* p, X v) { *(typename Unaligned<X, half>::type*)p = v; }

// The range of n times K numbers, C apart: what their exponents lose so that the largest stays below `limit`.
inline Range range_of(const bf16* x, long n, long C, long K, float limit) {
    if (K == C) K *= n, n = 1;
    __m512i top = _mm512_setzero_si512();
    for (; n; n--, x += C)
        for (long i = 0; i < K; i += 32) {
            __m512i v = _mm512_maskz_loadu_epi16(K - i < 32 ? (1u << (K - i)) - 1 : -1u, x + i);
            top = _mm512_max_epu16(top, _mm512_and_si512(v, _mm512_set1_epi16(0x7fff)));
        }
    uint16_t t[32];
    memcpy(t, &top, 64);
    int exponent = *std::max_element(t, t + 32) >> 7, low = std::max(0, exponent - 14 - std::ilogb(limit));
    return {low << 7, exponent == 255 ? NAN : std::ldexp(1.f, low - 112)};   // after NaN or infinity all is NaN
}

// The bits of bfloat16 as those of float16, which loses up to 2^-15 of the largest.
inline __m512i to_half(__m512i x, Range range) {
    __m512i size = _mm512_subs_epu16(_mm512_and_si512(x, _mm512_set1_epi16(0x7fff)), _mm512_set1_epi16(range.low));
    return _mm512_ternarylogic_epi32(_mm512_slli_epi16(size, 3), x, _mm512_set1_epi16(0x8000),
                                     0xf8);   // size | x & sign
}
inline void load(const bf16* p, Range r, QQ& v) { v = (QQ)to_half(_mm512_loadu_si512(p), r); }
inline void load(const bf16* p, Range r, Q& v) {
    __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    v = (Q)_mm512_castsi512_si256(to_half(x, r));
}

// The sum of each pair of neighbours, of a in the even lanes and of b in the odd ones.
inline QQ sum_pairs(QQ a, QQ b) {
    __m512i x = (__m512i)a, y = (__m512i)b;
    __m512i other = _mm512_ror_epi32(_mm512_mask_blend_epi16(0xaaaaaaaa, y, x), 16);
    return (QQ)_mm512_mask_blend_epi16(0xaaaaaaaa, x, y) + (QQ)other;
}
inline __m512i lane_order(long a, long b, long c, long d) {
    return _mm512_cvtepi8_epi16(_mm256_set_epi64x(d, c, b, a));
}

// The even lanes as float32, and the odd ones.
inline void split(QQ v, V* y) {
    __m512i order = lane_order(0x0e0c0a0806040200, 0x1e1c1a1816141210, 0x0f0d0b0907050301, 0x1f1d1b1917151311);
    __m512i both = _mm512_permutexvar_epi16(order, (__m512i)v);
    y[0] = (V)_mm512_cvtxph_ps((__m256h)_mm512_castsi512_si256(both));
    y[1] = (V)_mm512_cvtxph_ps((__m256h)_mm512_extracti64x4_epi64(both, 1));
}

// 16 numbers in the even lanes, 16 in the odd ones.
inline QQ interleave(const half* p, const half* q) {
    __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    both = _mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i*)q), 1);
    __m512i order = lane_order(0x1303120211011000, 0x1707160615051404, 0x1b0b1a0a19091808, 0x1f0f1e0e1d0d1c0c);
    return (QQ)_mm512_permutexvar_epi16(order, both);
}

// A pair of numbers in every pair of lanes.
inline QQ broadcast(const half* p) {
    int pair;
    memcpy(&pair, p, 4);
    return (QQ)_mm512_set1_epi32(pair);
}

// m [R][16 N] = the sums of pairs, two rows side by side, plus what was there if there is more.
template <int R, int N> inline void accumulate(half* m, const QQ (&sum)[R][N], bool more) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 2)
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            QQ was = {};
            if (more) load(m + (r * N + 2 * n) * 16, was);
            store(m + (r * N + 2 * n) * 16, was + sum_pairs(sum[r][n], sum[r + 1][n]));
        }
}
template <int R, int N> inline void add_rows(float* out, long row, const QQ (&sum)[R][N], float unit) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 2)
#pragma GCC unroll 16
        for (int k = 0; k < N; k++) {
            V s[2], a;
            split(sum_pairs(sum[r][k], sum[r + 1][k]), s);
            for (int z = 0; z < 2; z++) {
                float* at = out + (r + z) * row + k * 16;
                load(at, a);
                store(at, a + s[z] * unit);
            }
        }
}

// Two times 16 weights into packed order, in pairs.
inline void place(half* u, const V* v, float scale) {
    half both[32];
    for (int s = 0; s < 2; s++) store(both + 16 * s, __builtin_convertvector(v[s] / scale, Q));
    store(u, interleave(both, both + 16));
}

// As their float32 versions in arithmetic.h, in pairs of tiles or pixels: planes of [w / 2][C][2].
template <class F, int N> void planes_for_sums(const half* line, long length, long w, long C, half* v, long stride) {
    for (long j = 0; j < w; j += 2, line += 8 * C)
        for (long c = 0; c < C; c += 16, v += 32)
            for (int k = 0; k < 6; k++) {
                QQ d[N], s[6];
                for (int l = 0; l < N; l++) {
                    const half* at = line + k * length + c;
                    d[l] = interleave(at + l * C, at + (l + 4) * C);
                }
                F::transform(d, s);
                for (int l = 0; l < 6; l++) store(v + (k * 6 + l) * stride, s[l]);
            }
}
inline void gather_pixels(const half* line, long run, long step, long w, long size, half* v) {
    for (long j = 0; j < w; j += 2)
        for (long e = 0; e < run; e += 16)
            store(v + j * size + 2 * e, interleave(line + j * step + e, line + (j + 1) * step + e));
}
inline void read_pixels(const bf16* p, long w, long O, long M, Range range, half* m) {
    half both[32] = {};
    for (long j = 0; j < w; j += 2)
        for (long k = 0; k < M; k += 16) {
            for (int z = 0; z < 2; z++) {
                Q n = {};
                if (j + z < w) load(p + (j + z) * O + k, range, n);
                store(both + 16 * z, n);
            }
            store(m + j * M + 2 * k, interleave(both, both + 16));
        }
}
#endif
