// CUDA devices that the extension finds, for `exaonepath doctor`: it shows an old driver, or hidden devices.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace exaonepath {

struct DeviceInfo {
  std::string name;
  int capability_major;
  int capability_minor;
  int multiprocessors;
  std::size_t total_memory;             // bytes
  std::size_t shared_memory_per_block;  // bytes, opt-in maximum
};

// Empty if there is no device. Throws std::runtime_error with the driver's message on any other failure.
std::vector<DeviceInfo> cuda_devices();

}  // namespace exaonepath
