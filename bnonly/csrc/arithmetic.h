// What a convolution multiplies in: float32 for both types of numbers, or float16 for bfloat16 where the processor has
// it (float16.h). A "unit" is 16 output channels; its products take one vector of float16 or 16 / LANES of float32.
#pragma once
#include "vec.h"

// The type in which the convolutions of T multiply.
template <class T> struct Product { typedef float number; };

// Vectors of E for channel counts that are multiples of 16 (narrow) or of 32 (wide).
template <class E> struct Vectors {
    typedef V narrow, wide;
    static constexpr int tiles = 1;   // how many tiles (or pixels) a wide vector of products holds side by side
};
template <class E> struct Registers {
    typedef V one;
    static constexpr int lanes = LANES, each = 16 / LANES;   // numbers in a register, registers for a unit
};

// A power of two that brings the largest of some numbers below a limit, and what brings them back; float32 needs none.
struct Range {
    int low;
    float unit;
};
template <class T> Range range_of(const T*, long, long, long, float) { return {0, 1}; }
template <class T> inline void load(const T* p, Range, V& v) { load(p, v); }

// A number of E in every lane.
inline V broadcast(const float* p) { return *p - V{}; }   // unlike + 0 the compiler can fold it, because -0 + 0 is 0

// A vector of products as vectors of float32.
inline void split(V v, V* y) { y[0] = v; }

// m [R][16 N] = sum, plus what was there if there is more.
template <int R, int K> inline void accumulate(float* m, const V (&sum)[R][K], bool more) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int n = 0; n < K; n++) {
            V was = {};
            if (more) load(m + (r * K + n) * LANES, was);
            store(m + (r * K + n) * LANES, was + sum[r][n]);
        }
}

// out [R][16 N], its rows `row` apart, += sum times a unit that is 1 for float32.
template <int R, int K> inline void add_rows(float* out, long row, const V (&sum)[R][K], float) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) {
            V a;
            load(out + r * row + k * LANES, a);
            store(out + r * row + k * LANES, a + sum[r][k]);
        }
}

// Put LANES weights into packed order, divided by their scale.
inline void place(float* u, const V* v, float scale) { store(u, *v / scale); }

// The transformed tiles of a line of columns (planes_of in winograd.h), in the order in which `add_products` reads
// them.
template <class F, int N, class X, class E>
void planes_of(const E* line, long length, long w, long C, E* v, long stride);
template <class F, int N> void planes_for_sums(const float* line, long length, long w, long C, float* v, long stride) {
    planes_of<F, N, V>(line, length, w, C, v, stride);
}

#include "float16.h"

// v [w][size]: what each output of a row reads: `run` numbers from each of A lines, `step` after the pixel before; up
// to 15 more are written.
template <class E> void gather(const E* lines, long length, long A, long run, long step, long w, long size, E* v) {
    typedef typename Vectors<E>::narrow X;
    for (long j = 0; j < w; j++)
        for (long a = 0; a < A; a++)
            for (long e = 0; e < run; e += numbers<X, E>) {
                X n;
                load(lines + a * length + j * step + e, n);
                store(v + j * size + a * run + e, n);
            }
}

// The same of one line, and M of O channels of each pixel of an upstream gradient, as `add_products` reads them.
inline void gather_pixels(const float* line, long run, long step, long w, long size, float* v) {
    gather(line, 0, 1, run, step, w, size, v);
}
template <class T> void read_pixels(const T* p, long w, long O, long M, Range, float* m) {
    for (long j = 0; j < w; j++)
        for (long k = 0; k < M; k += LANES) {
            V n;
            load(p + j * O + k, n);
            store(m + j * M + k, n);
        }
}
// m [R][16 N] = v [R][C] (its rows `row` apart) times u [N][C][16] (its units `apart`), plus what was there if there is
// more. Two numbers of float16 are multiplied at a step.
template <int R, int N, class E> void multiply(const E* v, long row, const E* u, long apart, E* m, long C, bool more) {
    typedef Registers<E> Rs;
    constexpr int K = N * Rs::each, S = 4 / sizeof(E);
    typename Rs::one sum[R][K] = {};
    for (long k = 0; k < C; k += S, u += 16 * S) {
        typename Rs::one w[K];
#pragma GCC unroll 16
        for (int n = 0; n < K; n++) load(u + n / Rs::each * apart + n % Rs::each * Rs::lanes, w[n]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            auto a = broadcast(v + r * row + k);
#pragma GCC unroll 16
            for (int n = 0; n < K; n++) sum[r][n] += a * w[n];
        }
    }
    accumulate(m, sum, more);
}

