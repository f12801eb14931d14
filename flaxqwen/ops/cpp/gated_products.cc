// silu(x gate^T) * (x up^T) of a few rows as an XLA custom call for CPUs: y [rows, out] of x [rows, in] and two weights
// [out, in].
//
// The two products are one call, and the thread that has an output's sums has its result: apart, they were two calls
// that wait for both threads, and an operation of XLA's for which it wakes them once more. Results are rounded where
// those of torch's operations are: products, the activation, and what they make together.

#include "few_rows.h"
#include "softmax.h"

namespace {

// What a sum becomes: times its scale, if the weight is quantized, and rounded.
template <typename Number, typename Sum>
INLINE float rounded(Sum sum, float scale) {
  Number number;
  round_to(&number, to_float(sum) * scale);
  return to_float(number);
}

// x / (1 + e^-x), by e^-|x|.
INLINE float silu(float x) {
  const float power = exp_of(x < 0 ? x : -x);
  return x * ((x < 0 ? power : 1.0f) / (1.0f + power));
}

template <typename Number, typename Sum>
void join(const Sum* gate, const Sum* up, const float* gate_scale, const float* up_scale, Number* y, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const float left = rounded<Number>(gate[i], gate_scale == nullptr ? 1.0f : gate_scale[i]);
    const float right = rounded<Number>(up[i], up_scale == nullptr ? 1.0f : up_scale[i]);
    round_to(y + i, rounded<Number>(silu(left), 1.0f) * right);
  }
}

struct Weights {
  const void *gate, *up;
  const float *gate_scale, *up_scale;  // [out], or null
};

template <typename Products, typename Weight, typename Sum, typename Number>
void multiply_both(ffi::ThreadPool& pool, const void* x, Weights weights, Number* y, Shape shape) {
  const Cut cut(pool, shape.out, 2 * shape.out * shape.in * sizeof(Weight));
  const int64_t widest = cut.widest();
  auto run = [=](auto product, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    auto memory = std::make_unique_for_overwrite<Sum[]>(2 * rows * widest);
    Sum *gate = memory.get(), *up = gate + rows * widest;
    product(static_cast<const Weight*>(weights.gate) + begin * shape.in, gate, 0, end - begin);
    product(static_cast<const Weight*>(weights.up) + begin * shape.in, up, 0, end - begin);
    auto from = [begin](const float* scale) { return scale == nullptr ? nullptr : scale + begin; };
    for (int64_t i = 0; i < rows; i++)
      join(gate + i * widest, up + i * widest, from(weights.gate_scale), from(weights.up_scale),
           y + (row + i) * shape.out + begin, end - begin);
  };
  multiply_in_parts<Products, Weight, Sum>(pool, static_cast<const typename Products::Element*>(x),
                                           Shape{shape.rows, shape.in, widest}, cut, run);
}

using Scale = ffi::Buffer<ffi::F32, 1>;

ffi::Error gated_products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate, ffi::AnyBuffer up,
                          ffi::RemainingArgs scales, ffi::Result<ffi::AnyBuffer> y) {
  const auto wrong = ffi::Error::InvalidArgument(
      "gated_products: x is [rows, in], the weights [out, in], of one dtype, scales [out], and the result [rows, out]");
  auto sizes = gate.dimensions();
  if (sizes.size() != 2 || x.dimensions().size() != 2 || x.dimensions()[1] != sizes[1] || up.dimensions() != sizes ||
      gate.element_type() != up.element_type() ||
      static_cast<int64_t>(y->element_count()) != x.dimensions()[0] * sizes[0])
    return wrong;
  const bool is_quantized = gate.element_type() == ffi::S8;
  const bool is_wide = y->element_type() == ffi::F32;
  if (scales.size() != (is_quantized ? 2 : 0) || (!is_wide && y->element_type() != ffi::BF16)) return wrong;
  Weights weights{gate.untyped_data(), up.untyped_data(), nullptr, nullptr};
  if (is_quantized) {
    auto first = scales.get<Scale>(0), second = scales.get<Scale>(1);
    if (!first.has_value() || !second.has_value() || first->dimensions()[0] != sizes[0] ||
        second->dimensions()[0] != sizes[0])
      return wrong;
    weights.gate_scale = first->typed_data(), weights.up_scale = second->typed_data();
  }
  const Shape shape{x.dimensions()[0], sizes[1], sizes[0]};
  const auto sum_type = is_quantized ? ffi::F32 : y->element_type();
  const bool are_there = with_types(
      x.element_type(), gate.element_type(), sum_type, [&]<typename Products, typename Weight, typename Sum>() {
        if (is_wide)
          multiply_both<Products, Weight, Sum>(pool, x.untyped_data(), weights, y->typed_data<float>(), shape);
        else
          multiply_both<Products, Weight, Sum>(pool, x.untyped_data(), weights,
                                               static_cast<bfloat16*>(y->untyped_data()), shape);
      });
  return are_there ? ffi::Error::Success()
                   : ffi::Error::InvalidArgument("gated_products: there are none of such dtypes");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GatedProducts, gated_products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());
