// The only pybind11 file. Raw addresses and sizes come in, kernels run without the GIL, a wrong
// status becomes an exception with the operation's name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/decoder_layer.h"
#include "cpu/dispatch.h"
#include "cpu/lora_layers.h"
#include "cpu/pool.h"
#include "fastft/adafactor.h"
#include "fastft/dynamic8.h"
#include "fastft/numeric.h"
#include "fastft/optimizer.h"
#if defined(FASTFT_WITH_CUDA)
#include "fastft/cuda_api.h"
#endif

#ifndef FASTFT_CUDA_ARCHITECTURES
#define FASTFT_CUDA_ARCHITECTURES ""
#endif
#ifndef FASTFT_NVCC
#define FASTFT_NVCC ""
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

const fastft::Kernels& kernels(const std::string& isa) {
  if (isa.empty()) return *fastft::isa().kernels;
  for (int i = 0; i < fastft::kIsaCount; ++i)
    if (isa == fastft::kIsas[i].name && fastft::kIsas[i].runs_here())
      return *fastft::kIsas[i].kernels;
  throw std::invalid_argument("instruction set '" + isa + "' is not built or does not run here");
}

py::dict build_info() {
  std::vector<std::string> built, runs;
  for (int i = 0; i < fastft::kIsaCount; ++i) {
    built.push_back(fastft::kIsas[i].name);
    if (fastft::kIsas[i].runs_here()) runs.push_back(fastft::kIsas[i].name);
  }
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["instruction_sets_built"] = built;
  info["instruction_sets_usable"] = runs;
  info["instruction_set"] = fastft::isa().name;
  info["native_bfloat16"] = fastft::has_native_bfloat16();
#if defined(FASTFT_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_architectures"] = FASTFT_CUDA_ARCHITECTURES;
  info["nvcc"] = FASTFT_NVCC;
  return info;
}

// Keeps freed memory in the process instead of handing it back to the system after each large
// tensor, which costs a page fault for every 4 KiB of the next one. True where glibc took it.
bool keep_heap() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;  // -1: never trim
#else
  return false;
#endif
}

// Large blocks are mapped one by one and unmapped when they are freed: what is resident is alive.
bool tight_heap() {
#if defined(__GLIBC__)
  const bool mapped = mallopt(M_MMAP_MAX, 1 << 16) == 1 && mallopt(M_MMAP_THRESHOLD, 1 << 18) == 1;
  return mapped && mallopt(M_TRIM_THRESHOLD, 1 << 20) == 1 && malloc_trim(0) >= 0;
#else
  return false;
#endif
}

#if defined(FASTFT_WITH_CUDA)
// Throws with the operation's name and CUDA's own words.
void cuda_check(const char* operation, int status) {
  if (status != 0)
    throw std::runtime_error(std::string("fastft ") + operation +
                             " (CUDA): " + fastft_cuda_error_string(status));
}
#endif

int64_t max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

