// The residual blocks of a stage that keep their shape, in training, as one operator: relu(bn(conv(relu(bn(conv(x)))))
// + x), several times. BatchNorm's sums are taken of rows that were just written, and rows are normalized (or,
// backward, brought behind a BatchNorm) on their way into the next convolution, while they are in the cache.
#pragma once
#include "batchnorm.h"
#include "winograd.h"

// A convolution [C, C, 3, 3] and the BatchNorm behind it, two of which are a block.
struct Layer {
    const void* u;   // the packed weight, forward or for the gradient of the input
    double scale;   // by which to multiply it
    void *z, *x;   // output of the convolution, and its input, if that is kept: [B, H, W, C]
    float* dw;   // gradient of the weight, if that trains
    Entry at;   // its strides
    uint8_t* mask;   // of the ReLU behind a block
    Norm bn;
};

// y [B, H, W, C] = the n / 2 blocks of n layers applied to x [B, H, W, C]; workspace: for two more of these.
template <class T>
void blocks_forward(const T* x, T* y, T* workspace, const Layer* layers, long n, long B, long H, long W, long C,
                    int threads) {
    Plan plan(B * H * W, C);
    std::vector<Coefficients> norms;
    long line = W * C;   // numbers in a row of pixels
    for (long k = 0; k < n; k++) {
        const Layer &l = layers[k], &last = layers[std::max(0L, k - 1)];
        const T* shortcut = k % 2 ? nullptr : x;
        T* kept = l.x || k % 2 ? (T*)l.x
                               : workspace + k / 2 % 2 * plan.pixels * C;   // a block's output: the next one's shortcut
        // rows = what this convolution reads: the layer before it, normalized, with its shortcut behind a block.
        auto normalize = [&](Strip s, T* rows) {
            Normalize<T> f{norms[k - 1], (T*)last.z, shortcut, rows - s.from * line, nullptr, 1};
            plan.for_pixels(s.from * W, (s.first - s.from) * W, f);
            plan.for_pixels(s.last * W, (s.to - s.last) * W, f);
            f.mask = last.mask;
            plan.for_pixels(s.first * W, (s.last - s.first) * W, f);
            if (kept)
                memcpy(kept + s.first * line, rows + (s.first - s.from) * line, (s.last - s.first) * line * sizeof(T));
        };
        std::vector<double> parts(strips(B, H, W) * 2 * C);
        // The strip's sums for this BatchNorm.
        auto add_moments = [&](Strip s) {
            plan.add_up(s.first * W, (s.last - s.first) * W, Moments<T>{(T*)l.z, plan.row}, &parts[s.number * 2 * C]);
        };
        winograd<T>(x, k ? Before<T>(normalize) : nullptr, add_moments, l.u, nullptr, (T*)l.z, l.scale, B, H, W, C, C,
                    threads);
        set_statistics(l.bn, plan.total(parts), plan.pixels);
        norms.emplace_back(plan, l.bn);
        if (k && shortcut) x = kept;
    }
    const Layer& last = layers[n - 1];
    plan.for_chunks(threads, Normalize<T>{norms[n - 1], (T*)last.z, x, y, last.mask, 1});
}

// The gradients of the same from dy [B, H, W, C]: dx, where wanted, and those of what trains in each layer; workspace:
// for four more of these, or three if no weight trains.
template <class T>
void blocks_backward(const T* dy, T* dx, T* workspace, const Layer* layers, long n, long B, long H, long W, long C,
                     int threads) {
    Plan plan(B * H * W, C);
    long line = W * C, size = plan.pixels * C;   // numbers in a row of pixels, and in all
    std::vector<Coefficients> norms;
    for (long k = 0; k < n; k++) norms.emplace_back(plan, layers[k].bn);
    std::vector<double> parts;
    // The strip's sums for the gradient of a BatchNorm.
    auto add_up = [&](Strip s, const UpstreamSums<T>& f) {
        plan.add_up(s.first * W, (s.last - s.first) * W, f, &parts[s.number * 2 * C]);
    };
    T *g = workspace + 2 * size, *dz = g + size;   // the gradients between the layers of a block, and of a z
    // to = the gradient of a layer's input, through its BatchNorm (f) and its convolution, and dw.
    auto layer_backward = [&](const Layer& l, Gradient<T> f, const After& after, T* to) {
        parts.assign(strips(B, H, W) * 2 * C, 0);
        auto norm_backward = [&](Strip s, T* rows) {   // rows = dz, the gradient of the convolution's output
            auto gradient = f;
            gradient.dx = rows - s.from * line;
            plan.for_pixels(s.from * W, (s.to - s.from) * W, gradient);
            if (l.dw)
                memcpy(dz + s.first * line, rows + (s.first - s.from) * line, (s.last - s.first) * line * sizeof(T));
        };
        if (to) winograd<T>(nullptr, norm_backward, after, l.u, nullptr, to, l.scale, B, H, W, C, C, threads);
        else if (l.dw) f.dx = dz, plan.for_chunks(threads, f);
        if (l.dw) winograd_weight_gradient<T>((T*)l.x, dz, l.dw, l.at, B, H, W, C, C, threads);
    };
    for (long k = n - 1; k > 0; k -= 2) {
        const Layer &one = layers[k - 1], &two = layers[k], &previous = layers[std::max(0L, k - 2)];
        Upstream<T> last{dy, two.mask, 1}, middle{g, nullptr, 1};
        T *z = (T*)one.z, *t = (T*)two.z, *out = k > 1 ? workspace + k / 2 % 2 * size : dx;
        norms[k].gradient(plan, two.bn,
                          k == n - 1 ? plan.sums(threads, UpstreamSums<T>{norms[k], last, t}) : plan.total(parts), 1);
        layer_backward(
            two, {norms[k], last, t, nullptr, nullptr},
            [&](Strip s) {
                add_up(s, {norms[k - 1], middle, z});
            },
            g);
        norms[k - 1].gradient(plan, one.bn, plan.total(parts), 1);
        auto after = [&](Strip s) {
            plan.for_pixels(s.first * W, (s.last - s.first) * W, AddShortcut<T>{last, out});
            if (k > 1) add_up(s, {norms[k - 2], {out, previous.mask, 1}, (T*)previous.z});
        };
        layer_backward(one, {norms[k - 1], middle, z, nullptr, nullptr}, after, out);
        dy = out;
    }
}
