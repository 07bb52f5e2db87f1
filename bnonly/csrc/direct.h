// Convolutions of any square kernel and stride by direct products, a few output pixels by 16 N channels at a time. The
// gradient of the input is made of such convolutions too, one for each phase of the stride (`phases` in Python).
#pragma once
#include "arithmetic.h"

// line [length] = row i of x [H, W, C], whose column 0 comes `left` pixels after the line's begin, with zeros
// elsewhere.
template <class T, class E>
void read_row(const T* x, long i, long H, long W, long C, long left, Scaling scaling, E* line, long length) {
    typename Vectors<E>::narrow v;
    constexpr int L = numbers<decltype(v), E>;
    std::fill(line, line + length, (E)0);
    if (i < 0 || i >= H) return;
    long n = std::min(W * C, length - left * C), e = std::max(0L, -left * C);
    x += i * W * C;
    line += left * C;
    for (; e + L <= n; e += L) {
        load(x + e, scaling, v);
        store(line + e, v);
    }
    if (e < n) {
        T rest[L] = {};
        E out[L];
        std::copy(x + e, x + n, rest);
        load(rest, scaling, v);
        store(out, v);
        std::copy(out, out + n - e, line + e);
    }
}

// lines [A][length] = A such rows from row i on, scaled to below `limit`; returns what undoes it.
template <class T, class E>
float read_rows(const T* x, long i, long A, long H, long W, long C, long left, float limit, E* lines, long length) {
    long from = std::max(0L, i), n = std::max(0L, std::min(H, i + A) - from);
    Scaling scaling = scaling_of(x + from * W * C, n, W * C, W * C, limit);
    for (long a = 0; a < A; a++) read_row(x, i + a, H, W, C, left, scaling, lines + a * length, length);
    return scaling.undo;
}

// to[r] [16 N] = the products m [R][16 N] (float16: pairs of pixels) times scale[r], plus bias, for each of R pixels
// that has a place to go to.
template <int R, int N, class T, class E>
void write_pixels(const E* m, T* const* to, const float* scale, const T* bias) {
    typedef typename Vectors<E>::wide X;
    constexpr int P = Vectors<E>::tiles;
    for (int r = 0; r < R; r += P)
        for (int k = 0; k < UNIT * N; k += LANES) {
            X sum;
            Floats v[P], plus = {};
            load(m + r * UNIT * N + P * k, sum);
            split(sum, v);
            if (bias) load(bias + k, plus);
            for (int z = 0; z < P; z++)
                if (to[r + z]) store(to[r + z] + k, v[z] * scale[r + z] + plus);
        }
}

// The sizes of a direct convolution, or of one phase of the gradient of its input: output (i, j) of h x w reads A rows
// from i * stride - top and E columns from j * stride - left of x [B, H, W, C], and is pixel (i * step, j * step) of
// y [B, OH, OW, O].
struct Direct {
    long B, H, W, C, h, w, O, A, E, stride, top, left, OH, OW, step;
};

constexpr long PIXELS = 32;   // in the rows of outputs that a thread works on at once, about
constexpr long FEW_COLUMNS = 8;   // so few that neighbours in a product of matrices come from several rows
constexpr float HALF_SUM = 32768;   // the limit of a sum of float16