#include "bind_attention.inc"
#include "bind_lora.inc"
#include "bind_optimizers.inc"
#include "bind_pool.inc"
#include "bind_decoder.inc"
#include "bind_layer.inc"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastft; use fastft.ops, which checks its arguments.";
  const auto free_gil = py::call_guard<py::gil_scoped_release>();

  m.def("build_info", &build_info);
  m.def("keep_heap", &keep_heap);
  m.def("tight_heap", &tight_heap);
  m.def("max_threads", &max_threads);

  // addresses: bias, class_weight, label_weight, row_scale, entropy_scale, labels, top, log_sum,
  // z_label, weighted_sum, entropy, log_sum_sq, mean_logit, argmax; numbers: scale, softcap,
  // smoothing, z_loss, weight_sum, classes.
  m.def(
      "cross_entropy",
      [](int64_t logits, const std::vector<int64_t>& addresses, int64_t rows, int64_t vocab,
         const std::vector<float>& numbers, bool statistics, bool gradient, int dtype,
         const std::string& isa) {
        const auto p = [&](size_t i) { return at<float>(addresses.at(i)); };
        const auto n = [&](size_t i) { return numbers.at(i); };
        const auto* labels = at<const int64_t>(addresses.at(5));
        auto* argmax = at<int64_t>(addresses.at(13));
        const fastft::CrossEntropyRows given{
            p(0),  p(1),   p(2), p(3),  p(4), labels, p(6), p(7), p(8), p(9), p(10),      p(11),
            p(12), argmax, rows, vocab, n(0), n(1),   n(2), n(3), n(4), n(5), statistics, gradient};
        std::vector<float> scratch(static_cast<size_t>(max_threads() * vocab));
        kernels(isa).cross_entropy(given, at<void>(logits), dtype, scratch.data());
      },
      py::arg("logits"), py::arg("addresses"), py::arg("rows"), py::arg("vocab"),
      py::arg("numbers"), py::arg("statistics"), py::arg("gradient"), py::arg("dtype"),
      py::arg("isa") = "", free_gil);
  // numbers: scale, softcap, teacher_scale, teacher_softcap, temperature, beta.
  m.def(
      "divergence",
      [](int64_t student, int64_t teacher, int64_t bias, int64_t teacher_bias, int64_t row_scale,
         int64_t losses, int64_t rows, int64_t vocab, int kind, const std::vector<float>& numbers,
         bool gradient, int dtype, int teacher_dtype, const std::string& isa) {
        const fastft::DivergenceRows given{at<const float>(bias),
                                           at<const float>(teacher_bias),
                                           at<const float>(row_scale),
                                           at<float>(losses),
                                           rows,
                                           vocab,
                                           kind,
                                           numbers.at(0),
                                           numbers.at(1),
                                           numbers.at(2),
                                           numbers.at(3),
                                           numbers.at(4),
                                           numbers.at(5),
                                           gradient};
        std::vector<float> scratch(static_cast<size_t>(max_threads() * 2 * vocab));
        kernels(isa).divergence(given, at<void>(student), at<const void>(teacher), dtype,
                                teacher_dtype, scratch.data());
      },
      py::arg("student"), py::arg("teacher"), py::arg("bias"), py::arg("teacher_bias"),
      py::arg("row_scale"), py::arg("losses"), py::arg("rows"), py::arg("vocab"), py::arg("kind"),
      py::arg("numbers"), py::arg("gradient"), py::arg("dtype"), py::arg("teacher_dtype"),
      py::arg("isa") = "", free_gil);
  m.def(
      "glu_forward",
      [](int64_t out, int64_t gate, int64_t up, int64_t rows, int64_t cols, int64_t gate_stride,
         int64_t up_stride, int act, int dtype, const std::string& isa) {
        kernels(isa).glu_forward({rows, cols, gate_stride, up_stride}, at<void>(out),
                                 at<const void>(gate), at<const void>(up), act, dtype);
      },
      py::arg("out"), py::arg("gate"), py::arg("up"), py::arg("rows"), py::arg("cols"),
      py::arg("gate_stride"), py::arg("up_stride"), py::arg("activation"), py::arg("dtype"),
      py::arg("isa") = "", free_gil);
  m.def(
      "glu_backward",
      [](int64_t d_gate, int64_t d_up, int64_t dy, int64_t gate, int64_t up, int64_t rows,
         int64_t cols, int64_t gate_stride, int64_t up_stride, int act, int dtype, int64_t product,
         const std::string& isa) {
        kernels(isa).glu_backward({rows, cols, gate_stride, up_stride}, at<void>(d_gate),
                                  at<void>(d_up), at<const void>(dy), at<const void>(gate),
                                  at<const void>(up), at<void>(product), act, dtype);
      },
      py::arg("d_gate"), py::arg("d_up"), py::arg("dy"), py::arg("gate"), py::arg("up"),
      py::arg("rows"), py::arg("cols"), py::arg("gate_stride"), py::arg("up_stride"),
      py::arg("activation"), py::arg("dtype"), py::arg("product") = 0, py::arg("isa") = "",
      free_gil);
  m.def(
      "rms_norm_forward",
      [](int64_t y, int64_t rstd, int64_t x, int64_t weight, int64_t residual, int64_t sum,
         int64_t rows, int64_t cols, float eps, float offset, bool round_first, int dtype,
         const std::string& isa) {
        kernels(isa).rms_norm_forward({rows, cols, eps, offset, round_first}, at<void>(y),
                                      at<float>(rstd), at<const void>(x), at<const void>(weight),
                                      at<const void>(residual), at<void>(sum), dtype);
      },
      py::arg("y"), py::arg("rstd"), py::arg("x"), py::arg("weight"), py::arg("residual"),
      py::arg("sum"), py::arg("rows"), py::arg("cols"), py::arg("eps"), py::arg("offset"),
      py::arg("round_first"), py::arg("dtype"), py::arg("isa") = "", free_gil);
  m.def(
      "rms_norm_backward",
      [](int64_t dx, int64_t dw, int64_t dy, int64_t x, int64_t weight, int64_t rstd, int64_t more,
         int64_t rows, int64_t cols, float offset, int dtype, const std::string& isa) {
        kernels(isa).rms_norm_backward({rows, cols, 0.0f, offset, false}, at<void>(dx),
                                       at<float>(dw), at<const void>(dy), at<const void>(x),
                                       at<const void>(weight), at<const float>(rstd),
                                       at<const void>(more), dtype);
      },
      py::arg("dx"), py::arg("dw"), py::arg("dy"), py::arg("x"), py::arg("weight"), py::arg("rstd"),
      py::arg("more"), py::arg("rows"), py::arg("cols"), py::arg("offset"), py::arg("dtype"),
      py::arg("isa") = "", free_gil);
  m.def(
      "layer_norm_forward",
      [](int64_t y, int64_t mean, int64_t rstd, int64_t x, int64_t weight, int64_t bias,
         int64_t rows, int64_t cols, float eps, float offset, bool round_first, int dtype,
         const std::string& isa) {
        kernels(isa).layer_norm_forward({rows, cols, eps, offset, round_first}, at<void>(y),
                                        at<float>(mean), at<float>(rstd), at<const void>(x),
                                        at<const void>(weight), at<const void>(bias), dtype);
      },
      py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("x"), py::arg("weight"),
      py::arg("bias"), py::arg("rows"), py::arg("cols"), py::arg("eps"), py::arg("offset"),
      py::arg("round_first"), py::arg("dtype"), py::arg("isa") = "", free_gil);
  m.def(
      "layer_norm_backward",
      [](int64_t dx, int64_t dw, int64_t db, int64_t dy, int64_t x, int64_t weight, int64_t mean,
         int64_t rstd, int64_t rows, int64_t cols, float offset, int dtype,
         const std::string& isa) {
        kernels(isa).layer_norm_backward({rows, cols, 0.0f, offset, false}, at<void>(dx),
                                         at<float>(dw), at<float>(db), at<const void>(dy),
                                         at<const void>(x), at<const void>(weight),
                                         at<const float>(mean), at<const float>(rstd), dtype);
      },
      py::arg("dx"), py::arg("dw"), py::arg("db"), py::arg("dy"), py::arg("x"), py::arg("weight"),
      py::arg("mean"), py::arg("rstd"), py::arg("rows"), py::arg("cols"), py::arg("offset"),
      py::arg("dtype"), py::arg("isa") = "", free_gil);
  // sizes: batch, heads, tokens, width, rotary, strides of x and of out (batch, head, token), of
  // the tables (batch, token).
  m.def(
      "rope",
      [](int64_t out, int64_t x, int64_t cos, int64_t sin, const std::vector<int64_t>& sizes,
         bool interleaved, bool half_tables, bool backward, int x_dtype, int table_dtype,
         int out_dtype, const std::string& isa) {
        const auto n = [&](size_t i) { return sizes.at(i); };
        const fastft::RopeTensor given{n(0),
                                       n(1),
                                       n(2),
                                       n(3),
                                       n(4),
                                       {n(5), n(6), n(7)},
                                       {n(8), n(9), n(10)},
                                       n(11),
                                       n(12),
                                       interleaved,
                                       half_tables,
                                       backward};
        kernels(isa).rope(given, at<void>(out), at<const void>(x), at<const void>(cos),
                          at<const void>(sin), x_dtype, table_dtype, out_dtype);
      },
      py::arg("out"), py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("sizes"),
      py::arg("interleaved"), py::arg("half_tables"), py::arg("backward"), py::arg("x_dtype"),
      py::arg("table_dtype"), py::arg("out_dtype"), py::arg("isa") = "", free_gil);
  m.def(
      "dora_scale_forward",
      [](int64_t y, int64_t z, int64_t scale, int64_t bias, int64_t rows, int64_t cols, int dtype,
         const std::string& isa) {
        kernels(isa).dora_scale_forward(at<void>(y), at<const void>(z), at<const float>(scale),
                                        at<const void>(bias), rows, cols, dtype);
      },
      py::arg("y"), py::arg("z"), py::arg("scale"), py::arg("bias"), py::arg("rows"),
      py::arg("cols"), py::arg("dtype"), py::arg("isa") = "", free_gil);
  m.def(
      "dora_scale_backward",
      [](int64_t dz, int64_t d_scale, int64_t dy, int64_t z, int64_t scale, int64_t rows,
         int64_t cols, int dtype, const std::string& isa) {
        kernels(isa).dora_scale_backward(at<void>(dz), at<float>(d_scale), at<const void>(dy),
                                         at<const void>(z), at<const float>(scale), rows, cols,
                                         dtype);
      },
      py::arg("dz"), py::arg("d_scale"), py::arg("dy"), py::arg("z"), py::arg("scale"),
      py::arg("rows"), py::arg("cols"), py::arg("dtype"), py::arg("isa") = "", free_gil);
  m.def(
      "dora_norm",
      [](int64_t norm, int64_t squared, int64_t cross, int64_t a, int64_t b, int64_t rows,
         int64_t depth, int64_t r, float scaling, int64_t gram, const std::string& isa) {
        if (r > fastft::kThinMaxRank) throw std::invalid_argument("dora_norm: rank too large");
        kernels(isa).dora_norm(at<float>(norm), at<const double>(squared), at<const void>(cross),
                               at<const float>(a), at<const float>(b), rows, depth, r, scaling,
                               at<float>(gram));
      },
      py::arg("norm"), py::arg("squared"), py::arg("cross"), py::arg("a"), py::arg("b"),
      py::arg("rows"), py::arg("depth"), py::arg("r"), py::arg("scaling"), py::arg("gram"),
      py::arg("isa") = "", free_gil);
  m.def(
      "embedding_backward",
      [](int64_t d_weight, int64_t dy, int64_t order, int64_t ids, int64_t count, int64_t cols,
         int64_t padding, int dtype, const std::string& isa) {
        kernels(isa).embedding_backward(at<void>(d_weight), at<const void>(dy),
                                        at<const int64_t>(order), at<const int64_t>(ids), count,
                                        cols, padding, dtype);
      },
      py::arg("d_weight"), py::arg("dy"), py::arg("order"), py::arg("ids"), py::arg("count"),
      py::arg("cols"), py::arg("padding"), py::arg("dtype"), py::arg("isa") = "", free_gil);
  m.attr("SUM_ROWS") = fastft::kSumRows;
  bind_attention(m);
  bind_lora(m);
  bind_optimizers(m);
  bind_pool(m);
  bind_decoder(m);
  bind_layer(m);
}
