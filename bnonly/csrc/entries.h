// The gradient of a few entries of a convolution's weight (Frankle et al.'s "two random parameters"): each is the
// product of two planes, a channel of the input and one of the upstream gradient, shifted against each other by its
// tap.
#pragma once
#include "vec.h"

// A vector of LANES numbers of T.
template <class T> struct Lanes { typedef Floats vector; };
template <> struct Lanes<bf16> { typedef Bits16 vector; };

// out [C][size] = p [H, W, C] as a plane for each channel, whose pixel (h, w) is number (h * row + w) * step.
template <class T> void to_planes(const T* p, long H, long W, long C, long row, long step, long size, T* out) {
    for (long h = 0; h < H; h++)
        for (long c = 0; c < C; c += LANES)
            for (long w = 0; w < W; w += LANES) {
                long n = std::min((long)LANES, W - w), m = std::min((long)LANES, C - c);
                typename Lanes<T>::vector a[LANES] = {};
                const T* from = p + (h * W + w) * C + c;
                for (long i = 0; i < n; i++) memcpy(a + i, from + i * C, m == LANES ? sizeof *a : m * sizeof(T));
                transpose(a);
                for (long k = 0; k < m; k++) {
                    T *to = out + (c + k) * size + (h * row + w) * step, *pixels = (T*)(a + k);
                    if (step == 1 && n == LANES) memcpy(to, pixels, sizeof *a);
                    else
                        for (long i = 0; i < n; i++) to[i * step] = pixels[i];
                }
            }
}

constexpr int STEP = 16;   // products in a step, on every processor: sums are the same with 8 lanes and with 16

// out [n] = the gradients of the entries index [n] of a weight [O, C, K, K], from x [B, H, W, C] and dy [B, OH, OW, O].
template <class T>
void sparse_weight_gradient(const T* x, const T* dy, const int64_t* index, float* out, long n, long B, long H, long W,
                            long C, long OH, long OW, long O, long K, long stride, long pad, int threads) {
    long row = W + 2 * pad, length = (((OH - 1) * row + OW - 1) * stride + STEP) / STEP * STEP;
    long size = std::max((H + 2 * pad) * row, length + (K - 1) * (row + 1));
    std::vector<float> part(B * n);   // a sum for each image, so that the number of threads does not matter
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> reads(C * size, T{}), writes(O * length, T{});
#pragma omp for schedule(static)
        for (long b = 0; b < B; b++) {
            to_planes(x + b * H * W * C, H, W, C, row, 1, size, &reads[pad * (row + 1)]);
            to_planes(dy + b * OH * OW * O, OH, OW, O, row, stride, length, &writes[0]);
            for (long e = 0; e < n; e++) {
                long tap = index[e] % (K * K), c = index[e] / (K * K) % C, o = index[e] / (K * K * C);
                const T *r = &reads[c * size + tap / K * row + tap % K], *w = &writes[o * length];
                Floats sums[STEP / LANES] = {};
                for (long i = 0; i < length; i += STEP)
                    for (int k = 0; k < STEP / LANES; k++) {
                        Floats a, g;
                        load(r + i + k * LANES, a);
                        load(w + i + k * LANES, g);
                        sums[k] += a * g;
                    }
                for (int k = 0; k < STEP; k++) part[b * n + e] += sums[k / LANES][k % LANES];
            }
        }
    }
    for (long e = 0; e < n; e++) {
        double sum = 0;
        for (long b = 0; b < B; b++) sum += part[b * n + e];
        out[e] = sum;
    }
}
