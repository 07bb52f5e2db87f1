// What both kinds of convolution are made of: products of small matrices, in float32 for both dtypes, or in float16 for
// bfloat16 where the processor has it (float16.h). E is the type of what is multiplied.
//
// Packed weights and products go by units of 16 output channels. R x N counts what one product of matrices keeps in
// registers: R pixels (or tiles, or inputs of a gradient) by N units.
#pragma once
#include "vec.h"

constexpr int UNIT = 16;   // output channels

// How many neighbours of type E are multiplied and summed at once in a lane of 32 bits: one float32, two float16.
template <class E> constexpr int per_lane = 4 / sizeof(E);

// The type in which the convolutions of T multiply.
template <class T> struct Product { typedef float number; };

// The vectors that transforms of E run on, for counts of channels that are multiples of 16 (narrow) or of 32 (wide).
template <class E> struct Vectors {
    typedef Floats narrow, wide;
    static constexpr int tiles = 1;   // how many tiles (or pixels) a wide vector of products holds side by side
};

// The vectors that products of E are summed in.
template <class E> struct Registers {
    typedef Floats vector;
    static constexpr int lanes = LANES, per_unit = UNIT / LANES;   // numbers in a register, registers for a unit
};

// The power of two by which numbers are divided so that the largest stays below a limit of float16: what their
// exponents drop, and the factor that undoes it. float32 needs none.
struct Scaling {
    int drop;   // in the bits of a bfloat16
    float undo;
};

// The scaling of x [rows][K], its rows C numbers apart, to below `limit`: here, for float32, none.
template <class T> Scaling scaling_of(const T*, long /*rows*/, long /*C*/, long /*K*/, float /*limit*/) {
    return {0, 1};
}

// v = the numbers at p, scaled, in the type that is multiplied.
template <class T> inline void load(const T* p, Scaling, Floats& v) { load(p, v); }

// The number at p in every lane.
inline Floats broadcast(const float* p) {
    return *p - Floats{};
}   // unlike + 0 the compiler can fold it, because -0 + 0 is 0

// y = a vector of products as vectors of float32, one for each tile in it.
inline void split(Floats v, Floats* y) { y[0] = v; }

// m [R][16 N] = sum, plus what m already holds if `more`.
template <int R, int K> inline void accumulate(float* m, const Floats (&sum)[R][K], bool more) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int n = 0; n < K; n++) {
            Floats was = {};
            if (more) load(m + (r * K + n) * LANES, was);
            store(m + (r * K + n) * LANES, was + sum[r][n]);
        }
}

// out [R][16 N], its rows `row` numbers apart, += sum; the last argument, `undo` in float16.h, is 1 for float32.
template <int R, int K> inline void add_rows(float* out, long row, const Floats (&sum)[R][K], float) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) {
            Floats a;
            load(out + r * row + k * LANES, a);
            store(out + r * row + k * LANES, a + sum[r][k]);
        }
}

// u = weights of LANES output channels in packed order, divided by their scale.
inline void store_packed(float* u, const Floats* v, float scale) { store(u, *v / scale); }

// v = the transformed tiles of a line (transform_rows in winograd.h), in the order in which `add_products` reads them.
template <class F, int N, class X, class E>
void transform_rows(const E* line, long length, long w, long C, E* v, long stride);
template <class F, int N>
void transform_rows_for_sums(const float* line, long length, long w, long C, float* v, long stride) {
    transform_rows<F, N, Floats>(line, length, w, C, v, stride);
}

#include "float16.h"

// v [w][size] = what each of w outputs in a row reads: `run` numbers of each of A lines [length], from j * step for
// output j. Up to 15 numbers more are written.
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

// v [w][size] = the same of one line, in the order in which `add_products` reads it.
inline void gather_pixels(const float* line, long run, long step, long w, long size, float* v) {
    gather(line, 0, 1, run, step, w, size, v);
}

// m [w][M] = M of the O channels of each of w pixels at p, in the order in which `add_products` reads them.
template <class T> void read_pixels(const T* p, long w, long O, long M, Scaling, float* m) {
    for (long j = 0; j < w; j++)
        for (long k = 0; k < M; k += LANES) {
            Floats n;
            load(p + j * O + k, n);
            store(m + j * M + k, n);
        }
}

