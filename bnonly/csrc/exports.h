// The functions that Python calls, each written once: kernels.cpp includes this file for each dtype, with T as its
// number and NAME(f) as f_float32 or f_bfloat16. native.py lists their arguments, and ctypes passes them.
//
// Activations are channels last: x [B, H, W, C] has B images of H rows, W columns and C channels. Weights have O output
// channels and may lie in any order, which `at` gives: their strides in numbers. All gradients of weights are float32.

extern "C" {

// Whether convolutions of T multiply in float16.
int NAME(multiplies_float16)() { return sizeof(Product<T>::number) == 2; }

// y = relu(BatchNorm(x) + residual) of x [pixels, C], without the residual where it is null and without the ReLU unless
// `relus`; mask, where wanted: a bit for each number, 1 where the ReLU is open.
void NAME(forward)(const T* x, const T* residual, T* y, uint8_t* mask, const Norm* bn, long pixels, long C,
                   int training, int relus, int threads) {
    bn_forward(x, residual, y, mask, *bn, pixels, C, training, relus, threads);
}

// The gradients of the same: dx and that of the residual [pixels, C], and those of weight and bias [C], where wanted.
void NAME(backward)(const T* dy, const T* x, const uint8_t* mask, T* dx, T* dresidual, const Norm* bn, long pixels,
                    long C, int training, int relus, int threads) {
    bn_backward(dy, x, mask, dx, dresidual, *bn, pixels, C, training, relus, threads);
}

// The gradient out [n] of n entries of a weight [O, C, K, K], from x [B, H, W, C] and dy [B, OH, OW, O].
void NAME(entries)(const T* x, const T* dy, const int64_t* index, float* out, long n, long B, long H, long W, long C,
                   long OH, long OW, long O, long K, long stride, long pad, int threads) {
    sparse_weight_gradient<T>(x, dy, index, out, n, B, H, W, C, OH, OW, O, K, stride, pad, threads);
}

// Pack a weight [O, C, 3, 3] that begins at `from`, of the n numbers at w, for `winograd`; returns its scale.
float NAME(pack_winograd)(const T* w, long n, const T* from, const Entry* at, void* u, long O, long C, int threads) {
    return pack_winograd(w, n, from, *at, u, O, C, threads);
}

// y [B, H, W, O] = x [B, H, W, C] convolved with a packed weight of 3x3 taps, stride 1 and padding 1, plus bias [O].
void NAME(winograd)(const T* x, const void* u, const T* bias, T* y, double scale, long B, long H, long W, long C,
                    long O, int threads) {
    winograd<T>(x, nullptr, nullptr, u, bias, y, scale, B, H, W, C, O, threads);
}

// The gradient dw [O, C, 3, 3] of the same convolution's weight, from x [B, H, W, C] and dy [B, H, W, O].
void NAME(winograd_gradient)(const T* x, const T* dy, float* dw, const Entry* at, long B, long H, long W, long C,
                             long O, int threads) {
    winograd_weight_gradient<T>(x, dy, dw, *at, B, H, W, C, O, threads);
}

// Pack a weight [O, C, A, E] that begins at `from`, of the n numbers at w, for `direct`; returns its scale.
float NAME(pack_direct)(const T* w, long n, const T* from, const Entry* at, void* u, long O, long C, long A, long E,
                        int threads) {
    return pack_direct(w, n, from, *at, u, O, C, A, E, threads);
}

// y = x convolved with a packed weight of any taps and stride, plus bias [O]; `shape` has the sizes of all.
void NAME(direct)(const T* x, const void* u, const T* bias, T* y, double scale, const Direct* shape, int threads) {
    direct<T>(x, u, bias, y, scale, *shape, threads);
}

// The gradient dw [O, C, K, K] of a convolution's weight, from x [B, H, W, C] and dy [B, OH, OW, O].
void NAME(direct_gradient)(const T* x, const T* dy, float* dw, const Entry* at, long B, long H, long W, long C, long OH,
                           long OW, long O, long K, long stride, long pad, int threads) {
    direct_weight_gradient<T>(x, dy, dw, *at, B, H, W, C, OH, OW, O, K, stride, pad, threads);
}

// y = the residual blocks of n convolutions and BatchNorms, in training, applied to x [B, H, W, C].
void NAME(blocks_forward)(const T* x, T* y, T* workspace, const Layer* layers, long n, long B, long H, long W, long C,
                          int threads) {
    blocks_forward(x, y, workspace, layers, n, B, H, W, C, threads);
}

// The gradients of the same: dx [B, H, W, C], where wanted, and of what trains in each layer.
void NAME(blocks_backward)(const T* dy, T* dx, T* workspace, const Layer* layers, long n, long B, long H, long W,
                           long C, int threads) {
    blocks_backward(dy, dx, workspace, layers, n, B, H, W, C, threads);
}
}   // extern "C"
