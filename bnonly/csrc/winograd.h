// Convolutions of 3x3 with stride 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016): 36 products for 16 outputs, where
// a direct one takes 144. The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity, which round half as much as 0, +-1,
// +-2.
#pragma once
#include "arithmetic.h"

const double ROOT_HALF = std::sqrt(.5), ROOT_TWO = std::sqrt(2.);

// The three transforms of a column: inputs [6] to [6], products [6] to outputs [4], upstream gradients [4] to [6].
struct Inputs {
    template <class X> static void transform(const X* d, X* v) {
        typedef std::decay_t<decltype(d[0][0])> E;
        X a = d[4] - (E)2 * d[2], b = (E)ROOT_HALF * (d[3] - (E)2 * d[1]);
        X e = d[4] - (E).5 * d[2], f = (E)ROOT_TWO * (d[3] - (E).5 * d[1]);
        v[0] = d[0] - (E)2.5 * d[2] + d[4];
        v[1] = a + b;
        v[2] = a - b;
        v[3] = e + f;
        v[4] = e - f;
        v[5] = d[1] - (E)2.5 * d[3] + d[5];
    }
};
struct Outputs {
    template <class X> static void transform(const X* m, X* y) {
        typedef std::decay_t<decltype(m[0][0])> E;
        X a = m[1] + m[2], b = (E)ROOT_HALF * (m[1] - m[2]), c = m[3] + m[4], d = (E)ROOT_TWO * (m[3] - m[4]);
        y[0] = m[0] + a + c;
        y[1] = b + d;
        y[2] = (E).5 * a + (E)2 * c;
        y[3] = (E).5 * b + (E)2 * d + m[5];
    }
};
struct Gradients {
    template <class X> static void transform(const X* y, X* m) {
        typedef std::decay_t<decltype(y[0][0])> E;
        X a = y[0] + (E).5 * y[2], b = (E)ROOT_HALF * (y[1] + (E).5 * y[3]);
        X c = y[0] + (E)2 * y[2], d = (E)ROOT_TWO * (y[1] + (E)2 * y[3]);
        m[0] = y[0];
        m[1] = a + b;
        m[2] = a - b;
        m[3] = c + d;
        m[4] = c - d;
        m[5] = y[3];
    }
};

// G w: a column of three weights, `step` apart, to six; and G' u, the way back of their gradient.
inline void transform_weights(const V* w, long step, V* u) {
    V a = (w[0] + .5f * w[2 * step]) / -1.5f, b = (float)ROOT_HALF * w[step] / -1.5f;
    V c = (w[0] + 2 * w[2 * step]) / 6, d = (float)ROOT_TWO * w[step] / 6;
    u[0] = w[0];
    u[1] = a + b;
    u[2] = a - b;
    u[3] = c + d;
    u[4] = c - d;
    u[5] = w[2 * step];
}
inline void transform_back(const V* u, long step, V* w) {
    V a = (u[step] + u[2 * step]) / -1.5f, b = (float)ROOT_HALF * (u[step] - u[2 * step]) / -1.5f;
    V c = (u[3 * step] + u[4 * step]) / 6, d = (float)ROOT_TWO * (u[3 * step] - u[4 * step]) / 6;
    w[0] = u[0] + a + c;
    w[1] = b + d;
    w[2] = .5f * a + 2 * c + u[5 * step];
}

// N rows of x [H, W, C] from row i, K of their channels, transformed down the columns: six lines, `length` apart.
template <class F, int N, class X, class T, class E>
void columns_by(const T* x, const T* zeros, long i, long H, long W, long C, long K, Range range, E* line, long length) {
    const T* rows[N];
    for (int k = 0; k < N; k++) rows[k] = i + k < 0 || i + k >= H ? zeros : x + (i + k) * W * C;
    for (long j = 0; j < W; j++)
        for (long c = 0; c < K; c += numbers<X, E>, line += numbers<X, E>) {
            X d[N], s[6];
#pragma GCC unroll 6
            for (int k = 0; k < N; k++) load(rows[k] + j * C + c, range, d[k]);
            F::transform(d, s);
#pragma GCC unroll 6
            for (int k = 0; k < 6; k++) store(line + k * length, s[k]);
        }
}
template <class F, int N, class T, class E>
void columns(const T* x, const T* zeros, long i, long H, long W, long C, long K, Range range, E* line, long length) {
    typedef Vectors<E> Vs;
    if (K == C) C = K *= W, W = 1;   // as if a row were a pixel
    (K % 32 ? columns_by<F, N, typename Vs::narrow, T, E>
            : columns_by<F, N, typename Vs::wide, T, E>)(x, zeros, i, H, W, C, K, range, line, length);
}

