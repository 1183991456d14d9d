// pybind11 only: Python types in, plain C++ out. The work lives in the other files of this folder.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "sigmoid_loss.h"
#ifdef EXAONEPATH_WITH_CUDA
#include "device_info.h"
#endif

namespace py = pybind11;

namespace {

// Raised with every change of a function below, so that a module of an older build is recognised.
constexpr int kInterface = 1;

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

#ifdef EXAONEPATH_WITH_CUDA
exaonepath::GradKind grad_kind(const std::string& dtype) {
  if (dtype == "float32") return exaonepath::GradKind::kFloat32;
  if (dtype == "float16") return exaonepath::GradKind::kFloat16;
  if (dtype == "bfloat16") return exaonepath::GradKind::kBfloat16;
  throw std::invalid_argument("sigmoid pass: grad_dtype must be float32, float16 or bfloat16, got " + dtype);
}

void sigmoid_pass_cuda(std::uintptr_t dots, std::uintptr_t grad, const std::string& grad_dtype, std::int64_t rows,
                       std::int64_t cols, std::int64_t ld_dots, std::int64_t ld_grad, std::uintptr_t row_ids,
                       std::uintptr_t col_ids, std::uintptr_t params, std::uintptr_t workspace, std::uintptr_t sums,
                       int device, std::uintptr_t stream) {
  exaonepath::sigmoid_pass_cuda(pointer<const float>(dots), pointer<void>(grad), grad_kind(grad_dtype), rows, cols,
                                ld_dots, ld_grad, pointer<const std::int64_t>(row_ids),
                                pointer<const std::int64_t>(col_ids), pointer<const double>(params),
                                pointer<double>(workspace), pointer<double>(sums), device, pointer<void>(stream));
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
#ifdef EXAONEPATH_WITH_CUDA
  m.def("sigmoid_workspace_cuda", &exaonepath::sigmoid_workspace_cuda, arg("rows"), arg("cols"),
        "float64 elements of workspace that sigmoid_pass_cuda needs for a tile of this size.");
  m.def("sigmoid_pass_cuda", &sigmoid_pass_cuda, arg("dots"), arg("grad"), arg("grad_dtype"), arg("rows"), arg("cols"),
        arg("ld_dots"), arg("ld_grad"), arg("row_ids"), arg("col_ids"), arg("params"), arg("workspace"), arg("sums"),
        arg("device"), arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Queues the fused pass on a stream; see csrc/sigmoid_loss.h. ValueError on bad arguments, RuntimeError with "
        "CUDA's message if a call fails. Not available in a build without CUDA.");
#endif
}
