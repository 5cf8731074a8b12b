// nft_kernels._C: pointers, sizes and strides in; nothing of torch. The op layer validates before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <variant>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace nft {
namespace {

// (pointer, dtype code, batch stride, sizes, strides); sizes and strides without the batch, already collapsed.
using Tensor = std::tuple<uintptr_t, int, int64_t, std::vector<int64_t>, std::vector<int64_t>>;

View view(const Tensor& tensor) {
  const auto& [pointer, dtype, batch_stride, size, stride] = tensor;
  if (size.size() > kMaxDims) throw std::invalid_argument("more than 12 dimensions that cannot be collapsed");
  View out{reinterpret_cast<void*>(pointer), dtype, batch_stride, static_cast<int>(size.size()), {}, {}};
  for (size_t d = 0; d < size.size(); ++d) {
    out.size[d] = size[d];
    out.stride[d] = stride[d];
  }
  return out;
}

View view(const std::optional<Tensor>& tensor) { return tensor ? view(*tensor) : View{}; }

// (pointer, dtype code, stride) of a (B,) tensor, or the number that all samples have.
using PerSample = std::variant<std::tuple<uintptr_t, int, int64_t>, double>;

Vector vector(const PerSample& x) {
  if (x.index() == 1) return {nullptr, kFloat64, 0, std::get<1>(x)};
  const auto& [pointer, dtype, stride] = std::get<0>(x);
  return {reinterpret_cast<const void*>(pointer), dtype, stride, 0};
}

std::vector<std::string> isas() {
  std::vector<std::string> found{"baseline"};
#if defined(NFT_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
#if defined(NFT_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back("avx512");
#endif
  return found;
}

// (pointer, dtype code, strides of batch, rows and heads) of a tensor whose last dimension is dense.
using RowTensor = std::optional<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>>;

Rows rows(const RowTensor& tensor) {
  if (!tensor) return {};
  const auto& [pointer, dtype, batch, row, head] = *tensor;
  return {reinterpret_cast<void*>(pointer), dtype, batch, row, head};
}

dlpack::DataType dlpack_type(int dtype) {
  return {dtype == kBFloat16 ? dlpack::kBfloat : dlpack::kFloat, static_cast<uint8_t>(8 * item_size(dtype)), 1};
}

// Where to run: an instruction set of the CPU, or (device, stream, workspace) of CUDA.
using Where = std::variant<std::string, std::tuple<int, uintptr_t, uintptr_t>>;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A kernel that takes Args, or null; common_type_t keeps null out of the deduction of Args.
template <typename Args, typename... More>
using Kernel = void (*)(const std::common_type_t<Args>&, More...);

template <typename Args>
void dispatch(const Where& where, const Args& args, Kernel<Args> baseline, Kernel<Args> avx2, Kernel<Args> avx512,
              Kernel<Args, const cuda::Queue&> cuda) {
  py::gil_scoped_release release;
  if (where.index() == 1) {
    if (!cuda) throw std::invalid_argument("built without CUDA");
    const auto& [device, stream, workspace] = std::get<1>(where);
    return cuda(args, {device, pointer<void>(stream), pointer<void>(workspace)});
  }
  const std::string& isa = std::get<0>(where);
  if (isa == "avx512" && avx512) return avx512(args);
  if (isa == "avx2" && avx2) return avx2(args);
  baseline(args);
}

#if defined(NFT_HAS_AVX2)
#define NFT_AVX2(f) avx2::f
#else
#define NFT_AVX2(f) nullptr
#endif
#if defined(NFT_HAS_AVX512)
#define NFT_AVX512(f) avx512::f
#else
#define NFT_AVX512(f) nullptr
#endif
#if defined(NFT_CUDA_ARCHS)
#define NFT_CUDA(f) cuda::f
#else
#define NFT_CUDA(f) nullptr
#endif

}  // namespace
}  // namespace nft

PYBIND11_MODULE(_C, m) {
  using namespace nft;
  m.attr("isas") = isas();
  m.def("lend_memory", [](std::vector<int64_t> sizes, int dtype) {
    auto lent = std::make_unique<Lent>(std::move(sizes), dlpack_type(dtype));
    PyObject* capsule = PyCapsule_New(&lent->managed, "dltensor", [](PyObject* unused) {
      // Whoever takes the memory over gives the capsule another name.
      if (!PyCapsule_IsValid(unused, "dltensor")) return;
      auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(unused, "dltensor"));
      managed->deleter(managed);
    });
    if (!capsule) throw py::error_already_set();
    lent.release();
    return py::reinterpret_steal<py::object>(capsule);
  });
  m.def("release_memory", [] { Memory::instance().release(); });
  m.def("memory_sizes", [] { return Memory::instance().sizes(); });