// The tiles of a line of columns, w of them with N numbers across; v: their 36 planes of [w][C], `stride` numbers
// apart.
template <class F, int N, class X, class E>
void planes_of(const E* line, long length, long w, long C, E* v, long stride) {
    for (long j = 0; j < w; j++, line += 4 * C)
        for (long c = 0; c < C; c += numbers<X, E>, v += numbers<X, E>)
            for (int k = 0; k < 6; k++) {
                X d[N], s[6];
#pragma GCC unroll 6
                for (int l = 0; l < N; l++) load(line + k * length + l * C + c, d[l]);
                F::transform(d, s);
#pragma GCC unroll 6
                for (int l = 0; l < 6; l++) store(v + (k * 6 + l) * stride, s[l]);
            }
}

// m: 36 planes of products, `stride` numbers apart, of n tiles with K channels each (float16 two by two); y [H, W, O]
// of several images; first: the row of tiles where they begin; units: what to multiply each row of them by.
template <class T, class E>
void write_outputs(const E* m, long stride, const T* bias, const float* units, T* y, long first, long n, long H, long W,
                   long O, long K) {
    typedef typename Vectors<E>::wide X;
    constexpr int P = Vectors<E>::tiles;
    long h = (H + 3) / 4, b = first / h, i = first % h * 4, j = 0;
    for (long t = 0; t < n; t += P, m += P * K) {
        T* to[P];
        long rows[P], across[P];
        float unit[P];
        for (int z = 0; z < P; z++) {
            to[z] = y + ((b * H + i) * W + j) * O;
            rows[z] = t + z < n ? H - i : 0;
            across[z] = W - j;
            unit[z] = *units;
            if ((j += 4) < W) continue;
            j = 0;
            units++;
            if ((i += 4) >= H) i = 0, b++;
        }
        for (long c = 0; c < K; c += LANES) {
            X s[4][6];
#pragma GCC unroll 6
            for (int l = 0; l < 6; l++) {
                X d[6], r[4];
#pragma GCC unroll 6
                for (int k = 0; k < 6; k++) load(m + (k * 6 + l) * stride + P * c, d[k]);
                Outputs::transform(d, r);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) s[k][l] = r[k];
            }
            V v[P], plus = {};
            if (bias) load(bias + c, plus);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                X r[4];
                Outputs::transform(s[k], r);
#pragma GCC unroll 4
                for (int l = 0; l < 4; l++) {
                    split(r[l], v);
                    for (int z = 0; z < P; z++)
                        if (k < rows[z] && l < across[z]) store(to[z] + (k * W + l) * O + c, v[z] * unit[z] + plus);
                }
            }
        }
    }
}

// A strip of rows of tiles reads the rows of pixels `from` to `to`, counted over all images, and writes `first` to
// `last`. `Before` makes what it reads; `After` is called when it has written.
struct Strip {
    long number, from, to, first, last;
};
template <class T> using Before = std::function<void(Strip, T* rows)>;
using After = std::function<void(Strip)>;
// Rows of tiles in a strip: enough to repay its border, few enough that there is a strip for every thread.
inline long strip_rows(long B, long H, long W) {
    long h = (H + 3) / 4, w = (W + 3) / 4, tiles = WIDE ? 32 : 48;
    while (tiles > 16 && B * h * w < 16 * tiles) tiles /= 2;
    return std::max(1L, tiles / w);
}
inline long strips(long B, long H, long W) {
    long rows = strip_rows(B, H, W);
    return (B * ((H + 3) / 4) + rows - 1) / rows;
}

