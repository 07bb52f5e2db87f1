// Convolutions of 3x3 with stride 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016): 36 products for 16 outputs, where
// a direct one takes 144. The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity, which round half as much as 0, +-1,
// +-2.
#pragma once
#include "arithmetic.h"

constexpr int TILE = 4, PATCH = 6, PLANES = PATCH * PATCH;   // rows of outputs, and of the inputs that they read

// How many tiles n rows or columns of outputs make.
inline long tiles_of(long n) { return (n + TILE - 1) / TILE; }

const double ROOT_HALF = std::sqrt(.5), ROOT_TWO = std::sqrt(2.);

// The transforms of a column or row, each of vectors of channels: v [6] = B' d of inputs d [6].
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

// y [4] = A' m: products m [6] to outputs.
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

// m [6] = A y: upstream gradients y [4], to be multiplied with transformed inputs.
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

// u [6] = G w of three weights, `step` vectors apart.
inline void transform_weights(const Floats* w, long step, Floats* u) {
    Floats a = (w[0] + .5f * w[2 * step]) / -1.5f, b = (float)ROOT_HALF * w[step] / -1.5f;
    Floats c = (w[0] + 2 * w[2 * step]) / 6, d = (float)ROOT_TWO * w[step] / 6;
    u[0] = w[0];
    u[1] = a + b;
    u[2] = a - b;
    u[3] = c + d;
    u[4] = c - d;
    u[5] = w[2 * step];
}

// w [3] = G' u, the gradient of three weights, from that of six, `step` vectors apart.
inline void transform_back(const Floats* u, long step, Floats* w) {
    Floats a = (u[step] + u[2 * step]) / -1.5f, b = (float)ROOT_HALF * (u[step] - u[2 * step]) / -1.5f;
    Floats c = (u[3 * step] + u[4 * step]) / 6, d = (float)ROOT_TWO * (u[3 * step] - u[4 * step]) / 6;
    w[0] = u[0] + a + c;
    w[1] = b + d;
    w[2] = .5f * a + 2 * c + u[5 * step];
}

// line [6][W][K] = N rows of x [H, W, C] from row i, K of their channels, transformed down the columns; its six rows
// are `length` numbers apart. Rows outside of the image are `zeros` [W][C].
template <class F, int N, class X, class T, class E>
void transform_columns_by(const T* x, const T* zeros, long i, long H, long W, long C, long K, Scaling scaling, E* line,
                          long length) {
    const T* rows[N];
    for (int k = 0; k < N; k++) rows[k] = i + k < 0 || i + k >= H ? zeros : x + (i + k) * W * C;
    for (long j = 0; j < W; j++)
        for (long c = 0; c < K; c += numbers<X, E>, line += numbers<X, E>) {
            X d[N], s[6];
#pragma GCC unroll 6
            for (int k = 0; k < N; k++) load(rows[k] + j * C + c, scaling, d[k]);
            F::transform(d, s);
#pragma GCC unroll 6
            for (int k = 0; k < 6; k++) store(line + k * length, s[k]);
        }
}

// The same, with the widest vectors that K allows.
template <class F, int N, class T, class E>
void transform_columns(const T* x, const T* zeros, long i, long H, long W, long C, long K, Scaling scaling, E* line,
                       long length) {
    typedef Vectors<E> Vs;
    if (K == C) C = K *= W, W = 1;   // as if a row were a pixel
    (K % 32 ? transform_columns_by<F, N, typename Vs::narrow, T, E>
            : transform_columns_by<F, N, typename Vs::wide, T, E>)(x, zeros, i, H, W, C, K, scaling, line, length);
}

