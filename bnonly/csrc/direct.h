// Convolutions of any square kernel and stride by direct products, a few output pixels by 16 N channels at a time. The
// gradient of the input is made of such convolutions too, one for each phase of the stride (`phases` in Python).
#pragma once
#include "arithmetic.h"

// Row i of x [H, W, C], whose column 0 comes `left` pixels after the line's begin; zeros elsewhere.
template <class T, class E>
void read_row(const T* x, long i, long H, long W, long C, long left, Range range, E* line, long length) {
    typename Vectors<E>::narrow v;
    constexpr int L = numbers<decltype(v), E>;
    std::fill(line, line + length, (E)0);
    if (i < 0 || i >= H) return;
    long n = std::min(W * C, length - left * C), e = std::max(0L, -left * C);
    x += i * W * C;
    line += left * C;
    for (; e + L <= n; e += L) {
        load(x + e, range, v);
        store(line + e, v);
    }
    if (e < n) {
        T rest[L] = {};
        E out[L];
        std::copy(x + e, x + n, rest);
        load(rest, range, v);
        store(out, v);
        std::copy(out, out + n - e, line + e);
    }
}

// A rows from row i, `length` apart; returns what brings their numbers back, where these are brought below `limit`.
template <class T, class E>
float read_rows(const T* x, long i, long A, long H, long W, long C, long left, float limit, E* lines, long length) {
    long from = std::max(0L, i), n = std::max(0L, std::min(H, i + A) - from);
    Range range = range_of(x + from * W * C, n, W * C, W * C, limit);
    for (long a = 0; a < A; a++) read_row(x, i + a, H, W, C, left, range, lines + a * length, length);
    return range.unit;
}

// The products m of R pixels, each to where it belongs, if anywhere.
template <int R, int N, class T, class E>
void write_pixels(const E* m, T* const* to, const float* unit, const T* bias) {
    typedef typename Vectors<E>::wide X;
    constexpr int P = Vectors<E>::tiles;
    for (int r = 0; r < R; r += P)
        for (int k = 0; k < 16 * N; k += LANES) {
            X sum;
            V v[P], plus = {};
            load(m + r * 16 * N + P * k, sum);
            split(sum, v);
            if (bias) load(bias + k, plus);
            for (int z = 0; z < P; z++)
                if (to[r + z]) store(to[r + z] + k, v[z] * unit[r + z] + plus);
        }
}

// What a direct convolution reads and writes: output (i, j) of h x w reads A rows from i * stride - top and E columns
// from j * stride - left of x [B, H, W, C], and is pixel (i * step, j * step) of y [B, OH, OW, O].
struct Direct {
    long B, H, W, C, h, w, O, A, E, stride, top, left, OH, OW, step;
};

// u [O / 16][A][E * C][16], of float16 [O / 16][A][E * C / 2, rounded up][16][2], times `scale` is the weight.
template <int R, int N, class T>
void direct_by(const T* x, const void* u, const T* bias, T* y, float scale, const Direct& d, int threads) {
    typedef typename Product<T>::number F;
    constexpr int S = 4 / sizeof(F);
    bool wide = d.w >= 8;   // else R neighbours lie in several rows
    long across = wide ? (d.w + R - 1) / R * R : d.w, length = ((across - 1) * d.stride + d.E) * d.C;
    long rows = std::max(1L, 32 / across), run = (d.E * d.C + S - 1) / S * S, size = d.A * run, lines_of = d.A * length;
    long each = wide ? run : size, chain = S > 1 ? 64 : each, count = d.B * d.h;
#pragma omp parallel num_threads(threads)
    {
        Buffer<F> buffer(rows * lines_of + 16), gathered(wide ? 0 : (rows * d.w + R) * size + 16), products(R * 16 * N);
        F *lines = buffer, *v = gathered, *m = products;
        std::vector<float> units(rows + R + 1);
#pragma omp for schedule(static)
        for (long first = 0; first < count; first += rows) {
            long last = std::min(first + rows, count);
            for (long g = first; g < last; g++) {
                F* at = lines + (g - first) * lines_of;
                const T* image = x + g / d.h * d.H * d.W * d.C;
                float limit = 32768.f / std::max(1L, size);
                units[g - first] =
                    scale * read_rows(image, g % d.h * d.stride - d.top, d.A, d.H, d.W, d.C, d.left, limit, at, length);
                if (!wide) gather(at, length, d.A, run, d.stride * d.C, d.w, size, v + (g - first) * d.w * size);
            }
            auto row = [&](long g) { return y + (g / d.h * d.OH + g % d.h * d.step) * d.OW * d.O; };
            for (long o = 0; o < d.O; o += 16 * N)
                for (long q = 0, g = first, j = 0; q < (last - first) * across; q += R) {
                    T *line = row(g) + o, *to[R];
                    float unit[R];
                    for (long a = 0; a < (wide ? d.A : 1); a++)
                        for (long c = 0; c < each; c += chain) {
                            const F* from = lines + (g - first) * lines_of + a * length + j * d.stride * d.C;
                            multiply<R, N>((wide ? from : v + q * size) + c, wide ? d.stride * d.C : size,
                                           (const F*)u + o * size + (a * each + c) * 16, size * 16, m,
                                           std::min(chain, each - c), a + c);
                        }
                    for (int r = 0; r < R; r++) {
                        to[r] = g < last && j < d.w ? line + j * d.step * d.O : nullptr;
                        unit[r] = units[g - first];
                        if (++j == across) j = 0, line = row(++g) + o;
                    }
                    write_pixels<R, N>(m, to, unit, bias ? bias + o : nullptr);
                }
        }
    }
}
template <class T>
void direct(const T* x, const void* u, const T* bias, T* y, float scale, const Direct& d, int threads) {
    auto f = direct_by<6, 1, T>;
    if constexpr (WIDE) f = d.O % 32 ? direct_by<16, 1, T> : direct_by<8, 2, T>;
    f(x, u, bias, y, scale, d, threads);
}