// x [B, H, W, C]; u [36][O / 16][C][16], of float16 [36][O / 16][C / 2][16][2], times `scale` is G w G'; y [B, H, W,
// O].
template <int R, int N, class T>
void winograd_by(const T* x, const Before<T>& before, const After& after, const void* u, const T* bias, T* y,
                 float scale, long B, long H, long W, long C, long O, int threads) {
    typedef typename Product<T>::number E;
    typedef Vectors<E> Vs;
    auto planes = C % 32 ? planes_of<Inputs, 6, typename Vs::narrow, E> : planes_of<Inputs, 6, typename Vs::wide, E>;
    long h = (H + 3) / 4, w = (W + 3) / 4, rows = strip_rows(B, H, W), tiles = (rows * w + R - 1) / R * R, K = 16 * N;
    long length = (4 * w + 2) * C,
         gap = 64 / sizeof(E);   // between planes, so that they do not share lines of the cache
    long v_stride = tiles * C + gap, m_stride = tiles * K + gap,
         chain = sizeof(E) < 4 ? 32 : C;   // channels in one sum
#pragma omp parallel num_threads(threads)
    {
        Buffer<E> lines(6 * length), inputs(36 * v_stride), products(36 * m_stride);
        E *line = lines, *v = inputs, *m = products;
        std::vector<T> zeros(W * C), workspace(before ? (4 * rows + 2) * W * C : 0);
        std::vector<float> units(rows + 1);
#pragma omp for schedule(static)
        for (long first = 0; first < B * h; first += rows) {
            long last = std::min(first + rows, B * h);
            long top = first / h * H, bottom = (last - 1) / h * H, i = first % h * 4, j = (last - 1) % h * 4;
            Strip strip{first / rows, top + std::max(0L, i - 1), bottom + std::min(H, j + 5), top + i,
                        bottom + std::min(H, j + 4)};
            if (before) before(strip, workspace.data());
            const T* reads = before ? workspace.data() : x + strip.from * W * C;
            for (long g = first; g < last; g++) {
                long i = g % h * 4 - 1, top = std::max(0L, i);
                const T* image = reads + (g / h * H - strip.from) * W * C;
                long numbers = (std::min(H, i + 6) - top) * W * C;
                Range range =
                    range_of(image + top * W * C, 1, numbers, numbers, 256.f / C);   // so that no sum is infinite
                units[g - first] = range.unit * scale;
                columns<Inputs, 6>(image, zeros.data(), i, H, W, C, C, range, line + C, length);
                planes(line, length, w, C, v + (g - first) * w * C, v_stride);
            }
            for (long o = 0; o < O; o += K) {
                for (int p = 0; p < 36; p++)
                    for (long c = 0; c < C; c += chain)
                        for (long t = 0; t < (last - first) * w; t += R)
                            multiply<R, N>(v + p * v_stride + t * C + c, C, (const E*)u + (p * O + o) * C + c * 16,
                                           C * 16, m + p * m_stride + t * K, std::min(chain, C - c), c);
                const T* plus = bias ? bias + o : nullptr;
                write_outputs(m, m_stride, plus, units.data(), y + o, first, (last - first) * w, H, W, O, K);
            }
            if (after) after(strip);
        }
    }
}
template <class T>
void winograd(const T* x, const Before<T>& before, const After& after, const void* u, const T* bias, T* y, float scale,
              long B, long H, long W, long C, long O, int threads) {
    auto f = winograd_by<6, 1, T>;
    if constexpr (WIDE) f = O % 32 ? winograd_by<16, 1, T> : O % 64 ? winograd_by<8, 2, T> : winograd_by<4, 4, T>;
    f(x, before, after, u, bias, y, scale, B, H, W, C, O, threads);
}

// Pack G w G' in the order in which `winograd` reads it, from a weight of n numbers at w whose entries lie at `at`;
// returns the scale by which it is to be multiplied.
template <class T>
float pack_winograd(const T* w, long n, const T* from, Entry at, void* u, long O, long C, int threads) {
    typedef typename Product<T>::number E;
    constexpr int S = 4 / sizeof(E);
    float scale = range_of(w, 1, n, n, .25f).unit;   // G makes up to 1.48 of 1, and that twice
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long o = 0; o < O; o += LANES)
        for (long c = 0; c < C; c += S) {
            V d[9], t[18], v[36][S];
            for (long s = 0; s < S; s++) {
                for (long k = 0; k < 9; k++) d[k] = load_outputs(from + at(o, c + s, k / 3, k % 3), at.o);
                for (long l = 0; l < 3; l++) transform_weights(d + l, 3, t + 6 * l);
                for (long k = 0; k < 6; k++) {
                    V r[6];
                    transform_weights(t + k, 6, r);
                    for (long l = 0; l < 6; l++) v[k * 6 + l][s] = r[l];
                }
            }
            for (long p = 0; p < 36; p++) place((E*)u + ((p * O + o / 16 * 16) * C + c * 16 + o % 16), v[p], scale);
        }
    return scale;
}

