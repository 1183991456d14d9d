// pybind11 only: Python types in, plain C++ out. The work lives in the other files of this folder.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "attention.h"
#include "resize.h"
#include "sigmoid_loss.h"
#ifdef EXAONEPATH_WITH_CUDA
#include "cublas.h"
#include "device_info.h"
#endif

namespace py = pybind11;

namespace {

// Raised with every change of a function below, so that a module of an older build is recognised.
constexpr int kInterface = 5;

py::dict build_info() {
  py::dict info;
  info["version"] = EXAONEPATH_VERSION;
  info["interface"] = kInterface;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = py::none();
#endif
#ifdef EXAONEPATH_WITH_CUDA
  info["cuda"] = EXAONEPATH_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

py::list cuda_devices() {
  py::list devices;
#ifdef EXAONEPATH_WITH_CUDA
  for (const auto& device : exaonepath::cuda_devices()) {
    py::dict row;
    row["name"] = device.name;
    row["capability"] = py::make_tuple(device.capability_major, device.capability_minor);
    row["multiprocessors"] = device.multiprocessors;
    row["total_memory"] = device.total_memory;
    row["shared_memory_per_block"] = device.shared_memory_per_block;
    devices.append(row);
  }
#endif
  return devices;
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);  // what tensor.data_ptr() gave
}

void sigmoid_pass_cpu(std::uintptr_t dots, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                      std::uintptr_t row_ids, std::uintptr_t col_ids, double scale, double bias, double pos_weight,
                      std::uintptr_t sums, int threads) {
  exaonepath::sigmoid_pass_cpu(pointer<float>(dots), rows, cols, ld, pointer<const std::int64_t>(row_ids),
                               pointer<const std::int64_t>(col_ids), scale, bias, pos_weight, pointer<double>(sums),
                               threads);
}

// A tensor [tokens, heads, dim]: address, stride of tokens, stride of heads.
using Tensor = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;

template <typename T>
exaonepath::Tokens<T> tokens(const Tensor& tensor) {
  return {pointer<T>(std::get<0>(tensor)), std::get<1>(tensor), std::get<2>(tensor)};
}

// Cosines and sines of queries or keys; 0 without a rotation.
using Angles = std::pair<std::uintptr_t, std::uintptr_t>;

exaonepath::Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Angles& q_angles,
                                const Angles& k_angles, std::uintptr_t pieces, std::int64_t count, std::int64_t heads,
                                std::int64_t dim, double scale) {
  return {tokens<const float>(q),
          tokens<const float>(k),
          tokens<const float>(v),
          pointer<const float>(q_angles.first),
          pointer<const float>(q_angles.second),
          pointer<const float>(k_angles.first),
          pointer<const float>(k_angles.second),
          pointer<const std::int64_t>(pieces),
          count,
          heads,
          dim,
          scale};
}

void attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Angles& q_angles, const Angles& k_angles,
                   std::uintptr_t pieces, std::int64_t count, std::int64_t heads, std::int64_t dim, double scale,
                   const Tensor& out, int threads, const std::string& isa) {
  exaonepath::attention_cpu(attention(q, k, v, q_angles, k_angles, pieces, count, heads, dim, scale),
                            tokens<float>(out), threads, isa);
}

void attention_backward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Angles& q_angles,
                            const Angles& k_angles, std::uintptr_t pieces, std::int64_t count, std::int64_t heads,
                            std::int64_t dim, double scale, const Tensor& dout, const Tensor& dq, const Tensor& dk,
                            const Tensor& dv, int threads, const std::string& isa) {
  exaonepath::attention_backward_cpu(attention(q, k, v, q_angles, k_angles, pieces, count, heads, dim, scale),
                                     tokens<const float>(dout), tokens<float>(dq), tokens<float>(dk),
                                     tokens<float>(dv), threads, isa);
}

// One axis of a resize: addresses of the first pixels and of the weights, number of results, taps of each.
using Axis = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t>;

exaonepath::ResizeAxis resize_axis(const Axis& axis) {
  return {pointer<const std::int32_t>(std::get<0>(axis)), pointer<const std::int32_t>(std::get<1>(axis)),
          std::get<2>(axis), std::get<3>(axis)};
}

void resize_rgb(std::uintptr_t source, std::int64_t height, std::int64_t width, std::int64_t stride, const Axis& rows,
                const Axis& columns, std::uintptr_t out, const std::string& isa) {
  exaonepath::resize_rgb(pointer<const std::uint8_t>(source), height, width, stride, resize_axis(rows),
                         resize_axis(columns), pointer<std::uint8_t>(out), isa);
}

#ifdef EXAONEPATH_WITH_CUDA
exaonepath::ElementKind element_kind(const std::string& dtype) {
  if (dtype == "float32") return exaonepath::ElementKind::kFloat32;
  if (dtype == "float16") return exaonepath::ElementKind::kFloat16;
  if (dtype == "bfloat16") return exaonepath::ElementKind::kBfloat16;
  throw std::invalid_argument("sigmoid sweep: a dtype must be float32, float16 or bfloat16, got " + dtype);
}

std::string cublas_reason() {
  std::string reason;
  exaonepath::find_cublas(reason);
  return reason;
}

std::int64_t sigmoid_sweep_workspace_cuda(std::int64_t rows, std::int64_t cols, std::int64_t tile_rows,
                                          std::int64_t tile_cols, const std::string& gradient_dtype, bool overlapped) {
  exaonepath::SigmoidSweep sweep{};
  sweep.rows = rows;
  sweep.cols = cols;
  sweep.tile_rows = tile_rows;
  sweep.tile_cols = tile_cols;
  sweep.gradient_operand = element_kind(gradient_dtype);
  // Only whether there is one matters here.
  sweep.side_stream = overlapped ? &sweep : nullptr;
  return exaonepath::sigmoid_sweep_workspace_cuda(sweep);
}