// v [36][w][C] = the w tiles of such a line, transformed along the rows, which have N numbers each; its planes are
// `stride` numbers apart.
template <class F, int N, class X, class E>
void transform_rows(const E* line, long length, long w, long C, E* v, long stride) {
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

// y [B, H, W, O] = the outputs, in K channels, of n tiles from row of tiles `first` on, plus bias; from their products
// m [36][n][K] (float16: pairs of tiles), whose planes are `stride` numbers apart. scales: the factor of each row of
// tiles.
template <class T, class E>
void write_outputs(const E* m, long stride, const T* bias, const float* scales, T* y, long first, long n, long H,
                   long W, long O, long K) {
    typedef typename Vectors<E>::wide X;
    constexpr int P = Vectors<E>::tiles;
    long h = tiles_of(H), b = first / h, i = first % h * TILE, j = 0;
    for (long t = 0; t < n; t += P, m += P * K) {
        T* to[P];
        long rows[P], across[P];
        float scale[P];
        for (int z = 0; z < P; z++) {
            to[z] = y + ((b * H + i) * W + j) * O;
            rows[z] = t + z < n ? H - i : 0;
            across[z] = W - j;
            scale[z] = *scales;
            if ((j += TILE) < W) continue;
            j = 0;
            scales++;
            if ((i += TILE) >= H) i = 0, b++;
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
            Floats v[P], plus = {};
            if (bias) load(bias + c, plus);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                X r[4];
                Outputs::transform(s[k], r);
#pragma GCC unroll 4
                for (int l = 0; l < 4; l++) {
                    split(r[l], v);
                    for (int z = 0; z < P; z++)
                        if (k < rows[z] && l < across[z]) store(to[z] + (k * W + l) * O + c, v[z] * scale[z] + plus);
                }
            }
        }
    }
}

// A strip: some rows of tiles, which a thread convolves at once. Of the rows of pixels of all images it reads `from` to
// `to`, and writes `first` to `last`.
struct Strip {
    long number, from, to, first, last;
};

// What makes the rows that a strip reads, and what is done when the strip is written.
template <class T> using Before = std::function<void(Strip, T* rows)>;
using After = std::function<void(Strip)>;

// Rows of tiles in a strip: enough to repay its border, few enough that there is a strip for every thread.
inline long strip_rows(long B, long H, long W) {
    long h = tiles_of(H), w = tiles_of(W), tiles = WIDE ? 32 : 48;
    while (tiles > 16 && B * h * w < 16 * tiles) tiles /= 2;
    return std::max(1L, tiles / w);
}

// How many strips the images are cut into.
inline long strips(long B, long H, long W) {
    long rows = strip_rows(B, H, W);
    return (B * tiles_of(H) + rows - 1) / rows;
}

constexpr long SUM_TILES = 32;   // tiles in a float16 sum of a weight's gradient
constexpr float LARGEST_INPUTS = 256;   // the limit of float16 inputs times C, so that no sum of products is infinite

// y [B, H, W, O] = x [B, H, W, C] (or what `before` makes) convolved with the weight G w G' = scale * u, plus bias [O],
// for R tiles by N units at a time; u [36][O / 16][C][16], of float16 [36][O / 16][C / 2][16][2].
template <int R, int N, class T>
void winograd_by(const T* x, const Before<T>& before, const After& after, const void* u, const T* bias, T* y,
                 float scale, long B, long H, long W, long C, long O, int threads) {
    typedef typename Product<T>::number E;
    typedef Vectors<E> Vs;
    auto transform =
        C % 32 ? transform_rows<Inputs, 6, typename Vs::narrow, E> : transform_rows<Inputs, 6, typename Vs::wide, E>;
    long h = tiles_of(H), w = tiles_of(W), rows = strip_rows(B, H, W), tiles = (rows * w + R - 1) / R * R, K = UNIT * N;
    long length = (TILE * w + PATCH - TILE) * C,
         gap = CACHE_LINE / sizeof(E);   // between planes, so that they do not share lines of the cache
    long v_stride = tiles * C + gap, m_stride = tiles * K + gap,
         chain = sizeof(E) < 4 ? 32 : C;   // channels in one sum
#pragma omp parallel num_threads(threads)
    {
        Buffer<E> lines(PATCH * length), inputs(PLANES * v_stride), products(PLANES * m_stride);
        E *line = lines, *v = inputs, *m = products;
        std::vector<T> zeros(W * C), workspace(before ? (TILE * rows + 2) * W * C : 0);   // 2: a border
        std::vector<float> scales(rows + 1);
#pragma omp for schedule(static)
        for (long first = 0; first < B * h; first += rows) {
            long last = std::min(first + rows, B * h);
            long top = first / h * H, bottom = (last - 1) / h * H, i = first % h * TILE, j = (last - 1) % h * TILE;
            Strip strip{first / rows, top + std::max(0L, i - 1), bottom + std::min(H, j + TILE + 1), top + i,
                        bottom + std::min(H, j + TILE)};
            if (before) before(strip, workspace.data());
            const T* reads = before ? workspace.data() : x + strip.from * W * C;
            for (long g = first; g < last; g++) {
                long i = g % h * TILE - 1, top = std::max(0L, i);
                const T* image = reads + (g / h * H - strip.from) * W * C;
                long size = (std::min(H, i + PATCH) - top) * W * C;
                Scaling scaling = scaling_of(image + top * W * C, 1, size, size, LARGEST_INPUTS / C);
                scales[g - first] = scaling.undo * scale;
                transform_columns<Inputs, 6>(image, zeros.data(), i, H, W, C, C, scaling, line + C, length);
                transform(line, length, w, C, v + (g - first) * w * C, v_stride);
            }
            for (long o = 0; o < O; o += K) {
                for (int p = 0; p < PLANES; p++)
                    for (long c = 0; c < C; c += chain)
                        for (long t = 0; t < (last - first) * w; t += R)
                            multiply<R, N>(v + p * v_stride + t * C + c, C, (const E*)u + (p * O + o) * C + c * UNIT,
                                           C * UNIT, m + p * m_stride + t * K, std::min(chain, C - c), c);
                const T* plus = bias ? bias + o : nullptr;
                write_outputs(m, m_stride, plus, scales.data(), y + o, first, (last - first) * w, H, W, O, K);
            }
            if (after) after(strip);
        }
    }
}

