// BatchNorm with residual and ReLU in one pass over memory, on x [pixels][C] (channels last), forward and backward.
#pragma once
#include "vec.h"

// What Python gives of a BatchNorm, each array [C]; null where there is none, or where it is not wanted.
struct Norm {
    const float *weight, *bias;
    float *running_mean, *running_var, *mean, *inv_std, *dweight, *dbias;
    double momentum, eps;
};

// Rows are summed in chunks of about CHUNK numbers, each by one thread, and a chunk in blocks of BLOCK numbers, which
// are read column by column: with more, they would come from too many pages of memory at once.
constexpr long CHUNK = 32768, BLOCK = 1024;

// How the passes go over x [pixels][C]: several pixels are one row of `row` numbers, a multiple of four vectors, and
// rows are cut into chunks, whatever the number of threads. A pass is a struct below, whose operator()(X, at, n, width)
// goes over n rows of `width` numbers from number `at` on: whole rows with vectors (X = Floats), and the pixels that
// are left below one row with single numbers (X = float).
struct Plan {
    long pixels, C, row, chunk_pixels, chunks;
    Plan(long pixels, long C) : pixels(pixels), C(C), row(std::lcm(C, 4L * LANES)) {
        chunk_pixels = std::max(1L, CHUNK / row) * (row / C);
        chunks = (pixels + chunk_pixels - 1) / chunk_pixels;
    }
    // p [C] repeated along a row [row]; zeros where there is no p.
    std::vector<float> repeat(const float* p) const {
        std::vector<float> t(row);
        if (p)
            for (long i = 0; i < row; i++) t[i] = p[i % C];
        return t;
    }
    // Call f(Floats or float, first number, rows, numbers in each) for n pixels, a block at a time.
    template <class F> void for_pixels(long pixel, long n, F f) const {
        long at = pixel * C, rows = n * C / row, block = std::max(1L, BLOCK / row);
        for (long i = 0; i < rows; i += block) f(Floats{}, at + i * row, std::min(block, rows - i), row);
        if (rows * row < n * C) f(float{}, at + rows * row, n - rows * row / C, C);
    }
    // The same for all pixels, in parallel.
    template <class F> void for_chunks(int threads, F f) const {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (long c = 0; c < chunks; c++) {
            long first = c * chunk_pixels;
            for_pixels(first, std::min(chunk_pixels, pixels - first), f);
        }
    }
    // out [2][C] += two sums of each channel over n pixels: f sums down the columns in float32, f.widen in float64.
    template <class F> void add_up(long pixel, long n, const F& f, double* out) const {
        std::vector<float> rows(F::rows * row);
        for_pixels(pixel, n, [&](auto... where) { f(where..., rows.data()); });
        for (long i = 0; i < row; i += C)
            for (long c = 0; c < C; c++) f.widen(&rows[i + c], row, out[c], out[C + c]);
    }
    // The sums [2][C] of each channel over all pixels, in parallel.
    template <class F> std::vector<double> sums(int threads, const F& f) const {
        std::vector<double> parts(chunks * 2 * C);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (long c = 0; c < chunks; c++) {
            long first = c * chunk_pixels;
            add_up(first, std::min(chunk_pixels, pixels - first), f, &parts[c * 2 * C]);
        }
        return total(parts);
    }
    // The sum of parts [n][2][C], in a fixed order.
    std::vector<double> total(const std::vector<double>& parts) const {
        std::vector<double> out(2 * C);
        for (size_t c = 0; c < parts.size(); c += 2 * C)
            for (long i = 0; i < 2 * C; i++) out[i] += parts[c + i];
        return out;
    }
};

// How many vectors a loop down the columns takes abreast (K below, with L numbers in each), where each needs so many
// registers; a single number stands alone.
template <class X, int registers> constexpr int abreast = sizeof(X) == 4 ? 1 : WIDE || registers < 5 ? 4 : 2;

// For the mean and variance: sums [4][row] of x - m, of its square, the first number m of each column, and a count.
template <class T> struct Moments {
    static constexpr int rows = 4;
    const T* x;
    long row;
    template <class X> void operator()(X, long at, long n, long width, float* sums) const {
        constexpr int K = abreast<X, 3>, L = numbers<X, float>;
        for (long j = 0; j < width; j += K * L) {
            X s[K], q[K], m[K];
            float *p = sums + j, *count = p + 3 * row;
            for (int k = 0; k < K; k++) {
                load(p + k * L, s[k]);
                load(p + row + k * L, q[k]);
                if (*count) load(p + 2 * row + k * L, m[k]);
                else load(x + at + j + k * L, m[k]);
            }
            for (long i = 0; i < n; i++)
                for (int k = 0; k < K; k++) {
                    X d;
                    load(x + at + i * width + j + k * L, d);
                    d -= m[k];
                    s[k] += d;
                    q[k] += d * d;
                }
            for (int k = 0; k < K; k++) {
                store(p + k * L, s[k]);
                store(p + row + k * L, q[k]);
                store(p + 2 * row + k * L, m[k]);
            }
            for (int i = 0; i < K * L; i++) count[i] += n;
        }
    }
    // Add a column's sums, taken around zero.
    static void widen(const float* p, long row, double& sum, double& square) {
        double s = p[0], q = p[row], m = p[2 * row], n = p[3 * row];
        sum += s + n * m;
        square += q + (2 * s + n * m) * m;
    }
};

