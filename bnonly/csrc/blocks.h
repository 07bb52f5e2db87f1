// The residual blocks of a stage that keep their shape, in training, as one operator: relu(bn(conv(relu(bn(conv(x)))))
// + x), several times. BatchNorm's sums are taken of rows that were just written, and rows are normalized (or,
// backward, brought behind a BatchNorm) on their way into the next convolution, while they are in the cache.
#pragma once
#include "batchnorm.h"
#include "winograd.h"

// A convolution [C, C, 3, 3] and the BatchNorm behind it, two of which are a block: its packed weight and that weight's
// scale; z: its output; x: its input, if that is kept; dw: the gradient of its weight, if that trains, with entries at
// `at`; mask: of the ReLU behind a block.
struct Layer {
    const void* u;
    double scale;
    void *z, *x;
    float* dw;
    Entry at;
    uint8_t* mask;
    Norm bn;
};

// x and y [B, H, W, C]; workspace: for two more of them; n layers.
template <class T>
void blocks_forward(const T* x, T* y, T* workspace, const Layer* layers, long n, long B, long H, long W, long C,
                    int threads) {
    Plan plan(B * H * W, C);
    std::vector<Coefficients> of;
    long row = W * C;
    for (long k = 0; k < n; k++) {
        const Layer &l = layers[k], &last = layers[std::max(0L, k - 1)];
        const T* shortcut = k % 2 ? nullptr : x;
        T* kept = l.x || k % 2 ? (T*)l.x
                               : workspace + k / 2 % 2 * plan.pixels * C;   // a block's output: the next one's shortcut
        auto read = [&](Strip s, T* rows) {
            Normalize<T> f{of[k - 1], (T*)last.z, shortcut, rows - s.from * row, nullptr, 1};
            plan.for_pixels(s.from * W, (s.first - s.from) * W, f);
            plan.for_pixels(s.last * W, (s.to - s.last) * W, f);
            f.mask = last.mask;
            plan.for_pixels(s.first * W, (s.last - s.first) * W, f);
            if (kept)
                memcpy(kept + s.first * row, rows + (s.first - s.from) * row, (s.last - s.first) * row * sizeof(T));
        };
        std::vector<double> parts(strips(B, H, W) * 2 * C);
        auto add = [&](Strip s) {
            plan.add_up(s.first * W, (s.last - s.first) * W, Moments<T>{(T*)l.z, plan.W}, &parts[s.number * 2 * C]);
        };
        winograd<T>(x, k ? Before<T>(read) : nullptr, add, l.u, nullptr, (T*)l.z, l.scale, B, H, W, C, C, threads);
        settle(l.bn, plan.total(parts), plan.pixels);
        of.emplace_back(plan, l.bn);
        if (k && shortcut) x = kept;
    }
    const Layer& last = layers[n - 1];
    plan.for_chunks(threads, Normalize<T>{of[n - 1], (T*)last.z, x, y, last.mask, 1});
}

// From dy to dx, if that is wanted; workspace: for four more of them, or three if no weight trains.
template <class T>
void blocks_backward(const T* dy, T* dx, T* workspace, const Layer* layers, long n, long B, long H, long W, long C,
                     int threads) {
    Plan plan(B * H * W, C);
    long row = W * C, numbers = plan.pixels * C;
    std::vector<Coefficients> of;
    for (long k = 0; k < n; k++) of.emplace_back(plan, layers[k].bn);
    std::vector<double> parts;
    auto add_up = [&](Strip s, const UpstreamSums<T>& f) {
        plan.add_up(s.first * W, (s.last - s.first) * W, f, &parts[s.number * 2 * C]);
    };
    T *g = workspace + 2 * numbers, *dz = g + numbers;   // the gradients between the layers of a block, and of a z
    auto through = [&](const Layer& l, Gradient<T> f, const After& after, T* to) {
        parts.assign(strips(B, H, W) * 2 * C, 0);
        auto read = [&](Strip s, T* rows) {
            auto own = f;
            own.dx = rows - s.from * row;
            plan.for_pixels(s.from * W, (s.to - s.from) * W, own);
            if (l.dw) memcpy(dz + s.first * row, rows + (s.first - s.from) * row, (s.last - s.first) * row * sizeof(T));
        };
        if (to) winograd<T>(nullptr, read, after, l.u, nullptr, to, l.scale, B, H, W, C, C, threads);
        else if (l.dw) f.dx = dz, plan.for_chunks(threads, f);
        if (l.dw) winograd_weight_gradient<T>((T*)l.x, dz, l.dw, l.at, B, H, W, C, C, threads);
    };
    for (long k = n - 1; k > 0; k -= 2) {
        const Layer &one = layers[k - 1], &two = layers[k], &before = layers[std::max(0L, k - 2)];
        Upstream<T> last{dy, two.mask, 1}, middle{g, nullptr, 1};
        T *z = (T*)one.z, *t = (T*)two.z, *out = k > 1 ? workspace + k / 2 % 2 * numbers : dx;
        of[k].gradient(plan, two.bn,
                       k == n - 1 ? plan.sums(threads, UpstreamSums<T>{of[k], last, t}) : plan.total(parts), 1);
        through(
            two, {of[k], last, t, nullptr, nullptr},
            [&](Strip s) {
                add_up(s, {of[k - 1], middle, z});
            },
            g);
        of[k - 1].gradient(plan, one.bn, plan.total(parts), 1);
        auto after = [&](Strip s) {
            plan.for_pixels(s.first * W, (s.last - s.first) * W, AddShortcut<T>{last, out});
            if (k > 1) add_up(s, {of[k - 2], {out, before.mask, 1}, (T*)before.z});
        };
        through(one, {of[k - 1], middle, z, nullptr, nullptr}, after, out);
        dy = out;
    }
}
