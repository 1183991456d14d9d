// pybind11 only: Python types in, plain C++ out. The work lives in the other files of this folder.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef EXAONEPATH_WITH_CUDA
#include "device_info.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = EXAONEPATH_VERSION;
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of exaonepath.";
  m.def("build_info", &build_info, "Package version, compiler, and CUDA toolkit (None without nvcc) of this build.");
  m.def("cuda_devices", &cuda_devices, "CUDA devices visible to the extension; empty without any.");
}