// The same, with as many tiles and units at a time as the registers hold.
template <class T>
void winograd(const T* x, const Before<T>& before, const After& after, const void* u, const T* bias, T* y, float scale,
              long B, long H, long W, long C, long O, int threads) {
    auto f = winograd_by<6, 1, T>;
    if constexpr (WIDE) f = O % 32 ? winograd_by<16, 1, T> : O % 64 ? winograd_by<8, 2, T> : winograd_by<4, 4, T>;
    f(x, before, after, u, bias, y, scale, B, H, W, C, O, threads);
}

// u [36][O / 16][C][16] = G w G' / scale (see winograd_by) of the weight [O, C, 3, 3] at `from` with strides `at`, and
// the scale is returned: one for all the n numbers at w, which hold this weight.
template <class T>
float pack_winograd(const T* w, long n, const T* from, Entry at, void* u, long O, long C, int threads) {
    typedef typename Product<T>::number E;
    constexpr int S = per_lane<E>;
    float scale = scaling_of(w, 1, n, n, .25f).undo;   // G makes up to 1.48 of 1, and that twice
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long o = 0; o < O; o += LANES)
        for (long c = 0; c < C; c += S) {
            Floats d[9], t[3 * PATCH], v[PLANES][S];
            for (long s = 0; s < S; s++) {
                for (long k = 0; k < 9; k++) d[k] = load_outputs(from + at(o, c + s, k / 3, k % 3), at.o);
                for (long l = 0; l < 3; l++) transform_weights(d + l, 3, t + PATCH * l);
                for (long k = 0; k < PATCH; k++) {
                    Floats r[PATCH];
                    transform_weights(t + k, PATCH, r);
                    for (long l = 0; l < PATCH; l++) v[k * PATCH + l][s] = r[l];
                }
            }
            for (long p = 0; p < PLANES; p++)
                store_packed((E*)u + ((p * O + o / UNIT * UNIT) * C + c * UNIT + o % UNIT), v[p], scale);
        }
    return scale;
}

// dw [O, C, 3, 3] with strides `at` = G' sums G, from sums [36][64][O] for each block of 64 input channels, and for
// what is left of them.
inline void finish_winograd(const float* sums, float* dw, Entry at, long O, long C, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (long o = 0; o < O; o += LANES)
        for (long c = 0; c < C; c++) {
            long first = c / BLOCK_CHANNELS * BLOCK_CHANNELS, K = std::min(BLOCK_CHANNELS, C - first);
            Floats u[PLANES], t[3 * PATCH], r[3];
            for (long p = 0; p < PLANES; p++) load(sums + (PLANES * first + p * K + c - first) * O + o, u[p]);
            for (long l = 0; l < PATCH; l++) transform_back(u + l, PATCH, t + 3 * l);
            for (long k = 0; k < 3; k++) {
                transform_back(t + k, 3, r);
                for (long l = 0; l < 3; l++) store_outputs(r[l], dw + at(o, c, k, l), at.o);
            }
        }
}