// Pack a weight of n numbers at w in the order in which `direct` reads it: O channels, A rows and E columns of taps,
// whose entries lie at `at` from `from`; returns the scale by which it is to be multiplied.
template <class T>
float pack_direct(const T* w, long n, const T* from, Entry at, void* u, long O, long C, long A, long E, int threads) {
    typedef typename Product<T>::number F;
    constexpr int S = 4 / sizeof(F);
    float scale = range_of(w, 1, n, n, 1).unit;
    long run = (E * C + S - 1) / S;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long o = 0; o < O; o += LANES)
        for (long a = 0; a < A; a++)
            for (long k = 0; k < run; k++) {
                V v[S] = {};
                for (long s = 0; s < S && k * S + s < E * C; s++)
                    v[s] = load_outputs(from + at(o, (k * S + s) % C, a, (k * S + s) / C), at.o);
                place((F*)u + ((o / 16 * A + a) * run + k) * 16 * S + o % 16, v, scale);
            }
    return scale;
}

// dw from sums [K][K * C, or the next multiple of 8][O]; its entries lie at `at`.
inline void finish_direct(const float* sums, float* dw, Entry at, long O, long C, long K, int threads) {
    long depth = (K * C + 7) / 8 * 8;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long o = 0; o < O; o += LANES)
        for (long c = 0; c < C; c++)
            for (long k = 0; k < K * K; k++) {
                V v;
                load(sums + (k / K * depth + k % K * C + c) * O + o, v);
                store_outputs(v, dw + at(o, c, k / K, k % K), at.o);
            }
}

// The gradient of the weight: x [B, H, W, C]; dy [B, h, w, O]; entries of dw at `at`.
template <int R, int N, class T>
void direct_weight_gradient_by(const T* x, const T* dy, float* dw, Entry at, long B, long H, long W, long C, long h,
                               long w, long O, long K, long stride, long pad, int threads) {
    typedef typename Product<T>::number E;
    constexpr int S = 4 / sizeof(E);
    bool shared = w >= 8 && S == 1;   // neighbours read what lies in a line once
    long depth = (K * C + 7) / 8 * 8, rows = shared ? 1 : std::max(1L, 32 / w), length = ((w - 1) * stride + K) * C;
    long each = (w + S - 1) / S * S;
    float limit = std::sqrt(32768.f / (rows * each));   // so that no sum of float16 is infinite
    std::unique_ptr<V[]> sums(new V[K * depth * O / LANES]);
    auto chunk = [&](long first, long end, long, long o, long M, float* sum) {
        Buffer<E> read(length + stride * C + 16), gathered(rows * each * depth + 32), upstream(rows * each * M);
        E *line = read, *v = gathered, *m = upstream;
        for (long last; first < end; first = last) {
            last = std::min(first + rows, end);
            long from = first / h * H + std::max(0L, first % h * stride - pad);
            long to = (last - 1) / h * H + std::min(H, (last - 1) % h * stride - pad + K);
            Range range = range_of(x + from * W * C, std::max(0L, to - from), W * C, W * C, limit);
            Range low = range_of(dy + first * w * O + o, (last - first) * w, O, M, limit);
            for (long g = first; g < last; g++)
                read_pixels(dy + g * w * O + o, w, O, M, low, m + (g - first) * each * M);
            for (long a = 0; a < K; a++) {
                for (long g = first; g < last; g++) {
                    read_row(x + g / h * H * W * C, g % h * stride - pad + a, H, W, C, pad, range, line, length);
                    if (!shared) gather_pixels(line, K * C, stride * C, w, depth, v + (g - first) * each * depth);
                }
                for (long s = 0; s < M; s += 16 * N)
                    for (long k = 0; k < depth; k += R)
                        add_products<R, N>((shared ? line : v) + S * k, shared ? stride * C : depth, m + S * s, M,
                                           sum + (a * depth + k) * M + s, M, (last - first) * each,
                                           range.unit * low.unit);
            }
        }
    };
    sum_over_rows(B * h, K * depth, K * depth, O, (float*)sums.get(), threads, chunk);
    finish_direct((float*)sums.get(), dw, at, O, C, K, threads);
}
template <class T>
void direct_weight_gradient(const T* x, const T* dy, float* dw, Entry at, long B, long H, long W, long C, long h,
                            long w, long O, long K, long stride, long pad, int threads) {
    auto f = direct_weight_gradient_by<4, 1, T>;
    if constexpr (WIDE) f = O % 32 ? direct_weight_gradient_by<8, 1, T> : direct_weight_gradient_by<8, 2, T>;
    f(x, dy, dw, at, B, H, W, C, h, w, O, K, stride, pad, threads);
}