// Mean, 1 / sigma and running statistics of a BatchNorm from sums [2][C] over n pixels, of x and of its square.
inline void set_statistics(const Norm& bn, const std::vector<double>& sums, long n) {
    for (size_t c = 0, C = sums.size() / 2; c < C; c++) {
        double mean = sums[c] / n;
        float var = std::max(sums[C + c] / n - mean * mean, 0.);   // in this order NaN comes through
        bn.mean[c] = mean;
        bn.inv_std[c] = 1 / std::sqrt(var + bn.eps);
        if (!bn.running_mean) continue;
        bn.running_mean[c] += bn.momentum * (bn.mean[c] - bn.running_mean[c]);
        bn.running_var[c] += bn.momentum * (var * ((double)n / (n - 1)) - bn.running_var[c]);
    }
}

// What the passes read of a BatchNorm, each [row] repeated along a row: y = (x - mean) scale + shift;
// dx = scale g + p (x - mean) + q.
struct Coefficients {
    std::vector<float> mean, scale, shift, p, q;
    Coefficients(const Plan& plan, const Norm& bn)
        : mean(plan.repeat(bn.mean)),
          scale(plan.repeat(bn.inv_std)),
          shift(plan.repeat(bn.bias)),
          p(plan.row),
          q(plan.row) {
        if (bn.weight)
            for (long i = 0; i < plan.row; i++) scale[i] *= bn.weight[i % plan.C];
    }
    // p, q and the gradients of weight and bias [C], from the sums [2][C] of g and of g (x - mean).
    void gradient(const Plan& plan, const Norm& bn, const std::vector<double>& sums, int training) {
        std::vector<float> ps(plan.C), qs(plan.C);
        for (long c = 0; c < plan.C; c++) {
            double by_x = sums[plan.C + c], inv_std = bn.inv_std[c];
            if (bn.dbias) bn.dbias[c] = sums[c];
            if (bn.dweight) bn.dweight[c] = by_x * inv_std;
            if (training) {
                ps[c] = -scale[c] * bn.inv_std[c] * bn.inv_std[c] * by_x / plan.pixels;
                qs[c] = -scale[c] * sums[c] / plan.pixels;
            }
        }
        p = plan.repeat(ps.data());
        q = plan.repeat(qs.data());
    }
};

// y = relu((x - mean) scale + shift + residual), and a bit mask of the open ReLUs where one is wanted.
template <class T> struct Normalize {
    const Coefficients& of;
    const T *x, *residual;
    T* y;
    uint8_t* mask;
    int relus;
    template <class X> void operator()(X, long at, long n, long width) const {
        auto [of, x, residual, y, mask, relus] = *this;   // copies: what is stored might change what is not
        constexpr int K = abreast<X, 3>, L = numbers<X, float>;   // m, a, b: mean, scale and shift
        for (long j = 0; j < width; j += K * L) {
            X m[K], a[K], b[K];
            for (int k = 0; k < K; k++) {
                load(&of.mean[j + k * L], m[k]);
                load(&of.scale[j + k * L], a[k]);
                load(&of.shift[j + k * L], b[k]);
            }
            for (long i = 0; i < n; i++)
                for (int k = 0; k < K; k++) {
                    long e = at + i * width + j + k * L;
                    X z;
                    load(x + e, z);
                    z = (z - m[k]) * a[k] + b[k];
                    if (residual) {
                        X s;
                        load(residual + e, s);
                        z += s;
                    }
                    if (mask) put_mask(mask, e, z);
                    store(y + e, relus ? relu(z) : z);
                }
        }
    }
};

// The gradient g before the ReLU, from that behind it. Without a mask the ReLU is computed again from d = x - mean.
template <class T> struct Upstream {
    const T* dy;
    const uint8_t* mask;
    int relus;
    // g = the gradient of the numbers from e on.
    template <class X> void operator()(X& g, X d, long e, X scale, X shift) const {
        load(dy + e, g);
        if (mask) g = where_mask(mask, e, g);
        else if (relus) g = where_positive(d * scale + shift, g);
    }
};

// dx += g, the gradient of the shortcut, to that of the branch.
template <class T> struct AddShortcut {
    const Upstream<T> upstream;
    T* dx;
    template <class X> void operator()(X, long at, long n, long width) const {
        auto [upstream, dx] = *this;
        for (long e = at; e < at + n * width; e += numbers<X, float>) {
            X a, g;
            load(dx + e, a);
            upstream(g, X{}, e, X{}, X{});
            store(dx + e, a + g);
        }
    }
};