// y [B, OH, OW, O] = x [B, H, W, C] convolved with the weight scale * u, plus bias [O], for R pixels by N units at a
// time; u [O / 16][A][E * C][16], of float16 [O / 16][A][E * C / 2, rounded up][16][2].
template <int R, int N, class T>
void direct_by(const T* x, const void* u, const T* bias, T* y, float scale, const Direct& d, int threads) {
    typedef typename Product<T>::number F;
    constexpr int S = per_lane<F>;
    bool wide = d.w >= FEW_COLUMNS;
    long across = wide ? (d.w + R - 1) / R * R : d.w, length = ((across - 1) * d.stride + d.E) * d.C;
    long rows = std::max(1L, PIXELS / across), run = (d.E * d.C + S - 1) / S * S, size = d.A * run,
         lines_of = d.A * length;
    long each = wide ? run : size, chain = S > 1 ? 64 : each, count = d.B * d.h;
#pragma omp parallel num_threads(threads)
    {
        Buffer<F> buffer(rows * lines_of + 16), gathered(wide ? 0 : (rows * d.w + R) * size + 16),
            products(R * UNIT * N);
        F *lines = buffer, *v = gathered, *m = products;
        std::vector<float> scales(rows + R + 1);
#pragma omp for schedule(static)
        for (long first = 0; first < count; first += rows) {
            long last = std::min(first + rows, count);
            for (long g = first; g < last; g++) {
                F* at = lines + (g - first) * lines_of;
                const T* image = x + g / d.h * d.H * d.W * d.C;
                float limit = HALF_SUM / std::max(1L, size);
                scales[g - first] =
                    scale * read_rows(image, g % d.h * d.stride - d.top, d.A, d.H, d.W, d.C, d.left, limit, at, length);
                if (!wide) gather(at, length, d.A, run, d.stride * d.C, d.w, size, v + (g - first) * d.w * size);
            }
            auto row = [&](long g) { return y + (g / d.h * d.OH + g % d.h * d.step) * d.OW * d.O; };
            for (long o = 0; o < d.O; o += UNIT * N)
                for (long q = 0, g = first, j = 0; q < (last - first) * across; q += R) {
                    T *line = row(g) + o, *to[R];
                    float scale_of[R];
                    for (long a = 0; a < (wide ? d.A : 1); a++)
                        for (long c = 0; c < each; c += chain) {
                            const F* from = lines + (g - first) * lines_of + a * length + j * d.stride * d.C;
                            multiply<R, N>((wide ? from : v + q * size) + c, wide ? d.stride * d.C : size,
                                           (const F*)u + o * size + (a * each + c) * UNIT, size * UNIT, m,
                                           std::min(chain, each - c), a + c);
                        }
                    for (int r = 0; r < R; r++) {
                        to[r] = g < last && j < d.w ? line + j * d.step * d.O : nullptr;
                        scale_of[r] = scales[g - first];
                        if (++j == across) j = 0, line = row(++g) + o;
                    }
                    write_pixels<R, N>(m, to, scale_of, bias ? bias + o : nullptr);
                }
        }
    }
}

// The same, with as many pixels and units at a time as the registers hold.
template <class T>
void direct(const T* x, const void* u, const T* bias, T* y, float scale, const Direct& d, int threads) {
    auto f = direct_by<6, 1, T>;
    if constexpr (WIDE) f = d.O % 32 ? direct_by<16, 1, T> : direct_by<8, 2, T>;
    f(x, u, bias, y, scale, d, threads);
}

// u [O / 16][A][E * C][16] (see direct_by) = the weight [O, C, A, E] at `from` with strides `at`, divided by the scale
// that is returned: one for all the n numbers at w, which hold this weight.
template <class T>
float pack_direct(const T* w, long n, const T* from, Entry at, void* u, long O, long C, long A, long E, int threads) {
    typedef typename Product<T>::number F;
    constexpr int S = per_lane<F>;
    float scale = scaling_of(w, 1, n, n, 1).undo;
    long run = (E * C + S - 1) / S;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long o = 0; o < O; o += LANES)
        for (long a = 0; a < A; a++)
            for (long k = 0; k < run; k++) {
                Floats v[S] = {};
                for (long s = 0; s < S && k * S + s < E * C; s++)
                    v[s] = load_outputs(from + at(o, (k * S + s) % C, a, (k * S + s) / C), at.o);
                store_packed((F*)u + ((o / UNIT * A + a) * run + k) * UNIT * S + o % UNIT, v, scale);
            }
    return scale;
}

// The numbers of K columns of taps by C channels, up to a multiple of 8, which all numbers R of direct_weight_gradient
// divide.
inline long depth_of(long K, long C) { return (K * C + 7) / 8 * 8; }

