#include "device_info.h"

#include "cuda_check.h"

namespace exaonepath {

std::vector<DeviceInfo> cuda_devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    cudaGetLastError();  // "no device" (or no driver at all) is an answer, not an error to leave behind
    return {};
  }
  check(status, "cudaGetDeviceCount");
  std::vector<DeviceInfo> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                       properties.totalGlobalMem, properties.sharedMemPerBlockOptin});
  }
  return devices;
}

}  // namespace exaonepath