// out [R][16 N] += v [n][R] times m [n][16 N], over n tiles or pixels, in a sum of its own, which loses less.
template <int R, int N, class E>
__attribute__((noinline)) void add_products(const E* v, long v_row, const E* m, long m_row, float* out, long row,
                                            long n, float unit) {
    typedef Registers<E> Rs;
    constexpr int K = N * Rs::each, S = 4 / sizeof(E);
    typename Rs::one sum[R][K] = {};
    for (; n > 0; n -= S, v += S * v_row, m += S * m_row) {
        typename Rs::one w[K];
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) load(m + k * Rs::lanes, w[k]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            auto a = broadcast(v + S * r);
#pragma GCC unroll 16
            for (int k = 0; k < K; k++) sum[r][k] += a * w[k];
        }
    }
    add_rows(out, row, sum, unit);
}

// out [n][O], a sum over `rows` of outputs. It is cut into blocks of up to `each` of n by 64 of O, and the rows into
// chunks; f adds a chunk's share of block (part, o) to sum [K][M]. The cuts do not depend on the number of threads.
template <class F> void sum_over_rows(long rows, long n, long each, long O, float* out, int threads, F f) {
    long size = n * O, chunks = std::max(1L, std::min({16L, rows / 64, (1L << 21) / size})),
         parts = (n + each - 1) / each;
    std::unique_ptr<V[]> sums(new V[chunks * size / LANES]);
    auto block = [&](long c, long p, long o) {
        return (float*)sums.get() + c * size + p * each * O + std::min(each, n - p * each) * o;
    };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(3) schedule(dynamic)
        for (long c = 0; c < chunks; c++)
            for (long p = 0; p < parts; p++)
                for (long o = 0; o < O; o += 64) {
                    long K = std::min(each, n - p * each), M = std::min(64L, O - o);
                    std::fill(block(c, p, o), block(c, p, o) + K * M, 0.f);
                    f(rows * c / chunks, rows * (c + 1) / chunks, p, o, M, block(c, p, o));
                }
#pragma omp for collapse(2) schedule(static)
        for (long p = 0; p < parts; p++)
            for (long o = 0; o < O; o += 64) {
                long K = std::min(each, n - p * each), M = std::min(64L, O - o);
                for (long k = 0; k < K; k++)
                    for (long m = 0; m < M; m += LANES) {
                        V sum = {}, a;
                        for (long c = 0; c < chunks; c++) {
                            load(block(c, p, o) + k * M + m, a);
                            sum += a;
                        }
                        store(out + (p * each + k) * O + o + m, sum);
                    }
            }
    }
}

// Where entry (o, c) at tap (a, e) of a weight lies, in numbers from its begin.
struct Entry {
    long o, c, a, e;
    long operator()(long i, long j, long k, long l) const { return i * o + j * c + k * a + l * e; }
};

// LANES weights of successive output channels, `o` apart, read or written.
template <class T> inline V load_outputs(const T* w, long o) {
    V v;
    if (o == 1) load(w, v);
    else
        for (int i = 0; i < LANES; i++) {
            float f;
            load(w + i * o, f);
            v[i] = f;
        }
    return v;
}
inline void store_outputs(V v, float* dw, long o) {
    if (o == 1) store(dw, v);
    else
        for (int i = 0; i < LANES; i++) dw[i * o] = v[i];
}