// dw = G' sums G, from sums [36, 64, O] for each 64 of C and for the rest; its entries lie at `at`.
inline void finish_winograd(const float* sums, float* dw, Entry at, long O, long C, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (long o = 0; o < O; o += LANES)
        for (long c = 0; c < C; c++) {
            long first = c / 64 * 64, K = std::min(64L, C - first);
            V u[36], t[18], r[3];
            for (long p = 0; p < 36; p++) load(sums + (36 * first + p * K + c - first) * O + o, u[p]);
            for (long l = 0; l < 6; l++) transform_back(u + l, 6, t + 3 * l);
            for (long k = 0; k < 3; k++) {
                transform_back(t + k, 3, r);
                for (long l = 0; l < 3; l++) store_outputs(r[l], dw + at(o, c, k, l), at.o);
            }
        }
}

// The gradient of the weight: x [B, H, W, C]; dy [B, H, W, O]; entries of dw at `at`.
template <int R, int N, class T>
void winograd_weight_gradient_by(const T* x, const T* dy, float* dw, Entry at, long B, long H, long W, long C, long O,
                                 int threads) {
    typedef typename Product<T>::number E;
    long h = (H + 3) / 4, w = (W + 3) / 4, S = 4 / sizeof(E), rows = std::max(1L, 32 / w);
    w = (w + S - 1) / S * S;   // with one of zeros, where float16 goes in pairs
    long length = 4 * w + 2, gap = 64 / sizeof(E);
    float limit = w > 32 ? .25f : 1;   // 32 tiles in a sum, or a longer row
    std::vector<T> zeros(W * std::max(C, O));
    std::unique_ptr<V[]> sums(new V[36 * C * O / LANES]);
    auto chunk = [&](long first, long end, long part, long o, long M, float* sum) {
        long c = 64 * part, K = std::min(64L, C - c), v_stride = rows * w * K + gap, m_stride = rows * w * M + gap;
        Buffer<E> lines(6 * length * K), upstream(6 * length * M), inputs(36 * v_stride), gradients(36 * m_stride);
        E *reads = lines, *writes = upstream, *v = inputs, *m = gradients;
        for (long last; first < end; first = last) {
            last = std::min(first + rows, end);
            long from = (first / h * H + std::max(0L, first % h * 4 - 1)) * W;
            long n = ((last - 1) / h * H + std::min(H, (last - 1) % h * 4 + 5)) * W - from;
            Range range = range_of(x + from * C + c, n, C, K, limit), low = range_of(dy + from * O + o, n, O, M, limit);
            for (long g = first; g < last; g++) {
                long b = g / h, i = g % h * 4, to = (g - first) * w;
                columns<Inputs, 6>(x + b * H * W * C + c, zeros.data(), i - 1, H, W, C, K, range, reads + K,
                                   length * K);
                planes_for_sums<Inputs, 6>(reads, length * K, w, K, v + to * K, v_stride);
                columns<Gradients, 4>(dy + b * H * W * O + o, zeros.data(), i, H, W, O, M, low, writes, length * M);
                planes_for_sums<Gradients, 4>(writes, length * M, w, M, m + to * M, m_stride);
            }
            for (long p = 0; p < 36; p++)
                for (long s = 0; s < M; s += 16 * N)
                    for (long k = 0; k < K; k += R)
                        add_products<R, N>(v + p * v_stride + S * k, K, m + p * m_stride + S * s, M,
                                           sum + (p * K + k) * M + s, M, (last - first) * w, range.unit * low.unit);
        }
    };
    sum_over_rows(B * h, 36 * C, 36 * 64, O, (float*)sums.get(), threads, chunk);
    finish_winograd((float*)sums.get(), dw, at, O, C, threads);
}
template <class T>
void winograd_weight_gradient(const T* x, const T* dy, float* dw, Entry at, long B, long H, long W, long C, long O,
                              int threads) {
    auto f = winograd_weight_gradient_by<4, 1, T>;
    if constexpr (WIDE) f = O % 32 ? winograd_weight_gradient_by<16, 1, T> : winograd_weight_gradient_by<8, 2, T>;
    f(x, dy, dw, at, B, H, W, C, O, threads);
}