#if defined(NFT_CUDA_ARCHS)
  m.attr("cuda_archs") = NFT_CUDA_ARCHS;
  m.def("cuda_why_not", cuda::why_not);
  m.def("cuda_workspace_size", cuda::workspace_size);
  m.def("cuda_scale", [](const Where& where, const Tensor& tensor, int64_t elements, bool double_math,
                         uintptr_t factor) {
    const cuda::ScaleArgs a{view(tensor), double_math, 1, elements, pointer<void>(factor)};
    dispatch(where, a, nullptr, nullptr, nullptr, cuda::scale);
  });
#endif
  m.def("nft_loss", [](const Where& where, const Tensor& v_theta, const Tensor& v_old, const Tensor& x_t,
                       const Tensor& x0, const std::optional<Tensor>& v_ref, const std::optional<Tensor>& grad,
                       const std::optional<Tensor>& mask, const std::optional<Tensor>& policy_weight,
                       const std::optional<Tensor>& r_elements, uintptr_t offsets,
                       const PerSample& t, const PerSample& r, const PerSample& beta, const PerSample& loss_weight,
                       double adv_clip_max, double kl_weight, int weighting, int prediction, bool kl_in_x0,
                       bool detach_weight, int64_t channels, int64_t inner, bool double_math, int64_t batch,
                       int64_t elements, uintptr_t loss, uintptr_t details) {
    LossArgs a{view(v_theta), view(v_old), view(x_t), view(x0), view(v_ref), view(grad),
               view(mask), view(policy_weight), view(r_elements),
               v_ref.has_value(), grad.has_value(), double_math,
               mask.has_value(), policy_weight.has_value(), r_elements.has_value(), detach_weight, kl_in_x0,
               weighting, prediction, batch, elements, pointer<int64_t>(offsets),
               vector(t), vector(r), vector(beta), vector(loss_weight), adv_clip_max, kl_weight, channels, inner,
               pointer<void>(loss), pointer<void>(details)};
    dispatch(where, a, baseline::nft_loss, NFT_AVX2(nft_loss), NFT_AVX512(nft_loss), NFT_CUDA(nft_loss));
  });
  m.def("add_noise", [](const Where& where, const Tensor& x0, const std::optional<Tensor>& noise,
                        const Tensor& out, const std::optional<Tensor>& wide, bool double_math, int64_t batch,
                        int64_t elements, const PerSample& t, uintptr_t seed, uintptr_t sample) {
    NoiseArgs a{view(x0), view(noise), view(out), view(wide), noise.has_value(), wide.has_value(), double_math, batch,
                elements, vector(t), pointer<int64_t>(seed), pointer<int64_t>(sample)};
    dispatch(where, a, baseline::add_noise, NFT_AVX2(add_noise), NFT_AVX512(add_noise), NFT_CUDA(add_noise));
  });
  m.def("solver_step", [](const Where& where, const Tensor& x, const Tensor& v,
                          const std::optional<Tensor>& v_uncond, const std::optional<Tensor>& noise,
                          const std::vector<Tensor>& history, const Tensor& out, const std::optional<Tensor>& h,
                          const std::optional<Tensor>& x0, bool double_math, int64_t batch, int64_t elements, double a,
                          const std::vector<double>& b, double c, double p, double q, double t, double guidance,
                          uintptr_t seed, uintptr_t sample, uintptr_t z_square) {
    if (b.size() > kMaxHistory || b.size() > history.size() + 1)
      throw std::invalid_argument("more coefficients than history, or more than 8");
    StepArgs args{view(x), view(v), view(v_uncond), view(noise), {}, view(out), view(h),
                  view(x0), v_uncond.has_value(), noise.has_value(), h.has_value(), x0.has_value(),
                  double_math, batch, elements, static_cast<int>(b.size()), a, {}, c, p, q, t, guidance,
                  pointer<int64_t>(seed), pointer<int64_t>(sample), pointer<double>(z_square)};
    for (size_t j = 0; j < b.size(); ++j) {
      args.b[j] = b[j];
      if (j > 0) args.history[j] = view(history[j - 1]);
    }
    dispatch(where, args, baseline::solver_step, NFT_AVX2(solver_step), NFT_AVX512(solver_step), NFT_CUDA(solver_step));
  });
  m.def("layer_norm_modulate", [](const Where& where, const RowTensor& x, const RowTensor& y, const RowTensor& y2,
                                  const RowTensor& y_bias, const RowTensor& gate, const RowTensor& gate2,
                                  const RowTensor& scale, const RowTensor& shift, const RowTensor& scale2,
                                  const RowTensor& shift2, const RowTensor& h, const RowTensor& out,
                                  const RowTensor& out2, int64_t batch, int64_t length, int64_t width, double eps) {
    LayerNormArgs a{rows(x), rows(y), rows(y2), rows(y_bias), rows(gate), rows(gate2), rows(scale), rows(shift),
                    rows(scale2), rows(shift2), rows(h), rows(out), rows(out2), batch, length, width, eps};
    dispatch(where, a, baseline::layer_norm_modulate, NFT_AVX2(layer_norm_modulate), NFT_AVX512(layer_norm_modulate),
             nullptr);
  });
  m.def("layer_norm_modulate_gradient",
        [](const Where& where, const RowTensor& h, const RowTensor& gate, const RowTensor& gate2,
           const RowTensor& scale, const RowTensor& scale2, const RowTensor& grad_h, const RowTensor& grad_out,
           const RowTensor& grad_out2, const RowTensor& grad_x, const RowTensor& grad_y, const RowTensor& grad_y2,
           int64_t batch, int64_t length, int64_t width, double eps) {
    LayerNormGradientArgs a{rows(h), rows(gate), rows(gate2), rows(scale), rows(scale2), rows(grad_h), rows(grad_out),
                            rows(grad_out2), rows(grad_x), rows(grad_y), rows(grad_y2), batch, length, width, eps};
    dispatch(where, a, baseline::layer_norm_modulate_gradient, NFT_AVX2(layer_norm_modulate_gradient),
             NFT_AVX512(layer_norm_modulate_gradient), nullptr);
  });
  m.def("qk_norm", [](const Where& where, const std::vector<RowTensor>& input, const std::vector<RowTensor>& weight,
                      const std::vector<RowTensor>& grad, const std::vector<RowTensor>& output, int64_t batch,
                      int64_t length, int64_t heads, int64_t width, double eps) {
    if (input.size() > kMaxStreams || input.size() != output.size() || weight.size() > input.size() ||
        grad.size() > input.size())
      throw std::invalid_argument("more than 3 streams, or not an output for each");
    QkNormArgs a{{}, {}, {}, {}, static_cast<int>(input.size()), batch, length, heads, width, eps};
    for (size_t j = 0; j < input.size(); ++j) {
      a.input[j] = rows(input[j]);
      a.output[j] = rows(output[j]);
      if (j < weight.size()) a.weight[j] = rows(weight[j]);
      if (j < grad.size()) a.grad[j] = rows(grad[j]);
    }
    dispatch(where, a, baseline::qk_norm, NFT_AVX2(qk_norm), NFT_AVX512(qk_norm), nullptr);
  });
  m.def("gelu", [](const Where& where, const RowTensor& x, const RowTensor& grad, const RowTensor& out,
                   int64_t elements) {
    GeluArgs a{rows(x), rows(grad), rows(out), elements};
    dispatch(where, a, baseline::gelu, NFT_AVX2(gelu), NFT_AVX512(gelu), nullptr);
  });
  m.def("group_norm_silu", [](const Where& where, const Tensor& x, const PerSample& weight, const PerSample& bias,
                              const Tensor& out, int64_t batch, int64_t elements, int64_t channels, int64_t groups,
                              double eps) {
    const GroupNormArgs a{view(x), view(out), vector(weight), vector(bias), batch, elements, channels, groups, eps};
    dispatch(where, a, baseline::group_norm_silu, NFT_AVX2(group_norm_silu), NFT_AVX512(group_norm_silu), nullptr);
  });
  m.def("attention", [](const Where& where, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        int64_t batch) {
    const AttentionArgs a{view(q), view(k), view(v), view(out), {}, {}, {}, batch};
    dispatch(where, a, baseline::attention, NFT_AVX2(attention), NFT_AVX512(attention), nullptr);
  });
  m.def("attention_gradient", [](const Where& where, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& grad, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                                 int64_t batch) {
    const AttentionArgs a{view(q), view(k), view(v), view(grad), view(grad_q), view(grad_k), view(grad_v), batch};
    dispatch(where, a, baseline::attention_gradient, NFT_AVX2(attention_gradient), NFT_AVX512(attention_gradient),
             nullptr);
  });
}