// m [R][16 N] = v [R][C] (its rows `row` numbers apart) times u [N][C][16] (its units `apart`), plus what m already
// holds if `more`. Each step multiplies S of the C numbers.
template <int R, int N, class E> void multiply(const E* v, long row, const E* u, long apart, E* m, long C, bool more) {
    typedef Registers<E> Rs;
    constexpr int K = N * Rs::per_unit, S = per_lane<E>;
    typename Rs::vector sum[R][K] = {};
    for (long k = 0; k < C; k += S, u += UNIT * S) {
        typename Rs::vector w[K];
#pragma GCC unroll 16
        for (int n = 0; n < K; n++) load(u + n / Rs::per_unit * apart + n % Rs::per_unit * Rs::lanes, w[n]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            auto a = broadcast(v + r * row + k);
#pragma GCC unroll 16
            for (int n = 0; n < K; n++) sum[r][n] += a * w[n];
        }
    }
    accumulate(m, sum, more);
}

// out [R][16 N] (its rows `row` numbers apart) += v' m, of v [n][R] and m [n][16 N] over n tiles or pixels. They have a
// sum of their own, which is rounded less than one that goes on in `out`.
template <int R, int N, class E>
__attribute__((noinline)) void add_products(const E* v, long v_row, const E* m, long m_row, float* out, long row,
                                            long n, float undo) {
    typedef Registers<E> Rs;
    constexpr int K = N * Rs::per_unit, S = per_lane<E>;
    typename Rs::vector sum[R][K] = {};
    for (; n > 0; n -= S, v += S * v_row, m += S * m_row) {
        typename Rs::vector w[K];
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) load(m + k * Rs::lanes, w[k]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            auto a = broadcast(v + S * r);
#pragma GCC unroll 16
            for (int k = 0; k < K; k++) sum[r][k] += a * w[k];
        }
    }
    add_rows(out, row, sum, undo);
}

constexpr long BLOCK_CHANNELS = 64;   // of outputs, or of inputs, in a block of a weight's gradient
constexpr long MOST_SUMS = 1L << 21;   // numbers in the sums of all chunks

// out [n][O] = a sum over `rows` of outputs. It is cut into blocks of up to `each` of n by 64 of O, and the rows into
// chunks: f(first row, end, p, o, M, sum) adds a chunk's share to sum [K][M], block p by channels o to o + M. The cuts
// do not depend on the number of threads, nor does the result.
template <class F> void sum_over_rows(long rows, long n, long each, long O, float* out, int threads, F f) {
    long size = n * O, chunks = std::max(1L, std::min({16L, rows / 64, MOST_SUMS / size})),
         parts = (n + each - 1) / each;
    std::unique_ptr<Floats[]> sums(new Floats[chunks * size / LANES]);
    auto block = [&](long c, long p, long o) {   // where chunk c has its sum of block (p, o)
        return (float*)sums.get() + c * size + p * each * O + std::min(each, n - p * each) * o;
    };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(3) schedule(dynamic)
        for (long c = 0; c < chunks; c++)
            for (long p = 0; p < parts; p++)
                for (long o = 0; o < O; o += BLOCK_CHANNELS) {
                    long K = std::min(each, n - p * each), M = std::min(BLOCK_CHANNELS, O - o);
                    std::fill(block(c, p, o), block(c, p, o) + K * M, 0.f);
                    f(rows * c / chunks, rows * (c + 1) / chunks, p, o, M, block(c, p, o));
                }
#pragma omp for collapse(2) schedule(static)
        for (long p = 0; p < parts; p++)
            for (long o = 0; o < O; o += BLOCK_CHANNELS) {
                long K = std::min(each, n - p * each), M = std::min(BLOCK_CHANNELS, O - o);
                for (long k = 0; k < K; k++)
                    for (long m = 0; m < M; m += LANES) {
                        Floats sum = {}, a;
                        for (long c = 0; c < chunks; c++) {
                            load(block(c, p, o) + k * M + m, a);
                            sum += a;
                        }
                        store(out + (p * each + k) * O + o + m, sum);
                    }
            }
    }
}

// The strides of a weight in numbers, by output channel, input channel, row and column of its taps.
struct Entry {
    long o, c, a, e;
    // How far from its begin an entry lies.
    long operator()(long i, long j, long k, long l) const { return i * o + j * c + k * a + l * e; }
};

// The weights at w of LANES output channels, `o` numbers apart.
template <class T> inline Floats load_outputs(const T* w, long o) {
    Floats v;
    if (o == 1) load(w, v);
    else
        for (int i = 0; i < LANES; i++) {
            float f;
            load(w + i * o, f);
            v[i] = f;
        }
    return v;
}

// dw = v, of LANES output channels, `o` numbers apart.
inline void store_outputs(Floats v, float* dw, long o) {
    if (o == 1) store(dw, v);
    else
        for (int i = 0; i < LANES; i++) dw[i * o] = v[i];
}