// dw [O, C, K, K] with strides `at` = sums [K][depth][O].
inline void finish_direct(const float* sums, float* dw, Entry at, long O, long C, long K, int threads) {
    long depth = depth_of(K, C);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long o = 0; o < O; o += LANES)
        for (long c = 0; c < C; c++)
            for (long k = 0; k < K * K; k++) {
                Floats v;
                load(sums + (k / K * depth + k % K * C + c) * O + o, v);
                store_outputs(v, dw + at(o, c, k / K, k % K), at.o);
            }
}

// dw [O, C, K, K] with strides `at` = the gradient of the weight, from x [B, H, W, C] and dy [B, OH, OW, O];
// for R inputs of the K * C by N units of outputs at a time.
template <int R, int N, class T>
void direct_weight_gradient_by(const T* x, const T* dy, float* dw, Entry at, long B, long H, long W, long C, long OH,
                               long OW, long O, long K, long stride, long pad, int threads) {
    typedef typename Product<T>::number E;
    constexpr int S = per_lane<E>;
    bool shared = OW >= FEW_COLUMNS && S == 1;   // neighbours read what lies in a line once
    long depth = depth_of(K, C), rows = shared ? 1 : std::max(1L, PIXELS / OW), length = ((OW - 1) * stride + K) * C;
    long each = (OW + S - 1) / S * S;
    float limit = std::sqrt(HALF_SUM / (rows * each));   // so that no sum of float16 is infinite
    std::unique_ptr<Floats[]> sums(new Floats[K * depth * O / LANES]);
    auto chunk = [&](long first, long end, long, long o, long M, float* sum) {
        Buffer<E> read(length + stride * C + 16), gathered(rows * each * depth + 32), upstream(rows * each * M);
        E *line = read, *v = gathered, *m = upstream;
        for (long last; first < end; first = last) {
            last = std::min(first + rows, end);
            long from = first / OH * H + std::max(0L, first % OH * stride - pad);
            long to = (last - 1) / OH * H + std::min(H, (last - 1) % OH * stride - pad + K);
            Scaling scaling = scaling_of(x + from * W * C, std::max(0L, to - from), W * C, W * C, limit);
            Scaling dy_scaling = scaling_of(dy + first * OW * O + o, (last - first) * OW, O, M, limit);
            for (long g = first; g < last; g++)
                read_pixels(dy + g * OW * O + o, OW, O, M, dy_scaling, m + (g - first) * each * M);
            for (long a = 0; a < K; a++) {
                for (long g = first; g < last; g++) {
                    read_row(x + g / OH * H * W * C, g % OH * stride - pad + a, H, W, C, pad, scaling, line, length);
                    if (!shared) gather_pixels(line, K * C, stride * C, OW, depth, v + (g - first) * each * depth);
                }
                for (long s = 0; s < M; s += UNIT * N)
                    for (long k = 0; k < depth; k += R)
                        add_products<R, N>((shared ? line : v) + S * k, shared ? stride * C : depth, m + S * s, M,
                                           sum + (a * depth + k) * M + s, M, (last - first) * each,
                                           scaling.undo * dy_scaling.undo);
            }
        }
    };
    sum_over_rows(B * OH, K * depth, K * depth, O, (float*)sums.get(), threads, chunk);
    finish_direct((float*)sums.get(), dw, at, O, C, K, threads);
}

// The same, with as many inputs and units at a time as the registers hold.
template <class T>
void direct_weight_gradient(const T* x, const T* dy, float* dw, Entry at, long B, long H, long W, long C, long OH,
                            long OW, long O, long K, long stride, long pad, int threads) {
    auto f = direct_weight_gradient_by<4, 1, T>;
    if constexpr (WIDE) f = O % 32 ? direct_weight_gradient_by<8, 1, T> : direct_weight_gradient_by<8, 2, T>;
    f(x, dy, dw, at, B, H, W, C, OH, OW, O, K, stride, pad, threads);
}