// For the gradients of a BatchNorm: sums [2][row] of g and of g (x - mean).
template <class T> struct UpstreamSums {
    static constexpr int rows = 2;
    const Coefficients& of;
    const Upstream<T> upstream;
    const T* x;
    template <class X> void operator()(X, long at, long n, long width, float* sums) const {
        constexpr int K = abreast<X, 5>, L = numbers<X, float>;   // m, a, b: mean, scale and shift
        for (long j = 0; j < width; j += K * L) {
            X s[K], t[K], m[K], a[K], b[K];
            float *p = sums + j, *q = p + of.mean.size();
            for (int k = 0; k < K; k++) {
                load(p + k * L, s[k]);
                load(q + k * L, t[k]);
                load(&of.mean[j + k * L], m[k]);
                load(&of.scale[j + k * L], a[k]);
                load(&of.shift[j + k * L], b[k]);
            }
            for (long i = 0; i < n; i++)
                for (int k = 0; k < K; k++) {
                    long e = at + i * width + j + k * L;
                    X d, g;
                    load(x + e, d);
                    d -= m[k];
                    upstream(g, d, e, a[k], b[k]);
                    s[k] += g;
                    t[k] += g * d;
                }
            for (int k = 0; k < K; k++) {
                store(p + k * L, s[k]);
                store(q + k * L, t[k]);
            }
        }
    }
    // Add a column's sums.
    static void widen(const float* p, long row, double& s, double& t) {
        s += p[0];
        t += p[row];
    }
};

// dx = scale g + p (x - mean) + q, and dresidual = g, the gradient of the residual, each where it is wanted.
template <class T> struct Gradient {
    const Coefficients& of;
    const Upstream<T> upstream;
    const T* x;
    T *dx, *dresidual;
    template <class X> void operator()(X, long at, long n, long width) const {
        auto [of, upstream, x, dx, dresidual] = *this;
        constexpr int K = abreast<X, 5>, L = numbers<X, float>;   // m, a, b: mean, scale and shift
        for (long j = 0; j < width; j += K * L) {
            X m[K], a[K], b[K], p[K], q[K];
            for (int k = 0; k < K; k++) {
                load(&of.mean[j + k * L], m[k]);
                load(&of.scale[j + k * L], a[k]);
                load(&of.shift[j + k * L], b[k]);
                load(&of.p[j + k * L], p[k]);
                load(&of.q[j + k * L], q[k]);
            }
            for (long i = 0; i < n; i++)
                for (int k = 0; k < K; k++) {
                    long e = at + i * width + j + k * L;
                    X d, g;
                    load(x + e, d);
                    d -= m[k];
                    upstream(g, d, e, a[k], b[k]);
                    if (dresidual) store(dresidual + e, g);
                    if (dx) store(dx + e, a[k] * g + (p[k] * d + q[k]));
                }
        }
    }
};

// y [pixels][C] = relu(BatchNorm(x) + residual), in training with the batch's statistics, else with the running ones;
// and the mask of the open ReLUs, where wanted.
template <class T>
void bn_forward(const T* x, const T* residual, T* y, uint8_t* mask, const Norm& bn, long pixels, long C, int training,
                int relus, int threads) {
    Plan plan(pixels, C);
    if (training) set_statistics(bn, plan.sums(threads, Moments<T>{x, plan.row}), pixels);
    else
        for (long c = 0; c < C; c++) {
            bn.mean[c] = bn.running_mean[c];
            bn.inv_std[c] = 1 / std::sqrt(bn.running_var[c] + bn.eps);
        }
    long whole = pixels * C / plan.row * plan.row;   // numbers in whole rows; the bits of the rest are put one by one
    if (mask) std::fill(mask + whole / 8, mask + (pixels * C + 7) / 8, 0);
    plan.for_chunks(threads, Normalize<T>{Coefficients(plan, bn), x, residual, y, mask, relus});
}

// The gradients of the same from dy [pixels][C]: dx and dresidual [pixels][C], dweight and dbias [C], where wanted.
template <class T>
void bn_backward(const T* dy, const T* x, const uint8_t* mask, T* dx, T* dresidual, const Norm& bn, long pixels, long C,
                 int training, int relus, int threads) {
    Plan plan(pixels, C);
    Coefficients of(plan, bn);
    Upstream<T> upstream{dy, mask, relus};
    if (bn.dweight || bn.dbias || (training && dx))
        of.gradient(plan, bn, plan.sums(threads, UpstreamSums<T>{of, upstream, x}), training);
    if (dx || dresidual) plan.for_chunks(threads, Gradient<T>{of, upstream, x, dx, dresidual});
}