// dw [O, C, 3, 3] with strides `at` = the gradient of the weight, from x [B, H, W, C] and dy [B, H, W, O]; for R input
// channels by N units of outputs at a time.
template <int R, int N, class T>
void winograd_weight_gradient_by(const T* x, const T* dy, float* dw, Entry at, long B, long H, long W, long C, long O,
                                 int threads) {
    typedef typename Product<T>::number E;
    long h = tiles_of(H), w = tiles_of(W), S = per_lane<E>, rows = std::max(1L, SUM_TILES / w);
    w = (w + S - 1) / S * S;   // with one of zeros, where float16 goes in pairs
    long length = TILE * w + PATCH - TILE, gap = CACHE_LINE / sizeof(E);
    float limit = w > SUM_TILES ? .25f : 1;   // a row may be longer
    std::vector<T> zeros(W * std::max(C, O));
    std::unique_ptr<Floats[]> sums(new Floats[PLANES * C * O / LANES]);
    auto chunk = [&](long first, long end, long part, long o, long M, float* sum) {
        long c = BLOCK_CHANNELS * part, K = std::min(BLOCK_CHANNELS, C - c), v_stride = rows * w * K + gap,
             m_stride = rows * w * M + gap;
        Buffer<E> lines(PATCH * length * K), upstream(PATCH * length * M);
        Buffer<E> inputs(PLANES * v_stride), gradients(PLANES * m_stride);
        E *reads = lines, *writes = upstream, *v = inputs, *m = gradients;
        for (long last; first < end; first = last) {
            last = std::min(first + rows, end);
            long from = (first / h * H + std::max(0L, first % h * TILE - 1)) * W;
            long n = ((last - 1) / h * H + std::min(H, (last - 1) % h * TILE + TILE + 1)) * W - from;
            Scaling scaling = scaling_of(x + from * C + c, n, C, K, limit),
                    dy_scaling = scaling_of(dy + from * O + o, n, O, M, limit);
            for (long g = first; g < last; g++) {
                long b = g / h, i = g % h * TILE, to = (g - first) * w;
                transform_columns<Inputs, 6>(x + b * H * W * C + c, zeros.data(), i - 1, H, W, C, K, scaling, reads + K,
                                             length * K);
                transform_rows_for_sums<Inputs, 6>(reads, length * K, w, K, v + to * K, v_stride);
                transform_columns<Gradients, 4>(dy + b * H * W * O + o, zeros.data(), i, H, W, O, M, dy_scaling, writes,
                                                length * M);
                transform_rows_for_sums<Gradients, 4>(writes, length * M, w, M, m + to * M, m_stride);
            }
            for (long p = 0; p < PLANES; p++)
                for (long s = 0; s < M; s += UNIT * N)
                    for (long k = 0; k < K; k += R)
                        add_products<R, N>(v + p * v_stride + S * k, K, m + p * m_stride + S * s, M,
                                           sum + (p * K + k) * M + s, M, (last - first) * w,
                                           scaling.undo * dy_scaling.undo);
        }
    };
    sum_over_rows(B * h, PLANES * C, PLANES * BLOCK_CHANNELS, O, (float*)sums.get(), threads, chunk);
    finish_winograd((float*)sums.get(), dw, at, O, C, threads);
}

// The same, with as many channels and units at a time as the registers hold.
template <class T>
void winograd_weight_gradient(const T* x, const T* dy, float* dw, Entry at, long B, long H, long W, long C, long O,
                              int threads) {
    auto f = winograd_weight_gradient_by<4, 1, T>;
    if constexpr (WIDE) f = O % 32 ? winograd_weight_gradient_by<16, 1, T> : winograd_weight_gradient_by<8, 2, T>;
    f(x, dy, dw, at, B, H, W, C, O, threads);
}