void sigmoid_sweep_cuda(std::uintptr_t u, std::uintptr_t v, std::uintptr_t gradient_u, std::uintptr_t gradient_v,
                        std::uintptr_t du, std::uintptr_t dv, const std::string& dtype,
                        const std::string& gradient_dtype, std::uintptr_t row_ids, std::uintptr_t col_ids,
                        std::uintptr_t params, std::uintptr_t sums, std::int64_t rows, std::int64_t cols,
                        std::int64_t dim, std::int64_t tile_rows, std::int64_t tile_cols, std::uintptr_t workspace,
                        int device, std::uintptr_t stream, std::uintptr_t side_stream, std::uintptr_t blas_handle) {
  exaonepath::sigmoid_sweep_cuda({pointer<const void>(u),
                                  pointer<const void>(v),
                                  pointer<const void>(gradient_u),
                                  pointer<const void>(gradient_v),
                                  pointer<float>(du),
                                  pointer<float>(dv),
                                  element_kind(dtype),
                                  element_kind(gradient_dtype),
                                  pointer<const std::int64_t>(row_ids),
                                  pointer<const std::int64_t>(col_ids),
                                  pointer<const double>(params),
                                  pointer<double>(sums),
                                  rows,
                                  cols,
                                  dim,
                                  tile_rows,
                                  tile_cols,
                                  pointer<void>(workspace),
                                  device,
                                  pointer<void>(stream),
                                  pointer<void>(side_stream),
                                  pointer<void>(blas_handle)});
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;
  m.doc() = "Compiled half of exaonepath. Pointers are integers, as tensor.data_ptr() gives them.";
  m.def("build_info", &build_info,
        "Package version, number of this interface, compiler, and CUDA toolkit (None without nvcc) of this build.");
  m.def("cuda_devices", &cuda_devices, "CUDA devices visible to the extension; empty without any.");
  m.def("cpu_isa", [] { return exaonepath::sigmoid_cpu_isas().front(); },
        "Instruction set that the CPU code picked: avx512, avx2, sse2 or generic.");
  m.attr("SIGMOID_SUMS") = exaonepath::kSigmoidSums;
  m.def("sigmoid_pass_cpu", &sigmoid_pass_cpu, arg("dots"), arg("rows"), arg("cols"), arg("ld"), arg("row_ids"),
        arg("col_ids"), arg("scale"), arg("bias"), arg("pos_weight"), arg("sums"), arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "Fused pass over a float32 tile [rows, cols], in place; see csrc/sigmoid_loss.h. ValueError on bad sizes.");
  m.def("attention_cpu", &attention_cpu, arg("q"), arg("k"), arg("v"), arg("q_angles"), arg("k_angles"), arg("pieces"),
        arg("count"), arg("heads"), arg("dim"), arg("scale"), arg("out"), arg("threads"), arg("isa") = "",
        py::call_guard<py::gil_scoped_release>(),
        "Attention of segments, float32; see csrc/attention.h. A tensor is (address, token stride, head stride), angles "
        "are the addresses of (cos, sin). ValueError on bad sizes.");
  m.def("attention_backward_cpu", &attention_backward_cpu, arg("q"), arg("k"), arg("v"), arg("q_angles"),
        arg("k_angles"), arg("pieces"), arg("count"), arg("heads"), arg("dim"), arg("scale"), arg("dout"), arg("dq"),
        arg("dk"), arg("dv"), arg("threads"), arg("isa") = "", py::call_guard<py::gil_scoped_release>(),
        "Its gradients; see csrc/attention.h. ValueError on bad sizes.");
  m.attr("RESIZE_BITS") = exaonepath::kResizeBits;
  m.def("resize_rgb", &resize_rgb, arg("source"), arg("height"), arg("width"), arg("stride"), arg("rows"),
        arg("columns"), arg("out"), arg("isa") = "", py::call_guard<py::gil_scoped_release>(),
        "Resizes a uint8 RGB image by given weights; see csrc/resize.h. An axis is (address of the first pixels, address "
        "of the weights, results, taps). ValueError on bad sizes or weights.");
#ifdef EXAONEPATH_WITH_CUDA
  m.def("cublas_reason", &cublas_reason, "Why cuBLAS cannot be called in this process, or an empty string if it can.");
  m.def("sigmoid_sweep_workspace_cuda", &sigmoid_sweep_workspace_cuda, arg("rows"), arg("cols"), arg("tile_rows"),
        arg("tile_cols"), arg("gradient_dtype"), arg("overlapped"),
        "Bytes of workspace that sigmoid_sweep_cuda needs.");
  m.def("sigmoid_sweep_cuda", &sigmoid_sweep_cuda, py::kw_only(), arg("u"), arg("v"), arg("gradient_u"),
        arg("gradient_v"), arg("du"), arg("dv"), arg("dtype"), arg("gradient_dtype"), arg("row_ids"), arg("col_ids"),
        arg("params"), arg("sums"), arg("rows"), arg("cols"), arg("dim"), arg("tile_rows"), arg("tile_cols"),
        arg("workspace"), arg("device"), arg("stream"), arg("side_stream"), arg("blas_handle"),
        py::call_guard<py::gil_scoped_release>(),
        "Queues all tiles of one pair on a stream; see csrc/sigmoid_loss.h. ValueError on bad arguments, RuntimeError "
        "if a call of CUDA or cuBLAS fails. Not available in a build without CUDA.");
#endif
}
